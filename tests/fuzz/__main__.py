"""Fuzzes every reader: `make fuzz`, or `PYTHONPATH=tests python -m fuzz --cases 1000000`.

Runs add up: counts are kept beside the corpora, and `--summary` prints their sums.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .guided import HAS_ATHERIS, coverage, fuzz_guided, instrument
from .harness import fuzz
from .targets import targets

COUNTS = "counts.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a reader's name")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="corpora, findings")
    parser.add_argument("--summary", action="store_true", help="sums of the runs in --out")
    arguments = parser.parse_args()
    failed = 0 if arguments.summary else _run(arguments)
    _summary(arguments.out / COUNTS)
    return min(failed, 1)


def _run(arguments: argparse.Namespace) -> int:
    out, failed = arguments.out, 0
    out.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        chosen = [t for t in targets(Path(folder)) if arguments.only in t.name]
        if HAS_ATHERIS:
            instrument()
        else:
            print("guided by kinds of refusal: atheris is not installed")
        weights = sum(target.weight for target in chosen)
        for target in chosen:
            start = sum(os.times()[:4])
            count = int(arguments.cases * target.weight / weights) + 1
            if not HAS_ATHERIS:
                result = fuzz(target, count, seed=arguments.seed)
            else:
                result = fuzz_guided(target, count, seed=arguments.seed, folder=out / target.name)
            line: dict[str, Any] = {
                "reader": target.name, "seed": arguments.seed, "cases": result.cases,
                "accepted": result.accepted, "kinds": result.kinds, "slowest": result.slowest,
                "findings": len(result.findings), "cpu_seconds": sum(os.times()[:4]) - start,
                "coverage": coverage(out / target.name),
            }  # fmt: skip
            with open(out / COUNTS, "a") as file:
                file.write(json.dumps(line) + "\n")
            for finding in result.findings:
                path = out / target.name / finding.name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(finding.content)
                print(f"{path}: {finding.reason}\n{finding.trace}", flush=True)
            failed += len(result.findings)
    return failed


def _summary(counts: Path) -> None:
    """Sums of cases and findings, and the largest of the rest, of every reader."""
    total: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, counts.read_text().splitlines()):
        sums = total.setdefault(line.pop("reader"), dict.fromkeys(line, 0))
        for name in ("cases", "accepted", "findings", "cpu_seconds"):
            sums[name] += line[name]
        for name in ("kinds", "slowest", "coverage"):
            sums[name] = max(sums[name], line[name])
    names = ("cases", "accepted", "kinds", "coverage", "slowest", "findings", "CPU s")
    print(f"{'reader':32}" + "".join(f"{name:>10}" for name in names))
    for reader, s in total.items():
        print(
            f"{reader:32}{s['cases']:10,}{s['accepted']:10,}{s['kinds']:10}{s['coverage']:10}"
            f"{1e3 * s['slowest']:7.0f} ms{s['findings']:10}{s['cpu_seconds']:10.0f}"
        )
    cases, findings = (sum(s[k] for s in total.values()) for k in ("cases", "findings"))
    print(f"{cases:,} cases, {findings} findings")


if __name__ == "__main__":
    raise SystemExit(main())
