"""Several policies behind one port, encrypted connections, times and metrics."""

import re
import shutil
import socket
import ssl
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("msgpack")
sync = pytest.importorskip("websockets.sync.client")
requests = pytest.importorskip("requests")
json_numpy = pytest.importorskip("json_numpy")

from websockets.exceptions import InvalidStatus  # noqa: E402

from qvla_jax import cli  # noqa: E402
from qvla_jax.errors import InputError  # noqa: E402
from qvla_jax.inference import random_policy  # noqa: E402
from qvla_jax.inference.quantize import quantize_uniform  # noqa: E402
from qvla_jax.serving import ServeConfig, msgpack_numpy  # noqa: E402
from qvla_jax.serving.counters import PHASES, Counters, Times  # noqa: E402
from qvla_jax.serving.metrics import prometheus  # noqa: E402
from qvla_jax.serving.policies import check_memory, weight_bytes  # noqa: E402

from .served import running  # noqa: E402

PATIENCE = 60


@pytest.fixture(scope="module")
def other(policy):
    return random_policy("tiny-test", seed=1)


@pytest.fixture(scope="module")
def server(policy, other):
    with running(policy, others={"other": other}, max_batch=1) as server:
        yield server


def post(server, content, query=""):
    address = f"http://127.0.0.1:{server.port}/act{query}"
    return requests.post(address, data=json_numpy.dumps(content), timeout=PATIENCE)


def ask(server, content, query="", **settings):
    """The metadata and the reply over openpi's protocol."""
    address = f"ws://127.0.0.1:{server.port}/{query}"
    with sync.connect(address, compression=None, max_size=None, **settings) as connection:
        told = msgpack_numpy.decode(connection.recv(PATIENCE))
        connection.send(msgpack_numpy.encode(content))
        reply = connection.recv(PATIENCE)
        return told, reply if isinstance(reply, str) else msgpack_numpy.decode(reply)


def test_addresses_name_the_policy_that_answers(policy, other, server):
    for query, name, which in (
        ("", "tiny-test", policy),
        ("?policy=tiny-test", "tiny-test", policy),
        ("?policy=other", "other", other),
    ):
        observation = policy.fake_observation(3)
        expected = which.infer(observation)
        told, reply = ask(server, observation, query)
        assert (told["policy"], told["policies"]) == (name, ["tiny-test", "other"])
        np.testing.assert_allclose(reply["actions"], expected, atol=2e-5)
        found = np.stack(json_numpy.loads(post(server, observation, query).text))
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(policy.infer(observation) - other.infer(observation)).max() > 1e-3


def test_policies_that_are_not_there_are_refused_by_name(policy, server):
    observation = policy.fake_observation()
    refused = post(server, observation, "?policy=othr")
    assert refused.status_code == 400
    assert refused.json()["error"] == "unknown policy 'othr'; did you mean other?"
    for query in ("?model=other", "?policy=other&policy=tiny-test"):
        assert "expected ?policy=NAME or" in post(server, observation, query).json()["error"]
    with pytest.raises(InvalidStatus, match="400"):
        ask(server, observation, "?policy=othr")
    for odd in ("other", 1, np.zeros(2)):
        _, reply = ask(server, observation | {"policy": odd})
        assert reply == (
            "policy: this address is that of tiny-test; ask another one with ?policy=NAME"
        )


def test_policies_of_one_name_are_refused(policy):
    with (
        pytest.raises(InputError, match="tiny-test is the name of the first policy"),
        running(policy, others={"tiny-test": policy}),
    ):
        pass


def test_the_limit_counts_the_weights_of_all_policies(policy, other):
    packed = quantize_uniform(other, 4)
    assert weight_bytes(packed) < weight_bytes(other)
    both = (weight_bytes(policy) + weight_bytes(packed)) / 2**30
    check_memory({"a": policy, "b": packed}, both * 1.001)
    with pytest.raises(InputError, match=r"\(a [\d.e-]+, b [\d.e-]+\) exceed memory_limit_gib"):
        check_memory({"a": policy, "b": packed}, both * 0.999)


