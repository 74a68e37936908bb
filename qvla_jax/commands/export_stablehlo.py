"""`qvla export --stablehlo`: a policy as a function that runs without this package."""

import dataclasses
from pathlib import Path

from qvla_jax.commands.results import written
from qvla_jax.inference.stablehlo import FUNCTION, PLATFORMS, WEIGHTS, export_stablehlo
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result
from qvla_jax.pipeline.policies import load_named_policy
from qvla_jax.report.page import size_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Writes a policy as a StableHLO function for CPUs and TPUs, with its packed weights beside it.

    JAX alone runs it. It goes from prepared inputs (resized images, tokens, normalized state) of
    one observation to normalized actions.
    """

    # A .qvla file, or any other policy that `--policy` of `qvla evaluate --sim` takes.
    model: str
    # An empty or new folder.
    stablehlo: Path


def main(config: Config) -> Result:
    """Exports a policy; returns how far its actions moved."""
    policy = load_named_policy(config.model, config)
    out = config.stablehlo
    parity = export_stablehlo(policy, out)
    result = written(out)
    sizes = {file: (out / file).stat().st_size for file in (FUNCTION, WEIGHTS)}
    lines = (
        ", ".join(f"{file}: {size_text(size)}" for file, size in sizes.items()),
        f"for {' and '.join(PLATFORMS)}: {parity}",
    )
    content = {**result.content, "bytes": sizes, "parity": dataclasses.asdict(parity)}
    return Result(content, (*result.lines, *lines))
