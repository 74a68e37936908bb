"""Can a table be trusted? Rank correlation with exact probing, and additivity."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from qvla_jax.array_typing import Float, Int
from qvla_jax.errors import InputError
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_layers
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.quantization.index import ChannelIndex
from qvla_jax.quantization.layers import LayerRules
from qvla_jax.sensitivity.batches import Calibration, FirstFrames
from qvla_jax.sensitivity.exact import exact_costs
from qvla_jax.sensitivity.methods import DEFAULT_SHARE, sensitivities
from qvla_jax.sensitivity.probes import Probes
from qvla_jax.sensitivity.ranks import spearman, top_overlap
from qvla_jax.sensitivity.strata import module_types
from qvla_jax.sensitivity.sweep import Sweep
from qvla_jax.sensitivity.table import SensitivityTable

RANKS_KIND = "qvla_jax.ranks"


def sample_channels(index: ChannelIndex, count: int, *, seed: int) -> Int[np.ndarray, " m"]:
    """Rows drawn without replacement, as evenly over all channels as chance allows; sorted."""
    if count < 1:
        raise InputError(f"channels to sample: expected at least 1, got {count}")
    count = min(count, len(index))
    return np.sort(np.random.default_rng(seed).choice(len(index), count, replace=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """How estimated costs order sampled channels, compared with exact ones."""

    bits: int
    # Spearman's rank correlation over all samples; 0 where one side has no variation.
    spearman: float
    # Share of the most expensive tenth of the samples that the estimate also finds.
    top: float
    # Module type -> Spearman's rank correlation; types with fewer than three samples, or without
    # variation, are left out.
    by_module: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """A table compared with exact probing of sampled channels."""

    channels: int
    frames: int
    # Of the table.
    method: str
    # The method on the probed frames, and the table itself, which has other frames as well.
    spearman: tuple[RankCorrelation, ...]
    spearman_table: tuple[RankCorrelation, ...]
    # The sampled channels, in the table's order, and their exact costs [m][n].
    rows: tuple[int, ...]
    exact: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedRanking(Ranking):
    """The content of ranks.json."""

    format: Literal["qvla_jax.ranks"] = RANKS_KIND
    version: Literal[1] = 1
    # Policy fingerprint and calibration hash.
    made_from: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class ExactSample:
    """Exactly probed costs of some channels, for comparison with estimates."""

    # The probed frames.
    part: FirstFrames
    rows: Int[np.ndarray, " m"]
    # Options, without 16.
    bits: tuple[int, ...]
    costs: Float[np.ndarray, "m n"]
    # Module type of each channel.
    types: tuple[str, ...]

    def ranks(self, table: SensitivityTable) -> tuple[RankCorrelation, ...]:
        """How a table orders the sampled channels: `rank_correlations` with exact probing."""
        columns = [table.bits.index(b) for b in self.bits]
        estimate = table.costs[self.rows][:, columns]
        return rank_correlations(self.types, self.bits, estimate, self.costs)


def probe_sample(
    policy: Policy,
    calibration: Calibration,
    table: SensitivityTable,
    *,
    channels: int = 256,
    frames: int = 8,
    seed: int = 0,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> ExactSample:
    """Probes sampled channels exactly, on the first frames of a calibration set.

    Args:
        policy: the full-precision policy.
        calibration: the table's calibration set.
        table: whose channels, options and quantizer are probed.
        channels: channels drawn over all layers.
        frames: frames that they are measured on.
        seed: of the draw.
        rules: those of the table; None takes those of the policy's layout.
        progress: reports progress.

    Raises:
        InputError: the table belongs to other layers, or nothing can be sampled.
    """
    layers = policy_layers(policy, rules)
    if tuple(layers) != table.index.paths:
        raise InputError("the table was made for other layers than this policy's")
    part = FirstFrames(calibration, min(frames, calibration.frames))
    rows = sample_channels(table.index, channels, seed=seed)
    bits = tuple(b for b in table.bits if b != SOURCE)
    sweep = Sweep(
        policy=policy,
        calibration=part,
        index=table.index,
        quantizer=table.quantizer,
        bits=bits,
        weights=table.action_weights,
        steps=table.executed_steps,
        progress=progress,
    )
    costs, _ = exact_costs(sweep, rows=rows)
    names, numbers = module_types(table.index, policy.layout)
    return ExactSample(part, rows, bits, costs, tuple(names[number] for number in numbers[rows]))


def same_frames(
    policy: Policy,
    sample: ExactSample,
    table: SensitivityTable,
    *,
    method: str | None = None,
    seed: int = 0,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> SensitivityTable:
    """A method's table on the frames of a sample, for the table's quantizer.

    Uses as many reverse passes as the table in total (at most one per action entry and frame).

    Args:
        policy: the full-precision policy.
        sample: the frames.
        table: the source of settings and input statistics.
        method: None takes the table's own.
        seed: of the probes.
        rules: those of the table; None takes those of the policy's layout.
        progress: reports progress.
    """
    return sensitivities(
        policy,
        sample.part,
        method=method or table.method,
        bits=table.bits,
        probes=_probes(policy, table, sample.part.frames),
        exact_share=table.provenance["settings"].get("exact_share") or DEFAULT_SHARE,
        seed=seed,
        action_weights=table.action_weights,
        executed_steps=table.executed_steps or policy.config.action_horizon,
        quantizer=table.settings,
        statistics=table.statistics,
        joint=False,
        rules=rules,
        progress=progress,
    )


@in_32_bits
def validate(
    policy: Policy,
    calibration: Calibration,
    table: SensitivityTable,
    *,
    channels: int = 256,
    frames: int = 8,
    seed: int = 0,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> Ranking:
    """Compares a table with exact probing of sampled channels.

    The table's costs are means over its whole calibration set, but exact probing is expensive and
    only sees the first `frames` of it, so their correlation is a lower bound for the method. The
    method is therefore also run on those frames.

    Args:
        policy: the full-precision policy.
        calibration: the table's calibration set.
        table: what is tested.
        channels: channels drawn over all layers.
        frames: frames that they are measured on.
        seed: of the draw.
        rules: those of the table; None takes those of the policy's layout.
        progress: reports progress.

    Raises:
        InputError: the table belongs to other layers, or nothing can be sampled.
    """
    sample = probe_sample(
        policy,
        calibration,
        table,
        channels=channels,
        frames=frames,
        seed=seed,
        rules=rules,
        progress=progress,
    )
    same = same_frames(policy, sample, table, seed=seed, rules=rules, progress=progress)
    return Ranking(
        channels=len(sample.rows),
        frames=sample.part.frames,
        method=table.method,
        spearman=sample.ranks(same),
        spearman_table=sample.ranks(table),
        rows=tuple(sample.rows.tolist()),
        exact=tuple(map(tuple, sample.costs.tolist())),
    )


def _probes(policy: Policy, table: SensitivityTable, frames: int) -> Probes:
    """As many reverse passes on these frames as the table used on all of its own."""
    settings = table.provenance["settings"]
    if settings["probes"] is None or settings["probes"] == "full":
        return "full"
    probes = -(-settings["probes"] * settings["frames"] // frames)
    steps = table.executed_steps or policy.config.action_horizon
    entries = steps * policy.config.action_dim
    return probes if probes < entries else "full"


def rank_correlations(
    types: Sequence[str],
    bits: tuple[int, ...],
    estimate: Float[np.ndarray, "m n"],
    exact: Float[np.ndarray, "m n"],
) -> tuple[RankCorrelation, ...]:
    """Rank correlations for each bit-width, over all samples and within each module type.

    Args:
        types: module type of each sample.
        bits: options.
        estimate: costs to judge.
        exact: exactly probed costs.
    """
    of_type = np.asarray(types)
    result = []
    for column, b in enumerate(bits):
        by_module = {}
        for kind in sorted(set(types)):
            of_kind = of_type == kind
            if of_kind.sum() >= 3:
                rho = spearman(estimate[of_kind, column], exact[of_kind, column])
                if np.isfinite(rho):
                    by_module[str(kind)] = rho
        rho = spearman(estimate[:, column], exact[:, column])
        # Without variation there is no correlation, and JSON has no NaN.
        overall = rho if np.isfinite(rho) else 0.0
        top = top_overlap(estimate[:, column], exact[:, column])
        result.append(RankCorrelation(bits=b, spearman=overall, top=top, by_module=by_module))
    return tuple(result)


def joint_error(
    policy: Policy, quantized: Policy, calibration: Calibration, *, batch: int = 32
) -> float:
    """Measured mean over frames of || A_quantized(x) - A*(x) ||^2, summed over the chunk.

    Of a chunk counts what the robot executes. Comparable with `SensitivityTable.predicted(bits)`:
    their ratio shows how well single errors add up.
    """
    total, frames = 0.0, 0
    for observations in calibration.batches(batch):
        change = quantized.infer_normalized(observations).astype(np.float64)
        change -= policy.infer_normalized(observations)
        total += float(np.sum(policy.layout.executed(change) ** 2))
        frames += len(change)
    return total / frames
