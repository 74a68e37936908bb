"""Concurrent observations: each gets its own answer, whatever happens to the others."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax.errors import PolicyError
from qvla_jax.families.prismatic.config import LatentActionConfig, preset
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference import Policy
from qvla_jax.inference import policy as policy_module
from qvla_jax.inference.policy import make_policy
from qvla_jax.serving.batching import Batcher, batch_sizes


@pytest.mark.parametrize(
    ("largest", "devices", "expected"),
    [(1, 1, (1,)), (8, 1, (1, 2, 4, 8)), (5, 1, (1, 2, 4, 8)), (8, 2, (2, 4, 8)), (3, 4, (4,))],
)
def test_batches_are_padded_to_few_sizes(largest, devices, expected):
    assert batch_sizes(largest, devices) == expected


def inputs_of(policy, seed):
    observation = policy.fake_observation(seed)
    return policy.prepare(
        {k: [v] for k, v in observation.items()}
        | {k: v[None] for k, v in observation.items() if isinstance(v, np.ndarray)}
    )


def answers(policy, seeds, *, max_batch=4, **settings):
    """Answers to observations that all come at once; errors in their places."""

    async def main():
        batcher = Batcher(policy, max_batch=max_batch, window=0.01, **settings)
        batcher.start()
        try:
            return await asyncio.gather(
                *(batcher(inputs_of(policy, seed)) for seed in seeds), return_exceptions=True
            )
        finally:
            await batcher.stop()

    return asyncio.run(main())


def test_each_observation_gets_the_answer_that_it_gets_alone(policy):
    found = answers(policy, range(11))
    for seed, answer in enumerate(found):
        alone = policy.infer(policy.fake_observation(seed))
        np.testing.assert_allclose(answer.actions, alone, atol=2e-5)
    assert [answer.batch for answer in found] == [4] * 8 + [3] * 3


def test_answers_differ_between_observations(policy):
    first, second = answers(policy, [0, 1])
    assert np.abs(first.actions - second.actions).max() > 1e-3


def test_actions_of_a_mixed_batch_are_each_in_the_units_that_were_asked_for(policy):
    (key, entry) = next(iter(policy.statistics.items()))
    size = policy.config.action_dim
    low, high = [-1.0 - i for i in range(size)], [float(i) for i in range(size)]
    action = {"q01": low, "q99": high, "mask": [True] * size}
    other = dataclasses.replace(
        policy, statistics={key: entry, "other": {**entry, "action": action}}
    ).with_unnorm_key("other")

    async def main():
        batcher = Batcher(policy, max_batch=4, window=0.05)
        batcher.start()
        try:
            kinds = (policy, other, None, other)
            return await asyncio.gather(*(batcher(inputs_of(policy, 1), kind) for kind in kinds))
        finally:
            await batcher.stop()

    found = asyncio.run(main())
    assert [answer.batch for answer in found] == [4] * 4
    normalized = policy.infer_normalized(
        {k: [v] if isinstance(v, str) else v[None] for k, v in policy.fake_observation(1).items()}
    )[0].astype(np.float64)
    metric = (normalized + 1) / 2 * (np.array(high) - low) + low
    for answer, expected in zip(
        found, (policy.unnormalize_actions(normalized), metric) * 2, strict=True
    ):
        np.testing.assert_allclose(answer.actions, expected, atol=1e-4)


def test_nothing_compiles_after_the_warm_up(policy):
    batcher = Batcher(policy, max_batch=4, window=0.0)
    batcher.warm_up()
    compiled = policy_module.forward._cache_size()
    for count in range(1, 6):
        answers(policy, range(count))
    assert policy_module.forward._cache_size() == compiled


class Broken(Policy):
    """Returns NaN for observations whose first joint is positive, raises where all are."""

    def run(self, inputs):
        chunk = super().run(inputs).copy()
        bad = np.asarray(inputs.proprio)[:, 0] > 0
        if bad.all():
            raise RuntimeError("out of luck")
        chunk[bad, -1, -1] = np.nan
        return chunk


@pytest.fixture
def broken(policy):
    return Broken(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})


def seeds_by_first_joint(policy):
    positive = [policy.fake_observation(seed)["state"][0] > 0 for seed in range(20)]
    return [s for s in range(20) if positive[s]], [s for s in range(20) if not positive[s]]


def test_actions_that_are_not_finite_reach_nobody(broken, policy):
    bad, good = seeds_by_first_joint(policy)
    first, second, third = answers(broken, [good[0], bad[0], good[1]])
    assert isinstance(second, PolicyError)
    assert "NaN or infinite" in str(second)
    for seed, answer in ((good[0], first), (good[1], third)):
        alone = policy.infer(policy.fake_observation(seed))
        np.testing.assert_allclose(answer.actions, alone, atol=2e-5)


def test_a_policy_that_fails_does_so_for_its_batch_alone(broken, policy):
    bad, good = seeds_by_first_joint(policy)
    found = answers(broken, [bad[0], bad[1], good[0]], max_batch=2)
    assert [str(answer) for answer in found[:2]] == ["the policy failed (RuntimeError)"] * 2
    assert np.isfinite(found[2].actions).all()


class Hopeless(Policy):
    def run(self, inputs):
        return np.full_like(super().run(inputs), np.inf)


def test_a_policy_without_finite_actions_is_not_served(policy):
    hopeless = Hopeless(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})
    with pytest.raises(PolicyError, match="nothing to serve"):
        Batcher(hopeless, max_batch=2, window=0.0).warm_up()


def test_latent_tokens_come_back_as_the_history_of_the_next_call():
    config = dataclasses.replace(
        preset("tiny-test"),
        decoding="latents",
        latent_action=LatentActionConfig(embed_dim=16, num_heads=2, mlp_dim=24),
        action_horizon=2,
        proprio_dim=0,
        num_images=1,
        unnorm_key="x",
    )
    statistics = {"x": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    model = make_model(config, rngs=nnx.Rngs(0))
    univla = make_policy(config, model, word_files(), statistics, source="x")
    found = answers(univla, [0, 1], max_batch=2)
    both = jax.tree.map(
        lambda *leaves: np.concatenate(leaves), *(inputs_of(univla, seed) for seed in (0, 1))
    )
    completed = univla.complete(both)
    assert [answer.history for answer in found] == univla.processor.history(completed)
    chunks = univla.unnormalize_actions(univla.run(completed))
    np.testing.assert_allclose([answer.actions for answer in found], chunks, atol=2e-5)


def test_requests_that_wait_when_the_server_stops_are_told_so(policy):
    async def main():
        batcher = Batcher(policy, max_batch=1, window=0.0)
        waiting = asyncio.ensure_future(batcher(inputs_of(policy, 0)))
        await asyncio.sleep(0)
        await batcher.stop()
        return await asyncio.gather(waiting, return_exceptions=True)

    assert "shutting down" in str(asyncio.run(main())[0])


def test_requests_that_wait_for_company_when_the_server_stops_are_told_so(policy):
    async def main():
        batcher = Batcher(policy, max_batch=4, window=60.0)
        batcher.start()
        waiting = asyncio.ensure_future(batcher(inputs_of(policy, 0)))
        while not waiting.done():
            await asyncio.sleep(0.01)
            await batcher.stop()
        return await asyncio.gather(waiting, return_exceptions=True)

    assert "shutting down" in str(asyncio.run(main())[0])


def test_requests_that_were_given_up_are_not_computed(policy):
    calls = []

    class Counting(Policy):
        def run(self, inputs):
            calls.append(len(inputs.images))
            return super().run(inputs)

    counting = Counting(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})

    async def main():
        batcher = Batcher(counting, max_batch=4, window=0.0)
        given_up = asyncio.ensure_future(batcher(inputs_of(policy, 0)))
        await asyncio.sleep(0)
        given_up.cancel()
        batcher.start()
        answer = await batcher(inputs_of(policy, 1))
        await batcher.stop()
        return answer

    assert asyncio.run(main()).batch == 1
    assert len(calls) == 1
