"""From observations to model inputs, and from chunks to the robot's units, as openpi does.

State: the robot's units -> (ALOHA: those of the training data) -> normalized -> written into the
prompt or padded. Actions: un-normalized -> the state added where they are relative to it -> the
robot's entries -> (ALOHA: its own units).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.array_typing import Float, Float64, UInt8
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.images import parse_image, resize_with_pad
from qvla_jax.families.openpi.network import Pi0Inputs
from qvla_jax.families.openpi.normalization import Normalizer, read_normalizers
from qvla_jax.families.openpi.robots import (
    ROBOTS,
    Robot,
    aloha_commands,
    aloha_state,
    relative_to,
)
from qvla_jax.families.openpi.tokenizer import PromptTokenizer


@dataclasses.dataclass(frozen=True)
class Processor:
    """Host-side pre- and postprocessing of one policy."""

    config: OpenpiConfig
    tokenizer: PromptTokenizer
    state: Normalizer
    actions: Normalizer

    @property
    def robot(self) -> Robot:
        """The robot of the configuration."""
        assert self.config.robot is not None  # what `make_processor` checks
        return ROBOTS[self.config.robot]

    def __call__(self, batch: Mapping[str, Any], noise: Float[np.ndarray, "b h a"]) -> Pi0Inputs:
        """A batch of observations -> model inputs (numpy).

        Args:
            batch: b images under each of the robot's cameras (those that may be missing are
                missing in all), u8 or float in [0, 1], [H, W, 3] or [3, H, W] of any sizes;
                `state` [b, p] in the robot's units; `instruction`, b strings. Other keys are
                ignored.
            noise: starting point of the Euler steps.

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
            "noise": np.asarray(noise, np.float32),
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

    def robot_actions(
        self, chunks: Float[np.ndarray, "b h a"], states: Float[np.ndarray, "b p"]
    ) -> Float64[np.ndarray, "b h r"]:
        """Normalized chunks -> actions in the robot's units.

        Args:
            chunks: what the network returns.
            states: of the observations, in the robot's units.
        """
        robot = self.robot
        actions = self.actions.unnormalize(chunks)
        if self.config.delta_actions:
            state = self._trained_state(np.asarray(states, np.float64))
            actions = actions + relative_to(state, robot.relative, actions.shape[-1])
        actions = actions[..., : robot.action_dim]
        if self.config.robot == "aloha" and self.config.adapt_to_pi:
            return aloha_commands(actions)
        return actions

    def _trained_state(self, states: Float64[np.ndarray, "b p"]) -> Float64[np.ndarray, "b p"]:
        if self.config.robot == "aloha" and self.config.adapt_to_pi:
            return aloha_state(states)
        return states

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
    config: OpenpiConfig, statistics: Mapping[str, Any], tokenizer: Path, *, source: str
) -> Processor:
    """Assembles a processor.

    Args:
        config: of the policy.
        statistics: the content of norm_stats.json.
        tokenizer: the user's file.
        source: file of the statistics, named in errors.

    Raises:
        InputError: the configuration names no robot.
        CheckpointError: the statistics are not usable or too short, or the tokenizer is missing,
            damaged or of another vocabulary.
    """
    if config.robot is None:
        raise InputError(
            f"{config.name}: serves several robots and names none; name a preset of the same "
            "weights that does, such as pi0_aloha"
        )
    normalizers = read_normalizers(statistics, config.normalization, where=source)
    robot = ROBOTS[config.robot]
    for block, size in (("state", robot.state_dim), ("actions", robot.action_dim)):
        if (found := len(normalizers[block].offset)) < size:
            raise CheckpointError(
                f"{source}: norm_stats.{block} has {found} entries, {config.robot} has {size}"
            )
    if config.action_dim < max(robot.state_dim, robot.action_dim):
        raise InputError(
            f"{config.name}: action_dim is {config.action_dim}, but {config.robot} has states of "
            f"{robot.state_dim} and actions of {robot.action_dim} entries"
        )
    loaded = PromptTokenizer.from_file(tokenizer, max_tokens=config.max_prompt_tokens)
    if loaded.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer}: has {loaded.vocab_size} tokens, but the policy embeds "
            f"{config.vocab_size}"
        )
    return Processor(config, loaded, normalizers["state"], normalizers["actions"])
