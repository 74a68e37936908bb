"""The table of results on a tiny policy, with an environment that counts steps."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest

from qvla_jax import pipeline
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.evaluation import ActionErrors, Comparison
from qvla_jax.evaluation.study import Cell, CellErrors, CellSuccess
from qvla_jax.evaluation.success import EpisodesSuccess
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.methods import RECIPES, Measurements, Recipe
from qvla_jax.methods.packing import described
from qvla_jax.pipeline import StudyConfig, closed_loop, files
from qvla_jax.pipeline import methods as methods_stage
from qvla_jax.pipeline.methods import method_file
from qvla_jax.pipeline.quantize import embedding_bits
from qvla_jax.plain import to_plain
from qvla_jax.quantization import LayerRules

from ..simulators import Threads

# What the module looks up; the package's name of it is the function.
STUDY = pipeline.study.__wrapped__.__globals__
# "budget" stands in for methods that allocate, which measure for long.
ROWS, COLUMNS = ("rtn", "rtn-g16", "budget"), ("w4a16", "w9", "w0.5")


def within_budget(measured, setting):
    if setting.bits < 1:
        raise BudgetError("give at least 1 bit")
    packed = quantize_uniform(measured.policy, 3, rules=measured.rules)
    return dataclasses.replace(packed, quantization=described(measured, setting))


@pytest.fixture(scope="module", autouse=True)
def _few_layers_and_a_stub():
    rules = LayerRules(include=(r"vision_backbone\.featurizer\.blocks\.0\.attn\.proj",))
    few = functools.partial(Measurements, rules=rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDY, "Measurements", few)
        stub = Recipe(title="stub", quantizer=within_budget, options=(3,))
        patch.setitem(RECIPES, "budget", stub)
        yield


class Count:
    """Solved on the first step in the initial state 0, never in others."""

    name = "count"

    def __init__(self, episode):
        self.state, self.seen = 0, random_policy("tiny-test", seed=0).fake_observation()

    def reset(self, initial_state, *, seed):
        del seed
        self.state = initial_state

    def observe(self):
        return self.seen

    def render(self, camera):
        return np.zeros((8, 8, 3), np.uint8)

    def step(self, action):
        return self.state == 0

    def close(self):
        pass


@pytest.fixture(scope="module")
def config(policy_folder, tmp_path_factory):
    return StudyConfig(
        model=str(policy_folder), out=tmp_path_factory.mktemp("study") / "out", rows=ROWS,
        columns=COLUMNS, frames=4, eval_frames=6, eval_batch=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(config):
    return to_plain(pipeline.study(config))


def cell_of(results, row, column):
    return next(c for c in results["cells"] if (c["row"], c["column"]) == (row, column))


def test_cells_hold_stored_bytes_and_errors(results, config):
    assert {(c["row"], c["column"]) for c in results["cells"]} == {
        ("rtn", "w4a16"), ("rtn-g16", "w4a16"),
        ("budget", "w4a16"), ("budget", "w9"), ("budget", "w0.5"),
    }  # fmt: skip
    assert "at least" in cell_of(results, "budget", "w0.5")["unavailable"]
    for cell in results["cells"]:
        if "unavailable" not in cell:
            size = PackedFile(method_file(config.out, cell["method"])).packed_bytes
            assert cell["stored_bytes"] == size
            assert cell["versus_full_precision"]["action_mse_normalized"] > 0
    assert json.loads((config.out / files.STUDY).read_text()) == results
    lines = (config.out / files.STUDY_TABLE).read_text().splitlines()
    row = next(line for line in lines if line.startswith("| `rtn-g16`"))
    bits = cell_of(results, "rtn-g16", "w4a16")["stored_bits_per_weight"]
    assert f"({bits:.2f})" in row
    assert row.endswith("| - | - |")
    assert (config.out / files.STUDY_ERROR_FIGURE).read_bytes().startswith(b"\x89PNG")
    assert not (config.out / files.STUDY_SUCCESS_FIGURE).exists()


def test_embeddings_of_8_bits_count_apart_from_the_layers(results, config, tmp_path):
    shutil.copy(config.out / files.CALIBRATION, tmp_path)
    whole = dataclasses.replace(config, out=tmp_path, rows=("rtn",), columns=("w4a16",))
    rounded = dataclasses.replace(whole, embedding_bits=8)
    policy = load_policy(config.model)
    before = cell_of(results, "rtn", "w4a16")
    for one in (rounded, whole):  # the file of a cell is that of the last command
        (cell,) = to_plain(pipeline.study(one))["cells"]
        file = method_file(tmp_path, cell["method"])
        assert embedding_bits(file, policy) == one.embedding_bits
        assert cell["stored_bytes"] == before["stored_bytes"]
        errors = (c["versus_full_precision"]["action_mse_normalized"] for c in (cell, before))
        assert (len(set(errors)) == 1) == (one is whole)


def test_a_study_goes_on_where_it_stopped(results, config, monkeypatch):
    lost = method_file(config.out, "rtn-w4-g16")
    made = lost.read_bytes()
    lost.unlink()
    calls = []
    quantize_by = methods_stage.quantize_by
    monkeypatch.setattr(
        methods_stage,
        "quantize_by",
        lambda *args, **options: calls.append(args[2]) or quantize_by(*args, **options),
    )
    monkeypatch.setitem(STUDY, "predict", pytest.fail)
    again = to_plain(pipeline.study(config))
    # A budget that cannot be met is asked for again.
    assert calls == ["rtn-w4-g16", "budget-w0.5"]
    assert lost.read_bytes() == made
    assert again["cells"] == results["cells"]


def test_closed_loop_is_paired_with_full_precision(results, config, monkeypatch):
    run = closed_loop.run_episodes
    monkeypatch.setattr(
        closed_loop, "run_episodes", lambda *a, **o: run(*a, **{**o, "crew": Threads()})
    )
    simulated = dataclasses.replace(
        config, rows=("rtn",), columns=("w4a16",), sim="libero_spatial", tasks=(0,),
        episodes_per_task=2, workers=1,
    )  # fmt: skip
    found = to_plain(pipeline.study(simulated, make=Count))
    (cell,) = found["cells"]
    assert cell["stored_bytes"] == cell_of(results, "rtn", "w4a16")["stored_bytes"]
    assert (cell["success"]["successes"], cell["success"]["episodes"]) == (1, 2)
    assert cell["share_of_full_precision"] == 1
    assert (cell["paired"]["both"], cell["paired"]["neither"]) == (1, 1)
    table = (config.out / files.STUDY_TABLE).read_text()
    assert "50.0% [9.5%, 90.5%] (100.0%)" in table
    assert (config.out / files.STUDY_SUCCESS_FIGURE).read_bytes().startswith(b"\x89PNG")
    episodes = config.out / "closed_loop" / closed_loop.EPISODES_FILE
    before = episodes.read_bytes()
    pipeline.study(simulated, make=Count)
    assert episodes.read_bytes() == before
    table_only = dataclasses.replace(simulated, rows=("rtn", "budget"), episodes_per_task=0)
    finished, other = to_plain(pipeline.study(table_only, make=Count))["cells"]
    assert finished == cell
    assert "success" not in other
    assert episodes.read_bytes() == before


def test_rank_correlations_are_those_of_cells_with_success():
    def cell(error, flips, solved):
        errors = ActionErrors(
            action_sse_normalized=error,
            action_mse_normalized=error,
            action_mse_median_normalized=error,
            action_l1_normalized=error,
            mse_by_dimension=(0, error),
            l1_by_dimension=(0, 0),
            worst_by_dimension=(1, 1),
            gripper_flips=flips,
            gripper_flip_rate=flips,
            frames=1,
        )
        found = None
        if solved is not None:
            found = CellSuccess(
                success=EpisodesSuccess(solved, 10, mean_steps_of_successes=None),
                share_of_full_precision=None,
                paired=Comparison(solved, 0, 0, 10 - solved),
            )
        return Cell(
            row="rtn",
            column="w4",
            activation_bits=16,
            method="rtn-w4",
            title="",
            errors=CellErrors(
                stored_bytes=10, stored_bits_per_weight=4.0, versus_full_precision=errors
            ),
            closed_loop=found,
        )

    cells = [cell(1, 4, 9), cell(2, 5, 8), cell(3, 3, 1), cell(9, 9, None)]
    rank_correlations = STUDY["rank_correlations"]
    counted = rank_correlations(cells)
    assert counted.policies == 3
    found = counted.spearman
    assert found["mean squared error of the action"] == pytest.approx(-1)
    assert found["share of gripper commands that flip"] == pytest.approx(0.5)
    # The same everywhere: no order.
    assert not found.keys() & {"stored bytes", "largest error of the action"}
    assert to_plain(rank_correlations(cells[:2])) == {}
    # The same policy in two cells counts once.
    assert rank_correlations([*cells, cells[0]]) == counted
    assert to_plain(rank_correlations([*cells[:2], cells[0]])) == {}


def test_another_policy_s_cells_are_refused(results, config):
    del results
    other = random_policy("tiny-test", seed=1)
    with pytest.raises(InputError, match="another policy fingerprint"):
        pipeline.study(config, policy=other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("rtm",)}, "did you mean rtn"),
        ({"rows": ("rtn", "rtn")}, "none twice"),
        ({"columns": ("4",)}, "expected wBITS"),
        ({"columns": ("w2.5",), "rows": ("gptq",)}, "'gptq' has none of the settings w2.5"),
        ({"sim": "libero_spacial"}, "did you mean libero_spatial"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(out=tmp_path, **changes)


def test_stored_policies_load_by_name(results, config):
    del results
    loaded = load_policy(method_file(config.out, "budget-w9"))
    assert loaded.quantization["method"] == "budget-w9"


def test_a_column_may_be_a_budget_of_activation_bits(tmp_path):
    config = pipeline.StudyConfig(out=tmp_path)
    setting = config.setting("action-activations", "w4a4.5")
    assert setting is not None
    assert (setting.bits, setting.activation_bits) == (4, 4.5)
    assert config.setting("action-tuned", "w4a4.5") is None
