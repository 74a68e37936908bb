"""Where the time goes: stages add up to the whole, and compiling is told apart."""

import jax
import jax.numpy as jnp

from qvla_jax import stage_times
from qvla_jax.progress import no_progress
from qvla_jax.stage_times import StageSeconds, StageTimes


def test_stages_add_up_to_the_time_in_the_context(monkeypatch):
    readings = iter([(9.0, 0.0), (10.0, 1.0), (12.0, 5.0), (15.0, 6.0), (19.0, 6.5), (24.0, 8.0)])
    monkeypatch.setattr(stage_times, "_clocks", lambda: next(readings))
    reports = []
    with StageTimes(lambda *report: reports.append(report), first="load") as times:
        for stage in ("measure", "solve", "measure"):
            times(stage, 0, 1)
            times(stage, 1, 1)
    assert times.stages == [
        StageSeconds("load", 2.0, 0.0, 4.0),
        StageSeconds("measure", 3.0 + 5.0, 0.0, 1.0 + 1.5),
        StageSeconds("solve", 4.0, 0.0, 0.5),
    ]
    assert sum(stage.seconds for stage in times.stages) == 24.0 - 10.0
    assert reports[:2] == [("measure", 0, 1), ("measure", 1, 1)]
    assert len(reports) == 6


def test_compiling_counts_in_the_stage_that_compiles_and_in_no_other():
    with StageTimes(no_progress, first="compile") as times:
        x = jnp.arange(3.0)
        jax.jit(lambda x: x * 12.5 + 1)(x).block_until_ready()
        times("run", 0, 1)
    first, second = times.stages
    assert 0 < first.compiling <= first.seconds
    assert second.compiling == 0
    before = first.compiling
    jax.jit(lambda x: x * 12.5 + 2)(x).block_until_ready()
    assert first.compiling == before, "still listens"
