"""The notebooks: stored without output, and running from top to bottom (`make notebooks`)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Executed copies, with their figures, to look at.
EXECUTED = ROOT / "build" / "notebooks"

nbformat = pytest.importorskip("nbformat")


def named(path: Path) -> str:
    return path.stem


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_there_are_six():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_stored_without_output_and_in_the_current_format(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in cells(path, "code"):
        assert not cell.outputs, cell.source
        assert cell.execution_count is None, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_begins_with_a_title_and_its_code_parses(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith(f"# {int(path.stem[:2])}. ")
    ast.parse("\n".join(cell.source for cell in cells(path, "code")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_imports_names_that_there_are(path):
    """Without running it: what it takes from the package by import, or from `qvla_jax` itself."""
    code = ast.parse("\n".join(cell.source for cell in cells(path, "code")))
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qvla_jax"):
            taken = __import__(node.module, fromlist=[alias.name for alias in node.names])
            for alias in node.names:
                assert hasattr(taken, alias.name), f"{node.module}.{alias.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            import qvla_jax

            assert node.value.id != "qvla_jax" or node.attr in qvla_jax.__all__, node.attr


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises what a cell raises
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / path.name)
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 2
    complaints = [o.text for o in outputs if o.get("name") == "stderr"]
    assert not complaints, "".join(complaints)
