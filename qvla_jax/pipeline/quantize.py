"""Stage 4: pack the weights at the chosen bits into one file."""

from pathlib import Path

import numpy as np

from qvla_jax.array_typing import Int
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.errors import InputError
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.packed_linear import packed_layers
from qvla_jax.inference.quantize import quantize as pack_policy
from qvla_jax.models import named_modules
from qvla_jax.models.linear import Embed
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.pipeline.configs import QuantizeConfig
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.sensitivity import SensitivityTable


@in_32_bits
def quantize(
    config: QuantizeConfig,
    *,
    policy: Policy | None = None,
    table: SensitivityTable | None = None,
    progress: Progress = no_progress,
) -> Policy:
    """Packs the chosen allocation and writes policy.qvla.

    Args:
        config: settings.
        policy: the full-precision policy, if it is loaded already.
        table: the main sensitivity table, if it is loaded already.
        progress: reports progress.

    Returns:
        The packed policy.

    Raises:
        InputError: a file is missing, or was made for another policy or calibration set.
    """
    progress("quantize", 0, 1)
    policy = (
        load_policy(config.model, progress=progress, **config.said()) if policy is None else policy
    )
    allocations = Allocations.load(config.out / files.ALLOCATION)
    table = load_tables(config.out)[0] if table is None else table
    made_from = files.made_from(table)
    remedy = f"run `qvla sensitivity` and `qvla allocate` with --out {config.out} again"
    files.check_same(
        config.out / files.SENSITIVITY,
        made_from,
        {"policy fingerprint": policy.fingerprint},
        remedy=remedy,
    )
    files.check_same(config.out / files.ALLOCATION, allocations.made_from, made_from, remedy=remedy)
    packed = pack_policy(
        policy,
        allocations.chosen,
        quantizer=table.quantizer,
        embedding_bits=config.embedding_bits,
    )
    packed.save(config.out / files.POLICY)
    progress("quantize", 1, 1)
    return packed


def load_packed(path: Path, allocations: Allocations) -> Policy:
    """Loads the packed policy of a run.

    Raises:
        InputError: it is missing, damaged, or not of the chosen allocation.
    """
    policy = load_policy(files.needed(path))
    found = packed_bits(policy)
    bits = allocations.chosen.bits
    expected = {layer.path: bits[rows] for layer, rows in allocations.index.items()}
    same = found.keys() == expected.keys() and all(
        np.array_equal(bits, expected[name]) for name, bits in found.items()
    )
    if not same or policy.quantization is None:
        raise files.stale(path, "quantize")
    remedy = f"run `qvla quantize --out {path.parent}` again"
    files.check_same(path, policy.quantization, allocations.made_from, remedy=remedy)
    return policy


def embedding_bits(path: Path, policy: Policy) -> int:
    """Bits of the rows of token embeddings in a packed file; 16 where it keeps them.

    Args:
        path: the file.
        policy: the full-precision policy that it was made from.
    """
    entries, embeds = PackedFile(path).layers, named_modules(policy.model, Embed)
    return max((entries[name].segments[0].bits for name in entries.keys() & embeds), default=SOURCE)


def packed_bits(policy: Policy) -> dict[str, Int[np.ndarray, " c"]]:
    """Bits of the channels of each packed layer.

    Raises:
        InputError: no layer is packed.
    """
    layers = packed_layers(policy.model)
    if not layers:
        raise InputError(f"{policy.config.name}: no layer is packed")
    return {name: layer.weight.bits() for name, layer in layers.items()}
