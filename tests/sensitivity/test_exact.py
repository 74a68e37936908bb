"""Exact costs against quantizing one channel after another for real."""

import dataclasses

import numpy as np
import pytest

from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.inference.quantize import quantize
from qvla_jax.models import get_module
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.stages import Order, downstream, stage_paths
from qvla_jax.sharding import sweep_mesh

from .toys import LLM, UNREACHED

LAYOUT = layout(preset("tiny-test"))

BITS = (0, 2, 4, 8)


@pytest.fixture(scope="module")
def exact(sweep):
    return exact_costs(sweep, block=16)[0]


def looped_costs(policy, frames, index, quantizer, rows):
    """One quantized policy and one forward pass for each (channel, bits)."""
    batch = frames.whole()
    reference = policy.infer_normalized(batch).astype(np.float64)
    result = np.zeros((len(rows), len(BITS)))
    for i, row in enumerate(rows):
        for j, width in enumerate(BITS):
            bits = np.full(len(index), 16)
            bits[row] = width
            changed = quantize(policy, bits, quantizer=quantizer, packed=False)
            changed = changed.infer_normalized(batch)
            result[i, j] = np.mean(np.sum((changed - reference) ** 2, axis=(1, 2)))
    return result


def test_vmapped_equals_looped_quantized_policies(policy, frames, index, quantizer, exact):
    # The first and the last channel of every other layer: every stage, both towers.
    ends = [r for _, s in list(index.items())[::2] for r in (s.start, s.stop - 1)]
    looped = looped_costs(policy, frames, index, quantizer, ends)
    np.testing.assert_allclose(exact[ends], looped, rtol=2e-3, atol=1e-9)


def test_rows_block_and_batch_do_not_matter(sweep, index, exact):
    rows = np.arange(0, len(index), 7)
    some, _ = exact_costs(dataclasses.replace(sweep, batch=2), rows=rows, block=5)
    # Another batch shape rounds otherwise; at 8 bits a change is a few hundred ulps of the action.
    np.testing.assert_allclose(some, exact[rows], rtol=3e-3, atol=1e-10)


def test_every_mesh_gives_the_same_bits(sweep, one_device):
    def costs(mesh):
        return exact_costs(dataclasses.replace(sweep, batch=2, mesh=mesh), block=16)

    expected = costs(one_device)
    for found in (costs(sweep_mesh()), costs(sweep_mesh(channel=2))):
        np.testing.assert_array_equal(found, expected)


def test_layers_that_no_action_reads_cost_nothing(index, exact):
    for layer, rows in index.items():
        assert exact[rows].any() == (layer.path != UNREACHED)


def test_stages_are_blocks_of_both_towers_and_the_language_model(policy):
    assert set(stage_paths(policy.model, policy.layout)) == {
        "vision_backbone.featurizer.blocks.0",
        "vision_backbone.featurizer.blocks.1",
        "vision_backbone.fused_featurizer.blocks.0",
        "language_model.model.layers.0",
        "language_model.model.layers.1",
    }
    assert get_module(policy.model, LLM) is not None


def test_only_what_lies_behind_a_perturbation_runs_again():
    one, two = "vision_backbone.featurizer.blocks.0", "vision_backbone.fused_featurizer.blocks.0"
    llm = [f"language_model.model.layers.{i}" for i in (0, 1)]
    inside = {
        one: ["attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.fc2"],
        two: ["attn", "attn.qkv"],
        llm[0]: ["mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        llm[1]: ["self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"],
    }
    behind = [f"{s}{p}" for s in llm for p in ("", *(f".{p}" for p in inside[s]))]
    order = ["vision_backbone"]
    order += [f"{s}{p}" for s in (one, two) for p in ("", *(f".{p}" for p in inside[s]))]
    order += ["proprio_projector", *behind]

    inner = [sum(other.startswith(f"{part}.") for other in order) for part in order]
    ends = [place + 1 + count for place, count in enumerate(inner)]
    ends[0] = order.index("proprio_projector")  # both towers
    calls = Order(order, ends)

    def running(*layers):
        found = downstream(calls, layers, LAYOUT)
        return [part for part in order if (part, 0) in found]

    # Two halves of a block, two towers, and the proprio projector beside them.
    half = [f"{one}{p}" for p in ("", ".mlp", ".mlp.fc2")]
    assert running(f"{one}.mlp.fc1") == ["vision_backbone", *half, *behind]
    first = [f"{one}{p}" for p in ("", ".attn", ".attn.proj", ".mlp", ".mlp.fc1", ".mlp.fc2")]
    assert running(f"{one}.attn.qkv") == ["vision_backbone", *first, *behind]
    assert running(f"{two}.attn.qkv") == ["vision_backbone", two, f"{two}.attn", *behind]
    # Gate and up take the same input, and so do query and key.
    last = [p for p in behind if p.startswith(llm[1])]
    own = [f"{llm[0]}{p}" for p in ("", ".mlp", ".mlp.down_proj")]
    assert running(f"{llm[0]}.mlp.gate_proj") == [*own, *last]
    assert running(f"{llm[0]}.mlp.down_proj") == [*own[:2], *last]
    attention = [f"{llm[1]}{p}" for p in ("", ".self_attn", ".self_attn.o_proj")]
    assert running(f"{llm[1]}.self_attn.q_proj") == attention
    assert running(f"{llm[1]}.self_attn.o_proj") == attention[:2]
    both = running(f"{llm[1]}.self_attn.o_proj", f"{llm[0]}.mlp.down_proj")
    assert both == [*own[:2], *last]
