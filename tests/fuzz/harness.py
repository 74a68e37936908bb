"""Feeds a reader damaged files, and watches what leaves it.

A case passes if the reader returns or raises a `QvlaError`, within a second of CPU time, without
running code, and without taking more memory than twice the file (and a floor that covers small
ones). `fuzz` damages further what is refused in a new way; `guided` what reaches new code.
"""

import dataclasses
import hashlib
import random
import re
import resource
import signal
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvla_jax.errors import QvlaError

SECONDS = 1.0
# What a small file may take: Python objects of its header, an error and its trace.
FLOOR_BYTES = 2 << 20
# Address space beyond what is mapped when a run begins, for all cases.
HEADROOM_BYTES = 1 << 30
# Python's allocations are traced in one case of so many, which makes it several times slower.
TRACE_EVERY = 16
_MAX_POOL = 500
_FORBIDDEN = frozenset(
    {
        "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen",
        "pickle.find_class", "socket.connect", "code.__new__", "ctypes.dlopen",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        seeds: honest files.
        read: reads one.
        damage: file, source of randomness, other files -> damaged file.
        weight: share of the cases.
        warm_up: imports what the first damaged file would.
    """

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    damage: Callable[[bytes, random.Random, list[bytes]], bytes]
    weight: float = 1.0
    warm_up: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A case that did not pass."""

    reason: str
    content: bytes
    trace: str

    @property
    def name(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:12]


@dataclasses.dataclass
class Result:
    """Counts of a run."""

    cases: int = 0
    accepted: int = 0
    kinds: int = 0
    slowest: float = 0.0
    findings: list[Finding] = dataclasses.field(default_factory=list)


class _TooSlow(BaseException):
    """No `except Exception` of a reader catches it."""


class _Watch:
    """Remembers calls that a reader must not make; the interpreter cannot forget its hook."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, _: Any) -> None:
        if self.on and event in _FORBIDDEN:
            self.seen.append(event)


_watch: _Watch | None = None


@contextmanager
def limits() -> Iterator[None]:
    """Bounds CPU time of a case and the address space of this process."""

    def stop(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def check(
    target: Target, content: bytes, *, trace: bool, again: bool = False
) -> tuple[str, Finding | None]:
    """Reads one file; returns how it ended, and what is wrong with that. Inside `limits`."""
    global _watch
    watch = _watch = _watch or _Watch()
    watch.seen.clear()
    reason, ended, lines = None, "accepted", ""
    if trace:
        tracemalloc.start()
    watch.on = True
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(content)
    except QvlaError as error:
        ended = f"{type(error).__name__}: {_shape(str(error))}"
    except _TooSlow:
        reason = f"takes more than {SECONDS} s"
    except (Exception, MemoryError) as error:
        reason = f"{type(error).__name__} leaves the reader"
        lines = traceback.format_exc(limit=-12)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.on = False
    if trace:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > max(2 * len(content), FLOOR_BYTES):
            if not again:  # what is imported or cached the first time counts for no case
                return check(target, content, trace=True, again=True)
            reason, lines = f"takes {peak} bytes for a file of {len(content)}", ""
    if watch.seen:
        reason, lines = f"runs code: {watch.seen}", ""
    return ended, None if reason is None else Finding(reason, content, lines)


class Run:
    """Counts the cases of a reader, and keeps one finding of each sort. Inside `limits`."""

    def __init__(self, target: Target):
        self.target, self.result = target, Result()
        self._kinds: set[str] = set()
        self._reasons: set[str] = set()

    def case(self, content: bytes) -> bool:
        """Reads one file; whether it ended well and as none before."""
        result, start = self.result, time.process_time()
        ended, finding = check(self.target, content, trace=result.cases % TRACE_EVERY == 0)
        result.slowest = max(result.slowest, time.process_time() - start)
        result.cases += 1
        result.accepted += ended == "accepted" and finding is None
        if finding is not None:
            where = _shape(finding.reason.split(" for a file")[0] + finding.trace[-400:])
            if where not in self._reasons:
                self._reasons.add(where)
                result.findings.append(finding)
            return False
        new = ended not in self._kinds
        self._kinds.add(ended)
        result.kinds = len(self._kinds)
        return new


def fuzz(target: Target, cases: int, *, seed: int = 0, findings: int = 20) -> Result:
    """Runs `cases` damaged files; stops early after so many different findings."""
    rng = random.Random(f"{seed} {target.name}")
    seeds, run = list(target.seeds), Run(target)
    pool, longest = list(seeds), 4 * max(map(len, seeds))
    for content in seeds:  # imports and caches count for no case
        target.read(content)
    with limits():
        while run.result.cases < cases and len(run.result.findings) < findings:
            content = target.damage(rng.choice(pool), rng, seeds)
            if run.case(content) and len(content) < longest and len(pool) < _MAX_POOL:
                pool.append(content)
    return run.result


def _shape(message: str) -> str:
    """A message without what differs from case to case."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]|\{.*\}|\d+", "_", message)[:200]
