"""The full-size presets against the public checkpoints' sizes, without a byte of weights."""

import dataclasses
import math
from collections import Counter

import pytest
from flax import nnx

from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.network import abstract_model

# Sizes of the public parts: Llama-2-7B with 32,064 tokens, timm's DINOv2-L/14 with registers and
# SigLIP-so400m/14 with pooling head at 224 pixels, and the fused projector 2176 -> 8704 -> 4096.
_LLAMA = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
_OPENVLA = {
    "language_model.lm_head": 32064 * 4096,
    "language_model.model": 32064 * 4096 + _LLAMA,
    "projector": (2176 + 1) * 8704 + (8704 + 1) * 4096 + (4096 + 1) * 4096,
    "vision_backbone.featurizer": 303_230_976,
    "vision_backbone.fused_featurizer": 427_680_704,
}
_OFT = {
    "proprio_projector": (8 + 1) * 4096 + (4096 + 1) * 4096,
    "action_head": 2 * 28672 + 28673 * 4096 + 2 * (2 * 4096 + 4097 * 4096) + 2 * 4096 + 4097 * 7,
}
# UniVLA's: two blocks with 512 entries, and the layer to chunks of 12 x 7.
_POOL = 4097 * 512 + 3 * 512 + 512 * (512 + 1024) + 513 * 512 + 513 * 4096 + 2049 * 512
_UNIVLA = {"action_decoder": 2 * _POOL + 513 * 84}


# FiLM's two linear maps of every block, and no block changes.
_FILM = _OPENVLA | {
    "vision_backbone.featurizer": 303_230_976 + 24 * 2 * 4097 * 1024,
    "vision_backbone.fused_featurizer": 427_680_704 + 27 * 2 * 4097 * 1152,
}


@pytest.mark.parametrize(
    ("name", "film", "expected"),
    [
        ("openvla-7b", False, _OPENVLA),
        ("openvla-oft-7b", False, _OPENVLA | _OFT),
        ("openvla-oft-7b", True, _FILM | _OFT),
        ("univla-7b", False, _OPENVLA | _UNIVLA),
    ],
)
def test_parameters_by_module(name, film, expected):
    counts: Counter[str] = Counter()
    model = abstract_model(dataclasses.replace(preset(name), use_film=film))
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        depth = 2 if path[0] in ("language_model", "vision_backbone") else 1
        counts[".".join(path[:depth])] += math.prod(parameter.shape)
    assert counts == expected


def test_openvla_7b_has_the_size_of_the_public_checkpoint():
    # The public index gives 15,082,474,368 bytes of bfloat16.
    assert 2 * sum(_OPENVLA.values()) == 15_082_474_368


def test_univla_7b_has_the_decoder_of_the_public_code():
    # As PyTorch 2.13.0 counts on the meta device: the public ActionDecoderHead, window 12.
    assert sum(_UNIVLA.values()) == 12_640_340
