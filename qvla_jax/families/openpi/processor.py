"""From observations to model inputs, and from chunks to the robot's units, as openpi does.

State: the robot's units -> (ALOHA: those of the training data) -> normalized -> written into the
prompt or padded. Actions: un-normalized -> the state added where they are relative to it -> the
robot's entries -> (ALOHA: its own units).
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import Float, Float32, Float64, UInt8
from qvla_jax.checkpoints.files import STATISTICS_FILE
from qvla_jax.checkpoints.weights import Source, file_named
from qvla_jax.errors import CheckpointError, CheckpointWarning, InputError, unknown
from qvla_jax.families import family
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.images import parse_image, resize_with_pad
from qvla_jax.families.openpi.network import Pi0Inputs
from qvla_jax.families.openpi.normalization import Normalizer, read_normalizers
from qvla_jax.families.openpi.robots import (
    ROBOTS,
    Robot,
    aloha_actions,
    aloha_commands,
    aloha_state,
    relative_to,
)
from qvla_jax.families.openpi.tokenizer import FILES, MODEL_FILE, SOURCES, PromptTokenizer


@dataclasses.dataclass(frozen=True)
class Processor(family.Processor):
    """Host-side pre- and postprocessing of one policy."""

    config: OpenpiConfig
    tokenizer: PromptTokenizer
    state: Normalizer
    actions: Normalizer
    # The tokenizer's file: one of `FILES` -> its content.
    stored: Mapping[str, bytes]

    @property
    def robot(self) -> Robot:
        """The robot of the configuration."""
        assert self.config.robot is not None  # what `make_processor` checks
        return ROBOTS[self.config.robot]

    def __call__(self, batch: Mapping[str, Any], *, preprocessed: bool = False) -> Pi0Inputs:
        """A batch of observations -> model inputs (numpy).

        Args:
            batch: b images under each of the robot's cameras (those that may be missing are
                missing in all), u8 or float in [0, 1], [H, W, 3] or [3, H, W] of any sizes;
                `state` [b, p] in the robot's units; `instruction`, b strings; optionally `noise`
                f32[b, h, a], which the Euler steps start from, or `seed` i[b], from which each
                observation's is drawn (see `noise`; 0 without either). Other keys are ignored.
            preprocessed: makes no difference: an image of the tower's size is left as it is.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """
        config, robot = self.config, self.robot
        states = self.normalized_state(self._require(batch, "state"))
        count = len(states)
        images, seen = [], []
        for key in robot.cameras:
            there = key in batch or key not in robot.optional
            images.append(
                self._images(key, self._require(batch, key)) if there else np.zeros_like(images[0])
            )
            seen.append(np.full(count, there))
        instructions = self._instructions(batch, count)
        noise = self._noise(batch, count)
        sizes = {"state": count, "instruction": len(instructions), "noise": len(noise)}
        sizes |= {key: len(value) for key, value in zip(robot.cameras, images, strict=True)}
        if len(set(sizes.values())) != 1:
            raise InputError(f"observation batch: entries differ in length: {sizes}")
        expected = (count, config.action_horizon, config.action_dim)
        if noise.shape != expected:
            raise InputError(f"noise: expected shape {expected}, got {noise.shape}")
        prompts = [
            self.tokenizer(instruction, state if config.discrete_state else None)
            for instruction, state in zip(instructions, states, strict=True)
        ]
        arrays: dict[str, Any] = {
            "images": np.stack(images, axis=1),
            "image_mask": np.stack(seen, axis=1),
            "tokens": np.stack([ids for ids, _ in prompts]),
            "token_mask": np.stack([mask for _, mask in prompts]),
            "noise": noise,
            "state": None,
        }
        if config.variant == "pi0":
            padding = config.action_dim - states.shape[1]
            arrays["state"] = np.pad(states, ((0, 0), (0, padding))).astype(np.float32)
        return Pi0Inputs(**arrays)

    def normalized_state(self, states: Any) -> Float64[np.ndarray, "b p"]:
        """States in the robot's units -> normalized, not padded."""
        states = np.asarray(states, np.float64)
        expected = self.robot.state_dim
        if states.ndim != 2 or states.shape[1] != expected:
            raise InputError(f"state: expected [b, {expected}], got {list(states.shape)}")
        if not np.isfinite(states).all():
            raise InputError("state: holds NaN or inf")
        return self.state.normalize(self._trained_state(states))

    def noise(self, seeds: Sequence[int]) -> Float32[np.ndarray, "b h a"]:
        """What the Euler steps start from: normal numbers, those of an observation from its seed.

        Args:
            seeds: of each observation.
        """
        shape = (self.config.action_horizon, self.config.action_dim)
        drawn = {
            seed: np.asarray(jax.random.normal(jax.random.key(seed), shape, jnp.float32))
            for seed in set(seeds)
        }
        return np.stack([drawn[seed] for seed in seeds])

    def normalize_actions(
        self, actions: Float[np.ndarray, "*b h r"], state: Any = None
    ) -> Float32[np.ndarray, "*b h a"]:
        """Actions in the robot's units -> the network's: normalized, and padded with zeros."""
        config, robot = self.config, self.robot
        values = np.asarray(actions, np.float64)
        if self._adapts:
            values = aloha_actions(values)
        if config.delta_actions:
            values = values - self._offset(state, robot.action_dim)
        values = self.actions.normalize(values)
        padding = [(0, 0)] * (values.ndim - 1) + [(0, config.action_dim - robot.action_dim)]
        return np.pad(values, padding).astype(np.float32)

    def unnormalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Any = None
    ) -> Float64[np.ndarray, "*b h r"]:
        """Normalized chunks -> actions in the robot's units.

        Args:
            actions: what the network returns.
            state: of the observations, in the robot's units.

        Raises:
            InputError: actions are relative to the state, and there is none.
        """
        values = self.actions.unnormalize(actions)
        if self.config.delta_actions:
            values = values + self._offset(state, values.shape[-1])
        values = values[..., : self.robot.action_dim]
        return aloha_commands(values) if self._adapts else values

    def to_robot(self, actions: Float[np.ndarray, "*b r"]) -> Float64[np.ndarray, "*b r"]:
        """The standard form of data sets -> what the robot's controller takes."""
        return self.robot.from_standard(actions)

    def from_robot(self, actions: Float[np.ndarray, "*b r"]) -> Float64[np.ndarray, "*b r"]:
        """The inverse of `to_robot`."""
        return self.robot.to_standard(actions)

    @property
    def action_units(self) -> Float64[np.ndarray, " a"]:
        """The robot's units in one unit of each entry of a normalized action; 0 in the padding."""
        dims = self.robot.action_dim
        return np.pad(self.actions.scale[:dims], (0, self.config.action_dim - dims))

    def files(self) -> dict[str, bytes]:
        """The tokenizer."""
        return dict(self.stored)

    def _offset(self, state: Any, action_dim: int) -> Float64[np.ndarray, "*b 1 a"]:
        if state is None:
            raise InputError(
                f"{self.config.name}: its actions are relative to the state; give the observation's"
            )
        trained = self._trained_state(np.asarray(state, np.float64))
        return relative_to(trained, self.robot.relative, action_dim)

    @property
    def _adapts(self) -> bool:
        """Whether units are converted to those that the policy was trained in."""
        return self.config.robot == "aloha" and self.config.adapt_to_pi

    def _trained_state(self, states: Float64[np.ndarray, "b p"]) -> Float64[np.ndarray, "b p"]:
        return aloha_state(states) if self._adapts else states

    def _noise(self, batch: Mapping[str, Any], count: int) -> Float32[np.ndarray, "b h a"]:
        if "noise" in batch:
            return np.asarray(batch["noise"], np.float32)
        seeds = np.asarray(batch.get("seed", np.zeros(count, np.int64)))
        if seeds.shape != (count,) or seeds.dtype.kind not in "iu":
            raise InputError(
                f"seed: expected {count} whole numbers, got {seeds.dtype} {list(seeds.shape)}"
            )
        return self.noise(seeds.tolist())

    def _images(
        self, key: str, images: Sequence[np.ndarray] | np.ndarray
    ) -> UInt8[np.ndarray, "b H W 3"]:
        size = self.config.image_size
        return np.stack([resize_with_pad(parse_image(i, where=key), size) for i in images])

    def _instructions(self, batch: Mapping[str, Any], count: int) -> Sequence[str]:
        if "instruction" not in batch and self.config.default_prompt is not None:
            return [self.config.default_prompt] * count
        return self._require(batch, "instruction")

    @staticmethod
    def _require(batch: Mapping[str, Any], key: str) -> Any:
        if key not in batch:
            raise InputError(f"observation has no {key!r}; it holds: {', '.join(sorted(batch))}")
        return batch[key]


