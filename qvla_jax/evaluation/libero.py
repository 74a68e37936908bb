"""Environments of episodes in LIBERO, and what is recorded from them.

These functions run in simulator processes, so this module imports no JAX.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.data.libero import experts
from qvla_jax.data.libero.environment import LiberoEnvironment, policy_action
from qvla_jax.data.libero.recorded import Recording, save_recording
from qvla_jax.evaluation.episodes import Episode
from qvla_jax.evaluation.workers import Environment

# Prefix of the policy hash of the scripted expert.
EXPERT = "expert"


def expert_hash(sigmas: Sequence[float] = (0.0,)) -> str:
    """Identifies the expert in results: a digest of its source and its noise."""
    digest = hashlib.sha256()
    for path in sorted(Path(experts.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(repr(tuple(map(float, sigmas))).encode())
    return f"{EXPERT}:{digest.hexdigest()}"


def make_libero(episode: Episode, *, sigmas: Sequence[float] = (0.0,)) -> LiberoEnvironment:
    """The environment of an episode.

    Args:
        episode: the episode to run.
        sigmas: strengths of the noise added to the expert's actions; an episode's seed chooses one.
            Policies act without noise.
    """
    options: dict[str, Any] = {"size": episode.size, "rendering": episode.rendering}
    if episode.policy_hash.startswith(EXPERT):
        return ExpertEnvironment(episode.suite, episode.task, sigmas=sigmas, **options)
    return LiberoEnvironment(episode.suite, episode.task, **options)


class ExpertEnvironment(LiberoEnvironment):
    """A task in which the expert acts: it sees the simulator's state, and no pictures."""

    def __init__(self, *arguments: Any, sigmas: Sequence[float] = (0.0,), **options: Any) -> None:
        """As `LiberoEnvironment`; `sigmas` as in `make_libero`."""
        super().__init__(*arguments, **options)
        self._sigmas = tuple(sigmas)
        self._expert: experts.Expert | None = None
        self._noise: experts.SmoothNoise | None = None

    def reset(self, initial_state: int | None, *, seed: int, **options: Any) -> None:
        """Starts an episode, and its noise."""
        super().reset(initial_state, seed=seed, **options)
        self._expert = experts.make_expert(self)
        self._noise = experts.SmoothNoise(np.random.default_rng(seed), noise_of(seed, self._sigmas))

    def observe(self) -> dict[str, Any]:
        """The expert's action, for `ExpertPolicy` to return."""
        assert self._expert is not None
        return {"action": policy_action(self._expert(self.state)), "instruction": self.instruction}

    def step_raw(self, action: np.ndarray) -> bool:
        """Executes an action with noise on it."""
        assert self._expert is not None
        assert self._noise is not None
        self._expert(self.state)  # For its phase, on which the noise depends.
        return super().step_raw(self._noise(action, self._expert.phase))


class ExpertPolicy:
    """The expert in place of a policy: it acts in the simulator's process."""

    def __init__(self, sigmas: Sequence[float] = (0.0,)):
        """`sigmas` as in `make_libero`, which must get the same."""
        self.fingerprint = expert_hash(sigmas)

    def infer_normalized(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Returns what `ExpertEnvironment` observed, as chunks of one action."""
        return np.asarray(batch["action"])[:, None]

    def standard_actions(self, actions: np.ndarray, state: Any = None) -> np.ndarray:
        """Does nothing: the actions are metric."""
        return actions


def noise_of(seed: int, sigmas: Sequence[float]) -> float:
    """The noise of an episode with this seed."""
    return float(sigmas[seed % len(sigmas)])


def record(
    environment: Environment, episode: Episode, actions: Sequence[np.ndarray], path: Path
) -> None:
    """Replays an episode and writes all observations, with the expert's label of each state.

    Args:
        environment: the episode's environment.
        episode: the episode that was run.
        actions: the policy's actions, in its convention.
        path: the file to write.
    """
    assert isinstance(environment, LiberoEnvironment)
    environment.reset(episode.initial_state, seed=episode.seed)
    labeller = experts.make_expert(environment)
    recording = Recording.empty(
        task=environment.name, instruction=environment.instruction, seed=episode.seed
    )
    done = False
    for action in actions:
        # The base class's observation, because `ExpertEnvironment` leaves out the pictures.
        seen = LiberoEnvironment.observe(environment)
        recording.add(seen, joints=environment.joints(), label=labeller(environment.state))
        done = environment.step(action)
        recording.executed.append(np.asarray(environment.executed, np.float32))
    recording.success = done
    save_recording(path, recording)
