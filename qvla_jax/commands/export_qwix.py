"""`qvla export --qwix`: the weights of a packed policy for qwix."""

import dataclasses
from pathlib import Path

from qvla_jax.commands.results import written
from qvla_jax.inference import load_policy
from qvla_jax.inference.qarrays import PARAMS, export_qarrays
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result
from qvla_jax.progress import ProgressBars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Writes the parameters of a packed policy as an orbax checkpoint of qwix's quantized arrays.

    A layer becomes a `QArray` unless a channel keeps its 16 bits, its inputs are scaled or rotated,
    or groups do not divide them; others are dense, and named.
    """

    # A .qvla file.
    model: str
    # An empty or new folder.
    qwix: Path


def main(config: Config) -> Result:
    """Exports a packed policy; returns which layers are quantized arrays."""
    with ProgressBars() as progress:
        policy = load_policy(config.model, progress=progress, **config.said())
    description = export_qarrays(policy, config.qwix)
    result = written(config.qwix)
    quantized, dense = description["qarrays"], description["dense"]
    lines = [f"{len(quantized)} quantized arrays in {config.qwix / PARAMS}"]
    lines += [f"dense: {path}: {reason}" for path, reason in dense.items()]
    if rounded := description["activation_bits"]:
        lines.append(
            f"{len(rounded)} layers round their inputs in this policy; the arrays say nothing of it"
        )
    told = {name: description[name] for name in ("qarrays", "dense", "activation_bits")}
    return Result({**result.content, **told}, (*result.lines, *lines))
