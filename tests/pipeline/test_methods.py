"""Published methods from the command line's stage to evaluation, report and policies by name."""

import shutil

import numpy as np
import pytest

from qvla_jax import pipeline
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import InputError
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.pipeline.methods import MethodConfig, method_file
from qvla_jax.pipeline.policies import load_named_policy
from qvla_jax.plain import to_plain

NAME = "rtn-w4-g16"


@pytest.fixture(scope="module")
def folder(config, content, tmp_path_factory):
    """A copy of the run, with a method in it."""
    del content
    copy = tmp_path_factory.mktemp("methods") / "out"
    shutil.copytree(config.out, copy)
    written = pipeline.quantize_by_methods(
        MethodConfig(out=copy, model=config.model, method=(NAME,))
    )
    assert written == {NAME: method_file(copy, NAME)}
    return copy


def test_evaluation_and_report_list_the_method_with_its_stored_bytes(folder, config):
    settings = {"out": folder, "eval_frames": 9, "eval_batch": 4, "uniform_bits": (4,)}
    pipeline.evaluate(pipeline.EvaluateConfig(model=config.model, **settings))
    content = to_plain(pipeline.report(pipeline.ReportConfig(out=folder)))
    entry = next(e for e in content["methods"] + content["sweep"] if e["method"] == NAME)
    assert entry["stored_bytes"] == PackedFile(method_file(folder, NAME)).packed_bytes
    assert entry["channels_by_bits"] == {"4": content["model"]["channels"]}
    assert entry["versus_full_precision"]["action_mse_normalized"] > 0
    assert entry["label"] == "round to nearest (qwix), groups of 16, 4 bits"


def test_the_name_acts_as_the_file(folder, config):
    observation = load_policy(config.model).fake_observation()
    named = load_named_policy(f"{config.model}@{folder}:{NAME}").infer(observation)
    packed = load_policy(method_file(folder, NAME)).infer(observation)
    np.testing.assert_allclose(named, packed, atol=2e-3)


def test_a_method_that_is_not_there_names_the_command(folder, config):
    with pytest.raises(InputError, match="missing; `qvla quantize --method gptq-w4 --out"):
        load_named_policy(f"{config.model}@{folder}:gptq-w4")


def test_a_method_of_another_policy_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    random_policy("tiny-test", seed=1).save(other)
    with pytest.raises(InputError, match=f"{NAME}.*another policy fingerprint"):
        load_named_policy(f"{other}@{folder}:{NAME}")


def test_settings_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(InputError, match="name at least one of rtn, smoothquant"):
        MethodConfig(out=tmp_path, method=())
    with pytest.raises(InputError, match="did you mean gptq"):
        MethodConfig(out=tmp_path, method=("gtpq-w4",))
