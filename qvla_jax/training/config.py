"""The recipe of a training run, and the check that the run in a folder matches it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qvla_jax.atomic import write_json
from qvla_jax.errors import InputError

CONFIG_FILE = "train_config.json"

# These do not change what a run computes up to its last checkpoint, so a run can be extended;
# `claim_folder` still refuses to extend a run that has begun to decay.
_MAY_CHANGE = ("steps", "decay_steps", "checkpoint_every", "evaluate_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines the trained weights."""

    # RLDS or LeRobot directories with the two splits below, or their names on the Hugging Face Hub.
    # Their training splits together determine the normalization.
    data: tuple[str, ...]
    # Folder for checkpoints, log and the finished policy; an interrupted run resumes from here.
    out: Path
    # More such directories to train on, such as states that a policy visited and the expert
    # labeled.
    more_data: tuple[str, ...] = ()
    # Preset of the architecture.
    model: str = "libero-mini"
    # Start from the weights of this policy (a preset or a directory); None starts from random ones.
    initial_policy: str | None = None
    # Split to train on.
    train_split: str = "train"
    # Split to measure on, of the sets in `data`.
    heldout_split: str = "heldout"
    # Specification of the data sets: the name of one, or a JSON file; by default, found by their
    # names.
    spec: str | None = None
    # Seed of the random weights, the order of the frames and the augmentations.
    seed: int = 0
    # Total number of steps.
    steps: int = 3000
    # Frames per step.
    batch_size: int = 48
    # Muon learns faster; AdamW is what the first stage of the bundled policy was trained with.
    optimizer: Literal["muon", "adamw"] = "muon"
    # Learning rate after the warm-up and before the decay.
    peak_learning_rate: float = 1e-3
    # Steps of the linear warm-up.
    warmup_steps: int = 300
    # Last steps, over which the rate falls to zero.
    decay_steps: int = 600
    # Decoupled weight decay of matrices; it is multiplied by the learning rate.
    weight_decay: float = 0.02
    # Share that a running average of the weights keeps in each step; it is what is measured and
    # shipped, as if the rate had decayed. 0: the last weights are.
    average_decay: float = 0.0
    # Largest global norm of a gradient.
    clip_norm: float = 1.0
    # Random crops: shifts of up to this many pixels.
    shift_pixels: int = 4
    # Standard deviation of the noise on normalized proprio.
    proprio_noise: float = 0.02
    # Steps between checkpoints.
    checkpoint_every: int = 100
    # Steps between measurements on the held-out split.
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.decay_steps <= self.steps - self.warmup_steps:
            raise InputError(
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} do not fit "
                f"into steps {self.steps}"
            )
        if not 0 <= self.average_decay < 1:
            raise InputError(
                f"average_decay must be at least 0 and less than 1, got {self.average_decay}"
            )
        if not self.data:
            raise InputError("name at least one set to train on: --data DIRECTORY")


def portable(config: TrainConfig, *, initial_fingerprint: str | None) -> dict[str, Any]:
    """The recipe without the locations of its files.

    Args:
        config: the recipe.
        initial_fingerprint: fingerprint of the initial policy, which is identified by it and its
            folder's name; None if there is none.
    """
    values = dataclasses.asdict(config)
    for key in ("data", "more_data", "out"):
        del values[key]
    if config.initial_policy is not None:
        name = Path(config.initial_policy).name
        values["initial_policy"] = {"name": name, "fingerprint": initial_fingerprint}
    return values


def of_a_step(config: TrainConfig) -> TrainConfig:
    """The recipe without what no training step depends on, to share one compiled program."""
    default = TrainConfig(data=("",), out=Path())
    same = ("data", "out", "more_data", "model", "initial_policy", "train_split", "heldout_split")
    same += ("spec", "checkpoint_every", "evaluate_every")
    same += ("steps", "peak_learning_rate", "warmup_steps", "decay_steps")
    return dataclasses.replace(config, **{name: getattr(default, name) for name in same})


def claim_folder(config: TrainConfig, recipe: Mapping[str, Any], data: Sequence[str]) -> None:
    """Writes the recipe into `out`, or checks that the one there can be continued by this one.

    Args:
        config: the recipe.
        recipe: the same in the form of `portable`.
        data: fingerprints of the training sets.

    Raises:
        InputError: the folder has another recipe or other data, or the run to extend has begun to
            decay.
    """
    path = config.out / CONFIG_FILE
    values = {**recipe, "data": list(data)}
    if path.is_file():
        old = json.loads(path.read_text())
        for key in sorted(set(values) - set(_MAY_CHANGE)):
            if old.get(key) != values[key]:
                raise InputError(
                    f"{config.out} holds a run with {key} = {old.get(key)!r}, asked for "
                    f"{values[key]!r}; choose another --out"
                )
        # A kill may have left a partial checkpoint under another name.
        steps = [p.name for p in (config.out / "checkpoints").glob("*") if p.name.isdecimal()]
        reached = max(map(int, steps), default=0)
        decay_from = min(old["steps"] - old["decay_steps"], config.steps - config.decay_steps)
        same = all(old[key] == values[key] for key in ("steps", "decay_steps"))
        if reached > decay_from and not same:
            raise InputError(
                f"{config.out} is at step {reached}, past the start of a decay (step {decay_from}):"
                " its length cannot be changed any more; choose another --out"
            )
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
