"""Synthesized directories: written, read, mapped and packed as published ones are."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax import kernels
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import CheckpointError, CheckpointWarning, InputError
from qvla_jax.families.openpi.config import SHORT_NAMES, GemmaConfig, SiglipConfig, preset
from qvla_jax.families.openpi.names import parameters
from qvla_jax.families.openpi.synthetic import synthesize
from qvla_jax.families.registry import preset as any_preset
from qvla_jax.inference import load_policy
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.mapping import Spool, region_of
from qvla_jax.models import named_modules
from qvla_jax.pipeline import PackConfig, pack

pytestmark = pytest.mark.filterwarnings("ignore::qvla_jax.errors.CheckpointWarning")

_GEMMA = dict(depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8)
EMBEDDER = "PaliGemma.llm.embedder"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Variant -> a synthesized directory."""
    made = {}
    for variant in ("pi0", "pi05"):
        config = dataclasses.replace(
            preset(f"{variant}_libero"),
            vision=SiglipConfig(width=12, depth=1, mlp_dim=16, num_heads=3, image_size=28),
            language=GemmaConfig(width=16, **_GEMMA),
            action_expert=GemmaConfig(width=8, **_GEMMA),
            vocab_size=1030,
            action_horizon=3,
            max_prompt_tokens=12,
            num_steps=3,
        )
        made[variant] = tmp_path_factory.mktemp("synthetic") / variant
        synthesize(config, made[variant])
    return made


@pytest.fixture(scope="module")
def policies(folders):
    return {variant: load_policy(folder) for variant, folder in folders.items()}


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    """(variant, embedding bits) -> packed file."""
    made = {}

    def get(variant, embedding_bits):
        if (variant, embedding_bits) not in made:
            path = tmp_path_factory.mktemp("packed") / "policy.qvla"
            pack(
                PackConfig(
                    model=str(folders[variant]), file=path, bits=2, embedding_bits=embedding_bits
                )
            )
            made[variant, embedding_bits] = path
        return made[variant, embedding_bits]

    return get


def test_the_layout_is_the_published_one(folders):
    folder = folders["pi05"]
    assert (folder / "params" / "_METADATA").is_file()
    path = folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    assert json.loads(path.read_text())["norm_stats"]["state"]["q99"] == [1.0] * 8
    sizes = {path: value.shape for path, value in parameters(load_policy(folder).model)}
    assert sizes[f"{EMBEDDER}.embedding"] == (1030, 16)


def test_the_stand_in_for_the_tokenizer_is_called_one(folders):
    with pytest.warns(CheckpointWarning, match="knows 4 of 1030 tokens: a stand-in, good for"):
        load_policy(folders["pi0"], mapped=True)


def test_short_names_are_those_of_liberos_presets():
    assert {name: any_preset(name).name for name in SHORT_NAMES} == {
        "pi0": "pi0_libero",
        "pi05": "pi05_libero",
    }


def test_a_preset_of_several_robots_is_not_synthesized(tmp_path):
    with pytest.raises(InputError, match="names none; synthesize a preset of one, such as pi05_li"):
        synthesize(preset("pi05_base"), tmp_path / "x")


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_mapped_weights_are_the_loaded_ones_and_lie_in_no_memory(folders, policies, variant):
    mapped = dict(parameters(load_policy(folders[variant], mapped=True).model))
    for path, variable in parameters(policies[variant].model):
        value = mapped[path].get_value()
        assert region_of(value) is not None, path
        assert value.dtype == "bfloat16"
        if path.endswith(".kernel"):
            assert value.T.flags.c_contiguous  # rows of channels, as elsewhere
        np.testing.assert_array_equal(value.astype(np.float32), np.asarray(variable[...]))


def test_a_full_disk_is_named(monkeypatch):
    def full(**settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with (
        Spool(4096) as spool,
        pytest.raises(InputError, match=r"no room to keep decoded weights \(No space.*TMPDIR"),
    ):
        spool.add(np.zeros(4))


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_packed_policies_act_as_the_loaded_ones_with_their_values(policies, packed, variant):
    policy, small = policies[variant], load_policy(packed(variant, 8))
    # What nothing reads is gone, and what time alone decides is kept instead of its weights.
    assert not named_modules(small.model, nnx.Linear)
    assert not any("norm_1.Dense_0" in name for name in packed_layers(small.model))
    assert f"PaliGemma.llm.layers.{1}.mlp.gate" not in packed_layers(small.model)
    for found, expected in zip(
        jax.tree.leaves(small.conditioning), jax.tree.leaves(policy.conditioning), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    observation = policy.fake_observation()
    expected, found = unpacked(policy, small).infer(observation), small.infer(observation)
    rounding = np.abs(found - expected).max()
    assert rounding < 1e-5
    assert np.abs(policy.infer(observation) - expected).max() > 10 * rounding


def test_embeddings_of_8_bits_are_codes_times_scale(policies, packed, tmp_path):
    path = packed("pi05", 8)
    policy = load_policy(path)
    (table,) = packed_embeddings(policy.model).values()
    source = np.asarray(policies["pi05"].model.PaliGemma.llm.embedder.embedding[...])
    expected = kernels.dequantize(kernels.pack_table(source, 8))
    ids = np.array([[0, 1029], [7, 7]])
    np.testing.assert_array_equal(table(ids), np.asarray(expected)[ids])
    file, whole = PackedFile(path), PackedFile(packed("pi05", 16))
    assert file.layers[EMBEDDER].nbytes == 1030 * (16 + 2)
    assert EMBEDDER not in whole.layers
    assert whole.other_bytes - file.other_bytes == 1030 * 16 * 2
    policy.save(tmp_path / "again.qvla")
    again = load_policy(tmp_path / "again.qvla")
    assert again.fingerprint == policy.fingerprint
    assert PackedFile(tmp_path / "again.qvla").layers[EMBEDDER].nbytes == 1030 * 18
    assert policy.fingerprint != load_policy(packed("pi05", 16)).fingerprint


def test_a_table_of_another_shape_is_refused(folders, packed, monkeypatch):
    record = PackedFile(packed("pi05", 8)).header["config"] | {"vocab_size": 1031}
    header = PackedFile(packed("pi05", 8)).header | {"config": record}
    opened = PackedFile.__init__

    def changed(self, path):
        opened(self, path)
        self.header = header

    monkeypatch.setattr(PackedFile, "__init__", changed)
    with pytest.raises(CheckpointError, match=rf"layer {EMBEDDER} of shape \[1030, 16\]: pi05_lib"):
        load_policy(packed("pi05", 8))
