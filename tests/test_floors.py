"""The order of the rooms: a room imports from the floors below its own, and from itself."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "qvla_jax": ROOT / "qvla_jax",
    "qvla_jax.solvers": ROOT / "solvers",
    "qvla_jax.data": ROOT / "data",
}
# From the ground up. Rooms of one floor do not know each other.
FLOORS = (
    {"array_typing", "caches", "errors", "output", "precision", "programs", "progress"},
    {"compiler"},
    {"atomic", "devices", "failures", "mapping", "plain", "plain_pickle", "stage_times"},
    {"remote"},
    {"provenance"},
    {"array_files", "repeating", "sharding"},
    {"data", "models", "solvers"},
    {"quantization"},
    {"kernels"},
    {"checkpoints"},
    {"families"},
    {"inference", "model_options"},
    {"sensitivity"},
    {"allocation"},
    {"methods"},
    {"evaluation"},
    {"report"},
    {"pipeline", "serving", "training"},
    {"doctor"},
    {"commands"},
    {"cli"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in sorted(rooms)}


def rooms() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inside = ".".join(path.relative_to(folder).with_suffix("").parts)
            room = f"{package}.{inside}".split(".")[1]
            if room != "__init__":  # `import qvla_jax` loads what is asked for
                yield room, path


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package, late ones included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            own = node.module == "qvla_jax"
            names = [f"qvla_jax.{a.name}" for a in node.names] if own else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "qvla_jax" and len(parts) > 1 and parts[1] in FLOOR_OF:
                yield node.lineno, parts[1]


def test_every_room_has_a_floor():
    assert {room for room, _ in rooms()} - {"__main__"} == set(FLOOR_OF)


@pytest.mark.parametrize("room", FLOOR_OF)
def test_no_room_imports_from_a_floor_above(room):
    upwards = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for own, path in rooms()
        if own == room
        for line, other in imported_rooms(path)
        if other != room and FLOOR_OF[other] >= FLOOR_OF[room]
    ]
    assert not upwards


# Distinctive names of modules of the families' networks.
_MODULES = re.compile(
    r"vision_backbone|language_model|featurizer|projector|action_head|action_decoder|lm_head"
    r"|self_attn|[qkvo]_proj|(gate|up|down)_proj|embed_tokens|attn_pool|PaliGemma|encoderblock"
    r"|_einsum|MlpBlock|MultiHeadDotProduct|Dense_0"
)


def _written(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and string but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield node.lineno, str(node.value)


def test_families_alone_name_the_modules_of_networks():
    """Everything behind reads them from the layout."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for room, path in rooms()
        if room != "families"
        for line, text in _written(ast.parse(path.read_text("utf-8")))
        if _MODULES.search(text)
    ]
    assert not found


_MOST_PARAMETERS = 7


def test_no_function_takes_more_positional_arguments_than_one_can_remember():
    found = []
    for _, path in rooms():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                if count > _MOST_PARAMETERS:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count}")
    assert not found
