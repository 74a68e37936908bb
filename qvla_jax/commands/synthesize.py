"""`qvla synthesize`: a public directory with random weights."""

import dataclasses
from pathlib import Path

from qvla_jax.families.registry import family_of, preset
from qvla_jax.output import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Writes a public directory with random bfloat16 weights, for measurements at full size."""

    # A preset without FiLM; pi0 and pi05 are those of LIBERO.
    preset: str = "openvla-7b"
    # An empty or new folder; openvla-7b takes 15 GB, pi05 6.7 GB.
    out: Path
    seed: int = 0


def main(config: Config) -> Result:
    """Writes a synthetic directory."""
    made = preset(config.preset)
    family_of(made).synthesize(made, config.out, seed=config.seed)
    return Result(
        {"policy": str(config.out), "preset": config.preset},
        (f"{config.out}: {config.preset} with random weights",),
    )
