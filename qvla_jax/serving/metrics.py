"""The counters in the text format of Prometheus (version 0.0.4)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from qvla_jax.serving.counters import PHASES, QUANTILES, Snapshot

CONTENT_TYPE: Final = "text/plain; version=0.0.4"

_Sample = tuple[str, Mapping[str, str], float]


def prometheus(snapshot: Snapshot) -> str:
    """A snapshot as one page of metrics."""
    return "".join(_lines(snapshot))


def _lines(snapshot: Snapshot) -> Iterator[str]:
    by_policy = [("", {"policy": k}, v) for k, v in snapshot.answers_by_policy.items()]
    yield from _metric("answers_total", "counter", "Observations answered.", by_policy)
    for name, text in (
        ("refused", "Messages refused: the client's fault."),
        ("failed", "Observations that the policy or the server failed on."),
        ("turned_away", "Connections turned away."),
        ("skipped", "Observations of LeRobot's clients that were not needed."),
    ):
        yield from _metric(f"{name}_total", "counter", text, [("", {}, getattr(snapshot, name))])
    yield from _metric("clients", "gauge", "Connected clients.", [("", {}, snapshot.clients)])
    peak = [("", {}, snapshot.peak_rss_bytes)]
    yield from _metric("peak_resident_bytes", "gauge", "Peak memory of the process.", peak)
    text = "Seconds of answers by phase; quantiles are those of the latest 1000."
    yield from _metric("phase_seconds", "summary", text, _phases(snapshot))


def _phases(snapshot: Snapshot) -> Iterator[_Sample]:
    for phase in PHASES:
        label = {"phase": phase.removesuffix("_ms")}
        recent = snapshot.recent[phase]
        if snapshot.answered:
            values = (recent.p50, recent.p95, recent.p99)
            for quantile, value in zip(QUANTILES, values, strict=True):
                yield "", {**label, "quantile": str(quantile)}, 1e-3 * value
        yield "_sum", label, 1e-3 * snapshot.sums_ms[phase]
        yield "_count", label, snapshot.answered


def _metric(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> Iterator[str]:
    yield f"# HELP qvla_{name} {text}\n# TYPE qvla_{name} {kind}\n"
    for suffix, labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"qvla_{name}{suffix}{f'{{{inner}}}' if inner else ''} {value}\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
