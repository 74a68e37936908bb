"""QVLA (Xu et al., ICLR 2026, arXiv 2602.03782), as the paper describes it and as it was released.

Both give every output channel 0, 2, 4, 8 or 16 bits and round to nearest on the grid of QVLA,
without bias correction.

Paper: the cost of a channel at a bit-width is the squared error of the action when it alone is
quantized; it is taken to first order (`jacobian`), which ranks channels as exact probing does
(docs/sensitivity.md). Channels are demoted where the cost rises least for each byte saved, until
all stored bytes are within the budget.

Released: the cost is the weight error under the layer's input covariance (`input_hessian`), a step
is ranked by the absolute cost at its new bit-width, and the budget is an average over *channels*,
of codes alone; the file's header says what is actually stored.
"""

import numpy as np

from qvla_jax.inference.policy import Policy
from qvla_jax.inference.quantize import quantize
from qvla_jax.methods.action import with_activations
from qvla_jax.methods.job import Job
from qvla_jax.quantization.quantizer import UNIFORM_BASELINE, Quantizer
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.solvers import AllocationProblem, solve

OPTIONS = (0, 2, 4, 8, 16)


def qvla_paper(job: Job) -> Policy:
    """Costs in action error; a budget of bytes."""
    table = _table(job, "jacobian")
    problem = table.problem(budget_bits=job.setting.bits)
    return _applied(job, table, solve(problem, "greedy:qvla").choice)


def qvla_released(job: Job) -> Policy:
    """Costs of the released proxy; a budget of bits averaged over channels."""
    table = _table(job, "input_hessian")
    sizes = np.broadcast_to(np.asarray(table.bits, np.int64), table.costs.shape).copy()
    problem = AllocationProblem(
        costs=table.costs, sizes=sizes, budget=int(job.setting.bits * len(table.index))
    )
    return _applied(job, table, solve(problem, "greedy:released").choice)


def _table(job: Job, method: str) -> SensitivityTable:
    return job.measured.table(method, UNIFORM_BASELINE, OPTIONS, False)


def _applied(job: Job, table: SensitivityTable, choice: np.ndarray) -> Policy:
    bits = np.asarray(table.bits)[choice]
    packed = quantize(job.policy, bits, quantizer=Quantizer(UNIFORM_BASELINE), rules=job.rules)
    return with_activations(job, packed)