def make_processor(
    config: OpenpiConfig,
    statistics: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    source: Source,
) -> Processor:
    """Assembles a processor.

    Args:
        config: of the policy.
        statistics: asset id -> the content of its norm_stats.json.
        files: the tokenizer: one of `FILES` -> its content.
        source: file named in errors, or a function from a file's name.

    Raises:
        InputError: the configuration names no robot.
        CheckpointError: the statistics are missing, not usable or too short, or the tokenizer is
            missing, damaged or of another vocabulary.
    """
    if config.robot is None:
        raise InputError(
            f"{config.name}: serves several robots and names none; name a preset of the same "
            "weights that does, such as pi0_aloha"
        )
    where = file_named(source, STATISTICS_FILE)
    if config.asset_id is None or config.asset_id not in statistics:
        raise CheckpointError(f"{where}: {unknown('statistics', config.asset_id, statistics)}")
    where = f"{where}: {config.asset_id}"
    normalizers = read_normalizers(statistics[config.asset_id], config.normalization, where=where)
    robot = ROBOTS[config.robot]
    for block, size in (("state", robot.state_dim), ("actions", robot.action_dim)):
        if (found := len(normalizers[block].offset)) < size:
            raise CheckpointError(
                f"{where}: norm_stats.{block} has {found} entries, {config.robot} has {size}"
            )
    # pi0 takes the state as an action.
    state_dim = robot.state_dim if config.variant == "pi0" else 0
    if config.action_dim < max(state_dim, robot.action_dim):
        raise InputError(
            f"{config.name}: action_dim is {config.action_dim}, but {config.robot} has states of "
            f"{robot.state_dim} and actions of {robot.action_dim} entries"
        )
    name = next((name for name in FILES if name in files), None)
    if name is None:
        where = file_named(source, MODEL_FILE)
        raise CheckpointError(f"{where}: missing; the tokenizer is {SOURCES}")
    where = file_named(source, name)
    tokenizer = PromptTokenizer.from_content(
        name, files[name], where=where, max_tokens=config.max_prompt_tokens
    )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{where}: has {tokenizer.vocab_size} tokens, but the policy embeds {config.vocab_size}"
        )
    if tokenizer.vocab_size < config.vocab_size // 16:
        warnings.warn(
            f"{where}: knows {tokenizer.vocab_size} of {config.vocab_size} tokens: a stand-in, "
            f"good for measuring time and memory alone; PaliGemma's is {SOURCES}",
            CheckpointWarning,
            stacklevel=2,
        )
    stored = {name: files[name]}
    return Processor(config, tokenizer, normalizers["state"], normalizers["actions"], stored)
