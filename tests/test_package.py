"""The package as such: light to import, with the public names it promises."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qvla_jax

ROOT = Path(__file__).parents[1]
FOLDERS = ("qvla_jax", "solvers", "data", "tests", "benchmarks", "docs")
HEAVY = ("jax", "numpy", "tensorflow", "torch", "pulp", "highspy", "flax", "matplotlib", "rich")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return set(result.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import qvla_jax").intersection(HEAVY)


def test_the_command_line_and_its_doctor_import_the_standard_library_alone():
    program = (
        f"import sys; sys.path.insert(0, {str(Path(qvla_jax.__file__).parents[1])!r})\n"
        "from qvla_jax import cli\ncli.main(['--help']); cli.main(['--version'])\n"
        "from qvla_jax.commands import doctor\ncli.main(['doctor', '--help'])"
    )
    # -S: without what is installed
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert "usage: qvla doctor" in done.stdout


def test_importing_the_solvers_imports_no_jax_and_no_solver_library():
    loaded = modules_after("import qvla_jax.solvers")
    assert not loaded.intersection({"jax", "flax", "tensorflow", "pulp", "highspy"})


def test_importing_the_pipeline_imports_no_tensorflow_no_solver_library_and_creates_no_devices():
    loaded = modules_after(
        "import qvla_jax.pipeline, qvla_jax.commands.run, qvla_jax.commands.serve, jax\n"
        # This is an error once there are devices: importing creates none.
        "jax.config.update('jax_num_cpu_devices', 3)"
    )
    assert not loaded.intersection({"tensorflow", "torch", "pulp", "highspy", "libero"})


def private_names(tree: ast.Module) -> Iterator[str]:
    """What a file imports, or reaches through what it imports, that has a leading underscore."""
    bound, reached = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {a.asname or a.name.partition(".")[0]: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            reached.append(node)
    for node in reached:
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in bound:
            yield bound[root.id] + ast.unparse(node).removeprefix(root.id)
    yield from filter(is_private, bound.values())


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from a._b import c", "a._b.c"),
        ("from a import _b", "a._b"),
        ("import a._b as c", "a._b"),
        ("import a\na.b._c.d", "a.b._c"),
        ("from a import b as c\nc._d()", "a.b._d"),
    ],
)
def test_private_names_are_found(code, name):
    assert list(private_names(ast.parse(code))) == [name]
    assert not [*private_names(ast.parse("import a, b\na.c, a.__doc__, self._b, b.c()._d"))]


def test_nothing_private_of_another_package_is_used():
    ours = {"qvla_jax", *FOLDERS, *sys.stdlib_module_names}
    # A benchmark compares with products of PyTorch that have no public names.
    known = {
        "torch._convert_weight_to_int4pack_for_cpu",
        "torch.ops.aten._weight_int4pack_mm_for_cpu",
    }
    found = {
        (str(path.relative_to(ROOT)), name)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for name in private_names(ast.parse(path.read_text("utf-8")))
        if name.partition(".")[0] not in ours and name not in known
    }
    assert not found


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
