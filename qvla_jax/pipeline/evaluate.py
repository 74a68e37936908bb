"""Stage 5: the action error of every allocation on frames that calibration never saw."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np

from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.data.calibration import CalibrationSet, calibration_set
from qvla_jax.errors import InputError
from qvla_jax.evaluation import Predictions
from qvla_jax.evaluation.latency import WARM_UP, Latency, chunk_seconds, summarize_seconds
from qvla_jax.evaluation.offline import PreparedFrames
from qvla_jax.evaluation.results import (
    AllocationFacts,
    EmbeddingFacts,
    Evaluation,
    MethodResult,
    PackedFacts,
    PolicyFacts,
)
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.comparable import comparable
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.quantize import policy_index, quantize, quantize_uniform
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.methods import check_setting, title
from qvla_jax.models import named_modules
from qvla_jax.models.linear import Embed
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocation, Allocations, load_tables
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.configs import EvaluateConfig, HeldoutConfig
from qvla_jax.pipeline.methods import load_method, method_files
from qvla_jax.pipeline.quantize import embedding_bits, load_packed, packed_bits
from qvla_jax.plain import to_plain
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress, track
from qvla_jax.provenance import provenance
from qvla_jax.quantization import ChannelIndex, Quantizer, uniform_bytes
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.quantization.layout import source_bytes
from qvla_jax.quantization.quantizer import UNIFORM_FEEDBACK
from qvla_jax.sensitivity import SensitivityTable


@in_32_bits
def evaluate(
    config: EvaluateConfig,
    *,
    policy: Policy | None = None,
    table: SensitivityTable | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measures full precision, uniform rounding and every allocation; writes evaluation.json.

    The chosen allocation runs from the packed weights of policy.qvla. All others hold the same
    grids' values in float32, so that they share one compiled program; the chosen one runs both
    ways, and the largest difference of an action is reported.

    Args:
        config: settings.
        policy: the policy, if it is loaded already.
        table: the main sensitivity table, if it is loaded already.
        progress: reports progress.

    Raises:
        InputError: a file is missing or was made for another policy or calibration set, or the
            evaluation frames are those of the calibration.
    """
    started = time.perf_counter()
    policy = (
        load_policy(config.model, progress=progress, **config.said()) if policy is None else policy
    )
    path = config.out / files.ALLOCATION
    allocations = Allocations.load(path)
    calibration = load_calibration(config.out)
    files.check_same(
        path,
        allocations.made_from,
        {"policy fingerprint": policy.fingerprint, "calibration hash": calibration.hash},
        remedy=f"run `qvla sensitivity` and `qvla allocate` with --out {config.out} again",
    )
    heldout = heldout_set(config, horizon=policy.config.action_horizon)
    check_disjoint(calibration, heldout)
    held = PreparedFrames.of(policy, heldout, config.eval_batch)
    index = policy_index(policy)
    table = load_tables(config.out)[0] if table is None else table
    files.check_steps(config.out, table, policy.layout.executed_steps)

    difference = 0.0
    feedback = Quantizer(UNIFORM_FEEDBACK, table.statistics)
    packed = load_packed(config.out / files.POLICY, allocations)
    # Of all quantized policies of the run alike, so that their errors compare.
    rounded = embedding_bits(config.out / files.POLICY, policy)
    tables = _embedding_bytes(policy, packed)
    methods = method_files(config.out)
    total = 1 + 2 * len(config.uniform_bits) + len(allocations.items) + len(methods)
    progress("evaluate", 0, total)
    reference = held.predict(comparable(policy))
    entries = [_full_entry(index, reference)]
    embeddings = None
    if rounded != SOURCE:
        alone = quantize_uniform(policy, SOURCE, packed=False, embedding_bits=rounded)
        embeddings = EmbeddingFacts(
            bits=rounded,
            rows=sum(len(table) for table in _embeddings(policy).values()),
            stored_bytes=tables[1],
            source_bytes=tables[0],
            versus_full_precision=held.predict(comparable(alone)).errors(reference.chunks),
        )
    for bits in config.uniform_bits:
        progress("evaluate", len(entries), total)
        made = quantize_uniform(policy, bits, packed=False, embedding_bits=rounded)
        uniform = comparable(made)
        entries.append(_uniform_entry(index, bits, held.predict(uniform), reference))
        progress("evaluate", len(entries), total)
        made = quantize_uniform(
            policy, bits, quantizer=feedback, packed=False, embedding_bits=rounded
        )
        uniform = comparable(made)
        entries.append(_feedback_entry(index, bits, held.predict(uniform), reference))
    # Solvers and budgets may agree on the bits.
    known: dict[bytes, Predictions] = {}
    for allocation in allocations.items:
        progress("evaluate", len(entries), total)
        same = allocation.bits.tobytes()
        if same not in known:
            floats = quantize(
                policy,
                allocation,
                quantizer=table.quantizer,
                packed=False,
                embedding_bits=rounded,
            )
            known[same] = held.predict(comparable(floats))
        predictions, execution = known[same], "float32"
        if allocation is allocations.chosen:
            in_float, execution = predictions, "packed"
            predictions = held.predict(packed)
            difference = float(np.abs(predictions.chunks - in_float.chunks).max())
        solver = allocations.chosen.solver
        entries.append(
            _entry(index, allocation, predictions, reference, solver=solver, execution=execution)
        )
    for path in methods:
        progress("evaluate", len(entries), total)
        other = load_method(path, allocations.made_from)
        predictions = held.predict(comparable(unpacked(policy, other)))
        entry = _method_entry(index, path, other, predictions, reference)
        if rounded != SOURCE:
            size = _embedding_bytes(policy, other)[1]
            entry = dataclasses.replace(entry, embedding_bytes=size)
        entries.append(entry)
    if rounded != SOURCE:
        entries = [
            dataclasses.replace(entry, embedding_bytes=tables[entry.family != "full"])
            if entry.embedding_bytes is None
            else entry
            for entry in entries
        ]
    progress("evaluate", total, total)
    latency = _latency(config, policy, packed, heldout, progress)
    evaluation = Evaluation(
        made_from=allocations.made_from,
        model=PolicyFacts(
            name=policy.config.name,
            fingerprint=policy.fingerprint,
            options=config.said(),
            parameters=count_parameters(policy),
            layers=len(index.layers),
            channels=len(index),
            quantized_weights=index.num_weights,
        ),
        packed=describe_packed(config.out / files.POLICY, allocations, difference, embeddings),
        latency=latency,
        heldout=heldout.describe(),
        chosen=allocations.chosen.name,
        methods=tuple(entries),
        short_names={path: policy.layout.short_name(path) for path in index.paths},
        action_names=policy.layout.action_names,
        executed_steps=policy.layout.executed_steps,
        embeddings=embeddings,
        seconds=time.perf_counter() - started,
        provenance=provenance(seed=config.seed),
    )
    write_json(config.out / files.EVALUATION, to_plain(evaluation))
    return evaluation


