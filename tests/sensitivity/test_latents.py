"""UniVLA's policy: chunks behind fixed latent tokens, the decoder's layers included."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from qvla_jax.data.calibration import calibration_set
from qvla_jax.families.prismatic.config import LatentActionConfig, preset
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference.policy import make_policy
from qvla_jax.quantization import LayerRules
from qvla_jax.sensitivity import sensitivities, validate


@pytest.fixture(scope="module")
def policy():
    small = preset("tiny-test")
    config = dataclasses.replace(
        small,
        text=dataclasses.replace(small.text, num_hidden_layers=1),
        decoding="latents",
        latent_action=LatentActionConfig(embed_dim=16, num_heads=2, mlp_dim=24),
        action_horizon=2,
        proprio_dim=0,
        num_images=1,
        unnorm_key="x",
    )
    action = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    statistics = {"x": {"action": action}}
    model = make_model(config, rngs=nnx.Rngs(0))
    return make_policy(config, model, word_files(), statistics, source="x")


@pytest.mark.long
def test_jacobian_ranks_as_exact_probing_in_all_layers(policy):
    frames = calibration_set("bundled", frames=4, horizon=2)
    rules = LayerRules(include=(r"vision_backbone\.", r"language_model\.model\.", "action_decoder"))
    table = sensitivities(policy, frames, bits=(0, 4, 16), probes="full", joint=False, rules=rules)
    assert np.isfinite(table.costs).all()
    assert (table.costs[:, 2] == 0).all()
    in_decoder = [layer.path.startswith("action_decoder") for layer in table.index.layers]
    assert sum(in_decoder) == 13
    # The first question to the image is a learned vector, the same in every frame: all that its
    # rounding changes is moved into the bias.
    rows = dict((layer.path, rows) for layer, rows in table.index.items())
    constant = table.costs[rows["action_decoder.visual_pool.attn.q"]]
    assert constant.max() < 1e-9 * table.costs.max()
    ranks = validate(policy, frames, table, channels=48, frames=4, rules=rules).spearman
    assert {r.bits: r.spearman > 0.9 for r in ranks} == {0: True, 4: True}
