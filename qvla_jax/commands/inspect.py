"""`qvla inspect`: what a policy or a file holds."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from qvla_jax.commands.results import packed
from qvla_jax.errors import InputError
from qvla_jax.model_options import ModelOptions, in_words
from qvla_jax.output import Result
from qvla_jax.pipeline.models import load_model
from qvla_jax.quantization.layout import uniform_bytes
from qvla_jax.report.modules import describe, modules_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Says what a policy is made of: parameters, bytes and output channels of every module."""

    # A preset, a directory that holds a policy (a saved one or a public one), or a .qvla file.
    model: Positional[str]
    # Load the weights and print the fingerprint that results name the policy by.
    fingerprint: bool = False


def main(config: Config) -> Result:
    """What a policy or a file holds."""
    if config.model.endswith(".qvla"):
        if said := config.said():
            raise InputError(f"{config.model}: {in_words(said)} is for public directories")
        return packed(Path(config.model), layers=True)
    described = describe(config.model)
    index = described.index
    uniform = {bits: uniform_bytes(index, bits) for bits in (16, 8, 4, 3, 2)}
    content: dict[str, Any] = {
        "name": described.config.name,
        "source": described.source,
        "parameters": described.parameters,
        "stored_bytes": described.stored_bytes,
        "quantizable": {
            "layers": len(index.layers),
            "channels": len(index),
            "weights": index.num_weights,
            "bytes_by_uniform_bits": uniform,
        },
        "modules": [dataclasses.asdict(module) for module in described.modules],
    }
    lines: list[str | Table] = [
        f"{described.config.name} ({described.source})",
        f"{described.parameters:,} parameters in {described.stored_bytes:,} bytes; "
        f"{index.num_weights:,} of them are the weights of {len(index):,} quantizable output "
        f"channels of {len(index.layers)} layers",
    ]
    if config.said():
        # The weights stay in their files.
        found = load_model(config.model, config, mapped=True).config
        names = ("unnorm_key", "num_images", "center_crop", "action_horizon")
        content["settings"] = {name: getattr(found, name) for name in names}
        lines.append(", ".join(f"{name}: {value}" for name, value in content["settings"].items()))
    if config.fingerprint:
        content["fingerprint"] = load_model(config.model, config).fingerprint
        lines.append(f"fingerprint {content['fingerprint']}")
    table = Table("uniform bits", box=None)
    table.add_column("bytes of the quantized layers", justify="right")
    for bits, stored in uniform.items():
        table.add_row("source" if bits == 16 else str(bits), f"{stored:,}")
    lines += ["", modules_table(described.modules), "", table]
    return Result(content, tuple(lines))
