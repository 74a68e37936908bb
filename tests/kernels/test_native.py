"""The CPU kernel's functions against plain loops in C++, with neither XLA nor Python between.

csrc/tests/check_kernels.cpp holds the checks; this builds it, also for 64-bit ARM, and runs it,
there in an emulator of processors that have ever more instructions. `make sanitize` builds it, too.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AARCH64 = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# The best kernel of each processor.
PROCESSORS = {"cortex-a57": "neon", "neoverse-n1": "neon_dot", "max": "neon_bf16"}

pytestmark = pytest.mark.long


def needs(*programs, hint):
    """Skips where none of the programs is there; otherwise the first that is."""
    found = [path for path in map(shutil.which, programs) if path]
    if not found:
        pytest.skip(f"no {' or '.join(programs)}: install {hint}")
    return found[0]


def build(name, *settings, targets=("check_kernels",)):
    """The folder build/NAME with the targets in it."""
    cmake = needs("cmake", hint="cmake")
    folder = ROOT / "build" / name
    configure = [cmake, "-S", ROOT / "csrc", "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    compile_ = [cmake, "--build", folder, "--target", *targets]
    for command in ([*configure, *settings], compile_):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def build_for_aarch64(name, *settings, targets=("check_kernels",)):
    needs(AARCH64, hint="g++-aarch64-linux-gnu")
    return build(
        name, f"-DCMAKE_CXX_COMPILER={AARCH64}", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", *settings, targets=targets,
    )  # fmt: skip


def check(*command):
    """Names of the kernels that agree."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    return [line.split()[0] for line in result.stdout.splitlines() if line.endswith("cases agree")]


def test_kernels_of_this_processor():
    needs("c++", hint="a C++ compiler")
    assert "portable" in check(build("check") / "check_kernels", "3000")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_kernels_for_aarch64(processor):
    emulator = needs(*EMULATORS, hint="qemu-user-static or qemu-user")
    program = build_for_aarch64("check-aarch64") / "check_kernels"
    found = check(emulator, "-cpu", processor, program, "300")
    assert found[0] == PROCESSORS[processor]
    assert found[-1] == "portable"


def test_kernels_for_aarch64_with_undefined_operations_caught():
    emulator = needs(*EMULATORS, hint="qemu-user-static or qemu-user")
    folder = build_for_aarch64("check-aarch64-ubsan", "-DQVLA_SANITIZE=undefined")
    found = check(emulator, "-cpu", "max", folder / "check_kernels", "300")
    assert set(found) == {*PROCESSORS.values(), "portable"}


def test_the_library_is_built_for_aarch64():
    folder = build_for_aarch64("check-aarch64", targets=("_cpu",))
    header = (folder / "_cpu.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
