"""Full-size networks: the public number of parameters, and the names of the PyTorch layout."""

import functools
import json
import math

import pytest

from qvla_jax.families.openpi.config import preset
from qvla_jax.families.openpi.names import parameters, public_shapes, slots
from qvla_jax.families.openpi.network import abstract_model
from qvla_jax.families.openpi.torch_file import torch_name, torch_shape

from .trim_openpi import FIXTURES

_BOTH = {
    "PaliGemma/img/head": 2_361_344,
    "PaliGemma/llm/embedder": 526_647_296,
    "action_in_proj": 33_792,
    "action_out_proj": 32_800,
}
# Of the public classes, by module: the tower, PaliGemma's expert, the action expert, the rest.
COUNTS = {
    "pi0_base": {
        "sum": 3_238_048_528,
        "tower": 412_442_352,
        "expert 0": 1_981_884_416,
        "expert 1": 311_464_960,
        "state_proj": 33_792,
        "action_time_mlp_in": 2_098_176,
        "action_time_mlp_out": 1_049_600,
        **_BOTH,
    },
    "pi05_base": {
        "sum": 3_353_433_872,
        "tower": 412_442_352,
        "expert 0": 1_981_884_416,
        "expert 1": 427_932_672,
        "time_mlp_in": 1_049_600,
        "time_mlp_out": 1_049_600,
        **_BOTH,
    },
}


def _module(leaf: str) -> str:
    if leaf.startswith(("PaliGemma/llm/layers", "PaliGemma/llm/final_norm")):
        return "expert 1" if "_1/" in f"{leaf}/" else "expert 0"
    for name in ("PaliGemma/img/head", "PaliGemma/llm/embedder"):
        if leaf.startswith(name):
            return name
    return "tower" if leaf.startswith("PaliGemma/img") else leaf.partition("/")[0]


@pytest.fixture(scope="module")
def models():
    """Name of a preset -> its abstract network, made once."""
    return functools.cache(lambda name: abstract_model(preset(name)))


@pytest.mark.parametrize("name", COUNTS)
def test_full_size_networks_have_the_public_number_of_parameters(models, name):
    model = models(name)
    found = {"sum": 0}
    for leaf, shape in public_shapes(model).items():
        size = math.prod(shape)
        found["sum"] += size
        found[_module(leaf)] = found.get(_module(leaf), 0) + size
    assert found == COUNTS[name]
    assert found["sum"] == sum(math.prod(v.shape) for _, v in parameters(model))


@pytest.mark.parametrize("name", COUNTS)
def test_pytorchs_names_and_shapes_are_those_of_the_public_classes(models, name):
    layout = json.loads((FIXTURES / "openpi_pytorch_layout.json").read_text())
    expected = {
        tensor.replace("{i}", str(i)): tuple(shape)
        for tensor, (shape, layers) in layout[name.removesuffix("_base")].items()
        for i in range(layers)
    }
    # Tied to the embeddings, and never read.
    for part in ("paligemma", "gemma_expert"):
        del expected[f"paligemma_with_expert.{part}.lm_head.weight"]
    places = slots(models(name))
    assert expected == {torch_name(path): torch_shape(path, s) for path, s in places.items()}
