"""What libraries and the system raise: one line where it is no bug, a traceback where it may be."""

import errno
import os

import pytest

from qvla_jax import cli, failures
from qvla_jax.commands import report
from qvla_jax.errors import InputError


def of_the_system(number, name=None):
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (of_the_system(errno.EACCES, "a/b"), cli.BAD_INPUT, "a/b: Permission denied"),
        (of_the_system(errno.ENOENT, "a/b"), cli.BAD_INPUT, "a/b: No such file"),
        (of_the_system(errno.ENOSPC), cli.FAILED, "No space left on device; make room"),
        (of_the_system(errno.EMFILE, "a/b"), cli.FAILED, "a/b: Too many open files; raise"),
        (MemoryError(), cli.FAILED, "out of memory (MemoryError)"),
        (MemoryError("Unable to allocate 9 TiB"), cli.FAILED, "Unable to allocate 9 TiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory"), cli.FAILED, "memory on the device"),
        (ModuleNotFoundError("No", name="pulp.apis"), cli.BAD_INPUT, "pulp is not installed"),
        (InputError("so"), cli.BAD_INPUT, "so"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted"),
    ],
)
def test_what_is_no_bug_is_one_line(monkeypatch, capsys, tmp_path, error, code, words):
    def fail(config):
        raise error

    monkeypatch.setattr(report, "main", fail)
    assert cli.main(["report", "--out", str(tmp_path)]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RuntimeError("shapes differ"),
        of_the_system(errno.EINVAL),
        ImportError("cannot import name", name="qvla_jax.pipeline"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_what_may_be_a_bug_is_left_as_it_is(error):
    assert failures.in_one_line(error) is None


def test_a_package_that_is_broken_is_named(monkeypatch, tmp_path):
    (tmp_path / "brittle").mkdir()
    (tmp_path / "brittle" / "__init__.py").write_text("from brittle import inner")
    (tmp_path / "brittle" / "inner.py").write_text("raise AttributeError('no such\\nsymbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AttributeError) as caught:
        __import__("brittle")
    error = failures.broken_package(caught.value)
    assert str(error).startswith("brittle is broken (AttributeError: no such symbol)")
