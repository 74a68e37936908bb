"""The server from outside: the published clients, and those who mean no good."""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

pytest.importorskip("aiohttp")
sync = pytest.importorskip("websockets.sync.client")
requests = pytest.importorskip("requests")
json_numpy = pytest.importorskip("json_numpy")

from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from qvla_jax.errors import InputError, PolicyError  # noqa: E402
from qvla_jax.inference import Policy  # noqa: E402
from qvla_jax.inference import policy as policy_module  # noqa: E402
from qvla_jax.serving import msgpack_numpy  # noqa: E402
from qvla_jax.serving.rest import action_text  # noqa: E402

from .served import openpi_observation, running  # noqa: E402

# openpi's client opens its connection in a way that websockets 17 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")

# Waiting for other threads, never for anything measured.
PATIENCE = 60
TOKEN = "0123456789abcdef-robot"


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, max_message_mib=0.25, max_image_side=64) as server:
        yield server


@pytest.fixture
def client(server):
    with openpi_client(server) as client:
        yield client


@contextlib.contextmanager
def openpi_client(server, **settings):
    """The published client. It has no way to close its connection."""
    package = pytest.importorskip(
        "openpi_client.websocket_client_policy",
        reason="pip install --no-deps openpi-client (it asks for numpy < 2, and works with 2)",
    )
    client = package.WebsocketClientPolicy("127.0.0.1", server.port, **settings)
    try:
        yield client
    finally:
        client._ws.close()


@contextlib.contextmanager
def websocket(server, **settings):
    """A client of our own, past its greeting."""
    settings = {"compression": None, "max_size": None, **settings}
    with sync.connect(f"ws://127.0.0.1:{server.port}", **settings) as connection:
        msgpack_numpy.decode(connection.recv(PATIENCE))
        yield connection


def url(server, path="/act"):
    return f"http://127.0.0.1:{server.port}{path}"


def post(server, content, **settings):
    body = content if isinstance(content, bytes) else json_numpy.dumps(content)
    return requests.post(url(server), data=body, timeout=PATIENCE, **settings)


def check_alive(server, policy):
    """Others are still answered, and correctly."""
    with websocket(server) as connection:
        connection.send(msgpack_numpy.encode(policy.fake_observation(5)))
        found = msgpack_numpy.decode(connection.recv(PATIENCE))["actions"]
    np.testing.assert_allclose(found, policy.infer(policy.fake_observation(5)), atol=2e-5)


def test_the_openpi_client_gets_action_chunks(policy, client):
    for seed in range(3):
        reply = client.infer(openpi_observation(policy, seed))
        expected = policy.infer(policy.fake_observation(seed))
        np.testing.assert_allclose(reply["actions"], expected, atol=2e-5)
        assert reply["actions"].dtype == np.float32
        assert reply["server_timing"]["infer_ms"] > 0
    assert reply["server_timing"]["prev_total_ms"] > 0


def test_the_openpi_client_is_told_what_is_served(policy, client):
    metadata = client.get_server_metadata()
    assert metadata["action_horizon"] == policy.config.action_horizon
    assert metadata["images"] == ["image", "wrist_image"]
    assert metadata["unnorm_key"] == "libero_spatial"


def test_chunks_can_be_executed_by_openpis_broker(policy, client):
    broker = pytest.importorskip("openpi_client.action_chunk_broker")
    steps = broker.ActionChunkBroker(client, action_horizon=8)
    chunk = policy.infer(policy.fake_observation())
    found = [steps.infer(openpi_observation(policy))["actions"] for _ in range(8)]
    np.testing.assert_allclose(found, chunk, atol=2e-5)


def test_a_malformed_observation_is_an_error_and_the_connection_lives_on(policy, client):
    good = openpi_observation(policy)
    bad = {k: v for k, v in good.items() if k != "observation/state"}
    with pytest.raises(RuntimeError, match="observation has no state or observation/state"):
        client.infer(bad)
    with pytest.raises(RuntimeError, match=r"image: expected uint8 \[H, W, 3\]"):
        client.infer({**good, "observation/image": np.zeros((3, 32, 32), np.float32)})
    with pytest.raises(RuntimeError, match="65 x 32 pixels, expected at most 64"):
        client.infer({**good, "observation/image": np.zeros((65, 32, 3), np.uint8)})
    assert client.infer(good)["actions"].shape == (8, 7)


