"""A family that is defined here alone walks the whole street, from calibration to a server."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import qvla_jax
from qvla_jax.families.family import Family, Network, Processor
from qvla_jax.families.layout import Layout
from qvla_jax.families.observations import ObservationSpec
from qvla_jax.families.registry import register
from qvla_jax.models.linear import Linear
from qvla_jax.plain import from_plain
from qvla_jax.quantization.layers import LayerRules


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    family: ClassVar[str] = "toy"
    name: str = "toy"
    action_horizon: int = 8
    action_dim: int = 7
    unnorm_key: str | None = None
    to_dict = identity = dataclasses.asdict


class ToyNetwork(Network):
    """Two layers on a state vector."""

    def __init__(self, config, *, rngs):
        self.first = Linear(8, 24, rngs=rngs)
        self.second = Linear(24, 8 * 7, rngs=rngs)

    def __call__(self, state):
        actions = self.second(jnp.tanh(self.first(state[:, None])))  # one token
        return actions.reshape(-1, 8, 7)


@dataclasses.dataclass(frozen=True)
class ToyProcessor(Processor):
    units: np.ndarray

    def __call__(self, batch, *, preprocessed=False):
        return np.asarray(batch["state"], np.float32)

    def normalize_actions(self, actions, state=None):
        return (actions / self.units).astype(np.float32)

    def unnormalize_actions(self, actions, state=None):
        return (actions * self.units).astype(np.float32)


class Toy(Family):
    name, kinds, presets = "toy", "toy", {"toy": ToyConfig()}

    def config(self, values):
        return from_plain(ToyConfig, values, "config")

    def make_model(self, config, *, rngs):
        return ToyNetwork(config, rngs=rngs)

    def layout(self, config):
        return Layout(
            rules=LayerRules(include=("first",)), kept=("second",), stages=("first", "second"),
            module_types=(), action_entries=tuple(range(7)), grippers=(6,),
        )  # fmt: skip

    def observation(self, config):
        return ObservationSpec(state_dim=8, texts=())

    def make_processor(self, config, statistics, files, *, source):
        return ToyProcessor(np.asarray(statistics["states"]["units"], np.float32))

    def random_parts(self, config):
        return {"states": {"units": [0.5] * 7}}, {}


def test_the_toy_family_walks_the_whole_street(tmp_path):
    pytest.importorskip("aiohttp")
    from ..serving.served import running
    from ..serving.test_server import check_alive

    register(Toy())
    (policy := qvla_jax.random_policy("toy")).save(tmp_path / "toy")
    config = qvla_jax.RunConfig(
        model=str(tmp_path / "toy"), out=tmp_path / "run", frames=8, probes=2, validate=8,
        budget_bits=12.0, sweep=(10.0,), uniform_bits=(4,), match_uniform=(), eval_frames=8,
        latency_calls=1,
    )  # fmt: skip
    report = qvla_jax.run(config)
    assert [layer.path for layer in report.layers] == ["first"]
    packed = qvla_jax.load_policy(config.out / "policy.qvla")
    assert packed.family.name == "toy"
    assert np.abs(packed.infer(state := policy.fake_observation()) - policy.infer(state)).max() > 0
    with running(packed) as server:
        check_alive(server, packed)
