"""`qvla export`: a policy in the public layout."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from qvla_jax.commands.results import written
from qvla_jax.families.prismatic.checkpoint.export import reexport
from qvla_jax.families.prismatic.checkpoint.huggingface import is_huggingface
from qvla_jax.inference import load_policy
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Writes a policy in the public (Hugging Face) layout.

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
    public = is_huggingface(Path(config.model))
    if config.dtype is None and public and not config.said():
        reexport(Path(config.model), config.out)
    else:
        # Each tensor of a public directory is read when it is written, in its own dtype.
        policy = load_policy(config.model, mapped=public, **config.said())
        policy.export(config.out, dtype=config.dtype and jnp.dtype(config.dtype))
    return written(config.out)
