"""The LIBERO suites, and OpenVLA-OFT's limit on the length of their episodes.

LIBERO-PRO (arXiv 2510.03827) perturbs four of them, with the same tasks in the same order and
initial states of its own:

- `_swap`: objects stand in each other's places;
- `_object`: objects have another look;
- `_lan`: instructions in other words;
- `_task`: another object of the scene is asked for, or another place;
- `libero_object_temp_x0.1` to `_x0.5` and `_y0.1` to `_y0.5`: the object to pick up starts farther
  and farther away along x or y. The numbers are not meters: x0.1 is 7 cm, x0.5 is 35 cm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        base: the suite whose tasks these are, perturbed; None if they are its own.
        rewords: whether instructions differ from those of the base suite.
    """

    name: str
    tasks: int
    max_steps: int
    initial_states: int = 50
    base: str | None = None
    rewords: bool = False

    def chosen(self, tasks: Sequence[int]) -> tuple[int, ...]:
        """Tasks by number, each once; without any, all of the suite.

        Raises:
            InputError: the suite has no task of this number.
        """
        wrong = [task for task in tasks if not 0 <= task < self.tasks]
        if wrong:
            raise InputError(f"{self.name} has tasks 0 to {self.tasks - 1}, got {wrong[0]}")
        return tuple(dict.fromkeys(tasks)) or tuple(range(self.tasks))


_ORIGINAL: Final = (
    Suite("libero_spatial", 10, 220),
    Suite("libero_object", 10, 280),
    Suite("libero_goal", 10, 300),
    Suite("libero_10", 10, 520),
    Suite("libero_90", 90, 400),
)


def _perturbed(base: Suite, change: str, *, rewords: bool = False) -> Suite:
    return replace(base, name=f"{base.name}_{change}", base=base.name, rewords=rewords)


_OBJECT: Final = _ORIGINAL[1]
SUITES: Final[Mapping[str, Suite]] = {
    suite.name: suite
    for suite in (
        *_ORIGINAL,
        *(
            _perturbed(base, change, rewords=change in ("lan", "task"))
            for base in _ORIGINAL[:4]
            for change in ("swap", "object", "lan", "task")
        ),
        *(_perturbed(_OBJECT, f"temp_{axis}0.{tenths}") for axis in "xy" for tenths in range(1, 6)),
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
