"""Observations of concurrent clients, answered together in one call of the policy.

Batches are padded to a few fixed sizes, for all of which the policy is compiled beforehand. The
policy runs in its own thread, so that the connections stay alive meanwhile; observations that
arrive while it runs form the next batch.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvla_jax import sharding
from qvla_jax.array_typing import Float
from qvla_jax.errors import PolicyError
from qvla_jax.inference import Policy
from qvla_jax.progress import Progress, no_progress, track

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The policy's answer to one observation, and its timing.

    Attributes:
        actions: un-normalized, as `Policy.infer` returns them.
        history: for UniVLA, the `history` of the episode's next observation.
        queue_ms: from the prepared observation to the start of the call.
        infer_ms: duration of the call, which the whole batch shares.
        batch: number of observations in it.
    """

    actions: Float[np.ndarray, "h a"]
    history: str | None
    queue_ms: float
    infer_ms: float
    batch: int


@dataclasses.dataclass(frozen=True)
class _Waiting:
    inputs: Any
    state: Float[np.ndarray, "1 p"] | None
    # Has the statistics that un-normalize the actions.
    policy: Policy
    since: float
    answer: asyncio.Future[Answer]


@dataclasses.dataclass(frozen=True)
class _Called:
    actions: list[Float[np.ndarray, "h a"]]
    histories: Sequence[str | None]
    start: float
    seconds: float


def batch_sizes(largest: int, devices: int) -> tuple[int, ...]:
    """The sizes that batches are padded to: powers of two times the devices, up to `largest`.

    The last one is the smallest that holds `largest`.
    """
    sizes = [devices]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


class Batcher:
    """Collects requests and runs the policy on them.

    Attributes:
        sizes: sizes that batches are padded to.
        busy_since: start of the running call (`time.monotonic`), or None.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch: int,
        window: float,
        thread: concurrent.futures.ThreadPoolExecutor | None = None,
    ) -> None:
        """Prepares; `warm_up` and `start` follow.

        Args:
            policy: the policy to serve.
            max_batch: maximum number of observations in one call.
            window: seconds to wait for others after the first.
            thread: a pool of one thread that runs the policy, shared by policies that take turns;
                by default one of its own.
        """
        self.sizes = batch_sizes(max_batch, sharding.data_mesh().size)
        self.busy_since: float | None = None
        self._policy = policy
        self._max_batch = max_batch
        self._window = window
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = thread or concurrent.futures.ThreadPoolExecutor(1, "qvla-policy")
        self._loop: asyncio.Task[None] | None = None

    def warm_up(self, *, progress: Progress = no_progress) -> None:
        """Compiles the policy for every batch size.

        Raises:
            PolicyError: it already returns NaN or infinite actions.
        """
        observation: dict[str, Any] = {
            key: [value] if isinstance(value, str) else value[None]
            for key, value in self._policy.fake_observation().items()
        }
        inputs, state = self._policy.prepare(observation), observation.get("state")
        for size in track(self.sizes, len(self.sizes), "compile", progress):
            batch = [(inputs, state, self._policy)] * size
            actions = self._thread.submit(self._call, batch).result().actions
            if not all(np.isfinite(chunk).all() for chunk in actions):
                raise PolicyError("the policy returns NaN or infinite actions; nothing to serve")

    def start(self) -> None:
        """Starts answering, on the running event loop."""
        self._loop = asyncio.create_task(self._answer_all())

    async def __call__(
        self,
        inputs: Any,
        policy: Policy | None = None,
        *,
        state: Float[np.ndarray, "1 p"] | None = None,
    ) -> Answer:
        """Answers one prepared observation (a batch of one).

        Args:
            inputs: what the network takes.
            state: that of the observation, for policies whose actions are relative to it.
            policy: the same network with the statistics that un-normalize the actions; by default
                that of the batcher.

        Raises:
            PolicyError: the policy failed, or its actions are not finite.
        """
        answer = asyncio.get_running_loop().create_future()
        used = policy or self._policy
        self._queue.put_nowait(_Waiting(inputs, state, used, time.monotonic(), answer))
        return await answer

    async def stop(self) -> None:
        """Stops; waiting requests get an error."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        while not self._queue.empty():
            _fail([self._queue.get_nowait()], PolicyError("the server is shutting down"))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _answer_all(self) -> None:
        while True:
            batch: list[_Waiting] = []
            try:
                await self._collect(batch)
                # Cancelled requests have no client left.
                if batch := [waiting for waiting in batch if not waiting.answer.done()]:
                    await self._answer(batch)
            except asyncio.CancelledError:
                _fail(batch, PolicyError("the server is shutting down"))
                raise
            except Exception as error:
                logger.exception("the policy failed on a batch of %d", len(batch))
                _fail(batch, PolicyError(f"the policy failed ({type(error).__name__})"))

    async def _collect(self, batch: list[_Waiting]) -> None:
        """Fills an empty batch in place, so that its content survives cancellation."""
        batch.append(await self._queue.get())
        deadline = asyncio.get_running_loop().time() + self._window
        while len(batch) < self._max_batch:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        self.busy_since = time.monotonic()
        try:
            called = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._call, [(w.inputs, w.state, w.policy) for w in batch]
            )
        finally:
            self.busy_since = None
        for waiting, chunk, history in zip(batch, called.actions, called.histories, strict=True):
            if not np.isfinite(chunk).all():
                logger.error("the policy returned NaN or infinite actions")
                _fail([waiting], PolicyError("the policy returned NaN or infinite actions"))
                continue
            answer = Answer(
                actions=chunk,
                history=history,
                queue_ms=1e3 * (called.start - waiting.since),
                infer_ms=1e3 * called.seconds,
                batch=len(batch),
            )
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    def _call(
        self, batch: Sequence[tuple[Any, Float[np.ndarray, "1 p"] | None, Policy]]
    ) -> _Called:
        """Runs the policy on a padded batch, in its thread."""
        start = time.monotonic()
        size = next(size for size in self.sizes if size >= len(batch))
        stacked = self._policy.processor.join([inputs for inputs, _, _ in batch])
        padded, count = sharding.pad_batch(stacked, size)
        histories: Sequence[str | None] = [None] * count
        if self._policy.observation.has_history:
            padded = self._policy.complete(padded)
            histories = self._policy.processor.history(padded)[:count]
        chunks = self._policy.run(padded)[:count]
        actions = [
            policy.unnormalize_actions(chunk[None], state)[0]
            for chunk, (_, state, policy) in zip(chunks, batch, strict=True)
        ]
        return _Called(actions, histories, start, time.monotonic() - start)


def _fail(batch: Sequence[_Waiting], error: PolicyError) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
