"""Rendering stored simulator states; needs the simulator and an OpenGL library."""

import builtins
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvla_jax.data.libero.simulator import TaskScene, box_average
from qvla_jax.errors import InputError

SCENE = Path(__file__).parent / "fixtures" / "libero_scene.npz"

# In a process of its own: Mesa crashes where other tests have loaded TensorFlow.
PROGRAM = """
import os, sys
os.environ.setdefault("MUJOCO_GL", "egl")
import mujoco
import numpy as np
try:
    mujoco.GLContext(8, 8).free()
except Exception as error:
    print(f"no OpenGL context here: {error}")
    sys.exit(77)
from qvla_jax.data.libero.simulator import TaskScene
from qvla_jax.errors import InputError

def message(function, *args):
    try:
        function(*args)
    except InputError as error:
        return str(error)

stored = np.load(sys.argv[1])
fixtures = dict(zip(stored["fixture_names"], stored["fixture_poses"], strict=True))
shift = np.array([0.1, 0, 0, 0, 0, 0, 0])
with TaskScene("libero_spatial", str(stored["bddl_file"])) as scene:
    scene.restore(stored["state"], fixtures)
    image, wrist = scene.render("image"), scene.render("wrist_image")
    scene.restore(stored["state"], {name: pose + shift for name, pose in fixtures.items()})
    np.savez(
        sys.argv[2],
        image=image,
        wrist=wrist,
        moved=scene.render("image"),
        short=message(scene.restore, stored["state"][:-1], {}),
        unknown=message(TaskScene, "libero_spatial", "nothing.bddl"),
    )
"""


@pytest.mark.libero
@pytest.mark.slow
def test_stored_state_renders_the_stored_picture(tmp_path: Path) -> None:
    for name in ("mujoco", "libero"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the LIBERO simulator (extra `libero`)")
    out = tmp_path / "rendered.npz"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(SCENE), str(out)], capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays, np.load(SCENE) as stored:
        image, expected = arrays["image"], stored["image"]
        assert image.shape == arrays["wrist"].shape == (128, 128, 3)
        assert image.dtype == np.uint8
        # Exact with the rasterizer it was made with; others round differently at edges.
        assert np.abs(image.astype(np.int16) - expected.astype(np.int16)).mean() < 2.0
        assert np.abs(image.astype(np.int16) - arrays["moved"].astype(np.int16)).mean() > 2.0
        assert arrays["wrist"].std() > 10
        assert str(arrays["short"]) == "state has 91 entries, this task's has 92"
        assert "nothing.bddl: no such LIBERO task" in str(arrays["unknown"])


def test_missing_simulator_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_simulator(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("mujoco", "libero"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_simulator)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    with pytest.raises(InputError, match=r"qvla-jax\[libero\]"):
        TaskScene("libero_spatial", "any.bddl")


def test_tensorflow_beside_software_rendering_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", sys)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(InputError, match="process of its own"):
        TaskScene("libero_spatial", "any.bddl")


def test_box_average_rounds_half_up() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[0, 0] = 2  # A block's mean is 0.5.
    image[:, 2:] = 255
    assert box_average(image, 2).tolist() == [[[1] * 3, [255] * 3]]
    assert np.array_equal(box_average(image, 1), image)
