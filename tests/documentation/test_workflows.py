"""Continuous integration: it calls targets that there are, with few rights and pinned actions."""

import re

import pytest
import yaml

from .pages import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(path):
    return yaml.safe_load(path.read_text("utf-8"))


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "nightly", "wheels"}


def targets_of(job):
    """Named by a step, or by the matrix through the variable TARGET."""
    for step in job["steps"]:
        for target in re.findall(r"\bmake (\S+)", step.get("run", "")):
            if target != '"$TARGET"':
                yield target
                continue
            variables = {**job.get("env", {}), **step.get("env", {})}
            assert variables["TARGET"] == "${{ matrix.target }}"
            matrix = job["strategy"]["matrix"]
            yield from matrix.get("target", [])
            yield from (entry["target"] for entry in matrix.get("include", []))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_there_are(path):
    called = {target for job in load(path)["jobs"].values() for target in targets_of(job)}
    assert called
    assert called <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_of_workflows_are_in_the_makefile(path):
    for job in load(path)["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r'make [a-z0-9-]+|make "\$TARGET"', step.get("run", "make test"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_few_rights_and_pinned_actions(path):
    content = load(path)
    assert content["permissions"] == {}
    for name, job in content["jobs"].items():
        assert {right for right, kind in job["permissions"].items() if kind == "write"} <= (
            {"pages", "id-token"} if name == "publish" else set()
        )
    for line in re.findall(r"^[ -]+uses: (.*)", path.read_text(), re.MULTILINE):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("script", ["run", "nightly"])
def test_the_scripts_of_continuous_integration_call_targets_that_there_are(script):
    lines = (ROOT / ".ci" / script).read_text().splitlines()
    called = [line.removeprefix("make ") for line in lines if line.startswith("make ")]
    assert called
    assert set(called) <= TARGETS


def test_the_forms_for_issues_ask_something_and_the_policy_says_where_to_report():
    forms = [*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) == 4
    for form in (load(path) for path in forms if path.stem != "config"):
        assert form["name"]
        assert form["description"]
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)
        assert any(field.get("validations", {}).get("required") for field in fields)
    assert "Report a vulnerability" in (ROOT / "SECURITY.md").read_text()
