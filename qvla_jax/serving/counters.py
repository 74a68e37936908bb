"""Counters of a server."""

import collections
import dataclasses
import resource
from collections.abc import Mapping
from typing import Final

import numpy as np

from qvla_jax.array_typing import Float

# Number of answers that the percentiles cover.
_RECENT: Final = 1000
QUANTILES: Final = (0.5, 0.95, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Where the time of one answer went, in milliseconds.

    Attributes:
        prepare_ms: decoding, checking and preparing the message.
        queue_ms: from the prepared observation to the start of the call.
        infer_ms: duration of the call, which the whole batch shares.
        total_ms: from the received message to the answer, all of these.
        age_ms: of the observation: since the client captured it, if the message says so, by the
            clocks of both machines; else the same as `total_ms`.
    """

    prepare_ms: float
    queue_ms: float
    infer_ms: float
    total_ms: float
    age_ms: float


PHASES: Final = tuple(field.name for field in dataclasses.fields(Times))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of times, in milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The counters at one moment; see `Counters`."""

    answered: int
    refused: int
    failed: int
    turned_away: int
    skipped: int
    clients: int
    # Name of the policy -> answers.
    answers_by_policy: Mapping[str, int]
    # Size of the batch as text -> answers.
    answers_by_batch_size: Mapping[str, int]
    # Entry of `Times` -> percentiles over the latest answers.
    recent: Mapping[str, Percentiles]
    # The same -> sum over all answers.
    sums_ms: Mapping[str, float]
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
    # Observations of LeRobot's clients that a later one replaced, or that told nothing new.
    skipped: int = 0
    clients: int = 0
    policies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    batches: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    _times: collections.deque[tuple[float, ...]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_RECENT)
    )
    _sums: Float[np.ndarray, " n"] = dataclasses.field(
        default_factory=lambda: np.zeros(len(PHASES))
    )

    def observe(self, policy: str, batch: int, times: Times) -> None:
        """Counts an answer.

        Args:
            policy: name of the policy that gave it.
            batch: observations in its call.
            times: where its time went.
        """
        self.answered += 1
        self.policies[policy] += 1
        self.batches[batch] += 1
        values = dataclasses.astuple(times)
        self._times.append(values)
        self._sums += values

    def snapshot(self) -> Snapshot:
        """What they are now."""
        times = np.array(self._times or [(0.0,) * len(PHASES)]).T
        return Snapshot(
            answered=self.answered,
            refused=self.refused,
            failed=self.failed,
            turned_away=self.turned_away,
            skipped=self.skipped,
            clients=self.clients,
            answers_by_policy=dict(sorted(self.policies.items())),
            answers_by_batch_size={str(k): v for k, v in sorted(self.batches.items())},
            recent=dict(zip(PHASES, map(_percentiles, times), strict=True)),
            sums_ms=dict(zip(PHASES, self._sums.tolist(), strict=True)),
            peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )


def _percentiles(values: Float[np.ndarray, " n"]) -> Percentiles:
    p50, p95, p99 = (float(np.quantile(values, q)) for q in QUANTILES)
    return Percentiles(p50=p50, p95=p95, p99=p99)
