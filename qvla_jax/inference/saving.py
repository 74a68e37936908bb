"""Writes policies: a directory, one packed file, or the public layout."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvla_jax.atomic import write_bytes, write_json
from qvla_jax.checkpoints import public_tensors, save_weights
from qvla_jax.checkpoints.files import CONFIG_FILE, ORBAX_FOLDER, STATISTICS_FILE, WEIGHTS_FILE
from qvla_jax.checkpoints.packed_file import SUFFIX, write_packed
from qvla_jax.errors import InputError
from qvla_jax.families.registry import to_record
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.kernels import LayerInputs
from qvla_jax.provenance import package_versions
from qvla_jax.remote.folder import origins

if TYPE_CHECKING:
    from qvla_jax.families.family import Processor
    from qvla_jax.inference.policy import Policy

# Value of the key `unread` in the header of a packed file without weights that nothing reads.
DROPPED: Final = "dropped"


def save(policy: "Policy", path: Path, *, dtype: Any = None) -> None:
    """Writes a directory or a packed file; see `Policy.save`."""
    if path.suffix == SUFFIX or policy.quantization is not None:
        _save_packed(policy, path)
        return
    if (path / ORBAX_FOLDER).is_dir():
        raise InputError(f"{path}: holds an imported policy; name another folder")
    path.mkdir(parents=True, exist_ok=True)
    save_weights(policy.model, path / WEIGHTS_FILE, dtype=dtype)
    save_settings(policy.config, policy.processor, policy.statistics, path)


def save_settings(
    config: Any, processor: "Processor", statistics: Mapping[str, Any], folder: Path
) -> None:
    """Writes everything but the weights; the configuration, which loading needs, is last."""
    write_files(processor, folder)
    write_json(folder / STATISTICS_FILE, statistics)
    write_json(folder / CONFIG_FILE, to_record(config))


def export(policy: "Policy", folder: Path, *, dtype: Any = None) -> None:
    """Writes a public directory; see `Policy.export`."""
    if policy.quantization is not None:
        raise InputError(
            f"{folder}: a quantized policy has no public layout; save it instead, or export its "
            "rounded weights (`qvla export --dequantized`)"
        )
    policy.family.export(policy.config, policy.model, policy.statistics, folder, dtype=dtype)
    write_files(policy.processor, folder)


def packed_header(
    policy: "Policy", quantization: Mapping[str, Any] | None, *, dropped: bool
) -> dict[str, Any]:
    """What the header of a packed file says about a policy.

    Args:
        policy: packed, or what the packed layers are made of.
        quantization: see `Policy.quantization`.
        dropped: whether weights that inference never reads are left out.
    """
    return {
        "config": to_record(policy.config),
        "statistics": policy.statistics,
        "quantization": quantization,
        "packages": package_versions(),
        **({"sources": found} if (found := origins()) else {}),
        **({"unread": DROPPED} if dropped else {}),
    }


def _save_packed(policy: "Policy", path: Path) -> None:
    layers = packed_layers(policy.model)
    if not layers:
        raise InputError(
            f"{path}: no layer of the policy is packed; quantize it with packed=True first"
        )
    if path.suffix != SUFFIX:
        raise InputError(f"{path}: a packed policy is one file; give a name ending in {SUFFIX}")
    tables = packed_embeddings(policy.model)
    dropped = policy.family.is_dropped(policy.model)
    write_packed(
        path,
        layers=itertools.chain(
            ((name, layer.weight, layer.inputs) for name, layer in layers.items()),
            ((name, table.weight, LayerInputs()) for name, table in tables.items()),
        ),
        tensors=public_tensors(policy.model),
        files=policy.processor.files(),
        header=packed_header(policy, policy.quantization, dropped=dropped),
    )


def write_files(processor: "Processor", folder: Path) -> None:
    """Writes the files of a processor, such as its tokenizer."""
    for name, content in processor.files().items():
        if name.endswith(".json"):
            write_json(folder / name, json.loads(content))  # indented, for readers
        else:
            write_bytes(folder / name, content)
