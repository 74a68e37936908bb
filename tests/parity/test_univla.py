"""UniVLA: every stage of the public evaluation, latent tokens, chunks, histories and mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import InputError
from qvla_jax.families.prismatic.network import action_decoder
from qvla_jax.families.prismatic.network.openvla import RollOut
from qvla_jax.inference.ensembling import TemporalEnsemble
from qvla_jax.models import get_module

from .reference import PROGRAMS, install
from .trim import PLACES_STEP

NAME = "univla_tiny"
SAMPLES = range(4)
# Entries of the record that are no stage of the network.
_OTHERWISE = ("image", "input_ids", "latent_ids", "stop_would_win", "margin", "ensemble")
# Public modules that ours have no counterpart of: activations and containers.
_NO_MODULE = {
    f"action_decoder.{name}"
    for name in (
        "proj", "proj.1", "visual_pool.mlp", "visual_pool.mlp.0.act", "latent_action_pool.mlp",
        "latent_action_pool.mlp.0.act",
    )
}  # fmt: skip


def _prefix(sample: int) -> str:
    return f"sample{sample}_" if sample else ""


@pytest.fixture(scope="module")
def univla(references):
    return references(NAME)


def _compared(reference, found) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stage -> (ours, recorded), in the same shape."""
    pairs = {}
    for stage, recorded in reference.arrays.items():
        if any(word in stage for word in _OTHERWISE) or stage.startswith("sample"):
            continue
        if stage in _NO_MODULE or stage in ("unnormalized_chunk", "ensembled_action"):
            continue
        value = found[stage]
        if stage == "logits_steps":
            value = value[:, [2, *range(32001, 32017)]]
        elif value.size > recorded.size and "visual_pool" in stage:
            value = value[:, :: PLACES_STEP**2]
        elif value.size > recorded.size:
            value = value[:, ::PLACES_STEP]
        pairs[stage] = value.reshape(recorded.shape), recorded
    return pairs


def test_every_recorded_stage_is_matched(univla):
    reference, _, found = univla
    pairs = _compared(reference, found)
    for stage, (value, recorded) in pairs.items():
        assert np.abs(value - recorded).max() <= reference.tolerance(stage), stage
    decoder = {stage for stage in found if stage.startswith("action_decoder")}
    assert len(decoder) == 2 * 11 + 2
    assert decoder <= pairs.keys()
    assert {
        "fused_patch_features", "projector_output", "llm_layer0_output_decode", "logits_steps",
        "llm_final_norm_output", "llm_final_norm_output_decode", "latent_states", "visual_states",
    } <= pairs.keys()  # fmt: skip


@pytest.fixture(scope="module")
def inputs(univla):
    """The four calls of the recorded episode as one batch: prompts of different lengths."""
    reference, policy, _ = univla
    observations = [reference.observation(i) for i in SAMPLES]
    batch = {
        "image": np.stack([o["image"] for o in observations]),
        "instruction": [o["instruction"] for o in observations],
        "history": [o.get("history", "") for o in observations],
    }
    return policy.prepare(batch, preprocessed=True)


@pytest.fixture(scope="module")
def rolled(univla, inputs):
    """What decoding computes for the batch."""
    _, policy, _ = univla
    with jax.default_matmul_precision("float32"):
        fields = jax.jit(lambda x: dataclasses.asdict(policy.model.roll_out(x)))(inputs)
    return RollOut(**fields)


def _recorded(reference, name: str) -> np.ndarray:
    return np.stack([reference.arrays[f"{_prefix(i)}{name}"] for i in SAMPLES])


def _tolerance(reference, name: str) -> float:
    return min(reference.tolerance(f"{_prefix(i)}{name}") for i in SAMPLES)


def test_prompts_with_and_without_history_are_those_of_the_reference(univla, inputs):
    reference, _, _ = univla
    for sample in SAMPLES:
        # The tokenizer's, then the empty token that the public code appends.
        expected = [*reference.arrays[f"{_prefix(sample)}input_ids"][0], 29871]
        assert inputs.prompt_length[sample] == len(expected)
        np.testing.assert_array_equal(inputs.input_ids[sample, : len(expected)], expected)
    assert (inputs.prompt_length[1:] > inputs.prompt_length[0] + 4).all()


def test_latent_tokens_and_states_are_those_of_the_reference(univla, rolled):
    reference, _, _ = univla
    tokens = _recorded(reference, "latent_ids")
    np.testing.assert_array_equal(rolled.tokens, tokens)
    assert len({tuple(row) for row in tokens}) == len(SAMPLES)
    states = _recorded(reference, "latent_states")[:, 0]
    assert np.abs(rolled.states - states).max() <= _tolerance(reference, "latent_states")


def test_the_stop_token_is_never_chosen(univla, rolled):
    reference, policy, _ = univla
    would_win = np.argmax(rolled.logits, axis=-1) == policy.config.stop_token_id
    assert would_win.any()
    np.testing.assert_array_equal(would_win, _recorded(reference, "stop_would_win"))


def test_chunks_are_those_of_the_reference(univla, inputs):
    reference, policy, _ = univla
    recorded = _recorded(reference, "action_decoder").reshape(-1, 12, 7)
    tolerance = _tolerance(reference, "action_decoder")
    completed = policy.complete(inputs)
    np.testing.assert_array_equal(completed.action_tokens, _recorded(reference, "latent_ids"))
    # By the cache, and in one pass behind the tokens: what the sensitivities are derivatives of.
    for given in (inputs, completed):
        normalized = policy.run(given)
        assert np.abs(normalized - recorded).max() <= tolerance
        metric = policy.unnormalize_actions(normalized)
        expected = _recorded(reference, "unnormalized_chunk")
        np.testing.assert_allclose(metric, expected, atol=1e-4, rtol=0)
    histories = policy.processor.history(completed)
    assert histories[:-1] == [reference.meta["samples"][i]["history"] for i in SAMPLES[1:]]


