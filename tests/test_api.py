"""The public names: few, documented, and with examples that run."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import qvla_jax

README = Path(__file__).parents[1] / "README.md"
PUBLIC = [name for name in qvla_jax.__all__ if not name.startswith("__")]


def test_there_are_fewer_than_fifteen():
    assert len(PUBLIC) < 15
    assert {"load_policy", "calibration_set", "sensitivities", "allocate", "quantize"} < {*PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, tmp_path, monkeypatch):
    """Each in a folder of its own, with what its module imports and nothing else."""
    value = getattr(qvla_jax, name)
    monkeypatch.chdir(tmp_path)
    module = value if inspect.ismodule(value) else inspect.getmodule(value)
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(value) or "", vars(module), name, inspect.getsourcefile(module), None
    )
    assert test.examples, f"{name}: no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST)
    failed = runner.run(test, out=said.append).failed
    assert not failed, "".join(said)


def test_the_quickstart_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """As it stands there, on a smaller policy and fewer frames: those of the examples."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "sensitivities" in block)
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 20
    qvla_jax.random_policy("tiny-test").save("tiny")
    small = code.replace('"libero-mini"', '"tiny"').replace("budget_bits=4.0", "budget_bits=8.0")
    small = small.replace("frames=128", "frames=2").replace("frames=64", "frames=2")
    names: dict = {}
    exec(small, names)
    assert names["actions"].shape == (8, 7)
    assert "of the optimum" in capsys.readouterr().out
