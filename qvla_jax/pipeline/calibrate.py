"""Stage 1: draw the calibration frames."""

from pathlib import Path

from qvla_jax.data.calibration import CalibrationSet, calibration_set
from qvla_jax.pipeline import files
from qvla_jax.pipeline.configs import CalibrateConfig
from qvla_jax.progress import Progress, no_progress


def calibrate(config: CalibrateConfig, *, progress: Progress = no_progress) -> CalibrationSet:
    """Draws the calibration set and writes its manifest.

    Raises:
        DatasetError: The data set lacks a key, or has fewer frames than asked for.
    """
    files.check_folder(config.out)
    progress("calibrate", 0, 1)
    drawn = calibration_set(
        config.dataset,
        frames=config.frames,
        seed=config.seed,
        split=config.split,
        horizon=config.horizon,
    )
    drawn.save(config.out / files.CALIBRATION)
    progress("calibrate", 1, 1)
    return drawn


def load_calibration(folder: Path) -> CalibrationSet:
    """Rebuilds the set that `calibrate` drew.

    Raises:
        InputError: There is no manifest, or the data are not those that it was drawn from.
    """
    return CalibrationSet.from_manifest(files.needed(folder / files.CALIBRATION))
