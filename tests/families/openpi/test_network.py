"""The network of pi0 and pi0.5: sizes, names, and what no record of a tiny network shows."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvla_jax.families.openpi.names import slots
from qvla_jax.families.openpi.network import Pi0Inputs, abstract_model, unread_modules
from qvla_jax.families.openpi.network.gemma import KeysValues, attend
from qvla_jax.models.loops import looping, unrolled
from qvla_jax.models.surgery import named_modules


def test_a_parameter_and_its_place_in_the_public_tree_are_one_to_one(configs):
    for config in configs.values():
        model = abstract_model(config)
        places = slots(model)
        assert len({(slot.leaf, slot.index) for slot in places.values()}) == len(places)
        for path, slot in places.items():
            value = np.arange(math.prod(slot.flax_shape)).reshape(slot.flax_shape)
            public = slot.to_public(value)
            assert public.shape == slot.shape, path
            np.testing.assert_array_equal(slot.to_flax(public), value)


def test_layouts_are_those_of_the_public_einsums(configs):
    """Each kernel multiplies as openpi's einsum of the public leaf does."""
    config = configs["pi0"]
    places = slots(abstract_model(config))
    rng = np.random.default_rng(0)
    n, m, d = (getattr(config.language, f) for f in ("num_heads", "num_kv_heads", "head_dim"))
    for path, heads, equation in (
        ("PaliGemma.llm.layers.1.attn.q_einsum.kernel", n, "btd,ndh->btnh"),
        ("PaliGemma.llm.layers.1.attn.v_einsum_1.kernel", m, "bsd,kdh->bskh"),
        (
            "PaliGemma.img.Transformer.encoderblock.1.MultiHeadDotProductAttention_0.key.kernel",
            config.vision.num_heads,
            "btd,dnh->btnh",
        ),
    ):
        slot = places[path]
        x, w = rng.normal(size=(2, 3, slot.flax_shape[0])), rng.normal(size=slot.shape)
        expected = np.einsum(equation, x, w)
        np.testing.assert_allclose((x @ slot.to_flax(w)).reshape(2, 3, heads, -1), expected)
    slot = places["PaliGemma.llm.layers.0.attn.attn_vec_einsum_1.kernel"]
    y, w = rng.normal(size=(2, 3, n, d)), rng.normal(size=slot.shape)
    expected = np.einsum("btnh,nhd->btd", y, w)
    np.testing.assert_allclose(y.reshape(2, 3, -1) @ slot.to_flax(w), expected)


def test_query_heads_are_grouped_over_several_key_value_heads():
    """As openpi's einsum over (K, G) heads, with two parts that are concatenated there."""
    rng = np.random.default_rng(0)
    b, t, n, m, d = 2, 3, 4, 2, 5
    q = rng.normal(size=(b, t, n, d)).astype(np.float32)
    parts = [
        (rng.normal(size=(b, s, m, d)), rng.normal(size=(b, s, m, d)), mask)
        for s, mask in (
            (6, rng.random((b, 1, 1, 6)) < 0.7),
            (t, np.tril(np.ones((t, t), bool))[None, None]),
        )
    ]
    found = attend(
        jnp.asarray(q),
        *(
            (
                KeysValues(
                    k=jnp.asarray(k.transpose(0, 2, 3, 1), jnp.float32),
                    v=jnp.asarray(v.swapaxes(1, 2), jnp.float32),
                ),
                jnp.asarray(mask),
            )
            for k, v, mask in parts
        ),
    )
    k, v = (np.concatenate([part[i] for part in parts], axis=1) for i in range(2))
    mask = np.concatenate([np.broadcast_to(p[2], (b, 1, t, p[2].shape[-1])) for p in parts], -1)
    grouped = q.reshape(b, t, m, n // m, d) * d**-0.5
    logits = np.where(mask[:, :, None], np.einsum("btkgh,bskh->bkgts", grouped, k), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n * d)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def inputs(configs):
    """Two observations with three cameras, of which one is missing in the second."""
    rng = np.random.default_rng(0)
    config = configs["pi0"]
    return Pi0Inputs(
        images=rng.integers(0, 256, (2, 3, 28, 28, 3), np.uint8),
        image_mask=np.array([[True, True, True], [True, False, True]]),
        tokens=rng.integers(0, 20, (2, 5), np.int32),
        token_mask=np.array([[True] * 5, [True] * 3 + [False] * 2]),
        noise=rng.normal(size=(2, 3, 9)).astype(np.float32),
        state=rng.normal(size=(2, config.action_dim)).astype(np.float32),
    )


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_every_layer_runs_as_often_as_it_is_read(models, inputs, variant):
    """The tower once for all cameras, the prefix once, the action expert once a step."""
    model = models[variant]
    paths = {id(layer): path for path, layer in named_modules(model, nnx.Linear).items()}
    calls: dict[str, list[tuple[int, ...]]] = {}
    original = nnx.Linear.__call__

    def counted(self, x, *args):
        calls.setdefault(paths[id(self)], []).append(x.shape)
        return original(self, x, *args)

    with pytest.MonkeyPatch.context() as patch, looping(unrolled):
        patch.setattr(nnx.Linear, "__call__", counted)
        jax.eval_shape(lambda x: model.actions(x), inputs)
    config = model.config
    unread = tuple(f"{path}." for path in unread_modules(config))
    assert set(paths.values()) - set(calls) == {
        path for path in paths.values() if f"{path}.".startswith(unread)
    }
    stepped = re.compile(r"PaliGemma\.llm.*(einsum_1|mlp_1\..*)|action_(in|out|time).*")
    for path, shapes in calls.items():
        assert len(shapes) == (config.num_steps if stepped.fullmatch(path) else 1), path
    if variant == "pi05":  # all steps side by side
        adaptive = [path for path in calls if "norm_1.Dense_0" in path]
        assert len(adaptive) == 2 * config.language.depth + 1
        rows = {calls[path][0] for path in ("time_mlp_in", "time_mlp_out", *adaptive)}
        assert rows == {(config.num_steps, config.action_expert.width)}


def test_what_is_masked_is_read_by_nothing(models, inputs):
    model = models["pi0"]
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).actions(x))
    expected = run(state, inputs)
    images, tokens = inputs.images.copy(), inputs.tokens.copy()
    images[1, 1], tokens[1, 3:] = 77, 0
    changed = dataclasses.replace(inputs, images=images, tokens=tokens)
    np.testing.assert_array_equal(run(state, changed), expected)
    images[1, 2] = 77
    changed = dataclasses.replace(inputs, images=images)
    moved = np.abs(np.asarray(run(state, changed)) - expected).max(axis=(1, 2))
    assert moved[0] == 0.0
    assert moved[1] > 1e-6


def test_the_actions_are_differentiable_through_all_steps(models, inputs):
    """The derivative by the noise against a difference quotient."""
    model = nnx.clone(models["pi05"])
    model.config = dataclasses.replace(model.config, num_steps=2)
    graphdef, state = nnx.split(model)

    def total(noise):
        return nnx.merge(graphdef, state)(dataclasses.replace(inputs, noise=noise)).sum()

    direction = np.random.default_rng(1).normal(size=inputs.noise.shape).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        both = jax.jit(jax.value_and_grad(total))
        step = np.float32(1e-3)
        _, gradient = both(inputs.noise)
        above, below = (both(inputs.noise + sign * step * direction)[0] for sign in (1, -1))
        quotient = (above - below) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), quotient, rtol=1e-2)
