"""Counters of a server."""

import collections
import dataclasses
import resource
from typing import Any, Final

import numpy as np

from qvla_jax.serving.batching import Answer

# Number of answers that the percentiles cover.
_RECENT: Final = 1000


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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        times = np.array(self._times or [(0.0, 0.0)]).T
        return {
            "answered": self.answered,
            "refused": self.refused,
            "failed": self.failed,
            "turned_away": self.turned_away,
            "clients": self.clients,
            "answers_by_batch_size": {str(k): v for k, v in sorted(self.batches.items())},
            "recent": {
                name: {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}
                for name, values in zip(("queue_ms", "infer_ms"), times, strict=True)
            },
            "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
