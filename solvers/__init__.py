"""Bit allocation as a multiple-choice knapsack: solvers that certify their answers.

    >>> import numpy as np
    >>> from qvla_jax import solvers
    >>> problem = solvers.AllocationProblem(
    ...     costs=np.array([[9.0, 1.0, 0.0], [4.0, 2.0, 0.0]]),  # f64[C, n]
    ...     sizes=np.array([[0, 4, 8], [0, 4, 8]]),  # i64[C, n], bytes
    ...     budget=8,
    ... )
    >>> solution = solvers.solve(problem, "ilp")
    >>> solution.choice.tolist(), solution.cost, solution.size, solution.gap
    ([1, 1], 3.0, 8, 0.0)
    >>> solvers.verify(problem, solution).ok
    True
    >>> "greedy:marginal" in solvers.available()  # `solvers.compare(problem)` runs them all
    True

The package needs numpy; individual solvers need what `available()` checks for, and import it when
they run. It does not import JAX.
"""

# Importing a solver registers it.
from qvla_jax.solvers import alignment as alignment
from qvla_jax.solvers import core as core
from qvla_jax.solvers import demotion as demotion
from qvla_jax.solvers import dynamic_programming as dynamic_programming
from qvla_jax.solvers import evolutionary as evolutionary
from qvla_jax.solvers import ilp as ilp
from qvla_jax.solvers import instances as instances
from qvla_jax.solvers import lagrangian as lagrangian
from qvla_jax.solvers import marginal as marginal
from qvla_jax.solvers import uniform as uniform
from qvla_jax.solvers.blackbox import SearchResult as SearchResult
from qvla_jax.solvers.comparison import Comparison as Comparison
from qvla_jax.solvers.comparison import compare as compare
from qvla_jax.solvers.curves import Pareto as Pareto
from qvla_jax.solvers.curves import pareto as pareto
from qvla_jax.solvers.evolutionary import evolve as evolve
from qvla_jax.solvers.filling import fill as fill
from qvla_jax.solvers.front import Front as Front
from qvla_jax.solvers.front import sweep as sweep
from qvla_jax.solvers.problem import AllocationProblem as AllocationProblem
from qvla_jax.solvers.problem import ProblemSummary as ProblemSummary
from qvla_jax.solvers.registry import Proposal as Proposal
from qvla_jax.solvers.registry import available as available
from qvla_jax.solvers.registry import describe as describe
from qvla_jax.solvers.registry import register as register
from qvla_jax.solvers.registry import settings_of as settings_of
from qvla_jax.solvers.registry import solve as solve
from qvla_jax.solvers.relaxation import Relaxation as Relaxation
from qvla_jax.solvers.relaxation import relax as relax
from qvla_jax.solvers.resource import Resource as Resource
from qvla_jax.solvers.resource import count_of as count_of
from qvla_jax.solvers.solution import Solution as Solution
from qvla_jax.solvers.swapping import local_search as local_search
from qvla_jax.solvers.tying import Tied as Tied
from qvla_jax.solvers.tying import paired_rows as paired_rows
from qvla_jax.solvers.tying import row_blocks as row_blocks
from qvla_jax.solvers.tying import tie as tie
from qvla_jax.solvers.verification import Verification as Verification
from qvla_jax.solvers.verification import verify as verify
