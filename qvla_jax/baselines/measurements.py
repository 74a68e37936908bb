"""What methods measure on one policy and one calibration set, each thing once."""

import dataclasses
import functools
from collections.abc import Mapping

from qvla_jax.baselines.moments import InputMoments, input_moments
from qvla_jax.inference.policy import Policy
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import (
    DEFAULT_RULES,
    InputStatistics,
    LayerRules,
    QuantizerSettings,
    policy_index,
)
from qvla_jax.quantization.statistics import Weighting
from qvla_jax.sensitivity import SensitivityTable, sensitivities
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.joint import joint_factors
from qvla_jax.sensitivity.statistics import input_statistics

Moments = Mapping[str, InputMoments]
# All that rows can have; a table of fewer is a part of it.
OPTIONS = (0, 2, 3, 4, 8, 16)


class Measurements:
    """Measures on first use and keeps the result, for all methods of one policy and frames."""

    def __init__(
        self,
        policy: Policy,
        calibration: Calibration,
        *,
        rules: LayerRules = DEFAULT_RULES,
        moments: Moments | None = None,
        probes: int = 8,
        progress: Progress = no_progress,
    ):
        """Measures nothing yet.

        Args:
            policy: full precision.
            calibration: the only frames that are looked at.
            rules: which layers are quantized.
            moments: of the layers' inputs, if they are known already.
            probes: of sensitivities, for each frame.
            progress: called as it goes on.
        """
        self.policy, self.calibration, self.rules = policy, calibration, rules
        self.probes, self.progress = probes, progress
        if moments is not None:
            self.moments = moments
        # Instances are compared by identity, so each has entries of its own.
        self.statistics = functools.lru_cache(maxsize=None)(self._statistics)
        self._whole_table = functools.lru_cache(maxsize=None)(self._measured_table)
        self.table = functools.lru_cache(maxsize=None)(self._table)

    @functools.cached_property
    def moments(self) -> Moments:
        """Of the inputs of every layer that the forward pass reaches."""
        index = policy_index(self.policy, self.rules)
        return input_moments(self.policy, self.calibration, index, progress=self.progress)

    def _statistics(self, weighting: Weighting) -> InputStatistics:
        index = policy_index(self.policy, self.rules)
        return input_statistics(
            self.policy, self.calibration, index, weighting=weighting, progress=self.progress
        )

    def _measured_table(self, method: str, quantizer: QuantizerSettings) -> SensitivityTable:
        needed = quantizer.needs_statistics
        return sensitivities(
            self.policy, self.calibration, method=method, bits=OPTIONS, quantizer=quantizer,
            statistics=self.statistics(quantizer.weighting) if needed else None,
            probes=self.probes, joint=False, rules=self.rules, progress=self.progress,
        )  # fmt: skip

    def _table(
        self, method: str, quantizer: QuantizerSettings, options: tuple[int, ...], joint: bool
    ) -> SensitivityTable:
        """Costs of a quantizer's options, with joint factors if wanted."""
        whole = self._whole_table(method, quantizer)
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
        factors = joint_factors(
            self.policy, self.calibration, table, rules=self.rules, progress=self.progress
        )
        return dataclasses.replace(table, joint=factors)