def test_infer_takes_a_history(univla):
    reference, policy, _ = univla
    observation = reference.observation(1)
    expected = reference.arrays["sample1_unnormalized_chunk"]
    chunk = policy.infer(observation, preprocessed=True)
    assert chunk.shape == (12, 7)
    np.testing.assert_allclose(chunk, expected, atol=1e-4, rtol=0)
    del observation["history"]
    assert np.abs(policy.infer(observation, preprocessed=True) - expected).max() > 1e-2


def test_a_history_needs_completed_inputs(univla, inputs):
    _, policy, _ = univla
    with pytest.raises(InputError, match="no latent actions in these inputs"):
        policy.processor.history(inputs)


# Porting mistakes: what reads the states, or the decoder, changes.


def _none(model, rolled, patch):
    return rolled.states, model.visual_states(rolled.prompt_states)


def _states_one_later(model, rolled, patch):
    # As if the last token had been fed as well; another place stands for its state. (The order of
    # the four does not matter: they are pooled.)
    later = jnp.concatenate([rolled.states[:, 1:], rolled.prompt_states[:, 200:201]], axis=1)
    return later, model.visual_states(rolled.prompt_states)


def _patches_without_bos(model, rolled, patch):
    return rolled.states, rolled.prompt_states[:, 1:257]


def _bos_and_all_patches(model, rolled, patch):
    return rolled.states, rolled.prompt_states[:, :257]


def _no_start(model, rolled, patch):
    original = action_decoder.MAPBlock.__call__
    patch.setattr(
        action_decoder.MAPBlock, "__call__", lambda self, x, start=None: original(self, x)
    )
    return _none(model, rolled, patch)


def _pre_norm(model, rolled, patch):
    def call(self, states, start=None):
        x = jnp.repeat(self.latents[...][None], len(states), axis=0)
        x = x if start is None else x + start
        x = x + self.attn(self.attn_norm(x), self.projection(states))
        glu, out = self.mlp
        return x + out(glu(self.mlp_norm(x)))

    patch.setattr(action_decoder.MAPBlock, "__call__", call)
    return _none(model, rolled, patch)


def _gate_first(model, rolled, patch):
    def call(self, x):
        gate, value = jnp.split(self.project(x), 2, axis=-1)
        return value * jax.nn.silu(gate)

    patch.setattr(action_decoder.SwishGLU, "__call__", call)
    return _none(model, rolled, patch)


def _one_head(model, rolled, patch):
    for pool in ("visual_pool", "latent_action_pool"):
        get_module(model, f"action_decoder.{pool}.attn").num_heads = 1
    return _none(model, rolled, patch)


def _no_tanh(model, rolled, patch):
    class NoTanh:
        """Stands for `jax.numpy` in the decoder."""

        def __getattr__(self, name):
            return (lambda x: x) if name == "tanh" else getattr(jnp, name)

    patch.setattr(action_decoder, "jnp", NoTanh())
    return _none(model, rolled, patch)


def _pools_swapped(model, rolled, patch):
    decoder = model.action_decoder
    swapped = decoder.latent_action_pool, decoder.visual_pool
    decoder.visual_pool, decoder.latent_action_pool = swapped
    return _none(model, rolled, patch)


MUTATIONS = {
    "none": _none,
    "states of the four tokens themselves": _states_one_later,
    "patches without BOS": _patches_without_bos,
    "BOS and all patches": _bos_and_all_patches,
    "no start from the pooled image": _no_start,
    "norms before attention and MLP": _pre_norm,
    "gate and values swapped": _gate_first,
    "one head": _one_head,
    "no tanh": _no_tanh,
    "pooling blocks swapped": _pools_swapped,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_porting_mistake_breaks_parity(univla, rolled, monkeypatch, mutation):
    reference, policy, _ = univla
    model = nnx.clone(policy.model)
    install(PROGRAMS, monkeypatch)
    with jax.default_matmul_precision("float32"):
        states = MUTATIONS[mutation](model, rolled, monkeypatch)
        chunk = np.asarray(model.action_decoder(*states))
    deviation = np.abs(chunk - _recorded(reference, "action_decoder").reshape(-1, 12, 7)).max()
    tolerance = _tolerance(reference, "action_decoder")
    assert deviation <= tolerance if mutation == "none" else deviation > 10 * tolerance


def test_temporal_ensembling_is_that_of_the_public_evaluation(univla):
    reference, policy, _ = univla
    ensemble = TemporalEnsemble(3)
    chunks = reference.arrays["ensemble_chunks"]
    for _ in range(2):
        actions = np.stack([ensemble(chunk) for chunk in chunks])
        np.testing.assert_allclose(actions, reference.arrays["ensemble_actions"], atol=1e-6)
        ensemble.reset()
    # The episode: normalized chunks, and un-normalized behind the mean.
    ensemble = TemporalEnsemble(12)
    for chunk, action in zip(
        _recorded(reference, "action_decoder").reshape(-1, 12, 7),
        _recorded(reference, "ensembled_action"),
        strict=True,
    ):
        metric = policy.unnormalize_actions(ensemble(chunk))
        np.testing.assert_allclose(metric, action, atol=1e-6, rtol=0)
