"""Small Python programs that run in a process of their own. Imports the standard library alone."""

import subprocess
import sys
from collections.abc import Mapping


def run_apart(
    program: str, environment: Mapping[str, str], *, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Runs Python source with this interpreter, without standard input.

    Args:
        program: the source.
        environment: all variables that it sees.
        seconds: how long it may take.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
        stdin=subprocess.DEVNULL,
        env=dict(environment),
    )