def _latency(
    config: EvaluateConfig,
    policy: Policy,
    packed: Policy,
    heldout: CalibrationSet,
    progress: Progress,
) -> Latency | None:
    """Times one chunk of the full and of the packed policy, alternating call by call."""
    if not config.latency_calls:
        return None
    calls = WARM_UP + config.latency_calls
    some = list(itertools.islice(heldout.batches(1), calls))
    observations = itertools.islice(itertools.cycle(some), calls)
    seconds = chunk_seconds(
        {"full": policy, "packed": packed}, track(observations, calls, "latency", progress)
    )
    ratios = np.divide(seconds["full"], seconds["packed"])
    return Latency(
        full=summarize_seconds(seconds["full"]),
        packed=summarize_seconds(seconds["packed"]),
        speed_up=float(np.median(ratios)),
    )


def _embeddings(policy: Policy) -> dict[str, np.ndarray]:
    """The token embeddings of a full-precision policy, by path."""
    return {
        path: np.asarray(embed.embedding[...])
        for path, embed in named_modules(policy.model, Embed).items()
    }


def _embedding_bytes(policy: Policy, quantized: Policy) -> tuple[int, int]:
    """Bytes that files store for the token embeddings of a policy, and of one made from it."""
    source = {path: t.size * source_bytes(t) for path, t in _embeddings(policy).items()}
    own = {path: t.weight.nbytes for path, t in packed_embeddings(quantized.model).items()}
    return sum(source.values()), sum((source | own).values())


def describe_packed(
    path: Path, allocations: Allocations, difference: float, embeddings: EmbeddingFacts | None
) -> PackedFacts:
    """Describes the packed policy's file, and how far its actions are from those in float32.

    Args:
        path: the file.
        allocations: whose chosen one it holds.
        difference: the largest one of an action.
        embeddings: of the token embeddings, if it rounds them.

    Raises:
        InputError: the file does not store the bytes that the allocator counted.
    """
    file, chosen = PackedFile(path), allocations.chosen
    size = sum(file.layers[layer].nbytes for layer in allocations.index.paths)
    if size != chosen.stored_bytes:
        raise InputError(
            f"{path}: stores {size:,} bytes in quantized layers, the allocation counted "
            f"{chosen.stored_bytes:,}"
        )
    note = ""
    if embeddings is not None:
        alone = embeddings.versus_full_precision.action_mse_normalized
        note = (
            f" Token embeddings have {embeddings.bits} bits a row in all of them "
            f"({embeddings.stored_bytes:,} instead of {embeddings.source_bytes:,} bytes, which no "
            f"budget counts); alone they make a mean squared action error of {alone:.1e}."
        )
    return PackedFacts(
        file=path.name,
        file_bytes=path.stat().st_size,
        packed_bytes=size,
        other_bytes=file.packed_bytes - size + file.other_bytes,
        largest_action_difference_normalized=difference,
        note="The chosen policy ran from its packed weights; its actions differ from those of "
        f"the same values in float32 by at most {difference:.1e} (normalized). The other quantized "
        "policies ran in float32 on exactly the values of their grids; their bytes are counted by "
        f"the same rules.{note}",
    )


