"""`qvla import`: turns a public directory into one of ours."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from qvla_jax.commands.results import written
from qvla_jax.inference import import_policy
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result
from qvla_jax.progress import ProgressBars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Imports a public directory into one of ours, one tensor at a time, with weights in orbax."""

    # A public directory: OpenVLA, OpenVLA-OFT, UniVLA, or a checkpoint of openpi; or the name of
    # one: OWNER/NAME@REVISION of the Hugging Face Hub, gs://BUCKET/FOLDER.
    model: str
    # An empty or new folder.
    out: Path
    # Dtype of the weights; public checkpoints are published in bfloat16.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


def main(config: Config) -> Result:
    """Imports a public directory; reports the peak resident memory."""
    with ProgressBars() as progress:
        import_policy(
            config.model,
            config.out,
            dtype=jnp.dtype(config.dtype),
            progress=progress,
            **config.said(),
        )
    return written(config.out)
