"""Provenance says what is needed to repeat a result, and nothing about the machine's owner."""

import getpass
import json
import os
import platform
from pathlib import Path

from qvla_jax import provenance


def test_provenance_names_versions_device_and_seed():
    made = provenance.provenance(seed=3)
    assert made["seed"] == 3
    assert made["device"]["platform"] == "cpu"
    assert made["device"]["count"] == 2
    assert {"qvla-jax", "jax", "jaxlib", "flax", "numpy"} <= made["packages"].keys()
    json.dumps(made, allow_nan=False)


def test_provenance_holds_no_path_and_no_host_name():
    text = json.dumps(provenance.provenance(seed=0))
    assert str(Path(provenance.__file__).parents[1]) not in text
    assert os.sep not in text.replace("\\/", "/").replace("n/a", "")
    assert platform.node() not in text or platform.node() in {"", "localhost"}
    assert len(getpass.getuser()) < 4 or getpass.getuser() not in text


def test_a_package_outside_a_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "qvla_jax" / "provenance.py"))
    assert provenance.git_commit() is None