def test_bytes_and_text_of_any_kind_are_errors_and_the_connection_lives_on(policy, server):
    with websocket(server) as connection:
        for message in (b"", b"\xc1", b"\x91" * 1000, "hello", b"\x80"):
            connection.send(message)
            assert isinstance(connection.recv(PATIENCE), str)
        connection.send(msgpack_numpy.encode(policy.fake_observation()))
        assert isinstance(connection.recv(PATIENCE), bytes)


def test_a_message_that_is_too_large_closes_its_connection_alone(policy, server):
    with websocket(server) as connection:
        connection.send(b"x" * (2**18 + 1))
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(PATIENCE)
    assert caught.value.rcvd.code == 1009
    check_alive(server, policy)


def test_a_frame_that_announces_too_much_is_refused_before_it_arrives(server):
    with websocket(server) as connection:
        connection.socket.sendall(b"\x82\xff" + (2**62).to_bytes(8, "big") + b"mask")
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(PATIENCE)
    assert caught.value.rcvd.code == 1009


# OpenVLA's documentation has its clients do this. simplejson, which requests prefers where there is
# one, is not patched by json_numpy and cannot write arrays.
OPENVLA_CLIENT = """
    import sys
    sys.modules["simplejson"] = None
    import json_numpy, numpy, requests
    json_numpy.patch()
    observation = json_numpy.loads(sys.stdin.read())
    reply = requests.post(sys.argv[1], json=observation).json()
    print(json_numpy.dumps([[str(type(step).__name__) for step in reply], numpy.stack(reply)]))
"""


def test_a_client_of_openvla_gets_actions(policy, server):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OPENVLA_CLIENT), url(server)],
        input=json_numpy.dumps(policy.fake_observation(1)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kinds, actions = json_numpy.loads(result.stdout)
    assert kinds == ["ndarray"] * 8
    np.testing.assert_allclose(actions, policy.infer(policy.fake_observation(1)), atol=2e-5)


def test_a_client_without_json_numpy_encodes_twice(policy, server):
    text = json_numpy.dumps(policy.fake_observation(2))
    reply = requests.post(url(server), json={"encoded": text}, timeout=PATIENCE)
    assert reply.status_code == 200
    assert isinstance(reply.json(), str)
    actions = np.stack(json_numpy.loads(reply.json()))
    np.testing.assert_allclose(actions, policy.infer(policy.fake_observation(2)), atol=2e-5)
    assert "infer;dur=" in reply.headers["Server-Timing"]


def test_a_request_names_the_statistics_that_un_normalize(policy):
    (key, entry) = next(iter(policy.statistics.items()))
    wide = {**entry["action"], "q01": [-4.0] * 7, "q99": [4.0] * 7}
    several = {key: entry, "another": {**entry, "action": wide}}
    several = dataclasses.replace(policy, statistics=several)
    observation = policy.fake_observation(3)
    plain = policy.infer(observation)
    with running(several, max_batch=1) as server:
        found = {}
        for asked in (None, key, "another"):
            reply = post(server, observation | ({} if asked is None else {"unnorm_key": asked}))
            assert reply.status_code == 200
            found[asked] = np.stack(json_numpy.loads(reply.text))
        refused = post(server, observation | {"unnorm_key": "missing"})
    assert refused.status_code == 400
    assert f"there are: {key}, another" in refused.json()["error"]
    np.testing.assert_allclose(found[None], plain, atol=2e-5)
    np.testing.assert_array_equal(found[key], found[None])
    # Units of -1 to 1 became -4 to 4, but for the gripper, which is not scaled.
    np.testing.assert_allclose(found["another"][:, :6], 4 * plain[:, :6], atol=1e-4)
    np.testing.assert_array_equal(found["another"][:, 6], found[key][:, 6])


def test_a_policy_of_single_steps_replies_with_one_action_as_openvla_does():
    action = np.arange(7, dtype=np.float32)
    np.testing.assert_array_equal(json_numpy.loads(action_text(action[None])), action)
    twice = json_numpy.loads(json.loads(action_text(action[None], twice=True)))
    np.testing.assert_array_equal(twice, action)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not readable as JSON"),
        (b"{}", 400, "observation has no image"),
        (b"x" * (2**18 + 1), 413, "larger than 262144 bytes"),
        (gzip.compress(b"{}", mtime=0), 400, "not readable as JSON"),
    ],
    ids=["half", "empty", "too large", "compressed"],
)
def test_an_unusable_request_is_an_error(policy, server, body, status, message):
    headers = {"Content-Encoding": "gzip"} if body.startswith(b"\x1f") else {}
    reply = post(server, body, headers=headers)
    assert reply.status_code == status
    assert message in reply.json()["error"]
    check_alive(server, policy)


