"""Environment variables that JAX cannot use: one line that names the variable, its value, the rest.

Devices of this process exist already, so that what JAX would say is put in its place here; one
process of its own hears it from JAX.
"""

import os
import subprocess
import sys
from unittest import mock

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvla_jax import cli, devices
from qvla_jax.errors import InputError

from .test_cli import example_arguments

CHECKS = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Variables hold no zero byte, and here no half characters.
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)


NO_SETTINGS = cli._Call("report", None, cli.COMMANDS["report"], None, lambda _: None, False)


def run_with(variables, failure, capsys, *arguments):
    """The one line on stderr of a command where JAX has no device."""
    with (
        mock.patch.object(devices, "_asked", return_value=variables),
        mock.patch.object(devices, "_started", return_value=True),
        mock.patch.object(jax, "devices", mock.Mock(side_effect=failure)),
        mock.patch.object(devices, "platforms", return_value=["cpu"]),
    ):
        assert cli.main([str(argument) for argument in arguments]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("qvla: error: ")
    assert error.count("\n") == 1
    return error


@CHECKS
@given(value=VALUES, failure=st.sampled_from([AssertionError(), RuntimeError("no\nbackend")]))
def test_any_platform_that_is_not_there_is_one_line(value, failure, capsys):
    with mock.patch.object(cli, "_parse", return_value=NO_SETTINGS):
        said = run_with({"JAX_PLATFORMS": value}, failure, capsys, "report")
    shown = " ".join(repr(value).split())
    assert said.startswith(f"qvla: error: JAX_PLATFORMS={shown[:60]}")
    assert "there is: cpu" in said
    assert "unset JAX_PLATFORMS" in said


@pytest.mark.parametrize("name", ["run", "inspect", "serve", "compare-solvers"])
def test_every_command_says_so_before_it_begins(name, capsys, tmp_path):
    arguments = [name, *example_arguments(name, tmp_path)]
    said = run_with({"JAX_PLATFORMS": "rocm"}, AssertionError(), capsys, *arguments)
    assert "JAX_PLATFORMS='rocm'" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "blamed", "remedy"),
    [
        ({"JAX_PLATFORMS": "cuda"}, ["JAX_PLATFORMS='cuda'"], "qvla-jax[cuda]"),
        ({"JAX_PLATFORMS": "tpu,gpu"}, ["JAX_PLATFORMS='tpu,gpu'"], "qvla-jax[cuda,tpu]"),
        ({"JAX_PLATFORMS": "CPU"}, ["JAX_PLATFORMS='CPU'"], "or name cpu"),
        ({"JAX_PLATFORMS": "cpu,"}, ["JAX_PLATFORMS='cpu,'"], "or name cpu"),
        (
            {"JAX_PLATFORMS": "cpu", "JAX_PLATFORM_NAME": "cuda"},
            ["JAX_PLATFORM_NAME='cuda'"],
            "unset JAX_PLATFORM_NAME or",
        ),
        ({"JAX_DEFAULT_DEVICE": "tpu"}, ["JAX_DEFAULT_DEVICE='tpu'"], "qvla-jax[tpu]"),
        ({}, ["finds no device (AssertionError)"], "qvla doctor"),
    ],
)
def test_the_variable_that_is_to_blame_is_named(asked, blamed, remedy):
    said = devices.no_device(AssertionError(), asked, ["cpu"])
    assert all(part in said for part in [*blamed, remedy])
    innocent = {f"{name}=" for name in asked} - {part.partition("'")[0] for part in blamed}
    assert not any(name in said for name in innocent)


@CHECKS
@given(
    name=st.sampled_from(["JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "JAX_DEFAULT_DEVICE"]),
    value=VALUES,
)
def test_a_value_that_jax_refuses_is_named_with_its_variable(name, value):
    environment = {name: value, "JAX_LOG_COMPILES": "1", "HOME": "/"}
    forms = (f"environment {name!r}", f"JAX flag {name.lower()}", name.lower().replace("_", ".", 1))
    for said in forms:
        message = devices.refused_variable(ValueError(f"invalid value for {said}"), environment)
        assert message.startswith(f"{name}=")
        assert "JAX_LOG_COMPILES" not in message


@pytest.mark.parametrize("count", ["0", "-2", "many", ""])
def test_a_number_of_devices_that_is_none_is_refused(monkeypatch, count):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", count)
    with pytest.raises(InputError, match=r"JAX_NUM_CPU_DEVICES=.*unset it to use all cores"):
        devices.use_all_cpu_cores()


@pytest.mark.parametrize(
    ("code", "output", "refused"),
    [
        (1, "F1128 12:00 1 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --no\n", True),
        (-6, "E1128 1 command_line_flags.cc:93] Couldn't interpret value a for flag b.\n", True),
        (0, "", False),
        (1, "ImportError: another reason", False),
    ],
)
def test_flags_that_would_end_the_process_are_refused(monkeypatch, code, output, refused):
    monkeypatch.setattr(devices, "_run", lambda program, environment: (code, output))
    if not refused:
        devices.check_flags({"XLA_FLAGS": "--no"})
        return
    with pytest.raises(InputError, match="XLA_FLAGS='--no': XLA does not take it") as caught:
        devices.check_flags({"XLA_FLAGS": "--no"})
    assert output.strip().rpartition("] ")[2] in str(caught.value)


def test_devices_that_are_there_are_ready():
    devices.ready()
    assert devices._started()
    assert jax.config.jax_num_cpu_devices == 2


def test_python_gets_an_input_error_too():
    program = (
        "import qvla_jax\nfrom qvla_jax.errors import InputError\n"
        "try: qvla_jax.load_policy('libero-mini')\nexcept InputError as error: print(error)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("JAX_PLATFORMS='nonsense': ")
    assert "there is: cpu" in done.stdout
