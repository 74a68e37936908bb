"""UniVLA directories: what is wrong with them is named, and they come back bit for bit."""

import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx

from qvla_jax.checkpoints import public_tensors
from qvla_jax.checkpoints.tensor_files import ShardedTensors
from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.checkpoints.weights import public_shapes
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.prismatic.checkpoint.export import reexport, synthesize
from qvla_jax.families.prismatic.checkpoint.huggingface import read_config
from qvla_jax.families.prismatic.network import abstract_model, make_model
from qvla_jax.inference import load_policy
from qvla_jax.quantization import LayerRules
from qvla_jax.report.modules import describe

from ...checkpoints.torch_files import save
from .test_huggingface import architecture, write_directory

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "univla_tiny.zip"
DECODER = "action_decoder-7.pt"


@pytest.fixture
def folder(tmp_path):
    config = architecture("latents")
    write_directory(tmp_path / "hf", config, make_model(config, rngs=nnx.Rngs(0)))
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A directory whose tensors the public code wrote."""
    path = tmp_path_factory.mktemp("public") / "univla"
    zipfile.ZipFile(FIXTURE).extractall(path)
    return path


def _refused(folder, text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_policy(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("visual_pool.attn.kv.weight", "missing"),
        ("latent_action_pool.attn_norm.g", "mis-shaped"),
        ("latent_action_pool.latents", "mis-shaped"),
        ("proj.0.bias", "missing"),
        ("proprio_proj.0.weight", "unexpected"),
    ],
)
def test_a_wrong_tensor_of_the_decoder_is_named_with_its_file(folder, name, kind):
    path = folder / DECODER
    tensors = dict(read_torch_zip(path))
    if kind == "missing":
        text = f"of shape {tensors.pop(name).shape} is missing"
    elif kind == "unexpected":
        tensors[name] = np.zeros((24, 7), np.float32)
        text = "of shape (24, 7) is unexpected"
    else:
        shape = tensors[name].shape
        tensors[name] = np.zeros((3, *shape), np.float32)
        text = f"has shape {(3, *shape)}, expected {shape}"
    save(path, tensors)
    _refused(folder, f"{path}: tensor 'action_decoder.{name}' {text}")


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("proj.0.weight", (36, 24), "'proj.0.weight' has 36 rows, expected a multiple of 7"),
        ("proj.0.weight", (35, 129), "for vectors of 129 entries, which do not divide into heads"),
        ("visual_pool.mlp.1.weight", (24,), "has shape (24,), expected 2 dimensions"),
    ],
)
def test_tensors_that_tell_a_size_are_named_too(folder, name, shape, text):
    path = folder / DECODER
    save(path, dict(read_torch_zip(path)) | {name: np.zeros(shape, np.float32)})
    _refused(folder, text)


def test_two_decoders_and_two_kinds_of_heads_are_refused(folder):
    other = folder / "action_decoder.pt"
    other.write_bytes((folder / DECODER).read_bytes())
    _refused(folder, f"several action_decoder files: ['{DECODER}', 'action_decoder.pt']")
    other.rename(folder / "action_head--1_checkpoint.pt")
    _refused(folder, "holds action_head--1_checkpoint.pt of an OpenVLA-OFT policy and")


def test_latent_tokens_without_a_decoder_are_refused(folder):
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<ACT_0>"])
    tokenizer.save(str(path))
    _refused(folder, f"gives <ACT_0> the id {tokenizer.token_to_id('<ACT_0>')}, expected 449")
    (folder / DECODER).unlink()
    _refused(folder, "but there is no action_decoder*.pt")


def test_a_public_directory_is_exported_and_imported_bit_for_bit(public, tmp_path):
    policy = load_policy(public)
    assert policy.config.decoding == "latents"
    assert (policy.config.action_horizon, policy.config.center_crop) == (12, True)
    policy.export(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert again.config == policy.config
    assert again.fingerprint == policy.fingerprint
    (written,) = (tmp_path / "out").glob("*.pt")
    (stored,) = public.glob("*.pt")
    theirs, ours = read_torch_zip(stored), read_torch_zip(written)
    assert list(theirs) != []
    assert {n: t.tobytes() for n, t in theirs.items()} == {n: t.tobytes() for n, t in ours.items()}
    policy.export(tmp_path / "half", dtype=ml_dtypes.bfloat16)
    before, after = ShardedTensors(public), ShardedTensors(tmp_path / "half")
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}


def test_a_public_directory_passes_through_the_import(public, tmp_path):
    reexport(public, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in public.iterdir()}
    before, after = load_policy(public), load_policy(tmp_path / "out")
    tensors = public_tensors(after.model)
    for name, tensor in public_tensors(before.model).items():
        assert tensor.tobytes() == tensors[name].tobytes(), name


def test_the_decoder_is_kept_unless_a_rule_includes_it(public):
    described = describe(str(public))
    decoder = [m for m in described.modules if m.part == "action_decoder"]
    (stored,) = public.glob("*.pt")
    tensors = read_torch_zip(stored)
    assert sum(m.parameters for m in decoder) == sum(t.size for t in tensors.values())
    assert sum(m.stored_bytes for m in decoder) == sum(t.nbytes for t in tensors.values())
    assert not any(m.quantized for m in decoder)
    rules = LayerRules(include=(r"action_decoder\.",))
    paths = [layer.path for layer in describe(str(public), rules=rules).index.layers]
    assert len(paths) == 13
    assert "action_decoder.visual_pool.mlp.0.project" in paths
    with pytest.raises(InputError, match="matches none"):
        describe(str(public), rules=LayerRules(include=(r"action_head\.",)))


def test_a_synthetic_directory_describes_its_architecture(tmp_path):
    config = architecture("latents")
    synthesize(config, tmp_path / "s")
    read, _ = read_config(tmp_path / "s")
    assert (read.decoding, read.latent_action) == ("latents", config.latent_action)
    assert read.action_horizon == config.action_horizon
    stored = read_torch_zip(tmp_path / "s" / "action_decoder.pt")
    shapes = public_shapes(abstract_model(config).action_decoder)
    assert {name: tensor.shape for name, tensor in stored.items()} == shapes