def test_a_request_of_unknown_length_is_cut_off(server):
    def endless():
        for _ in range(2**10):
            yield b"x" * 2**10

    # The server may close the connection before all is sent.
    with contextlib.suppress(requests.ConnectionError):
        reply = requests.post(url(server), data=endless(), timeout=PATIENCE)
        assert reply.status_code == 413


def test_other_paths_and_methods_are_not_there(server):
    assert requests.get(url(server, "/"), timeout=PATIENCE).status_code == 426
    assert requests.get(url(server, "/act"), timeout=PATIENCE).status_code == 405
    assert requests.get(url(server, "/etc/passwd"), timeout=PATIENCE).status_code == 404


def test_web_pages_are_not_served(server, policy):
    reply = post(server, policy.fake_observation(), headers={"Origin": "http://example.com"})
    assert reply.status_code == 403
    with pytest.raises(InvalidStatus, match="403"), websocket(server, origin="http://example.com"):
        pass


def test_many_clients_of_both_kinds_each_get_their_own_answers(policy, server):
    seeds = range(4)
    expected = [
        [policy.infer(policy.fake_observation(10 * client + seed)) for seed in seeds]
        for client in range(8)
    ]
    compiled = policy_module.forward._cache_size()
    barrier = threading.Barrier(8)

    def robot(client):
        observations = [policy.fake_observation(10 * client + seed) for seed in seeds]
        barrier.wait(PATIENCE)
        if client % 2:
            return [np.stack(json_numpy.loads(post(server, o).text)) for o in observations]
        found = []
        with websocket(server) as connection:
            for observation in observations:
                connection.send(msgpack_numpy.encode(observation))
                found.append(msgpack_numpy.decode(connection.recv(PATIENCE))["actions"])
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(robot, range(8)))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert policy_module.forward._cache_size() == compiled
    stats = requests.get(url(server, "/stats"), timeout=PATIENCE).json()
    assert max(map(int, stats["answers_by_batch_size"])) > 1
    assert stats["answered"] >= 32


def test_slow_clients_are_cut_off_and_hold_nobody_up(policy):
    head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with (
        running(policy, io_timeout=2.0) as server,
        socket.create_connection(("127.0.0.1", server.port)) as silent,
        socket.create_connection(("127.0.0.1", server.port)) as half_header,
        socket.create_connection(("127.0.0.1", server.port)) as half_body,
    ):
        half_header.sendall(head[:20])
        half_body.sendall(head)
        check_alive(server, policy)
        for connection in (silent, half_header, half_body):
            connection.settimeout(PATIENCE)
        assert b"408" in half_body.recv(1000)
        assert half_header.recv(1000) == b""
        assert silent.recv(1000) == b""


def test_clients_that_leave_before_their_reply_disturb_nobody(policy, server):
    message = msgpack_numpy.encode(policy.fake_observation())
    for _ in range(10):
        with websocket(server) as connection:
            connection.send(message)
            connection.socket.shutdown(socket.SHUT_RDWR)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json_numpy.dumps(policy.fake_observation()).encode()
        head = f"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
    check_alive(server, policy)
    deadline = time.monotonic() + PATIENCE
    while server.service.counters.clients and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.service.counters.clients == 0


