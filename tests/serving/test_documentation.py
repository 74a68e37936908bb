"""The snippets of the documentation run against a server."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("websockets")
pytest.importorskip("openpi_client.websocket_client_policy")
requests = pytest.importorskip("requests")
json_numpy = pytest.importorskip("json_numpy")

from qvla_jax.serving.pictures import decode_picture  # noqa: E402

from .served import running  # noqa: E402

# openpi's client opens its connection in a way that websockets 17 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")

ROOT = Path(__file__).parents[2]


def snippets(file, word):
    """The Python blocks of a page that hold a word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text("utf-8"), re.DOTALL)
    found = [block for block in blocks if word in block]
    assert found
    return found


def run(code, port, policy):
    names = {"observation": policy.fake_observation()}
    exec(code.replace("8000", str(port)), names)
    return names


def in_our_words(observation):
    """openpi's names are those that `Policy.infer` takes, with a prefix, but for the prompt."""
    names = {key: key.removeprefix("observation/") for key in observation} | {
        "prompt": "instruction"
    }
    return {names[key]: value for key, value in observation.items()}


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, max_batch=2) as server:
        yield server


@pytest.mark.parametrize(
    ("file", "client", "name"),
    [("README.md", "robot_side", "actions"), ("docs/serving.md", "policy", "chunk")],
)
def test_openpi_snippets_give_actions(policy, server, file, client, name):
    for code in snippets(file, "WebsocketClientPolicy"):
        if "captured_at" in code:
            continue
        names = run(code, server.port, policy)
        names[client]._ws.close()
        expected = policy.infer(in_our_words(names["observation"]))
        np.testing.assert_allclose(names[name], expected, atol=2e-5)


def test_snippets_of_chunks_asked_for_ahead_give_their_rest(policy, server):
    (code,) = snippets("docs/serving.md", "captured_at")
    names = run(code, server.port, policy)
    names["policy"]._ws.close()
    names["asking"].shutdown()
    expected = policy.infer(names["observation"])
    skipped = len(expected) - len(names["chunk"])
    assert skipped == min(len(expected), int(names["reply"]["server_timing"]["age_ms"] / 100))
    np.testing.assert_allclose(names["chunk"], expected[skipped:], atol=2e-5)


def test_snippets_of_pictures_give_actions(policy, server):
    (code,) = snippets("docs/serving.md", "b64encode")
    names = run(code, server.port, policy)
    sent = dict(names["observation"])
    for name, text in names["cameras"].items():
        sent[name] = decode_picture(name, base64.b64decode(text), 32)
    found = np.stack(json_numpy.loads(names["reply"].text))
    np.testing.assert_allclose(found, policy.infer(sent), atol=2e-5)


def test_rest_snippets_give_actions(policy, server, monkeypatch):
    # What json_numpy.patch replaces, so that it is put back. The snippet is for where there is no
    # simplejson, which requests would prefer.
    for function in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(json, function, getattr(json, function))
    for module in (requests.models, requests.compat):
        if hasattr(module, "complexjson"):
            monkeypatch.setattr(module, "complexjson", json)
    (code,) = snippets("docs/serving.md", "json_numpy.patch()")
    names = run(code, server.port, policy)
    expected = policy.infer(policy.fake_observation())
    np.testing.assert_allclose(names["action"], expected, atol=2e-5)
