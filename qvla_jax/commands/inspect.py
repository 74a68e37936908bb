"""`qvla inspect`: what a policy or a file holds."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from qvla_jax.commands.results import packed
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.registry import public_family
from qvla_jax.inference import load_policy
from qvla_jax.inference.places import policy_folder, policy_outline
from qvla_jax.model_options import ModelOptions
from qvla_jax.output import Result
from qvla_jax.progress import ProgressBars
from qvla_jax.quantization.layout import uniform_bytes
from qvla_jax.report.modules import describe, modules_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Lists what a policy consists of: parameters, bytes and output channels of every module."""

    # A preset, a directory that holds a policy (saved or public), or a .qvla file.
    model: Positional[str]
    # Load the weights and print the fingerprint that identifies the policy in results.
    fingerprint: bool = False


def main(config: Config) -> Result:
    """What a policy or a file holds."""
    if config.model.endswith(".qvla"):
        if config.said():
            load_policy(config.model, **config.said())  # refuses options that contradict it
        return packed(Path(config.model), layers=True)
    with contextlib.ExitStack() as stack:
        with ProgressBars() as progress:
            if config.fingerprint:  # of which an outline is not enough
                policy_folder(config.model, config, progress=progress)
            outline = policy_outline(config.model, config, progress=progress)
            folder = stack.enter_context(outline)
        return _inspected(config, folder)


def _inspected(config: Config, folder: Path) -> Result:
    described = describe(config.model, folder=folder)
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
        family = public_family(folder)
        found = (
            load_policy(config.model, **config.said()).config
            if family is None
            else family.read(folder, config).config
        )
        names = (field.name for field in dataclasses.fields(LoadOptions))
        content["settings"] = {n: getattr(found, n) for n in names if hasattr(found, n)}
        lines.append(", ".join(f"{name}: {value}" for name, value in content["settings"].items()))
    if config.fingerprint:
        content["fingerprint"] = load_policy(config.model, **config.said()).fingerprint
        lines.append(f"fingerprint {content['fingerprint']}")
    table = Table("uniform bits", box=None)
    table.add_column("bytes of the quantized layers", justify="right")
    for bits, stored in uniform.items():
        table.add_row("source" if bits == 16 else str(bits), f"{stored:,}")
    lines += ["", modules_table(described.modules), "", table]
    return Result(content, tuple(lines))