def test_the_health_check_needs_no_token_and_all_else_does(policy, tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    with running(policy, token_file=file) as server:
        assert requests.get(url(server, "/healthz"), timeout=PATIENCE).text == "OK\n"
        assert requests.get(url(server, "/stats"), timeout=PATIENCE).status_code == 401
        for headers in ({}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": TOKEN}):
            assert post(server, policy.fake_observation(), headers=headers).status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert post(server, policy.fake_observation(), headers=headers).status_code == 200
        with pytest.raises(InvalidStatus, match="401"), openpi_client(server):
            pass
        with openpi_client(server, api_key=TOKEN) as client:
            assert client.infer(openpi_observation(policy))["actions"].shape == (8, 7)


def test_websockets_that_say_nothing_are_closed(policy):
    with running(policy, idle_timeout=0.1) as server, websocket(server) as connection:
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(PATIENCE)
        assert caught.value.rcvd.code == 1001
        assert "idle" in caught.value.rcvd.reason


def test_the_health_check_sees_a_policy_that_hangs(server):
    batcher = server.service.policies[0].batcher
    batcher.busy_since = time.monotonic() - 1000
    try:
        assert requests.get(url(server, "/healthz"), timeout=PATIENCE).status_code == 503
    finally:
        batcher.busy_since = None
    assert requests.get(url(server, "/healthz"), timeout=PATIENCE).status_code == 200


def test_grippers_can_be_as_libero_takes_them(policy):
    with running(policy, gripper="libero") as server, openpi_client(server) as client:
        assert client.get_server_metadata()["gripper"] == "libero"
        found = client.infer(openpi_observation(policy))["actions"]
    own = policy.infer(policy.fake_observation())
    np.testing.assert_allclose(found[:, :-1], own[:, :-1], atol=2e-5)
    np.testing.assert_array_equal(found[:, -1], np.where(own[:, -1] > 0.5, -1.0, 1.0))
    assert found.dtype == np.float32


def test_one_client_too_many_is_turned_away(policy):
    with running(policy, max_clients=2) as server, websocket(server), websocket(server) as second:
        with pytest.raises(InvalidStatus, match="503"), websocket(server):
            pass
        assert "2 clients" in post(server, policy.fake_observation()).json()["error"]
        assert requests.get(url(server, "/healthz"), timeout=PATIENCE).status_code == 200
        second.send(msgpack_numpy.encode(policy.fake_observation()))
        assert isinstance(second.recv(PATIENCE), bytes)


class Gated(Policy):
    """Answers once it is let, and with NaN where the first joint says so."""

    entered, gate = threading.Event(), threading.Event()

    def run(self, inputs):
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        chunk = super().run(inputs).copy()
        chunk[np.asarray(inputs.proprio)[:, 0] == 1.0] = np.nan
        return chunk


@pytest.fixture
def gated(policy):
    gated = Gated(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})
    gated.gate.set()
    return gated


def test_actions_that_are_not_finite_are_errors(gated):
    bad = gated.fake_observation()
    bad["state"] = np.full(8, 100.0, np.float32)  # normalized, clipped to 1
    with running(gated) as server:
        with openpi_client(server) as client:
            with pytest.raises(RuntimeError, match="NaN or infinite actions"):
                client.infer(bad)
            assert np.isfinite(client.infer(gated.fake_observation())["actions"]).all()
        reply = post(server, bad)
        assert reply.status_code == 500
        assert "NaN or infinite actions" in reply.json()["error"]
        assert server.service.counters.failed == 2


def test_a_server_that_stops_answers_what_it_has_accepted(gated):
    message = msgpack_numpy.encode(gated.fake_observation())
    with contextlib.ExitStack() as clients:
        with running(gated) as server:
            idle = clients.enter_context(websocket(server))
            asking = clients.enter_context(websocket(server))
            port = server.port
            gated.entered.clear()
            gated.gate.clear()
            asking.send(message)
            assert gated.entered.wait(PATIENCE)
            threading.Timer(0.3, gated.gate.set).start()
        for client in (idle, asking):
            if client is asking:
                actions = msgpack_numpy.decode(client.recv(PATIENCE))["actions"]
                np.testing.assert_allclose(
                    actions, super(Gated, gated).infer(gated.fake_observation()), atol=2e-5
                )
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(PATIENCE)
            assert caught.value.rcvd.code == 1001
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()


def test_a_port_that_is_taken_is_bad_input(policy, server):
    with pytest.raises(InputError, match=f"port {server.port}"), running(policy, port=server.port):
        pass


def test_a_policy_without_finite_actions_opens_no_port(policy):
    class Hopeless(Policy):
        def run(self, inputs):
            return np.full_like(super().run(inputs), np.nan)

    hopeless = Hopeless(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})
    with pytest.raises(PolicyError, match="nothing to serve"), running(hopeless):
        pass


def test_the_command_serves_until_it_is_told_to_stop(policy, tmp_path):
    policy.save(tmp_path / "policy")
    command = (sys.executable, "-m", "qvla_jax.cli", "serve", "--policy", str(tmp_path / "policy"))
    process = subprocess.Popen(
        [*command, "--port", "0", "--max-batch", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert "Serving tiny-test at ws://127.0.0.1:" in line, process.stderr.read()
        address = line.split()[3]
        with sync.connect(address, compression=None) as connection:
            connection.recv(PATIENCE)
            connection.send(msgpack_numpy.encode(policy.fake_observation()))
            found = msgpack_numpy.decode(connection.recv(PATIENCE))["actions"]
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    np.testing.assert_allclose(found, policy.infer(policy.fake_observation()), atol=2e-5)
    assert process.returncode == 0, errors
    assert errors == ""
