"""Loops of a network over a part that runs several times, such as the steps of flow matching.

A network writes the loop as `repeat`. It runs as one compiled body, unless who looks into the
network's layers runs it otherwise (`looping`): functions that see every call need either unrolled
rounds, or to carry what they see out of the body.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp

from qvla_jax.array_typing import Array, Int

# (what a round takes, number of the round) -> what the next one takes: the same shapes and dtypes.
Round: TypeAlias = Callable[[Any, int | Int[Array, ""]], Any]
# (round, what the first one takes, number of rounds) -> what the last one returns.
Loop: TypeAlias = Callable[[Round, Any, int], Any]


def scanned(body: Round, start: Any, times: int) -> Any:
    """The rounds as one compiled body."""
    return jax.lax.scan(lambda x, i: (body(x, i), None), start, jnp.arange(times))[0]


def unrolled(body: Round, start: Any, times: int) -> Any:
    """The rounds one after the other, as the caller of each sees them."""
    for number in range(times):
        start = body(start, number)
    return start


_LOOP: Final[contextvars.ContextVar[Loop]] = contextvars.ContextVar("loop", default=scanned)


def repeat(body: Round, start: Any, times: int) -> Any:
    """Runs a part of a network several times, each round on what the last one returned."""
    return _LOOP.get()(body, start, times)


@contextlib.contextmanager
def looping(loop: Loop) -> Iterator[None]:
    """How `repeat` runs its rounds inside."""
    token = _LOOP.set(loop)
    try:
        yield
    finally:
        _LOOP.reset(token)
