"""The package as such: light to import, with the public names it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

import qvla_jax

HEAVY = ("jax", "numpy", "tensorflow", "torch", "pulp", "highspy", "flax", "matplotlib", "rich")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return set(result.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import qvla_jax").intersection(HEAVY)


def test_importing_the_solvers_imports_no_jax_and_no_solver_library():
    loaded = modules_after("import qvla_jax.solvers")
    assert not loaded.intersection({"jax", "flax", "tensorflow", "pulp", "highspy"})


def test_importing_the_pipeline_imports_no_tensorflow_and_no_solver_library():
    loaded = modules_after("import qvla_jax.pipeline, qvla_jax.commands")
    assert not loaded.intersection({"tensorflow", "torch", "pulp", "highspy", "libero"})


def test_importing_creates_no_devices():
    code = "import qvla_jax.pipeline, jax; jax.config.update('jax_num_cpu_devices', 3)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", qvla_jax.__all__)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(qvla_jax, name)
    assert name == "__version__" or value.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = qvla_jax.frobnicate
    assert "load_policy" in dir(qvla_jax)


def test_the_citation_names_this_version():
    citation = Path(__file__).parents[1] / "CITATION.cff"
    assert f"version: {qvla_jax.__version__}" in citation.read_text().splitlines()
