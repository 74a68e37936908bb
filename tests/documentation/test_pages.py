"""The pages: their commands parse, quick ones run, links lead somewhere, and so does Python."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import qvla_jax
from qvla_jax import cli, pipeline
from qvla_jax.repeating import write_settings

from .pages import NOTEBOOKS, PAGES, ROOT, all_commands, markdown

COMMANDS = all_commands()


def test_the_pages_show_every_command():
    """What is not shown anywhere is not found by anybody."""
    shown = {command.split()[1] for command in COMMANDS}
    assert shown >= set(cli.COMMANDS) - {"doctor", "synthesize"}
    assert len(COMMANDS) > 60


# What a sentence may leave out.
REQUIRED = {key: ("--out", "x") for key in ("evaluate", "quantize", "report", "train")}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"--config (\S+)", command):
        Path(name).parent.mkdir(parents=True)
        write_settings(Path(name), "run", None, pipeline.RunConfig(out=tmp_path / "run"))
    program, name, *arguments = shlex.split(command)
    assert program == "qvla"
    if "--out" not in arguments:
        arguments += REQUIRED.get(name, ())
    call = cli._parse(name, arguments)
    assert call.name == name


QUICK = [
    "qvla calibrate --frames 128 --out runs/mini",
    "qvla pack --model libero-mini --bits 4 --file four.qvla",
]


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(command, tmp_path, monkeypatch):
    assert command in COMMANDS, "the pages show another one now"
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == cli.DONE


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", markdown(path), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", markdown(there), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{path.name}: {target}"


def test_files_and_targets_that_pages_name_are_there():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = markdown(page)
        for script in re.findall(r"python (\w+/[\w/]+\.py)", text):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"
        for target in re.findall(r"(?:^    |`)make ([a-z0-9-]+)", text, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_extras_that_pages_name_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = "".join(markdown(page) for page in PAGES)
    named = re.findall(r"pip install (?:-e )?'(?:\.|qvla-jax)\[([\w,-]+)\]'", texts)
    assert len(named) > 5
    assert {e for extras in named for e in extras.split(",")} <= {*project["optional-dependencies"]}


def python_blocks() -> list[tuple[str, str]]:
    blocks = []
    for page in PAGES:
        found = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        blocks += [(page.name, code) for code in found]
    return blocks


@pytest.mark.parametrize(("page", "code"), python_blocks())
def test_python_takes_names_that_there_are(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qvla_jax"):
            taken = __import__(node.module, fromlist=[alias.name for alias in node.names])
            for alias in node.names:
                assert hasattr(taken, alias.name), f"{page}: {node.module}.{alias.name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qvla_jax":
            assert node.attr in qvla_jax.__all__, f"{page}: qvla_jax.{node.attr}"


def test_the_pages_of_the_api_are_of_names_that_there_are_and_are_described():
    code = ast.parse((ROOT / "docs" / "build_api.py").read_text("utf-8"))
    (packages,) = (
        ast.literal_eval(node.value)
        for node in code.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    )
    assert "qvla_jax" in packages
    for package in packages:
        module = importlib.import_module(package)
        assert module.__doc__, package
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("qvla_jax")
            assert value.__doc__ or not ours, f"{package}.{name}"
