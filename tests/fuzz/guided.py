"""Fuzzing guided by coverage: Atheris (libFuzzer) mutates what reaches new code of a reader.

Two of three mutations are those of the target, which keep a file readable for longer than
libFuzzer's own. The corpus stays in a folder, where the next run goes on.
"""

import gc
import importlib.util
import json
import os
import random
import re
import sys
import traceback
import types
from pathlib import Path

from .harness import Finding, Result, Run, Target, limits

# There are wheels for Linux on x86-64; elsewhere kinds of refusal guide the run.
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None


def instrument() -> None:
    """Makes every function of the package that is imported by now count its branches."""
    import atheris

    # An import hook would be simpler, and misses modules of an editable installation.
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and _is_ours(function):
            atheris.instrument_func(function)


def fuzz_guided(target: Target, cases: int, *, seed: int, folder: Path) -> Result:
    """Runs `cases` files in a child process; keeps its corpus and log below `folder`.

    After `instrument`, or nothing guides it. A child that crashes is a finding, with the file that
    libFuzzer left.
    """
    report = folder / "result.json"
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            _fuzz(target, cases, seed, folder)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if report.exists():
        found = json.loads(report.read_text())
        findings = [Finding(r, bytes.fromhex(c), t) for r, c, t in found.pop("findings")]
        return Result(**found, findings=findings)
    crashes = sorted(folder.glob("crash-*")) or [folder / "log"]
    log = (folder / "log").read_text(errors="replace")[-2000:]
    reason = f"the process ended with status {status}"
    return Result(findings=[Finding(reason, path.read_bytes(), log) for path in crashes])


def coverage(folder: Path) -> int:
    """Edges and comparisons of the package that the last run reached; 0 if it was not guided."""
    log = folder / "log"
    found = re.findall(r"cov: (\d+)", log.read_text(errors="replace")) if log.exists() else []
    return int(found[-1]) if found else 0


def _fuzz(target: Target, cases: int, seed: int, folder: Path) -> None:
    """Never returns: libFuzzer owns the process."""
    import atheris

    target.warm_up()
    seeds = list(target.seeds)
    for number, content in enumerate(seeds):
        (folder / "corpus" / f"seed-{number}").write_bytes(content)
        target.read(content)  # imports and caches count for no case
    with open(folder / "log", "wb") as log:
        os.dup2(log.fileno(), 2)
    run = Run(target)

    def case(content: bytes) -> None:
        run.case(content)
        if run.result.cases >= cases or len(run.result.findings) >= 20:
            found = vars(run.result) | {
                "findings": [(f.reason, f.content.hex(), f.trace) for f in run.result.findings]
            }
            (folder / "result.json").write_text(json.dumps(found))
            os._exit(0)

    def mutate(content: bytes, longest: int, number: int) -> bytes:
        rng = random.Random(number)
        if not rng.randrange(3):
            return atheris.Mutate(content, longest)
        return target.damage(content, rng, seeds)[:longest]

    longest = max(4 * max(map(len, seeds)), 1 << 16)
    options = {
        "seed": seed + 1, "max_len": longest, "len_control": 0, "rss_limit_mb": 0, "timeout": 60,
        "artifact_prefix": f"{folder}/", "detect_leaks": 0, "handle_segv": 1,
    }  # fmt: skip
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items())]
    with limits():
        atheris.Setup([*arguments, str(folder / "corpus")], case, custom_mutator=mutate)
        atheris.Fuzz()


def _is_ours(function: types.FunctionType) -> bool:
    return (function.__module__ or "").startswith("qvla_jax.") and not hasattr(
        function, "__wrapped__"
    )
