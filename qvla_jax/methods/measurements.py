"""What is measured on one policy and one calibration set: each thing once, by all methods.

With a folder, statistics, sensitivities and joint factors are kept in `measurements/`, under a hash
of everything that they depend on, this package's code included: they are measured again where
anything differs. Finished items of a sweep that was killed are in `sweep/` until its table is kept.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from qvla_jax import sharding
from qvla_jax.errors import InputError
from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import policy_index
from qvla_jax.methods.moments import InputMoments, input_moments
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import provenance, source_digest
from qvla_jax.quantization import InputStatistics, LayerRules, QuantizerSettings
from qvla_jax.quantization.statistics import Weighting
from qvla_jax.sensitivity import SensitivityTable, SweepStore, sensitivities
from qvla_jax.sensitivity.batches import Calibration
from qvla_jax.sensitivity.joint import joint_factors
from qvla_jax.sensitivity.methods import DEFAULT_SHARE
from qvla_jax.sensitivity.statistics import input_statistics, streamed_means

Moments = Mapping[str, InputMoments]
# All options that rows can have; methods use some of them.
OPTIONS: Final = (0, 2, 3, 4, 8, 16)
MEASUREMENTS: Final = "measurements"
_SWEEP: Final = "sweep"


Measured = TypeVar("Measured", InputStatistics, SensitivityTable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How sensitivities are swept, as `sensitivities` takes it."""

    probes: int = 8
    exact_share: float = DEFAULT_SHARE
    seed: int = 0
    mesh: Mesh = dataclasses.field(default_factory=sharding.sweep_mesh)
    split_weights: bool = False
    streamed: bool = False

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON types."""
        return {**vars(self), "mesh": dict(self.mesh.shape)}


class Measurements:
    """Measures on first use and keeps the result."""

    def __init__(
        self,
        policy: Policy,
        calibration: Calibration,
        *,
        rules: LayerRules | None = None,
        options: tuple[int, ...] = OPTIONS,
        sweep: SweepSettings | None = None,
        moments: Moments | None = None,
        folder: Path | None = None,
        progress: Progress = no_progress,
    ):
        """Measures nothing yet.

        Args:
            policy: full precision.
            calibration: the only frames that are used.
            rules: which layers are quantized; None takes those of the policy's layout.
            options: bits that are measured at a time; a table of fewer is a part of theirs.
            sweep: settings of the sweep; None takes the defaults.
            moments: of the layers' inputs, if they are known already.
            folder: a run's folder, for later commands; None keeps nothing.
            progress: reports progress.
        """
        self.policy, self.calibration = policy, calibration
        self.rules = policy.layout.rules if rules is None else rules
        self.progress = progress
        self._options, self._folder = options, folder
        self._sweep = SweepSettings() if sweep is None else sweep
        if moments is not None:
            self.moments = moments
        # What was measured here, in place of being read.
        self.taken: list[str] = []
        # Instances are compared by identity, so each has its own entries.
        self.statistics = functools.lru_cache(maxsize=None)(self._statistics)
        self._whole_table = functools.lru_cache(maxsize=None)(self._measured_table)
        self.table = functools.lru_cache(maxsize=None)(self._table)

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of the inputs of every layer that the forward pass reaches."""
        index = policy_index(self.policy, self.rules)
        return input_moments(self.policy, self.calibration, index, progress=self.progress)

    @functools.cached_property
    def _made_from(self) -> dict[str, Any]:
        """What every measurement depends on."""
        known = provenance(seed=self._sweep.seed)
        return {
            **{key: known[key] for key in ("packages", "python", "machine", "device", "seed")},
            "code": source_digest(),
            "policy": self.policy.fingerprint,
            "calibration": self.calibration.manifest["sha256"],
            "rules": dataclasses.asdict(self.rules),
            "mesh": dict(self._sweep.mesh.shape),
            "streamed": self._sweep.streamed,
        }

    def _statistics(self, weighting: Weighting) -> InputStatistics:
        def measure() -> InputStatistics:
            index, seed = policy_index(self.policy, self.rules), self._sweep.seed
            if self._sweep.streamed:
                return streamed_means(
                    self.policy, self.calibration, index, seed=seed, progress=self.progress
                )
            return input_statistics(
                self.policy, self.calibration, index, weighting=weighting, seed=seed,
                mesh=self._sweep.mesh, progress=self.progress,
            )  # fmt: skip

        def save(statistics: InputStatistics, path: Path) -> None:
            # Rounded ones would give other codes to those who read them.
            statistics.save(path, exact=True)

        return self._kept(f"statistics_{weighting}", {}, measure, InputStatistics.load, save)

    def _measured_table(
        self, estimator: str, quantizer: QuantizerSettings, weights: tuple[float, ...] | None
    ) -> SensitivityTable:
        statistics = self.statistics(quantizer.weighting) if quantizer.needs_statistics else None
        name, of = f"sensitivity_{estimator}", self._of(quantizer, weights, self._options)
        store = None
        if self._folder is not None:
            store = SweepStore(self._folder / _SWEEP / self._file(name, of).stem)

        def measure() -> SensitivityTable:
            return sensitivities(
                self.policy, self.calibration, method=estimator, bits=self._options,
                quantizer=quantizer, statistics=statistics, joint=False, rules=self.rules,
                action_weights=None if weights is None else np.asarray(weights),
                store=store, progress=self.progress, **vars(self._sweep),
            )  # fmt: skip

        load = functools.partial(SensitivityTable.load, statistics=statistics)
        table = self._kept(name, of, measure, load, SensitivityTable.save)
        if store is not None and sharding.is_main_process():
            shutil.rmtree(store.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # there are other sweeps
                store.folder.parent.rmdir()
        return table

    def _table(
        self,
        estimator: str,
        quantizer: QuantizerSettings,
        options: tuple[int, ...],
        joint: bool,
        weights: tuple[float, ...] | None = None,
    ) -> SensitivityTable:
        """Costs of a quantizer's options, with joint factors and action weights if wanted."""
        whole = self._whole_table(estimator, quantizer, weights)
        columns = [whole.bits.index(b) for b in options]
        error = whole.standard_error
        table = dataclasses.replace(
            whole,
            bits=options,
            costs=whole.costs[:, columns],
            sizes=whole.sizes[:, columns],
            standard_error=None if error is None else error[:, columns],
        )
        # The costs of `input_hessian` are no action errors.
        if not joint or estimator == "input_hessian":
            return table

        def measure() -> SensitivityTable:
            factors = joint_factors(
                self.policy, self.calibration, table, rules=self.rules, progress=self.progress
            )
            return dataclasses.replace(table, joint=factors)

        load = functools.partial(SensitivityTable.load, statistics=table.statistics)
        of = self._of(quantizer, weights, options)
        return self._kept(f"joint_{estimator}", of, measure, load, SensitivityTable.save)

    def _of(
        self,
        quantizer: QuantizerSettings,
        weights: tuple[float, ...] | None,
        options: tuple[int, ...],
    ) -> dict[str, Any]:
        return {
            "quantizer": dataclasses.asdict(quantizer),
            "weights": weights,
            # No part of the fingerprint: they change what counts, and no action.
            "executed steps": self.policy.layout.executed_steps,
            "options": options,
            "measured options": self._options,
            "sweep": self._sweep.to_json(),
        }

    def _file(self, name: str, of: Mapping[str, Any]) -> Path:
        made_from = json.dumps({**self._made_from, **of}, sort_keys=True).encode()
        return Path(f"{name}_{hashlib.sha256(made_from).hexdigest()[:16]}.safetensors")

    def _kept(
        self,
        name: str,
        of: Mapping[str, Any],
        measure: Callable[[], Measured],
        load: Callable[[Path], Measured],
        save: Callable[[Measured, Path], None],
    ) -> Measured:
        """The measurement kept in the folder, taken first if it is missing."""
        if self._folder is None:
            return measure()
        path = self._folder / MEASUREMENTS / self._file(name, of)
        # Processes that sweep together each have a folder, and must take the same steps.
        if jax.process_count() == 1 and path.is_file():
            try:
                return load(path)
            except InputError as error:
                raise InputError(f"{error}; remove the file, and it is made again") from error
        self.taken.append(name)
        measured = measure()
        if sharding.is_main_process():
            save(measured, path)
        return measured
