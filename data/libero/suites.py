"""The LIBERO suites, and OpenVLA-OFT's limit on the length of their episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qvla_jax.errors import InputError, unknown


@dataclass(frozen=True)
class Suite:
    """One suite of LIBERO.

    Attributes:
        name: LIBERO's name of the suite.
        tasks: number of tasks.
        max_steps: steps after which an episode counts as failed, not counting the first ones, in
            which the objects settle. OpenVLA-OFT's limits: the longest demonstration and some
            slack.
        initial_states: number of official initial states of each task.
    """

    name: str
    tasks: int
    max_steps: int
    initial_states: int = 50

    def chosen(self, tasks: Sequence[int]) -> tuple[int, ...]:
        """Tasks by number, each once; without any, all of the suite.

        Raises:
            InputError: the suite has no task of this number.
        """
        wrong = [task for task in tasks if not 0 <= task < self.tasks]
        if wrong:
            raise InputError(f"{self.name} has tasks 0 to {self.tasks - 1}, got {wrong[0]}")
        return tuple(dict.fromkeys(tasks)) or tuple(range(self.tasks))


SUITES: Final[Mapping[str, Suite]] = {
    suite.name: suite
    for suite in (
        Suite("libero_spatial", 10, 220),
        Suite("libero_object", 10, 280),
        Suite("libero_goal", 10, 300),
        Suite("libero_10", 10, 520),
        Suite("libero_90", 90, 400),
    )
}


def get(name: str) -> Suite:
    """The suite of a name.

    Raises:
        InputError: the name is unknown; the message lists close matches.
    """
    if name not in SUITES:
        raise InputError(unknown("LIBERO suite", name, SUITES))
    return SUITES[name]
