"""Methods by name: one packed file for each in `RUN/methods`."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qvla_jax.checkpoints.packed_file import SUFFIX
from qvla_jax.errors import InputError
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.quantize import with_embeddings
from qvla_jax.methods import RECIPES, Measurements, Setting, check_setting, quantize_by
from qvla_jax.model_options import ModelOptions
from qvla_jax.pipeline import files
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.configs import StageConfig
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.codes import SOURCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(StageConfig, ModelOptions):
    """Quantizes by named methods, on the folder's calibration frames; writes methods/NAME.qvla.

    `qvla evaluate` and `qvla report` then list them next to the folder's allocations, and
    MODEL@RUN:NAME refers to them in `qvla evaluate --sim`.
    """

    # METHOD-wBITS, optionally followed by aBITS for activations and -gGROUP for groups of inputs:
    # gptq-w4, rtn-w4-g128. Several methods share the pass over the calibration frames.
    method: tuple[str, ...]
    # A policy that ships with the package, or a directory that holds one.
    model: str = "libero-mini"
    # Bits of the rows of token embeddings: 8, with a scale for each row, or 16, as they are.
    embedding_bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        if not self.method:
            raise InputError(f"--method: name at least one of {', '.join(RECIPES)}, with its bits")
        for name in self.method:
            check_setting(name)


@in_32_bits
def quantize_by_methods(
    config: MethodConfig, *, policy: Policy | None = None, progress: Progress = no_progress
) -> dict[str, Path]:
    """Quantizes and saves.

    Args:
        config: settings.
        policy: the full-precision policy, if it is loaded already.
        progress: reports progress.

    Returns:
        The file of each method.

    Raises:
        InputError: there is no calibration manifest, a name is wrong, or the policy is quantized.
    """
    policy = (
        load_policy(config.model, progress=progress, **config.said()) if policy is None else policy
    )
    calibration = load_calibration(config.out)
    measured = Measurements(policy, calibration, folder=config.out, progress=progress)
    settings = [check_setting(name) for name in config.method]
    return {
        setting.name: write_method(config.out, setting, measured, config.embedding_bits)
        for setting in settings
    }


def write_method(
    folder: Path, setting: Setting, measured: Measurements, embedding_bits: int = SOURCE
) -> Path:
    """Quantizes by a method, with token embeddings of these bits, and returns the file."""
    quantized = quantize_by(
        measured.policy, measured.calibration, setting.name, measured=measured
    )  # fmt: skip
    quantized = with_embeddings(quantized, embedding_bits, packed=True)
    path = method_file(folder, setting.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    quantized.save(path)
    return path


def method_file(folder: Path, name: str) -> Path:
    """Path of a method's policy in a run's folder."""
    return folder / files.METHODS / f"{name}{SUFFIX}"


def is_method(name: str) -> bool:
    """Whether a name has the form of a method's name, valid or not."""
    return re.search(r"-w\d", name) is not None


def method_files(folder: Path) -> list[Path]:
    """The files of all methods in a run's folder."""
    return sorted((folder / files.METHODS).glob(f"*{SUFFIX}"))


def load_method(path: Path, made_from: Mapping[str, Any]) -> Policy:
    """Loads a method's packed policy.

    Args:
        path: the file.
        made_from: what it must be made from: `policy fingerprint`, and `calibration hash`, which is
            ignored if a method uses no calibration frames.

    Raises:
        InputError: it is missing, damaged, or was made from something else.
    """
    command = f"`qvla quantize --method {path.stem} --out {path.parent.parent}`"
    if not path.is_file():
        raise InputError(f"{path}: missing; {command} writes it")
    packed = load_policy(path)
    found = packed.quantization or {}
    expected = dict(made_from)
    if found.get("calibration hash") is None:
        expected.pop("calibration hash", None)
    files.check_same(path, found, expected, remedy=f"run {command} again")
    return packed
