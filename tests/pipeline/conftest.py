"""One small run of the whole walk, shared by the tests."""

from pathlib import Path

import pytest

from qvla_jax import pipeline
from qvla_jax.inference import random_policy
from qvla_jax.plain import to_plain


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    random_policy("tiny-test", seed=0).save(folder)
    return folder


@pytest.fixture(scope="session")
def config(policy_folder, tmp_path_factory) -> pipeline.RunConfig:
    return pipeline.RunConfig(
        model=str(policy_folder),
        out=tmp_path_factory.mktemp("run") / "out",
        frames=6,
        probes=2,
        thorough=True,
        validate=24,
        validate_frames=6,
        budget_bits=10.0,
        sweep=(0.1, 9.0, 12.0),
        uniform_bits=(3, 4, 8),
        match_uniform=(8,),
        eval_frames=9,
        eval_batch=4,
        latency_calls=2,
    )


@pytest.fixture(scope="session")
def finished(config) -> tuple[dict, set[str]]:
    """report.json, and the files that were there when the run ended: later stages write more."""
    return to_plain(pipeline.run(config)), {path.name for path in config.out.iterdir()}


@pytest.fixture(scope="session")
def content(finished) -> dict:
    return finished[0]


@pytest.fixture(scope="session")
def written(finished) -> set[str]:
    return finished[1]
