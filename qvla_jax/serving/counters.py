"""Counters of a server."""

import collections
import dataclasses
import resource
from collections.abc import Mapping
from typing import Final

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.serving.batching import Answer

# Number of answers that the percentiles cover.
_RECENT: Final = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of times, in milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecentTimes:
    """Times of the latest answers: in the queue, and in the policy."""

    queue_ms: Percentiles
    infer_ms: Percentiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The counters at one moment; see `Counters`."""

    answered: int
    refused: int
    failed: int
    turned_away: int
    clients: int
    # Size of the batch as text -> answers.
    answers_by_batch_size: Mapping[str, int]
    recent: RecentTimes
    # Peak resident memory of the process.
    peak_rss_bytes: int


@dataclasses.dataclass
class Counters:
    """Counts since the start, and times of the latest answers."""

    # Observations answered, refused (the client's fault), or failed (the policy's fault).
    answered: int = 0
    refused: int = 0
    failed: int = 0
    # Connections turned away: no token, a browser, or too many clients.
    turned_away: int = 0
    clients: int = 0
    batches: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    _times: collections.deque[tuple[float, float]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_RECENT)
    )

    def observe(self, answer: Answer) -> None:
        """Counts an answer."""
        self.answered += 1
        self.batches[answer.batch] += 1
        self._times.append((answer.queue_ms, answer.infer_ms))

    def snapshot(self) -> Snapshot:
        """What they are now."""
        queue, infer = np.array(self._times or [(0.0, 0.0)]).T
        return Snapshot(
            answered=self.answered,
            refused=self.refused,
            failed=self.failed,
            turned_away=self.turned_away,
            clients=self.clients,
            answers_by_batch_size={str(k): v for k, v in sorted(self.batches.items())},
            recent=RecentTimes(queue_ms=_percentiles(queue), infer_ms=_percentiles(infer)),
            peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )


def _percentiles(values: Float[np.ndarray, " n"]) -> Percentiles:
    p50, p95, p99 = (float(np.percentile(values, p)) for p in (50, 95, 99))
    return Percentiles(p50=p50, p95=p95, p99=p99)
