"""Measurements that methods share on one policy and one calibration set, each taken once."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.methods.moments import InputMoments, input_moments
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import InputStatistics, LayerRules, QuantizerSettings
from qvla_jax.quantization.statistics import Weighting
from qvla_jax.sensitivity import SensitivityTable, SweepStore, sensitivities
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.joint import joint_factors
from qvla_jax.sensitivity.statistics import input_statistics

Moments = Mapping[str, InputMoments]
# All options that rows can have; a table of fewer is a subset.
OPTIONS = (0, 2, 3, 4, 8, 16)

Kept = TypeVar("Kept", InputStatistics, SensitivityTable)


class Measurements:
    """Measures on first use and keeps the result, for all methods of one policy and frames."""

    def __init__(
        self,
        policy: Policy,
        calibration: Calibration,
        *,
        rules: LayerRules | None = None,
        moments: Moments | None = None,
        probes: int = 8,
        folder: Path | None = None,
        progress: Progress = no_progress,
    ):
        """Measures nothing yet.

        Args:
            policy: full precision.
            calibration: the only frames that are used.
            rules: which layers are quantized; None takes those of the policy's layout.
            moments: of the layers' inputs, if they are known already.
            probes: probes of the sensitivities per frame.
            folder: where statistics and sensitivities are kept for other processes; None keeps
                nothing.
            progress: reports progress.
        """
        self.policy, self.calibration = policy, calibration
        self.rules = policy.layout.rules if rules is None else rules
        self.probes, self.progress = probes, progress
        if moments is not None:
            self.moments = moments
        self._folder: Path | None = None
        if folder is not None:
            of = [policy.fingerprint, calibration.manifest["sha256"], probes]
            self._folder = folder / _digest([*of, dataclasses.asdict(self.rules)])
        # Instances are compared by identity, so each has its own entries.
        self.statistics = functools.lru_cache(maxsize=None)(self._statistics)
        self._whole_table = functools.lru_cache(maxsize=None)(self._measured_table)
        self.table = functools.lru_cache(maxsize=None)(self._table)

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of the inputs of every layer that the forward pass reaches."""
        index = policy_index(self.policy, self.rules)
        return input_moments(self.policy, self.calibration, index, progress=self.progress)

    def _statistics(self, weighting: Weighting) -> InputStatistics:
        def measure() -> InputStatistics:
            index = policy_index(self.policy, self.rules)
            return input_statistics(
                self.policy, self.calibration, index, weighting=weighting, progress=self.progress
            )

        return self._kept(f"statistics_{weighting}", measure, InputStatistics.load)

    def _measured_table(
        self, method: str, quantizer: QuantizerSettings, weights: tuple[float, ...] | None
    ) -> SensitivityTable:
        needed = quantizer.needs_statistics
        statistics = self.statistics(quantizer.weighting) if needed else None

        def measure() -> SensitivityTable:
            return sensitivities(
                self.policy, self.calibration, method=method, bits=OPTIONS, quantizer=quantizer,
                statistics=statistics, probes=self.probes, joint=False, rules=self.rules,
                action_weights=None if weights is None else np.asarray(weights),
                store=None if self._folder is None else SweepStore(self._folder / "sweep"),
                progress=self.progress,
            )  # fmt: skip

        load = functools.partial(SensitivityTable.load, statistics=statistics)
        name = f"sensitivity_{method}_{_digest(_of(quantizer, weights))}"
        return self._kept(name, measure, load)

    def _table(
        self,
        method: str,
        quantizer: QuantizerSettings,
        options: tuple[int, ...],
        joint: bool,
        weights: tuple[float, ...] | None = None,
    ) -> SensitivityTable:
        """Costs of a quantizer's options, with joint factors and action weights if wanted."""
        whole = self._whole_table(method, quantizer, weights)
        columns = [whole.bits.index(b) for b in options]
        error = whole.standard_error
        table = dataclasses.replace(
            whole,
            bits=options,
            costs=whole.costs[:, columns],
            sizes=whole.sizes[:, columns],
            standard_error=None if error is None else error[:, columns],
        )
        if not joint:
            return table

        def measure() -> SensitivityTable:
            factors = joint_factors(
                self.policy, self.calibration, table, rules=self.rules, progress=self.progress
            )
            return dataclasses.replace(table, joint=factors)

        load = functools.partial(SensitivityTable.load, statistics=table.statistics)
        name = f"joint_{method}_{_digest([*_of(quantizer, weights), options])}"
        return self._kept(name, measure, load)

    def _kept(self, name: str, measure: Callable[[], Kept], load: Callable[[Path], Kept]) -> Kept:
        """The measurement kept in the folder, taken first if it is missing."""
        if self._folder is None:
            return measure()
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            measure().save(path)
        # Read back even right after measuring, because files hold fewer digits.
        return load(path)


def _of(quantizer: QuantizerSettings, weights: tuple[float, ...] | None) -> list[Any]:
    return [dataclasses.asdict(quantizer), *([] if weights is None else [weights])]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
