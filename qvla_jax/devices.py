"""Checks that JAX starts and has a device; names the environment variable to blame if not.

JAX reads its variables when it is imported (JAX_ENABLE_X64, JAX_NUM_CPU_DEVICES), when the first
device is made (JAX_PLATFORMS, JAX_PLATFORM_NAME, XLA_FLAGS) and when the first array is
(JAX_DEFAULT_DEVICE). People export them once and forget them. An unusable value raises one of JAX's
exceptions, fails an assertion, or kills the process. Here it becomes an `InputError` that names the
variable, its value and the available platforms.

Nothing here imports JAX before it is called.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from qvla_jax import compiler
from qvla_jax.errors import InputError
from qvla_jax.programs import run_apart

# The variables that select devices, in the order in which JAX reads them.
_CHOICES: Final = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE")
_COUNT: Final = "JAX_NUM_CPU_DEVICES"
_FLAGS: Final = "XLA_FLAGS"
# The extra that installs the platform.
_EXTRAS: Final = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
_TIMEOUT: Final = 120

_PLATFORMS: Final = """
import contextlib
import jax
for name in ("cuda", "rocm", "tpu", "cpu"):
    with contextlib.suppress(Exception):
        print("there is", name, len(jax.devices(name)))
"""
_START: Final = "import jax; jax.devices()"


def import_jax() -> None:
    """Imports JAX.

    Raises:
        InputError: JAX rejects a variable, or is not installed.
    """
    try:
        import jax  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"JAX does not import ({_one_line(error)}): pip install 'jax>=0.10.2'; `qvla doctor` "
            "says more"
        ) from error
    except Exception as error:  # of the parsers of single variables
        raise InputError(refused_variable(error, os.environ)) from error


def ready() -> None:
    """Creates JAX's devices, unless they exist, and puts a number on one.

    Processes of one computation join first (`sharding.join_processes`).

    Raises:
        InputError: there is no device. The message names the variable that requests one, its value,
            and the available platforms.
    """
    import_jax()
    import jax
    import numpy as np

    if not _started():
        _check_count()
        check_flags(os.environ)
    try:
        jax.devices()
        jax.device_put(np.float32(0)).block_until_ready()
    except Exception as error:  # RuntimeError, an assertion without a message, or a plugin's own
        raise InputError(no_device(error, _asked(), platforms())) from error


def rest_idle_threads() -> None:
    """Lets the threads of NumPy's and SciPy's OpenBLAS sleep as soon as they have nothing to do.

    They spin for some milliseconds after every call, which takes the cores away from XLA: the
    Cholesky factors of a small policy take six times as much CPU time. Has to run before NumPy is
    imported. A value that the environment has stays.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def use_all_cpu_cores() -> None:
    """Creates one virtual CPU device for each core that this process may use.

    One XLA CPU device uses about one core. A number in JAX_NUM_CPU_DEVICES and existing devices are
    respected.

    Raises:
        InputError: JAX_NUM_CPU_DEVICES is not a number of devices.
    """
    import_jax()
    _check_count()
    if _COUNT not in os.environ:
        import jax

        # JAX rejects the setting once its devices exist; their creator chose the number.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores())


def check_flags(environment: Mapping[str, str]) -> None:
    """Rejects flags that XLA does not accept.

    XLA aborts the process that reads them, so a separate process reads them first, on the CPU.

    Raises:
        InputError: XLA rejects them; the message names the flag.
    """
    flags = environment.get(_FLAGS, "").replace(compiler.SETTING, "").strip()
    if not flags:  # none but our own
        return
    without = {key: value for key, value in environment.items() if key not in _CHOICES}
    code, output = _run(_START, {**without, "JAX_PLATFORMS": "cpu"})
    if code == 0 or "flag" not in output.lower():
        return
    said = output.strip().splitlines()[0].rpartition("] ")[2]
    raise InputError(
        f"{_FLAGS}={_short(flags)}: XLA does not take it ({said}); correct or unset it"
    )


def platforms() -> list[str]:
    """The available platforms, queried in a separate process without the variables."""
    without = {key: value for key, value in os.environ.items() if key not in _CHOICES}
    _, output = _run(_PLATFORMS, without)
    found = [line.split() for line in output.splitlines() if line.startswith("there is ")]
    return [name for _, _, name, _ in found]


def no_device(error: BaseException, asked: Mapping[str, str], available: Sequence[str]) -> str:
    """The message when JAX finds no device.

    Args:
        error: what JAX said.
        asked: the variables that choose a platform -> their values.
        available: the available platforms.
    """
    said = _one_line(error)[:300]
    wrong = {n: v for n, v in asked.items() if not set(v.split(",")) <= set(available)} or asked
    if not wrong:
        return f"JAX finds no device ({said}); `qvla doctor` says more"
    values = " and ".join(f"{name}={_short(value)}" for name, value in wrong.items())
    words = {word.strip().lower() for value in wrong.values() for word in value.split(",")}
    extras = sorted({_EXTRAS[word] for word in words - set(available) if word in _EXTRAS})
    remedy = f"unset {' and '.join(wrong)}"
    if available:
        remedy += f" or name {' or '.join(available)}"
    if words & {"cuda", "gpu"} and (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        values += f" and CUDA_VISIBLE_DEVICES={_short(hidden)}"
    if extras:
        remedy += f"; pip install 'qvla-jax[{','.join(extras)}]' brings {' and '.join(extras)}"
    there = ", ".join(available) or "none that starts"
    return f"{values}: JAX cannot start this here, there is: {there}; {remedy} [{said}]"


def refused_variable(error: BaseException, environment: Mapping[str, str]) -> str:
    """The message when JAX does not import because of a variable's value."""
    text = _one_line(error)
    said = text.lower().replace(".", "_")  # `jax.default_device`
    own = {name: value for name, value in environment.items() if name.startswith("JAX_")}
    # The longest match, because one name may be a prefix of another.
    named = sorted((name for name in own if name.lower() in said), key=len)[-1:] or sorted(own)
    if not named:
        return f"JAX does not import ({text}); `qvla doctor` says more"
    values = " and ".join(f"{name}={_short(own[name])}" for name in named)
    return f"{values}: JAX does not take it ({text}); correct or unset it"


def _check_count() -> None:
    """Rejects a count of zero CPU devices, which JAX reports as an unknown process."""
    said = os.environ.get(_COUNT, "1")
    if not said.strip().isdecimal() or int(said) < 1:
        raise InputError(f"{_COUNT}={_short(said)}: expected 1 or more; unset it to use all cores")


def _asked() -> dict[str, str]:
    """What selects a platform: variables, or settings a program made in JAX instead."""
    import jax

    asked = {name: value for name in _CHOICES if (value := os.environ.get(name))}
    # JAX defines its settings at run time.
    told = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if told and told != asked.get("JAX_PLATFORMS"):
        asked.pop("JAX_PLATFORMS", None)
        asked = {"jax_platforms": str(told), **asked}
    return asked


def _started() -> bool:
    """Whether JAX has created its devices; it then rejects another number of them."""
    import jax

    count = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count + 1)
        jax.config.update("jax_num_cpu_devices", count)
        return False
    return True


def _run(program: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and all output of a program; the code is the negative signal if one ended it."""
    try:
        done = run_apart(program, environment, seconds=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM, ""
    return done.returncode, done.stdout + done.stderr


def _short(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
