"""How the sensitivities of pi0 and pi0.5 rank.

    python benchmarks/openpi_ranks.py pi0 pi05        # the tiny checkpoints of the tests
    python benchmarks/openpi_ranks.py FOLDER          # a policy of your own

Prints, for 2 bundled LIBERO frames and all basis vectors of the executed actions as probes:

1. the rank correlation of `jacobian` with exact probing of 96 channels drawn from all layers, the
   share of the most expensive tenth that it finds, and the ratio of exact to first-order costs;
2. the rank correlation of the whole table with that of the same frames with other noise;
3. costs of the rows of the token embedding, to first order and exact, and the error with all rows
   rounded.

The weights of the tiny checkpoints are random: their figures say that the first order is right,
not how a trained policy ranks.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from flax import nnx

from qvla_jax.array_typing import Float
from qvla_jax.data.calibration import CalibrationSet, calibration_set
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.kernels import dequantize, pack_table
from qvla_jax.models.surgery import get_module
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.sensitivity import joint_error, sensitivities, spearman
from qvla_jax.sensitivity.embeddings import RowCosts, embedding_costs
from qvla_jax.sensitivity.validation import probe_sample

FIXTURES = Path(__file__).parents[1] / "tests" / "parity" / "fixtures"
FRAMES, CHANNELS, ROW_BITS = 2, 96, 8
# Ratios of costs are stated for rows that cost more than this share of the most expensive one.
_SHARE = 1e-3


def main() -> None:
    """Prints the figures of the policies that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("policies", nargs="+", help="pi0, pi05, or a policy's name or folder")
    for name in parser.parse_args().policies:
        policy = tiny(name) if name in ("pi0", "pi05") else load_policy(name)
        frames = calibration_set("bundled", frames=FRAMES, horizon=policy.config.action_horizon)
        print_ranks(policy.config.name, policy, frames)
        print_rows(policy.config.name, policy, frames)


def tiny(name: str) -> Policy:
    """A tiny checkpoint in openpi's own layout."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(FIXTURES / f"{name}_tiny.zip") as archive:
            archive.extractall(folder)
        tokenizer = Path(folder, "tokenizer", "paligemma_tokenizer.model")
        return load_policy(folder, preset=f"{name}_libero", tokenizer=str(tokenizer))


def print_ranks(name: str, policy: Policy, frames: CalibrationSet) -> None:
    """Jacobian against exact probing, and against itself with other noise."""
    table = sensitivities(policy, frames, probes="full", joint=False)
    sample = probe_sample(policy, frames, table, channels=CHANNELS, frames=FRAMES)
    columns = [table.bits.index(bits) for bits in sample.bits]
    first_order = table.costs[sample.rows][:, columns]
    other = sensitivities(
        policy, frames.with_noise(1), probes="full", joint=False, statistics=table.statistics
    )
    reached = table.costs.any(axis=1)
    for rank, column, estimate, exact in zip(
        sample.ranks(table), columns, first_order.T, sample.costs.T, strict=True
    ):
        clear = estimate > 0
        ratio = exact[clear] / estimate[clear]
        noise = spearman(other.costs[reached, column], table.costs[reached, column])
        print(
            f"{name}: {rank.bits} bits, {len(sample.rows)} channels: spearman with exact "
            f"{rank.spearman:.3f}, most expensive tenth {rank.top:.2f}, exact / first order "
            f"{ratio.min():.2f} to {ratio.max():.2f}, median {np.median(ratio):.2f}; "
            f"other noise {noise:.3f}",
            flush=True,
        )


def print_rows(name: str, policy: Policy, frames: CalibrationSet) -> None:
    """Rows of the token embedding: to first order, one by one, and all at once."""
    (found,) = embedding_costs(policy, frames, bits=(ROW_BITS,), probes="full")
    first_order, exact = found.costs[:, 0], exact_rows(policy, frames, found)
    clear = exact > _SHARE * exact.max()
    ratio = first_order[clear] / exact[clear]
    rounded = quantize_uniform(policy, SOURCE, packed=False, embedding_bits=ROW_BITS)
    print(
        f"{name}: {len(found.tokens)} rows at {ROW_BITS} bits: first order / exact "
        f"{ratio.min():.3f} to {ratio.max():.3f}, median {np.median(ratio):.3f}; sums "
        f"{first_order.sum():.3g} and {exact.sum():.3g}; all rows rounded "
        f"{joint_error(policy, rounded, frames):.3g}",
        flush=True,
    )


def exact_rows(policy: Policy, frames: CalibrationSet, found: RowCosts) -> Float[np.ndarray, " u"]:
    """The measured error when a row alone is rounded."""
    table = get_module(policy.model, found.path).embedding[...]
    costs = []
    for token in found.tokens:
        row = dequantize(pack_table(np.asarray(table[token])[None], ROW_BITS))[0]
        model = nnx.clone(policy.model)
        get_module(model, found.path).embedding = nnx.Param(table.at[token].set(row))
        costs.append(joint_error(policy, policy.replace(model=model), frames))
    return np.asarray(costs)


if __name__ == "__main__":
    main()
