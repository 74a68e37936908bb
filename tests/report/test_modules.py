"""Module tables against the stored files themselves."""

import zipfile
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 for safetensors)
import pytest
import safetensors.numpy
from rich.console import Console

from qvla_jax import cli
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.quantization import LayerRules
from qvla_jax.report.modules import describe, modules_table

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules") / "policy"
    random_policy("tiny-test").save(folder)
    return folder


def test_a_saved_policy_is_described_as_its_file_is(saved):
    described = describe(str(saved))
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    assert described.parameters == sum(t.size for t in stored.values())
    assert described.stored_bytes == sum(t.nbytes for t in stored.values())
    q_proj = "language_model.model.layers.*.self_attn.q_proj"
    (row,) = [m for m in described.modules if m.path == q_proj]
    assert (row.count, row.parameters, row.channels, row.quantized) == (2, 2 * 32 * 32, 64, True)
    (norm,) = [m for m in described.modules if m.path == "language_model.model.norm"]
    assert (norm.count, norm.parameters, norm.channels, norm.quantized) == (1, 32, 0, False)


@pytest.mark.parametrize("model", ["libero-mini", "saved"])
def test_the_channels_are_those_of_the_loaded_policy(model, saved):
    source = str(saved) if model == "saved" else model
    loaded = policy_index(load_policy(source))
    assert describe(source).index == loaded
    quantized = [m for m in describe(source).modules if m.quantized]
    assert sum(m.channels for m in quantized) == len(loaded)


def test_a_public_directory_is_described_in_its_own_dtypes(tmp_path):
    folder = tmp_path / "film"
    zipfile.ZipFile(FIXTURES / "openvla_oft_film_tiny.zip").extractall(folder)
    (head,) = folder.glob("action_head--*")
    described = describe(str(folder))
    expected = sum(t.nbytes for t in read_torch_zip(head).values())
    found = sum(m.stored_bytes for m in described.modules if m.part == "action_head")
    assert found == expected, "stored in bfloat16, unlike the rest"
    (shard, *_) = sorted(folder.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        describe(str(folder))


def test_a_preset_without_weights_is_counted_in_bfloat16():
    described = describe("tiny-test")
    assert described.stored_bytes == 2 * described.parameters


def test_rules_decide_what_is_kept():
    rules = LayerRules(include=(r".*\.q_proj",))
    quantized = {m.path for m in describe("tiny-test", rules=rules).modules if m.quantized}
    assert quantized == {"language_model.model.layers.*.self_attn.q_proj"}
    one = LayerRules(include=(r".*\.0\..*q_proj",))
    rows = [m for m in describe("tiny-test", rules=one).modules if m.path.endswith("q_proj")]
    assert sorted((m.count, m.quantized) for m in rows) == [(1, False), (1, True)]


def test_the_table_adds_up():
    described = describe("tiny-test")
    console = Console(width=140)
    with console.capture() as captured:
        console.print(modules_table(described.modules))
    lines = captured.get().splitlines()
    assert f"{described.parameters:,}" in lines[-1]
    assert any("projector" in line and "kept" in line for line in lines)


def test_unknown_names_and_damaged_folders_are_refused(saved, tmp_path):
    with pytest.raises(InputError, match="did you mean"):
        describe("openvla-7")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="missing"):
        describe(str(tmp_path))
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    name = "projector.fc1.weight"
    stored[name] = stored[name][1:].copy()
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'projector.fc1.weight' has shape \(127, 32\), exp"):
        describe(str(tmp_path))


def test_the_command_prints_table_and_fingerprint(saved, capsys):
    assert cli.main(["inspect", str(saved), "--fingerprint"]) == 0
    printed = capsys.readouterr().out
    assert load_policy(saved).fingerprint in printed
    assert "layers.*.mlp.down_proj" in printed
