"""Fuzzes every reader: `make fuzz`, or `PYTHONPATH=tests python -m fuzz --cases 1000000`."""

import argparse
import tempfile
import time
from pathlib import Path

from .harness import fuzz
from .targets import targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a reader's name")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="for findings")
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    total = failed = 0
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        chosen = [t for t in targets(Path(folder)) if arguments.only in t.name]
        weights = sum(target.weight for target in chosen)
        print(f"{'reader':32}{'cases':>9}{'accepted':>9}{'kinds':>7}{'slowest':>10}{'findings':>9}")
        for target in chosen:
            start = time.process_time()
            count = -(-int(arguments.cases * target.weight) // int(max(weights, 1)))
            result = fuzz(target, count, seed=arguments.seed)
            print(
                f"{target.name:32}{result.cases:9}{result.accepted:9}{result.kinds:7}"
                f"{1e3 * result.slowest:7.0f} ms{len(result.findings):9}"
                f"   {time.process_time() - start:.0f} CPU s",
                flush=True,
            )
            for finding in result.findings:
                path = arguments.out / target.name / finding.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(finding.content)
                print(f"  {path}: {finding.reason}\n{finding.trace}", flush=True)
            total, failed = total + result.cases, failed + len(result.findings)
    print(f"{total} cases, {failed} findings")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
