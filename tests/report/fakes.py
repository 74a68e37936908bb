# ruff: noqa: E501
"""A made-up report with the shape of a real one."""

import numpy as np

from qvla_jax.evaluation import action_errors
from qvla_jax.evaluation.latency import ChunkTimes, Latency
from qvla_jax.evaluation.results import AllocationFacts, MethodResult, PackedFacts, PolicyFacts
from qvla_jax.report import SensitivityMap
from qvla_jax.report.contents import (
    Budget,
    LayerFacts,
    RankingFacts,
    Report,
    SensitivityFacts,
    StageSummary,
)
from qvla_jax.sensitivity.validation import RankCorrelation
from qvla_jax.stage_times import StageSeconds

LAYERS = {
    **{f"vision_backbone.featurizer.blocks.{i}.attn.qkv": 96 for i in range(3)},
    **{f"vision_backbone.fused_featurizer.blocks.{i}.mlp.fc1": 128 for i in range(3)},
    **{f"language_model.model.layers.{i}.mlp.gate_proj": 256 for i in range(3)},
}
BITS = (0, 2, 4, 8, 16)


def fake_map(seed=0):
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(list(LAYERS.values()))])
    base = np.exp(random.normal(size=(offsets[-1], 1)) * 2 - 9)
    costs = base * np.array([3.0, 1.0, 0.05, 2e-4, 0.0])
    return SensitivityMap(list(LAYERS), offsets, BITS, costs)


def fake_entry(family, method, label, bits, size, error, *, predicted=None, seed=0):
    random = np.random.default_rng(seed)
    reference = random.uniform(-1, 1, (20, 8, 7))
    expert = reference + random.normal(size=reference.shape) * 0.03
    candidate = reference + random.normal(size=reference.shape) * np.sqrt(error / 56)
    allocated = family not in ("uniform", "full")
    return MethodResult(
        method=method,
        label=label,
        series=label.split(",")[0],
        family=family,
        requested_bits=None if family == "full" else bits,
        stored_bytes=size,
        stored_bits_per_weight=bits,
        avg_bits_per_weight=bits - 0.3,
        channels_by_bits={"4": 1137},
        execution="packed" if family == "ours" else "float32",
        versus_full_precision=action_errors(candidate, reference),
        versus_expert=action_errors(candidate, expert),
        allocation=AllocationFacts(
            sensitivity="jacobian",
            solver=method.split("+")[1],
            bias_correction=True,
            budget_bytes=size,
            matches_uniform_bits=None,
            predicted_sse_normalized=predicted,
        )
        if allocated
        else None,
    )


def fake_report():
    weights = 4_000_000

    def size(bits):
        return int(weights * bits / 8)

    ours = "jacobian+greedy:marginal@4"
    methods = [
        fake_entry("full", "full", "full precision", 16.0, size(16), 0.0),
        fake_entry("uniform", "uniform@4", "uniform RTN, 4 bits", 4.2, size(4.2), 0.1),
        fake_entry(
            "baseline", "input_hessian+greedy:marginal@4", "input Hessian", 4.0, size(4), 0.05
        ),
        fake_entry(
            "other_solver",
            "jacobian+greedy:qvla@4",
            "QVLA's greedy",
            4.0,
            size(4),
            0.01,
            predicted=0.008,
        ),
        fake_entry("ours", ours, "action sensitivity", 4.0, size(4), 0.003, predicted=0.002),
    ]
    sweep = []
    for bits in (2.5, 3.0, 3.5, 5.0, 6.0, 8.0):
        error = 2.0 * np.exp(-1.6 * bits)
        sweep.append(
            fake_entry(
                "uniform",
                f"uniform@{bits}",
                f"uniform RTN, {bits} bits",
                bits + 0.2,
                size(bits + 0.2),
                30 * error,
            )
        )
        sweep.append(
            fake_entry(
                "baseline",
                f"input_hessian+greedy:marginal@{bits}",
                "input Hessian",
                bits,
                size(bits),
                20 * error,
            )
        )
        sweep.append(
            fake_entry(
                "ours",
                f"jacobian+greedy:marginal@{bits}",
                "action sensitivity",
                bits,
                size(bits),
                error,
                predicted=error / 2,
            )
        )
        sweep.append(
            fake_entry(
                "other_solver",
                f"jacobian+greedy:qvla@{bits}",
                "QVLA's greedy",
                bits,
                size(bits),
                3 * error,
                predicted=error,
            )
        )
    frames = {
        "dataset": "libero_spatial_mini",
        "version": "1.0.0",
        "frames": 128,
        "episodes": 20,
        "seed": 0,
    }
    return Report(
        created="2026-11-23T22:00:00Z",
        model=PolicyFacts(
            name="libero-mini", fingerprint="ab" * 32, options={}, parameters=4_150_000, layers=len(LAYERS),
            channels=sum(LAYERS.values()), quantized_weights=weights,
        ),
        packed=PackedFacts(
            file="policy.qvla", file_bytes=size(5), packed_bytes=size(4), other_bytes=size(0.9),
            largest_action_difference_normalized=1e-6, note="The chosen policy ran from its packed weights.",
        ),
        latency=Latency(
            full=ChunkTimes(calls=50, median_ms=15.25, p95_ms=18.0),
            packed=ChunkTimes(calls=50, median_ms=10.5, p95_ms=12.0), speed_up=1.45,
        ),
        budget=Budget(bits_per_weight=4.0, bytes=size(4)),
        calibration={**frames, "split": "calibration", "hash": "0f" * 32},
        heldout={**frames, "split": "heldout", "hash": "1e" * 32},
        sensitivity=SensitivityFacts(method="jacobian", bits=BITS),
        validation=RankingFacts(
            channels=256, frames=32, spearman=ranks(0.95, 0.96, 0.999, 0.999), spearman_table=ranks(*[0.93] * 4),
        ),
        chosen=ours,
        methods=tuple(methods),
        sweep=tuple(sweep),
        allocations=(),
        action_names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
        layers=tuple(
            LayerFacts(
                path=path, name=path, out_features=n, fan_in=64, average_bits=3.4, sensitivity_by_bits={},
                channels_by_bits={"0": n // 8, "2": n // 4, "4": n // 2, "8": n // 8},
            )
            for path, n in LAYERS.items()
        ),
        seconds=StageSummary(sensitivity=60.0, allocate=1.0, evaluate=2.0),
        stages=(StageSeconds("load", 1.5, 0.25, 1.25), StageSeconds("evaluate", 40.0, 5.5, 70.0)),
        closed_loop=None,
        provenance={
            "packages": {"jax": "0.10.2"}, "commit": "0" * 40, "python": "3.11.7", "system": "Linux",
            "machine": "x86_64", "device": {"platform": "cpu", "kind": "cpu", "count": 2}, "seed": 0,
        },
    )  # fmt: skip


def ranks(*rho):
    return tuple(
        RankCorrelation(bits=b, spearman=r, top=1.0, by_module={})
        for b, r in zip((0, 2, 4, 8), rho, strict=True)
    )
