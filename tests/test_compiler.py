"""Sums on CPUs are right, whatever is imported first: in processes without the tests' XLA flags."""

import os

import pytest

from qvla_jax import compiler
from qvla_jax.programs import run_apart

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def output_of(program):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = run_apart(program, environment, seconds=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_sums_are_right_behind_the_import():
    (error,) = output_of(
        "import qvla_jax\nfrom qvla_jax.compiler import error_of_sums\nprint(error_of_sums())"
    )
    assert float(error) < 1e-5


def test_wrong_sums_are_refused_where_the_flag_comes_too_late():
    error, refused = output_of(
        "import jax\njax.devices()\nfrom qvla_jax import compiler\n"
        "print(compiler.error_of_sums())\n"
        "try: compiler.check_sums()\n"
        "except compiler.InputError as error: print('XLA_FLAGS=' in str(error))\n"
        "else: print(False)"
    )
    assert (float(error) > 1e-3) == (refused == "True")


@pytest.mark.parametrize(
    ("affected", "before", "after"),
    [
        (True, None, f"{FLAG}="),
        (True, "--xla_a=1", f"--xla_a=1 {FLAG}="),
        (True, f"{FLAG}=dot", f"{FLAG}=dot"),
        (False, None, None),
    ],
)
def test_the_flag_is_set_where_it_is_needed_and_not_said(monkeypatch, affected, before, after):
    monkeypatch.setattr(compiler, "_affected", lambda: affected)
    environment = {} if before is None else {"XLA_FLAGS": before}
    compiler.avoid_wrong_sums(environment)
    assert environment.get("XLA_FLAGS") == after
