"""Stage 1: draw the calibration frames."""

from pathlib import Path

import numpy as np

from qvla_jax.data import open_x
from qvla_jax.data.calibration import CalibrationSet, calibration_set
from qvla_jax.errors import InputError
from qvla_jax.inference import Policy
from qvla_jax.pipeline import files
from qvla_jax.pipeline.configs import FramesConfig
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress


@in_32_bits
def calibrate(
    config: FramesConfig, *, horizon: int = 8, progress: Progress = no_progress
) -> CalibrationSet:
    """Draws the calibration set and writes its manifest.

    Args:
        config: settings.
        horizon: expert actions with each frame; the policy's.
        progress: reports progress.

    Raises:
        InputError: there is no such mixture or specification.
        DatasetError: a data set is missing, lacks a key, or has fewer frames than requested.
    """
    files.check_folder(config.out)
    source: str | dict[str, float] = config.weights or config.dataset
    if config.mixture is not None:
        source = open_x.mixture_below(config.mixture, config.dataset)
    drawn = calibration_set(
        source,
        frames=config.frames,
        seed=config.seed,
        split=config.split,
        horizon=horizon,
        spec=config.spec,
        max_episodes=config.max_episodes,
        balance=config.mixture is not None,
        gripper_share=config.gripper_share,
        progress=progress,
    )
    drawn.save(config.out / files.CALIBRATION)
    return drawn


def check_frames(policy: Policy, frames: CalibrationSet) -> None:
    """Checks that a policy takes the frames of a set, and that their actions are its robot's.

    Raises:
        InputError: a camera is missing, or states or actions have another length; the message says
            which.
    """
    spec, config = policy.observation, policy.config
    batch = next(frames.batches(1))
    name = frames.describe()["dataset"]
    takes = f"{name}: {config.name} takes"
    for camera in spec.cameras:
        if camera not in batch and camera not in spec.optional:
            raise InputError(f"{takes} a {camera!r}, which this data set does not have")
    lengths = {"state": spec.state_dim, "actions": len(policy.layout.action_entries)}
    for key, length in lengths.items():
        found = np.shape(batch[key])[-1] if key in batch else 0
        if length and found != length:
            raise InputError(
                f"{takes} {key} of {length} entries, this data set has {found}; frames of another "
                "robot do not calibrate it"
            )


def load_calibration(folder: Path) -> CalibrationSet:
    """Rebuilds the set that `calibrate` drew.

    Raises:
        InputError: there is no manifest, or the data are not those that it was drawn from.
    """
    return CalibrationSet.from_manifest(files.needed(folder / files.CALIBRATION))
