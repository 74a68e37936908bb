"""The measured joint errors of the solvers' allocations, searches included."""

import dataclasses
from typing import Any

import numpy as np

from qvla_jax.array_typing import Float, Int
from qvla_jax.atomic import write_json
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.evaluation.objective import ActionErrorObjective
from qvla_jax.evaluation.sequential import allocate_sequentially
from qvla_jax.inference import Policy, load_policy
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import load_tables
from qvla_jax.pipeline.calibrate import load_calibration
from qvla_jax.pipeline.configs import HeldoutConfig
from qvla_jax.pipeline.evaluate import check_disjoint, heldout_set
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import provenance
from qvla_jax.solvers import AllocationProblem, evolve, local_search, relax, solve

KIND = "qvla_jax.measured_solvers"
FILE = "measured_solvers.json"
SEARCHES = ("evolutionary", "local_search", "sequential")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureSolversConfig(HeldoutConfig):
    """Measures the joint action error of each solver's allocation; writes measured_solvers.json.

    The searches see only the calibration frames. Held-out frames are for reporting.
    """

    # Budgets, in bits per quantized weight, counting everything stored.
    budgets: tuple[float, ...] = (3.0, 4.0, 6.0)
    # Solvers of the separable problem; the searches start from the first one's result.
    solvers: tuple[str, ...] = (
        "core",
        "greedy:marginal",
        "greedy:qvla",
        "greedy:released",
        "uniform",
    )
    # Searches with the measured error on the calibration frames as their objective.
    searches: tuple[str, ...] = SEARCHES
    # Rounds of evolutionary and local_search.
    rounds: int = 10
    # Maximum number of rounds of sequential.
    turns: int = 24
    # Candidates per round (evolutionary, local_search).
    population: int = 8
    # Frames per forward pass.
    eval_batch: int = 32

    def __post_init__(self) -> None:
        HeldoutConfig.__post_init__(self)
        if self.eval_batch < 1:
            raise InputError(f"eval_batch must be at least 1, got {self.eval_batch}")
        unknown = [name for name in self.searches if name not in SEARCHES]
        if unknown or not self.solvers:
            raise InputError(
                f"expected at least one solver, and searches out of {', '.join(SEARCHES)}; got "
                f"{self.solvers} and {self.searches}"
            )


@in_32_bits
def measure_solvers(
    config: MeasureSolversConfig,
    *,
    policy: Policy | None = None,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Solves, searches and measures; one record for each allocation.

    Allocations that are equal channel by channel are measured once.

    Args:
        config: settings.
        policy: the policy, if it is loaded already.
        progress: reports progress.

    Raises:
        InputError: a file is missing or belongs to another policy, a name is unknown, or the
            evaluation frames are those of the calibration.
        BudgetError: a budget is below what can be stored.
    """
    policy = (
        load_policy(config.model, progress=progress, **config.said()) if policy is None else policy
    )
    table = load_tables(config.out)[0]
    calibration = load_calibration(config.out)
    files.check_same(
        config.out / files.SENSITIVITY,
        files.made_from(table),
        {"policy fingerprint": policy.fingerprint, "calibration hash": calibration.hash},
        remedy=f"run `qvla sensitivity --out {config.out}` again",
    )
    heldout = heldout_set(config, horizon=policy.config.action_horizon)
    check_disjoint(calibration, heldout)
    problems = {bits: table.problem(budget_bits=bits) for bits in config.budgets}
    objective = ActionErrorObjective(policy, calibration, table, batch=config.eval_batch)
    judge = objective.on(heldout, batch=config.eval_batch)
    known: dict[bytes, tuple[float, Float[np.ndarray, " N"]]] = {}

    def measured(choice: Int[np.ndarray, " C"]) -> tuple[float, Float[np.ndarray, " N"]]:
        key = choice.astype(np.int16).tobytes()
        if key not in known:
            known[key] = float(objective(choice[None])[0]), judge.frame_errors(choice)[0]
        return known[key]

    records: list[dict[str, Any]] = []
    each = len(config.solvers) + len(config.searches)
    for bits, problem in problems.items():
        start = solve(problem, config.solvers[0]).choice
        bound = relax(problem).lower_bound
        for name in (*config.solvers, *config.searches):
            progress("allocations", len(records), len(problems) * each)
            extra: dict[str, Any] = {}
            try:
                if name in config.searches:
                    choice, extra = _search(name, objective, calibration, problem, start, config)
                else:
                    solution = solve(problem, name)
                    choice, extra = solution.choice, {"seconds": solution.seconds}
            except BudgetError as error:  # no uniform option fits, say
                records.append({"budget_bits": bits, "solver": name, "error": str(error)})
                continue
            error, heldout_errors = measured(choice)
            difference = heldout_errors - measured(start)[1]
            records.append(
                {
                    "budget_bits": bits,
                    "solver": name,
                    "budget_bytes": problem.budget,
                    "stored_bytes": problem.size_of(choice),
                    "predicted_sse_normalized": problem.cost_of(choice),
                    "lower_bound": bound,
                    "calibration_sse_normalized": error,
                    "heldout_sse_normalized": float(heldout_errors.mean()),
                    # Paired over frames: against the separable optimum that searches start from.
                    "heldout_change": float(difference.mean()),
                    "heldout_change_error": _standard_error(difference),
                    "channels_changed": int((choice != start).sum()),
                    **extra,
                }
            )
    content = {
        "format": KIND,
        "version": 1,
        "made_from": files.made_from(table),
        "model_options": config.said(),
        "calibration_frames": calibration.frames,
        "heldout": heldout.describe(),
        "allocations": records,
        "provenance": provenance(seed=config.seed),
    }
    write_json(config.out / FILE, content)
    return records


def _search(
    name: str,
    objective: ActionErrorObjective,
    calibration: Any,
    problem: AllocationProblem,
    start: Int[np.ndarray, " C"],
    config: MeasureSolversConfig,
) -> tuple[Int[np.ndarray, " C"], dict[str, Any]]:
    if name == "evolutionary":
        found = evolve(
            problem, objective, start=start, generations=config.rounds,
            population=config.population, seed=config.seed,
        )  # fmt: skip
    elif name == "local_search":
        found = local_search(
            problem, objective, start=start, rounds=config.rounds, population=config.population,
            seed=config.seed,
        )  # fmt: skip
    else:
        found = allocate_sequentially(
            objective, calibration, problem, start=start, rounds=config.turns, seed=config.seed
        )
    extra = {
        "seconds": found.seconds,
        "evaluations": found.evaluations,
        "history": found.history.tolist(),
    }
    return found.choice, extra


def _standard_error(values: Float[np.ndarray, " N"]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
