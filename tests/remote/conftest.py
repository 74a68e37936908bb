"""A Hub on loopback, and caches of each test's own."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from qvla_jax.inference import random_policy
from qvla_jax.remote.folder import forget

from .fake_hub import FakeHub, serve


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of both caches; nothing is remembered of other tests."""
    monkeypatch.setenv("QVLA_CACHE", str(tmp_path / "cache/own"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A small public directory of OpenVLA-OFT's kind."""
    folder = tmp_path_factory.mktemp("public") / "tiny"
    random_policy("tiny-test").export(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["qvla_jax"]["name"]  # as in directories that others wrote
    (folder / "config.json").write_text(json.dumps(config))
    return folder