def test_the_command_does_not_load_beyond_the_limit(policy, tmp_path, capsys):
    policy.save(tmp_path / "first")
    arguments = ["serve", "--policy", str(tmp_path / "first"), "--memory-limit-gib", "1e-6"]
    assert cli.main([*arguments, "--also", "b=not-there"]) == cli.BAD_INPUT
    assert "exceed --memory-limit-gib 1e-06" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"also": ("mini.qvla",)}, "also 'mini.qvla': expected NAME=POLICY"),
        ({"also": ("a b=x",)}, "also 'a b=x': expected NAME=POLICY"),
        ({"also": ("a=x", "a=y")}, "two policies have the name a"),
        ({"memory_limit_gib": 0.0}, "memory_limit_gib must be positive"),
        ({"tls_cert": "x"}, "TLS needs both"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        ServeConfig(**change)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for this machine that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_connections_are_encrypted_by_a_certificate(policy, certificate):
    cert, key = certificate
    observation = policy.fake_observation()
    expected = policy.infer(observation)
    with running(policy, max_batch=1, tls_cert=cert, tls_key=key) as server:
        address = f"127.0.0.1:{server.port}"
        body = json_numpy.dumps(observation)
        reply = requests.post(f"https://{address}/act", body, verify=str(cert), timeout=PATIENCE)
        np.testing.assert_allclose(np.stack(json_numpy.loads(reply.text)), expected, atol=2e-5)
        context = ssl.create_default_context(cafile=cert)
        with sync.connect(f"wss://{address}/", ssl=context, compression=None) as connection:
            connection.recv(PATIENCE)
            connection.send(msgpack_numpy.encode(observation))
            found = msgpack_numpy.decode(connection.recv(PATIENCE))
        np.testing.assert_allclose(found["actions"], expected, atol=2e-5)
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.settimeout(PATIENCE)
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in plain.recv(1000)


def test_certificates_that_cannot_be_used_are_refused(certificate, tmp_path, capsys):
    cert, key = certificate
    with pytest.raises(InputError, match="no certificate and its key in PEM"):
        ServeConfig(tls_cert=key, tls_key=cert).read_tls()
    locked = tmp_path / "locked.pem"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", key, "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(InputError, match="the key has a passphrase"):
        ServeConfig(tls_cert=cert, tls_key=locked).read_tls()
    missing = ["--tls-cert", str(tmp_path / "no.pem"), "--tls-key", str(key)]
    assert cli.main(["serve", "--policy", "no-such-policy", *missing]) == cli.BAD_INPUT
    assert "no.pem" in capsys.readouterr().err


def test_replies_tell_the_age_of_the_observation(policy, server):
    observation = policy.fake_observation()
    timing = ask(server, observation)[1]["server_timing"]
    assert timing["age_ms"] == timing["total_ms"] > 0
    parts = timing["prepare_ms"] + timing["queue_ms"] + timing["infer_ms"]
    assert 0 < parts <= timing["total_ms"]
    timing = ask(server, observation | {"captured_at": time.time() - 7.0})[1]["server_timing"]
    assert 7000 < timing["age_ms"] < 7000 + 1000 * PATIENCE
    reply = post(server, observation | {"captured_at": time.time() - 7.0})
    found = dict(re.findall(r"(\w+);dur=([\d.]+)", reply.headers["Server-Timing"]))
    assert list(found) == ["prepare", "queue", "infer", "total", "age"]
    assert float(found["age"]) > 7000 > float(found["total"])
    assert post(server, observation | {"captured_at": 10**400}).status_code == 400
    for odd in ("now", True, float("inf"), [1.0], np.zeros(1)):
        _, reply = ask(server, observation | {"captured_at": odd})
        assert reply.startswith("captured_at: expected seconds since 1970")


def test_percentiles_are_those_of_each_phase():
    counters = Counters()
    for number in range(1, 101):
        counters.observe("a", 2, Times(**{name: number * k for k, name in enumerate(PHASES, 1)}))
    snapshot = counters.snapshot()
    for factor, name in enumerate(PHASES, 1):
        assert snapshot.recent[name].p50 == pytest.approx(50.5 * factor)
        assert snapshot.recent[name].p95 == pytest.approx(95.05 * factor)
        assert snapshot.sums_ms[name] == pytest.approx(5050 * factor)


def test_metrics_are_text_that_prometheus_reads(policy, server):
    ask(server, policy.fake_observation(), "?policy=other")
    reply = requests.get(f"http://127.0.0.1:{server.port}/metrics", timeout=PATIENCE)
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4"
    stats = requests.get(f"http://127.0.0.1:{server.port}/stats", timeout=PATIENCE).json()
    samples = {}
    for line in reply.text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) qvla_[a-z_]+ .+", line)
            continue
        found = re.fullmatch(
            r'(qvla_[a-z_]+(?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})?) (\S+)', line
        )
        assert found, line
        samples[found[1]] = float(found[2])
    assert samples['qvla_answers_total{policy="other"}'] == stats["answers_by_policy"]["other"]
    assert samples['qvla_phase_seconds_count{phase="infer"}'] == stats["answered"]
    p95 = samples['qvla_phase_seconds{phase="queue",quantile="0.95"}']
    assert p95 == pytest.approx(1e-3 * stats["recent"]["queue_ms"]["p95"])


def test_metrics_of_odd_names_and_of_nothing_are_text_too():
    counters = Counters()
    assert "quantile=" not in prometheus(counters.snapshot())
    counters.observe('a"b\\\n', 1, Times(**dict.fromkeys(PHASES, 1.0)))
    assert r'qvla_answers_total{policy="a\"b\\\n"} 1' in prometheus(counters.snapshot())