def heldout_set(config: HeldoutConfig, *, horizon: int) -> CalibrationSet:
    """Draws the evaluation frames, or takes all of the split."""
    everything = config.eval_frames < 1
    return calibration_set(
        config.eval_dataset,
        frames=None if everything else config.eval_frames,
        trajectories="all" if everything else None,
        seed=config.seed,
        split=config.eval_split,
        horizon=horizon,
        spec=config.eval_spec,
    )


def check_disjoint(calibration: CalibrationSet, heldout: CalibrationSet) -> None:
    """Refuses to evaluate on the calibration frames.

    Raises:
        InputError: both sets draw from the same files.
    """
    if calibration.shares_data_with(heldout):
        found = heldout.describe()
        raise InputError(
            f"split {found['split']!r} of {found['dataset']} was calibrated on; evaluate on "
            "another one (--eval-split)"
        )


def count_parameters(policy: Policy) -> int:
    """Counts the policy's parameters, quantized or not."""
    import jax
    from flax import nnx

    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(policy.model, nnx.Param)))


def _full_entry(index: ChannelIndex, reference: Predictions) -> MethodResult:
    return MethodResult(
        method="full",
        label="full precision",
        series="full precision",
        family="full",
        **_stored(index, uniform_bytes(index, SOURCE), np.full(len(index), SOURCE)),
        **_measured(reference, reference),
    )


def _uniform_entry(
    index: ChannelIndex, bits: int, candidate: Predictions, reference: Predictions
) -> MethodResult:
    return MethodResult(
        method=f"uniform@{bits}",
        label=f"uniform round-to-nearest, {bits} bits",
        series="uniform round-to-nearest",
        family="uniform",
        requested_bits=float(bits),
        **_stored(index, uniform_bytes(index, bits), np.full(len(index), bits)),
        **_measured(candidate, reference),
    )


def _feedback_entry(
    index: ChannelIndex, bits: int, candidate: Predictions, reference: Predictions
) -> MethodResult:
    """The same bytes, rounded with error feedback: the gain from better rounding alone."""
    return dataclasses.replace(
        _uniform_entry(index, bits, candidate, reference),
        method=f"uniform_feedback@{bits}",
        label=f"uniform, error feedback (GPTQ), {bits} bits",
        series="uniform, error feedback (GPTQ)",
        family="baseline",
    )


def _method_entry(
    index: ChannelIndex,
    path: Path,
    packed: Policy,
    candidate: Predictions,
    reference: Predictions,
) -> MethodResult:
    """A published method (`qvla quantize --method`)."""
    setting = check_setting(path.stem)
    series = title(setting)
    found = packed_bits(packed)
    bits = np.concatenate([found[layer] for layer in index.paths])
    return MethodResult(
        method=setting.name,
        label=f"{series}, {setting.bits:g} bits",
        series=series,
        family="baseline",
        requested_bits=setting.bits,
        **_stored(index, PackedFile(path).packed_bytes, bits),
        **_measured(candidate, reference),
    )


def _entry(
    index: ChannelIndex,
    allocation: Allocation,
    candidate: Predictions,
    reference: Predictions,
    *,
    solver: str,
    execution: str,
) -> MethodResult:
    ours = not allocation.baseline
    source = "action sensitivity" if ours else allocation.sensitivity.replace("_", " ")
    series = f"{source}, {allocation.solver}"
    budget = f"{allocation.budget_bits:g} bits"
    if allocation.matches is not None:
        budget = f"bytes of uniform {allocation.matches} bits"
    return MethodResult(
        method=allocation.name,
        label=f"{series}, {budget}",
        series=series,
        family=("ours" if allocation.solver == solver else "other_solver") if ours else "baseline",
        requested_bits=allocation.budget_bits,
        **_stored(index, allocation.stored_bytes, allocation.bits),
        **_measured(candidate, reference, execution=execution),
        allocation=AllocationFacts(
            sensitivity=allocation.sensitivity,
            solver=allocation.solver,
            bias_correction=True,
            budget_bytes=allocation.budget_bytes,
            matches_uniform_bits=allocation.matches,
            # The unit of a baseline's costs is not that of the action error.
            predicted_sse_normalized=allocation.predicted_sse_normalized if ours else None,
        ),
    )


def _stored(index: ChannelIndex, size: int, bits: np.ndarray) -> dict[str, Any]:
    """Fields of a `MethodResult`: what the policy stores."""
    widths, counts = np.unique(bits, return_counts=True)
    return {
        "stored_bytes": int(size),
        "stored_bits_per_weight": 8 * size / index.num_weights,
        "avg_bits_per_weight": index.average_bits(bits),
        "channels_by_bits": {str(w): int(n) for w, n in zip(widths, counts, strict=True)},
    }


def _measured(
    candidate: Predictions, reference: Predictions, *, execution: str = "float32"
) -> dict[str, Any]:
    """Fields of a `MethodResult`: how it ran, and its errors."""
    return {
        "execution": execution,
        "versus_full_precision": candidate.errors(reference.chunks),
        "versus_expert": candidate.errors(reference.expert),
    }
