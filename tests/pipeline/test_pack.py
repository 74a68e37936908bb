"""`qvla pack` against quantizing whole policies, on a directory in the public layout."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax import kernels
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import InputError
from qvla_jax.families.prismatic.checkpoint.export import synthesize
from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.word_tokenizer import word_tokenizer
from qvla_jax.inference import load_policy
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import policy_index, quantize, quantize_uniform
from qvla_jax.models import named_modules
from qvla_jax.pipeline import PackConfig, pack
from qvla_jax.quantization.quantizer import NEAREST_UNCORRECTED, Quantizer

UNREAD = (
    "language_model.lm_head",
    "vision_backbone.featurizer.blocks.1",
    "vision_backbone.fused_featurizer.blocks.1",
    "vision_backbone.fused_featurizer.attn_pool",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Towers with a block, a norm and an attention pool that nothing reads, as the public ones."""
    full, small = preset("openvla-oft-7b"), preset("tiny-test")
    vision = tuple(
        dataclasses.replace(
            t, image_size=28, embed_dim=16, depth=2, num_heads=2, mlp_dim=32, feature_block=0
        )
        for t in full.vision
    )
    text = dataclasses.replace(small.text, vocab_size=384, hidden_size=64, intermediate_size=96)
    config = dataclasses.replace(
        full, vision=vision, text=text, action_vocab_size=320, pad_token_id=0, empty_token_id=4
    )
    path = tmp_path_factory.mktemp("pack") / "public"
    synthesize(config, path)
    word_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder)


@pytest.fixture(scope="module")
def mixed(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "mixed.qvla"
    pack(PackConfig(model=str(folder), file=path, mean_bits=4.0))
    return path


def test_uniform_layers_store_what_the_whole_policy_would(folder, policy, tmp_path):
    pack(PackConfig(model=str(folder), file=tmp_path / "p.qvla", bits=4))
    file, whole = PackedFile(tmp_path / "p.qvla"), quantize_uniform(policy, 4)
    compared = 0
    for name, layer in packed_layers(whole.model).items():
        if name.startswith(UNREAD):
            assert name not in file.layers
            continue
        jax.tree.map(np.testing.assert_array_equal, file.weight(name), layer.weight)
        compared += 1
    assert compared == 2 * 5 + 2 * 7


def test_a_mixed_file_acts_as_the_policy_quantized_at_its_bits(policy, mixed):
    loaded = load_policy(mixed)
    index = policy_index(policy)
    bits = np.full(len(index), 4)  # of what nothing reads
    packed = packed_layers(loaded.model)
    for layer, rows in index.items():
        if layer.path in packed:
            bits[rows] = packed[layer.path].weight.bits()
    assert len(set(bits.tolist())) > 2
    expected = quantize(policy, bits, quantizer=Quantizer(NEAREST_UNCORRECTED), packed=False)
    observation = policy.fake_observation()
    np.testing.assert_allclose(
        loaded.infer(observation), expected.infer(observation), atol=1e-3, rtol=1e-3
    )


def test_a_file_without_unread_layers_is_saved_again(mixed, tmp_path):
    loaded = load_policy(mixed)
    loaded.save(tmp_path / "again.qvla")
    again = load_policy(tmp_path / "again.qvla")
    observation = loaded.fake_observation()
    np.testing.assert_array_equal(again.infer(observation), loaded.infer(observation))
    assert again.fingerprint == loaded.fingerprint


def test_mixed_layers_keep_to_the_budget_and_use_it(policy, mixed):
    file = PackedFile(mixed)
    index = policy_index(policy)
    stored = [file.layers[layer.path] for layer in index.layers if layer.path in file.layers]
    weights = sum(entry.shape[0] * entry.shape[1] for entry in stored)
    mean = 8 * sum(entry.nbytes for entry in stored) / weights
    assert 3.8 < mean <= 4.0


def test_other_layers_keep_their_numbers_and_unread_ones_are_gone(policy, mixed):
    loaded = load_policy(mixed)
    assert not named_modules(loaded.model, nnx.Linear)
    assert not any(name.startswith(UNREAD) for name in packed_layers(loaded.model))
    kept = packed_layers(loaded.model)["action_head.model.fc1"].weight
    assert set(kept.bits().tolist()) == {16}
    source = named_modules(policy.model, nnx.Linear)["action_head.model.fc1"]
    np.testing.assert_array_equal(kernels.dequantize(kept), np.asarray(source.kernel[...]).T)
    table = loaded.model.language_model.model.embed_tokens.embedding.get_value()
    assert table.dtype == "bfloat16"


def test_inputs_are_rounded_where_asked_for(folder, tmp_path):
    pack(PackConfig(model=str(folder), file=tmp_path / "p.qvla", kept_bits=8, activation_bits=8))
    file = PackedFile(tmp_path / "p.qvla")
    assert file.inputs("language_model.model.layers.0.mlp.up_proj").activation_bits == 8
    assert file.inputs("action_head.model.fc1").activation_bits == 16
    assert [s.bits for s in file.layers["action_head.model.fc1"].segments] == [8]


def test_names_of_other_files_and_packed_policies_are_refused(mixed, tmp_path):
    with pytest.raises(InputError, match=r"ends in \.qvla"):
        pack(PackConfig(file=tmp_path / "p.bin"))
    with pytest.raises(InputError, match="is packed already"):
        pack(PackConfig(model=str(mixed), file=tmp_path / "p.qvla"))
