"""A LIBERO task as a picture book: put the simulator into a stored state, render its cameras.

Needs the ``libero`` extra and an OpenGL library (EGL by default). Nothing here steps the physics.

Rendering is what LIBERO costs most. Reflections and multisampling take half to three quarters of
it and show on the stove's glossy top only, so both are off; a picture is rendered at twice its
size and averaged instead.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from qvla_jax.errors import InputError

CAMERAS: Final = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}


class TaskScene:
    """The scene of one LIBERO task, to be restored and rendered."""

    def __init__(self, suite: str, bddl_file: str, *, size: int = 128, supersample: int = 2):
        """Compiles the task's model (a few seconds).

        Args:
          suite: Folder of the task's definition, such as "libero_spatial".
          bddl_file: Name of the definition inside that folder.
          size: Height and width of the pictures in pixels.
          supersample: Each pixel is the mean of ``supersample`` squared rendered ones.

        Raises:
          InputError: The extra is not installed or the task is unknown.
        """
        control_env, folder, mujoco = _import_libero()
        path = folder / suite / bddl_file
        if not path.is_file():
            raise InputError(f"{path}: no such LIBERO task definition")
        self._mujoco, self._size, self._supersample = mujoco, size, supersample
        self._env = control_env(
            bddl_file_name=str(path),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            hard_reset=False,
        )
        self._env.reset()  # Hides the sites (grasp markers), which construction leaves visible.
        self._model = self._env.sim.model._model
        rendered = size * supersample
        quality, view = self._model.vis.quality, self._model.vis.global_
        quality.offsamples = 0
        quality.shadowsize = 64  # No light in LIBERO casts a shadow; the default map is 4096 wide.
        view.offwidth, view.offheight = max(view.offwidth, rendered), max(view.offheight, rendered)
        self._renderer = mujoco.Renderer(self._model, rendered, rendered, max_geom=1000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # Group 0 holds the collision shapes.

    def restore(self, state: np.ndarray, fixtures: Mapping[str, np.ndarray]) -> None:
        """Puts the scene into a flattened state, with its fixtures at the given poses.

        Cabinets and stoves are placed in the model when an episode starts, not in its state.
        """
        expected = 1 + self._model.nq + self._model.nv
        if len(state) != expected:
            raise InputError(f"state has {len(state)} entries, this task's has {expected}")
        for name, pose in fixtures.items():
            body = self._model.body(name).id
            self._model.body_pos[body] = pose[:3]
            self._model.body_quat[body] = pose[3:]
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()

    def render(self, camera: str) -> np.ndarray:
        """Renders "image" or "wrist_image" as u8[size, size, 3], turned as OpenVLA wants it."""
        renderer = self._renderer
        renderer.update_scene(
            self._env.sim.data._data, camera=CAMERAS[camera], scene_option=self._options
        )
        renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        # MuJoCo's own renderer hands the rows top-down; a turn by 180 degrees leaves the columns.
        pixels = renderer.render()[:, ::-1]
        return box_average(pixels, self._supersample)

    def close(self) -> None:
        """Frees the OpenGL context and the simulation."""
        self._renderer.close()
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


def box_average(image: np.ndarray, factor: int) -> np.ndarray:
    """Shrinks u8[h * factor, w * factor, 3] to u8[h, w, 3], rounding half up."""
    if factor == 1:
        return np.ascontiguousarray(image)
    h, w = image.shape[0] // factor, image.shape[1] // factor
    blocks = image.reshape(h, factor, w, factor, 3).astype(np.uint32).sum(axis=(1, 3))
    area = factor * factor
    return ((blocks + area // 2) // area).astype(np.uint8)


def _import_libero() -> tuple[Any, Path, Any]:
    if "tensorflow" in sys.modules and not Path("/dev/nvidiactl").exists():
        raise InputError(
            "TensorFlow is loaded in this process, and Mesa's software OpenGL crashes beside it "
            "(both bring LLVM): render in a process of its own"
        )
    os.environ.setdefault("MUJOCO_GL", "egl")
    # Rendering is bound by vertices, which Mesa's software rasterizer does not thread.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    try:
        import mujoco
        from libero.libero import get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise InputError(
            "rendering LIBERO needs the simulator: pip install 'qvla-jax[libero]', and an OpenGL "
            f"library (Debian: libegl1 libgl1-mesa-dri libegl-mesa0 libgl1) [{error}]"
        ) from error
    return ControlEnv, Path(get_libero_path("bddl_files")), mujoco
