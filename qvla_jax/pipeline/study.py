"""The table of results: methods against settings on one policy, offline and in closed loop.

A cell is one method at one setting. Its packed policy is in `OUT/methods`, its measurements in
`OUT/cells`, its episodes in `OUT/closed_loop`: called again, the study resumes where it stopped.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np

from qvla_jax.atomic import write_json, write_text
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.data.calibration import CalibrationSet
from qvla_jax.data.libero import suites
from qvla_jax.data.libero.simulator import Rendering
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.evaluation import ActionErrors, Predictions
from qvla_jax.evaluation.episodes import EpisodeLog
from qvla_jax.evaluation.libero import make_libero
from qvla_jax.evaluation.offline import PreparedFrames
from qvla_jax.evaluation.study import (
    CELL_KIND,
    Cell,
    CellErrors,
    CellSuccess,
    FullPrecision,
    MethodErrors,
    SavedCell,
    Study,
    StudyPolicy,
    SuccessRanks,
)
from qvla_jax.evaluation.success import EpisodesSuccess, compare_policies, policy_success
from qvla_jax.evaluation.workers import MakeEnvironment
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.comparable import comparable
from qvla_jax.inference.places import policy_folder
from qvla_jax.inference.quantize import policy_index
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.methods import RECIPES, Measurements, Setting, SweepSettings, check_setting, title
from qvla_jax.pipeline import closed_loop, files
from qvla_jax.pipeline.calibrate import calibrate, load_calibration
from qvla_jax.pipeline.configs import FramesConfig, HeldoutConfig
from qvla_jax.pipeline.evaluate import check_disjoint, heldout_set
from qvla_jax.pipeline.methods import load_method, method_file, write_method
from qvla_jax.pipeline.policies import check_acting
from qvla_jax.pipeline.quantize import embedding_bits
from qvla_jax.plain import from_plain, to_plain
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import provenance
from qvla_jax.quantization import ChannelIndex, uniform_bytes
from qvla_jax.quantization.codes import SOURCE
from qvla_jax.report.study import draw_error, draw_success, markdown
from qvla_jax.sensitivity.ranks import spearman

_ROW: Final = re.compile(r"(?P<method>[a-z-]+?)(?P<group>-g\d+)?")
_COLUMN: Final = re.compile(r"w(?P<bits>\d+(?:\.\d+)?)(?:a(?P<activation>\d+(?:\.\d+)?))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(FramesConfig, HeldoutConfig):
    """Builds the table of results: methods against settings, on one policy.

    Writes study.json, study.md and figures. Every cell is kept: repeat the command to resume
    after an interruption, to add rows or columns, or with --sim to add the closed loop. Uses the
    folder's calibration.json if there is one.
    """

    # Methods, followed by -gGROUP if groups of inputs have their own scales: rtn-g128.
    rows: tuple[str, ...] = tuple(RECIPES)
    # Settings: bits of weights (for methods that allocate, a budget of stored bits), and aBITS of
    # activations. If a method does not support a setting, the cell stays empty.
    columns: tuple[str, ...] = (
        "w8a16", "w4a16", "w8a8", "w4a4", "w4a5", "w3", "w2.5", "w2", "w1.5", "w1",
    )  # fmt: skip
    # Random probe vectors per frame, for the sensitivities.
    probes: int = 8
    # LIBERO suite for success in closed loop, such as libero_spatial; by default offline only.
    sim: str | None = None
    # Episodes of each task, from the initial states 0, 1, ...; 0 runs none. The table counts all
    # finished episodes, also those of earlier commands, so cells can have different numbers.
    episodes_per_task: int = 20
    # Tasks by number; by default the whole suite.
    tasks: tuple[int, ...] = ()
    # As in `qvla evaluate --sim`.
    rendering: Rendering = "fast"
    # Simulator processes; 0 runs one per core, of the cluster if there is one.
    workers: int = 0
    # As in `qvla evaluate --sim`.
    cluster: str | None = None
    # Frames per forward pass of the offline measurement.
    eval_batch: int = 8
    # Bits of the rows of token embeddings in every cell: 8, with a scale for each row, or 16, as
    # they are. Bytes of cells are those of the quantized layers alone.
    embedding_bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        FramesConfig.__post_init__(self)
        HeldoutConfig.__post_init__(self)
        for name in ("probes", "eval_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for kind, names in (("row", self.rows), ("column", self.columns)):
            if not names or len(set(names)) != len(names):
                raise InputError(
                    f"name at least one {kind}, and none twice; got {', '.join(names)}"
                )
        for column in self.columns:
            if _COLUMN.fullmatch(column) is None:
                raise InputError(f"column {column!r}: expected wBITS or wBITSaBITS, such as w4a4")
        for row in self.rows:
            if not any(self.setting(row, column) for column in self.columns):
                raise InputError(f"row {row!r} has none of the settings {', '.join(self.columns)}")
        if self.episodes_per_task < 0:
            raise InputError(
                f"episodes_per_task must not be negative, got {self.episodes_per_task}"
            )
        if self.sim is not None:
            self.closed_loop(self.sim, ())

    def setting(self, row: str, column: str) -> Setting | None:
        """The cell's setting; None if the method does not support it.

        Raises:
            InputError: there is no such method.
        """
        method, bits = _ROW.fullmatch(row), _COLUMN.fullmatch(column)
        assert bits is not None
        if method is None or method["method"] not in RECIPES:
            check_setting(f"{row}-w4")  # Its message suggests close ones.
            raise InputError(f"row {row!r}: expected METHOD or METHOD-gGROUP, such as rtn-g128")
        activation = bits["activation"] or "16"
        name = f"{method['method']}-w{bits['bits']}a{activation}{method['group'] or ''}"
        try:
            return check_setting(name)
        except InputError:
            return None

    def closed_loop(
        self, sim: str, names: tuple[str, ...], *, finished: bool = False
    ) -> closed_loop.ClosedLoopConfig:
        """Settings of the paired episodes of these policies, full precision first.

        Args:
            sim: the suite.
            names: policies other than full precision.
            finished: all possible episodes, some of which are finished, instead of the requested
                ones.
        """
        everything = finished or not self.episodes_per_task
        return closed_loop.ClosedLoopConfig(
            sim=sim, out=self.out / files.EPISODES, policy=(self.model, *names),
            episodes_per_task=suites.get(sim).initial_states if everything
            else self.episodes_per_task,
            tasks=self.tasks, rendering=self.rendering, workers=self.workers,
            cluster=self.cluster, videos=False, seed=self.seed, **self.said(),
        )  # fmt: skip


@in_32_bits
def study(
    config: StudyConfig,
    *,
    policy: Policy | None = None,
    make: MakeEnvironment = make_libero,
    progress: Progress = no_progress,
) -> Study:
    """Fills the empty cells and writes the tables and figures.

    Args:
        config: settings.
        policy: the full-precision policy, if it is loaded already.
        make: makes the environment of an episode, in a separate process.
        progress: reports progress.

    Returns:
        The content of study.json.

    Raises:
        InputError: a file in the folder was made from another policy or calibration set, the
            evaluation frames are those of the calibration, or the simulator is missing.
    """
    files.check_folder(config.out)
    if config.sim is not None:
        closed_loop.check_simulator(make)
        policy_folder(config.model, config, progress=progress)  # fetched, if it is elsewhere
        check_acting(config.model, config)
    policy = (
        load_policy(config.model, progress=progress, **config.said()) if policy is None else policy
    )
    horizon = policy.config.action_horizon
    heldout = heldout_set(config, horizon=horizon)
    if (config.out / files.CALIBRATION).is_file():
        calibration = load_calibration(config.out)
    else:
        calibration = calibrate(config, horizon=horizon, progress=progress)
    check_disjoint(calibration, heldout)
    work = _Study(config, policy, calibration, heldout, progress)
    settings = {
        (row, column): setting
        for row in config.rows
        for column in config.columns
        if (setting := config.setting(row, column)) is not None
    }
    cells: list[Cell] = []
    for done, ((row, column), setting) in enumerate(settings.items()):
        progress("cells", done, len(settings))
        cells.append(work.cell(row, column, setting))
    progress("cells", len(settings), len(settings))
    if config.sim is not None:
        for done, cell in enumerate(cells):
            progress("cells in closed loop", done, len(cells))
            if cell.unavailable is None:
                found = work.success(config.sim, cell.method, make)
                cells[done] = dataclasses.replace(cell, closed_loop=found)
                if config.episodes_per_task:
                    work.write(cells)
        progress("cells in closed loop", len(cells), len(cells))
    return work.write(cells)


def rank_correlations(cells: Sequence[Cell]) -> SuccessRanks:
    """Spearman's rank correlation of offline measures with success.

    Cells with the same policy (all offline measures are equal, for example because tuning changed
    nothing) count once.
    """
    # The last of the cells with the same measures.
    rates = {
        cell.errors: cell.closed_loop.success.rate
        for cell in cells
        if cell.errors is not None and cell.closed_loop is not None
    }
    if len(rates) < 3 or len(set(rates.values())) == 1:
        return SuccessRanks()
    errors = [measured.versus_full_precision for measured in rates]
    measures: dict[str, list[float]] = {
        "mean squared error of the action": [e.action_mse_normalized for e in errors],
        "median over frames of the squared error": [e.action_mse_median_normalized for e in errors],
        "mean absolute error of the action": [e.action_l1_normalized for e in errors],
        "mean squared error of the gripper": [e.mse_by_dimension[-1] for e in errors],
        "share of gripper commands that flip": [e.gripper_flip_rate for e in errors],
        "largest error of the action": [max(e.worst_by_dimension) for e in errors],
        "stored bytes": [measured.stored_bytes for measured in rates],
    }
    return SuccessRanks(
        policies=len(rates),
        spearman={
            name: spearman(np.asarray(values), np.asarray(list(rates.values())))
            for name, values in measures.items()
            if len(set(values)) > 1
        },
    )


class _Study:
    """One study: what its cells share."""

    def __init__(
        self,
        config: StudyConfig,
        policy: Policy,
        calibration: CalibrationSet,
        heldout: CalibrationSet,
        progress: Progress,
    ):
        self.config, self.policy = config, policy
        self.calibration, self.heldout, self.progress = calibration, heldout, progress
        self.index: ChannelIndex = policy_index(policy)
        self.measured = Measurements(
            policy, calibration, sweep=SweepSettings(probes=config.probes), folder=config.out,
            progress=progress,
        )  # fmt: skip
        self.made_from = {
            "policy fingerprint": policy.fingerprint,
            "calibration hash": calibration.hash,
        }
        self._held: PreparedFrames | None = None
        self._reference: Predictions | None = None
        self._full_success: EpisodesSuccess | None = None
        self._log: EpisodeLog | None = None

    def cell(self, row: str, column: str, setting: Setting) -> Cell:
        """The cell, so far without episodes."""
        errors = unavailable = None
        try:
            errors = self._errors(setting)
        except BudgetError as error:
            unavailable = str(error)
        return Cell(
            row=row,
            column=column,
            activation_bits=setting.activation_bits,
            method=setting.name,
            title=title(setting),
            unavailable=unavailable,
            errors=errors,
        )

    def _errors(self, setting: Setting) -> CellErrors | None:
        """The cell's offline measurements, from its file if that is up to date.

        Raises:
            BudgetError: nothing fits the setting's budget.
        """
        path = self.config.out / files.CELLS / f"{setting.name}.json"
        # A cell of an older version, with fewer measures, is measured again.
        measures = [field.name for field in dataclasses.fields(ActionErrors)]
        made_from = {**self.made_from, "heldout hash": self.heldout.hash, "measures": measures}
        packed = self._packed(setting)
        file = method_file(self.config.out, setting.name)
        made_from["file sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if path.is_file():
            content = files.read_json(path, kind=CELL_KIND)
            if content.get("made_from") == made_from:
                return from_plain(SavedCell, content, str(path)).cell.errors
        layers = frozenset(self.index.paths)
        size = sum(e.nbytes for path, e in PackedFile(file).layers.items() if path in layers)
        if self._reference is None:
            self._reference = self._predict(self.policy)
        found = self._predict(unpacked(self.policy, packed))
        errors = CellErrors(
            stored_bytes=size,
            stored_bits_per_weight=8 * size / self.index.num_weights,
            versus_full_precision=found.errors(self._reference.chunks),
        )
        kept = MethodErrors(method=setting.name, title=title(setting), errors=errors)
        write_json(path, to_plain(SavedCell(made_from=made_from, cell=kept)))
        return errors

    def success(self, sim: str, name: str, make: MakeEnvironment) -> CellSuccess | None:
        """Success of a cell's policy, paired with full precision on the same episodes."""
        label = f"{self.config.model}@{self.config.out}:{name}"
        packed = self._packed(check_setting(name))
        policies = {self.config.model: self.policy, label: unpacked(self.policy, packed)}
        if self.config.episodes_per_task:
            closed_loop.closed_loop(
                self.config.closed_loop(sim, (label,)), policies=policies, make=make,
                progress=self.progress,
            )  # fmt: skip
            self._log = None
        self._full_success, found = self._finished(sim, policies, make)
        return found.get(label)

    def _finished(
        self, sim: str, policies: Mapping[str, Policy], make: MakeEnvironment
    ) -> tuple[EpisodesSuccess | None, dict[str, CellSuccess]]:
        """Success in all finished episodes of full precision, and of others paired with it."""
        if self._log is None:
            self._log = EpisodeLog(self.config.out / files.EPISODES / closed_loop.EPISODES_FILE)
        simulator = closed_loop.simulator_versions() if make is make_libero else "none"
        config = self.config.closed_loop(sim, tuple(policies)[1:], finished=True)
        results = {
            name: found
            for name, policy in policies.items()
            if (found := self._log.outcomes(closed_loop.plan(config, policy, simulator)))
        }
        if self.config.model not in results:
            return None, {}
        full, *others = (policy_success(name, one).overall for name, one in results.items())
        found = {}
        for entry, compared in zip(others, compare_policies(results), strict=True):
            paired = compared.overall
            # Only episodes that both have run.
            own = paired.both + paired.candidate_only
            of_full = paired.both + paired.reference_only
            found[compared.candidate] = CellSuccess(
                success=entry,
                share_of_full_precision=own / of_full if of_full else None,
                paired=paired,
            )
        return full, found

    def write(self, cells: Sequence[Cell]) -> Study:
        """Writes the tables and figures, and returns the content of study.json."""
        size = uniform_bytes(self.index, SOURCE)
        content = Study(
            made_from=self.made_from,
            model=StudyPolicy(
                name=self.config.model,
                options=self.config.said(),
                quantized_weights=self.index.num_weights,
            ),
            heldout=self.heldout.describe(),
            sim=self.config.sim,
            full_precision=FullPrecision(stored_bytes=size, success=self._full_success),
            rows=self.config.rows,
            columns=self.config.columns,
            cells=tuple(cells),
            rank_correlation_with_success=rank_correlations(cells),
            provenance=provenance(seed=self.config.seed),
        )
        out = self.config.out
        write_json(out / files.STUDY, to_plain(content))
        write_text(out / files.STUDY_TABLE, markdown(content))
        draw_error(content, out / files.STUDY_ERROR_FIGURE)
        if any(cell.closed_loop is not None for cell in cells):
            draw_success(content, out / files.STUDY_SUCCESS_FIGURE)
        return content

    def _packed(self, setting: Setting) -> Policy:
        path = method_file(self.config.out, setting.name)
        wanted = self.config.embedding_bits
        if not path.is_file() or embedding_bits(path, self.policy) != wanted:
            write_method(self.config.out, setting, self.measured, wanted)
        return load_method(path, self.made_from)

    def _predict(self, policy: Policy) -> Predictions:
        if self._held is None:
            self._held = PreparedFrames.of(self.policy, self.heldout, self.config.eval_batch)
        return self._held.predict(comparable(policy))
