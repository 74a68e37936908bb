"""pi0 and pi0.5 as a policy: observation in, action chunk out."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax.array_typing import Array, Float, Float64
from qvla_jax.families.openpi.checkpoint import (
    ASSETS,
    STATISTICS_FILE,
    load_model,
    read_config,
    read_statistics,
    step_folder,
)
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.network import Conditioning, FlowMatching, Pi0Inputs
from qvla_jax.families.openpi.processor import Processor, make_processor


@functools.partial(jax.jit, static_argnums=0)
def _actions(
    graphdef: nnx.GraphDef[FlowMatching],
    state: nnx.State,
    inputs: Pi0Inputs,
    conditioning: Conditioning,
) -> Float[Array, "b h a"]:
    return nnx.merge(graphdef, state).actions(inputs, conditioning)


@dataclasses.dataclass(frozen=True)
class OpenpiPolicy:
    """A network with everything it needs between sensors and motors."""

    config: OpenpiConfig
    model: FlowMatching
    processor: Processor
    # The content of norm_stats.json.
    statistics: Mapping[str, Any]

    def noise(self, batch_size: int, seed: int) -> Float[np.ndarray, "b h a"]:
        """The starting point of the Euler steps, for all entries of the network's actions."""
        shape = (batch_size, self.config.action_horizon, self.config.action_dim)
        return np.asarray(jax.random.normal(jax.random.key(seed), shape, jnp.float32))

    def run(self, inputs: Pi0Inputs) -> Float[np.ndarray, "b h a"]:
        """Prepared inputs -> normalized action chunks."""
        graphdef, state = nnx.split(self.model)
        with jax.default_matmul_precision("float32"):
            return np.asarray(_actions(graphdef, state, inputs, self.conditioning))

    @functools.cached_property
    def conditioning(self) -> Conditioning:
        """The network's conditioning for the times of all steps, the same for every call."""
        with jax.default_matmul_precision("float32"):
            return self.model.conditioning(self.model.times[None])

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: Float[np.ndarray, "h a"] | None = None,
        seed: int = 0,
    ) -> Float64[np.ndarray, "h r"]:
        """One observation -> the action chunk in the robot's units.

        The same observation, noise or seed, and weights give the same chunk.

        Args:
            observation: an image under each of the robot's cameras, `state` in its units and
                `instruction`; see `Processor.__call__`.
            noise: starting point of the Euler steps; None draws it from the seed.
            seed: of the noise.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """
        batch: dict[str, Any] = {
            key: [value] if isinstance(value, str) else np.asarray(value)[None]
            for key, value in observation.items()
        }
        start = self.noise(1, seed) if noise is None else np.asarray(noise)[None]
        chunk = self.run(self.processor(batch, start))
        return self.processor.robot_actions(chunk, batch["state"])[0]


def load_policy(
    source: str | Path,
    *,
    tokenizer: str | Path,
    preset: str | None = None,
    asset_id: str | None = None,
    dtype: Any = None,
) -> OpenpiPolicy:
    """Loads a checkpoint of openpi; weights are read, cast and placed one at a time.

    Args:
        source: a directory as openpi publishes or saves it.
        tokenizer: PaliGemma's, a SentencePiece model or a tokenizers file.
        preset: openpi's training configuration, for what no file says; optional for directories
            that we wrote.
        asset_id: the asset whose statistics to use; by default that of the preset.
        dtype: dtype of the weights in memory, by default float32.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the preset.
        InputError: unknown preset, or one that names no robot.
    """
    folder = step_folder(Path(source))
    config = read_config(folder, preset_name=preset)
    if asset_id is not None:
        config = dataclasses.replace(config, asset_id=asset_id)
    statistics = read_statistics(folder, config.asset_id)
    where = str(folder / ASSETS / str(config.asset_id) / STATISTICS_FILE)
    processor = make_processor(config, statistics, Path(tokenizer), source=where)
    return OpenpiPolicy(config, load_model(folder, config, dtype=dtype), processor, statistics)
