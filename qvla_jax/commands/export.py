"""`qvla export`: a policy in the public layout."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from qvla_jax.commands.results import written
from qvla_jax.families.registry import public_family
from qvla_jax.inference import load_policy
from qvla_jax.inference.loading import stays_in_files
from qvla_jax.inference.places import policy_folder
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result
from qvla_jax.progress import ProgressBars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Writes a policy in the public layout of its family, such as OpenVLA's on Hugging Face.

    A public directory passes through the import one tensor at a time and comes back bit for bit;
    any other policy, or one whose dtype or settings change, is loaded first.
    """

    # A preset with weights, or a directory that holds a policy (saved or public).
    model: str
    # An empty or new folder.
    out: Path
    # Dtype of all tensors; by default unchanged.
    dtype: Literal["float32", "bfloat16"] | None = None


def main(config: Config) -> Result:
    """Exports a policy; reports the peak resident memory."""
    with ProgressBars() as progress:
        folder = policy_folder(config.model, config, progress=progress)
    family = public_family(folder) if config.dtype is None else None
    if family is None or not family.reexport(folder, config.out, config):
        # Each tensor that can stay in its file is read when it is written, in its own dtype.
        mapped = stays_in_files(config.model)
        policy = load_policy(config.model, mapped=mapped, **config.said())
        policy.export(config.out, dtype=config.dtype and jnp.dtype(config.dtype))
    return written(config.out)
