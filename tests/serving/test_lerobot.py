"""LeRobot's asynchronous client: messages of its own classes, recorded, and calls over loopback."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import pickle
import threading
import time
import urllib.request
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiohttp")
grpc = pytest.importorskip("grpc")

from qvla_jax.errors import InputError, QvlaError  # noqa: E402
from qvla_jax.serving import ServeConfig, lerobot  # noqa: E402
from qvla_jax.serving.lerobot_messages import (  # noqa: E402
    read_instructions,
    read_observation,
    write_actions,
)
from qvla_jax.serving.server import PolicyServer  # noqa: E402

from .checks import CHECKS  # noqa: E402
from .served import running  # noqa: E402

# Pickled by `RemotePolicyConfig` and `TimedObservation` of lerobot for a robot that does not exist.
RECORDED = {
    name: {kind: base64.b64decode(text) for kind, text in messages.items()}
    for name, messages in json.loads(
        Path(__file__).with_name("lerobot_messages.json").read_text()
    ).items()
}
VERSIONS = pytest.mark.parametrize("version", RECORDED)
LATEST = RECORDED["lerobot 0.6.1, numpy 2.2.6, protocol 4"]
MODULE = "lerobot.async_inference.helpers"
JOINTS = [f"joint_{i}.pos" for i in range(8)]
PATIENCE = 60


def recorded_values():
    """What the robot saw when the messages were recorded."""
    rng = np.random.default_rng(0)
    state = rng.uniform(-1, 1, 8)
    state[7] = np.float32(state[7])
    images = [rng.integers(0, 256, (12, 16, 3), np.uint8) for _ in range(2)]
    return state, images


class RemotePolicyConfig:
    """A stand-in for lerobot's, which pickles the same."""


class TimedObservation(RemotePolicyConfig):
    """A stand-in, too."""


RemotePolicyConfig.__module__ = TimedObservation.__module__ = MODULE


class _Pickler(pickle._Pickler):
    """Python's own pickler, which need not find the stand-ins where they say they are."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_global(self, obj, name=None):
        if obj not in (RemotePolicyConfig, TimedObservation):
            return super().save_global(obj, name)
        self.save(obj.__module__)
        self.save(obj.__name__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)
        return None

    dispatch[type] = save_global


def pickled(kind, **fields):
    record = kind()
    record.__dict__.update(fields)
    out = io.BytesIO()
    _Pickler(out, 4).dump(record)
    return out.getvalue()


def instructions(**changes):
    cameras = {f"observation.images.{name}": {} for name in ("image", "wrist_image")}
    fields = {
        "policy_type": "qvla",
        "pretrained_name_or_path": "tiny-test",
        "lerobot_features": {"observation.state": {"names": JOINTS}, **cameras},
        "actions_per_chunk": 8,
        "device": "cpu",
        "rename_map": {},
    }
    return pickled(RemotePolicyConfig, **{**fields, **changes})


def observation(policy, timestep=0, *, seed=0, must_go=True, **changes):
    own = policy.fake_observation(seed)
    values = dict(zip(JOINTS, own["state"].tolist(), strict=True))
    values |= {"image": own["image"], "wrist_image": own["wrist_image"], "task": own["instruction"]}
    return pickled(
        TimedObservation,
        timestamp=time.time(),
        timestep=timestep,
        observation={**values, **changes},
        must_go=must_go,
    )


class TimedAction:
    """What lerobot's client makes of a reply."""


class _Client(pickle.Unpickler):
    """Loads replies as the client does, with numpy in the place of PyTorch."""

    def find_class(self, module, name):
        if (module, name) == ("torch", "tensor"):
            return lambda numbers: np.array(numbers, np.float32)
        assert name == "TimedAction"
        self.module = module
        return TimedAction


def loaded(reply):
    client = _Client(io.BytesIO(reply))
    return client.load(), client.module


def field(number, data):
    """A field of bytes in a protocol buffer."""
    size, length = b"", len(data)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


class Robot:
    """LeRobot's calls, with the messages as bytes. `name` makes its connection its own."""

    def __init__(self, server, name="robot"):
        address = f"127.0.0.1:{server.lerobot_port}"
        self.channel = grpc.insecure_channel(address, options=[("grpc.primary_user_agent", name)])
        path = "/transport.AsyncInference/"
        one, many = self.channel.unary_unary, self.channel.stream_unary
        self.calls = {n: one(path + n) for n in ("Ready", "SendPolicyInstructions", "GetActions")}
        self.calls["SendObservations"] = many(path + "SendObservations")

    def start(self, data=None):
        self.calls["Ready"](b"", timeout=PATIENCE)
        message = field(1, instructions() if data is None else data)
        self.calls["SendPolicyInstructions"](message, timeout=PATIENCE)
        return self

    def send(self, data, size=2**21):
        """In parts, as lerobot's `send_bytes_in_chunks` divides them."""
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        states = [2] * len(parts)
        states[0], states[-1] = 1, 3
        if len(parts) == 1:
            states = [3]
        messages = (bytes([8, s]) + field(2, part) for s, part in zip(states, parts, strict=True))
        self.calls["SendObservations"](messages, timeout=PATIENCE)

    def actions(self):
        reply = self.calls["GetActions"](b"", timeout=PATIENCE)
        if not reply:
            return None
        start = next(i for i in range(1, 6) if reply[i] < 128) + 1
        assert field(1, reply[start:]) == reply
        return loaded(reply[start:])[0]


@contextlib.contextmanager
def connected(server, name="robot"):
    robot = Robot(server, name)
    try:
        yield robot
    finally:
        robot.channel.close()


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, max_batch=2, lerobot_port=0, max_message_mib=1) as server:
        yield server


@pytest.fixture
def robot(server):
    with connected(server) as robot:
        yield robot


@pytest.fixture
def impatient(monkeypatch):
    """Requests for actions do not wait for observations."""
    monkeypatch.setattr(lerobot, "_PATIENCE", 0.02)


def counts(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/stats") as reply:
        return json.load(reply)


@VERSIONS
def test_recorded_messages_are_read(version):
    asked = read_instructions(RECORDED[version]["instructions"])
    assert asked.module == (
        "lerobot.scripts.server.helpers" if version.startswith("lerobot 0.3") else MODULE
    )
    assert (asked.policy, asked.steps, list(asked.joints)) == ("tiny-test", 5, JOINTS)
    assert asked.cameras == {"image": "image", "wrist_image": "wrist_image"}
    seen = read_observation(RECORDED[version]["observation"])
    assert (seen.timestamp, seen.timestep, seen.must_go) == (1700000000.25, 7, False)
    state, images = recorded_values()
    assert [seen.values[name] for name in JOINTS] == state.tolist()
    for name, image in zip(("image", "wrist_image"), images, strict=True):
        np.testing.assert_array_equal(seen.values[name], image)
    assert seen.values["task"] == "pick up the black bowl"


@VERSIONS
def test_a_robot_gets_the_chunk_of_its_observation(policy, robot, version):
    robot.start(RECORDED[version]["instructions"]).send(RECORDED[version]["observation"], 1000)
    actions = robot.actions()
    state, images = recorded_values()
    expected = policy.infer(
        {
            "image": images[0],
            "wrist_image": images[1],
            "state": state.astype(np.float32),
            "instruction": "pick up the black bowl",
        }
    )
    np.testing.assert_allclose([a.action for a in actions], expected[:5], atol=2e-5)
    assert [a.timestep for a in actions] == [7, 8, 9, 10, 11]
    np.testing.assert_allclose(
        [a.timestamp - 1700000000.25 for a in actions], np.arange(5) / 30, atol=1e-6
    )


def test_replies_are_lists_of_the_clients_own_records():
    actions = np.random.default_rng(0).standard_normal((3, 2))
    reply = write_actions(
        actions, module="a.b", timestep=2**31 - 2, timestamp=1.5, step_seconds=0.5
    )
    found, module = loaded(reply)
    assert module == "a.b"
    np.testing.assert_array_equal([a.action for a in found], actions.astype(np.float32))
    assert [vars(a).keys() for a in found] == [{"timestamp", "timestep", "action"}] * 3
    assert [a.timestamp for a in found] == [1.5, 2.0, 2.5]


def test_observations_that_tell_nothing_new_wait_for_a_must_go(policy, server, robot, impatient):
    before = counts(server)["skipped"]
    robot.start().send(observation(policy, 3, must_go=False))  # the first is always answered
    assert robot.actions()[0].timestep == 3
    far = {name: 10.0 for name in JOINTS}
    robot.send(observation(policy, 3, must_go=False, **far))  # a step that was answered
    robot.send(observation(policy, 4, must_go=False, **{JOINTS[0]: 0.5}))  # near the last state
    assert robot.actions() is None
    robot.send(observation(policy, 4, must_go=False, **far))
    assert robot.actions()[0].timestep == 4
    robot.send(observation(policy, 4, **far))
    assert robot.actions()[0].timestep == 4
    robot.start().send(observation(policy, 4, must_go=False, **far))  # another episode
    assert robot.actions()[0].timestep == 4
    assert counts(server)["skipped"] == before + 2


def test_the_latest_observation_is_answered(policy, server, robot, impatient):
    before = counts(server)["skipped"]
    robot.start()
    for step in range(3):
        robot.send(observation(policy, step, seed=step))
    actions = robot.actions()
    assert actions[0].timestep == 2
    expected = policy.infer(policy.fake_observation(2))
    np.testing.assert_allclose([a.action for a in actions], expected, atol=2e-5)
    assert robot.actions() is None
    assert counts(server)["skipped"] == before + 2


def test_a_request_waits_for_an_observation(policy, robot):
    robot.start()
    box = []
    thread = threading.Thread(target=lambda: box.append(robot.actions()))
    thread.start()
    robot.send(observation(policy, 9))
    thread.join(PATIENCE)
    assert box[0][0].timestep == 9


def test_a_step_is_tried_again_after_an_error(policy, robot):
    """Its second observation has no `must_go`, and tells nothing new."""
    robot.start().send(observation(policy, 5))
    robot.actions()
    robot.send(observation(policy, 5, image=np.zeros((2000, 1, 3), np.uint8)))
    with pytest.raises(grpc.RpcError, match="2000 x 1 pixels, expected at most 1024"):
        robot.actions()
    robot.send(observation(policy, 5, must_go=False))
    assert robot.actions()[0].timestep == 5
    with pytest.raises(grpc.RpcError, match="expected a number"):
        robot.send(observation(policy, 5, **{JOINTS[0]: "up"}))
    robot.send(observation(policy, 5, must_go=False))
    assert robot.actions()[0].timestep == 5


def test_the_counters_of_the_server_cover_lerobots_robots(policy, server, robot):
    before = counts(server)
    robot.start().send(observation(policy))
    robot.actions()
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        robot.send(b"nothing")
    after = counts(server)
    assert after["answered"] == before["answered"] + 1
    assert after["answers_by_policy"]["tiny-test"] == after["answered"]
    assert after["refused"] == before["refused"] + 1
    assert after["recent"]["age_ms"]["p50"] < 1e3 * PATIENCE  # since the robot's own timestamp
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as reply:
        page = reply.read().decode()
    assert f'qvla_answers_total{{policy="tiny-test"}} {after["answered"]}\n' in page
    assert f"qvla_skipped_total {after['skipped']}\n" in page


FEATURES = {"observation.state": {"names": JOINTS}}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pretrained_name_or_path": "act"}, "unknown policy 'act'; there are: tiny-test."),
        ({"actions_per_chunk": 0}, "actions_per_chunk: expected a positive number, got 0"),
        ({"lerobot_features": FEATURES}, "the robot has no camera image; tiny-test takes image, "),
        (
            {"lerobot_features": {**FEATURES, "observation.images.front": {}}},
            "camera front: tiny-test has the cameras image, wrist_image; give",
        ),
        ({"lerobot_features": {"observation.effort": {}}}, "observation.effort: expected "),
        ({"lerobot_features": {"observation.state": {"names": None}}}, "expected a list of names"),
        ({"lerobot_features": 1}, "lerobot_features: expected a map, got int"),
        ({"rename_map": {"observation.images.a": "b"}}, "the robot has no observation.images.a"),
        ({"quantize": True}, "RemotePolicyConfig: unknown field quantize"),
    ],
)
def test_what_a_policy_does_not_take_is_refused_at_the_start(robot, changes, text):
    with pytest.raises(grpc.RpcError) as caught:
        robot.start(instructions(**changes))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in caught.value.details()


def test_the_robots_state_fits_the_policy(robot):
    features = {f"observation.images.{name}": {} for name in ("image", "wrist_image")}
    features["observation.state"] = {"names": JOINTS[:6]}
    with pytest.raises(grpc.RpcError, match="state has 6 entries, tiny-test takes 8"):
        robot.start(instructions(lerobot_features=features))


def test_cameras_are_renamed_as_the_robot_asks(policy, robot):
    front, wrist = (f"observation.images.{name}" for name in ("front", "wrist_image"))
    features = {**FEATURES, front: {}, wrist: {}}
    renamed = {front: "observation.images.image"}
    robot.start(instructions(lerobot_features=features, rename_map=renamed))
    image = policy.fake_observation()["image"]
    robot.send(observation(policy, front=image, image=255 - image))
    found = [a.action for a in robot.actions()]
    np.testing.assert_allclose(found, policy.infer(policy.fake_observation()), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({JOINTS[0]: "up"}, "joint_0.pos: expected a number"),
        ({JOINTS[0]: 10**400}, "too large"),
        ({"image": [1, 2]}, "image: expected a number, a numpy array or text, got list"),
        ({"image": np.array([object()])}, "message: "),
        ({"image": np.zeros(2, ">f4")}, "array: dtype '>f4'; accepted: "),
        ({"image": os.system}, "message: refuses posix system"),
        ({"image": 1 + 2j}, "message: refuses builtins complex"),
    ],
)
def test_observations_that_are_no_plain_data_are_refused(policy, robot, changes, text):
    robot.start()
    with pytest.raises(grpc.RpcError) as caught:
        robot.send(observation(policy, **changes))
    assert text in caught.value.details()


@dataclasses.dataclass
class _Evil:
    marker: str

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_no_code_of_a_message_runs(policy, robot, tmp_path):
    robot.start()
    marker = tmp_path / "pwned"
    with pytest.raises(grpc.RpcError, match="refuses posix system"):
        robot.send(observation(policy, task=_Evil(str(marker))))
    with pytest.raises(grpc.RpcError, match="refuses posix system"):
        robot.start(pickle.dumps(_Evil(str(marker))))
    assert not marker.exists()


def nested(levels):
    """A tuple of 2^levels tuples, each of which is pickled once."""
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


def test_what_is_nested_is_not_printed_whole(policy):
    class Shaped:
        def __reduce_ex__(self, protocol):
            function, arguments, state = np.zeros(2, np.uint8).__reduce__()
            return function, arguments, (state[0], nested(60), *state[2:])

    for changes in ({"image": nested(60)}, {"image": Shaped()}, {JOINTS[0]: nested(60)}):
        with pytest.raises(InputError) as caught:
            read_observation(observation(policy, **changes))
        assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match="actions_per_chunk"):
        read_instructions(instructions(actions_per_chunk=nested(60)))


@CHECKS
@given(st.data())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pickletools warns of names
def test_damaged_messages_are_errors(data):
    read, kind = data.draw(
        st.sampled_from([(read_instructions, "instructions"), (read_observation, "observation")])
    )
    message = bytearray(LATEST[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(message), 800) - 1))
        message[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(InputError):
        read(bytes(message))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], "the observation has no end"),
        ([b"\x08\x01" + field(2, b"x")], "the observation has no end"),
        ([b"\x08\x07" + field(2, b"x")], "unknown transfer state 7"),
        ([b"\x0f"], "message: not one of LeRobot's"),
        ([b"\x08\x02" + field(2, bytes(2**19 + 1))] * 2, "is larger than 1048576 bytes"),
    ],
    ids=["nothing", "no end", "state", "no message", "large"],
)
def test_parts_that_make_no_observation_are_refused(robot, parts, text):
    robot.start()
    with pytest.raises(grpc.RpcError) as caught:
        robot.calls["SendObservations"](iter(parts), timeout=PATIENCE)
    assert text in caught.value.details()


def test_calls_come_in_order(robot, policy):
    robot.calls["Ready"](b"", timeout=PATIENCE)
    with pytest.raises(grpc.RpcError, match="expected SendPolicyInstructions"):
        robot.send(observation(policy))
    with pytest.raises(grpc.RpcError, match="expected SendPolicyInstructions"):
        robot.actions()


def test_a_robot_is_turned_away_where_all_places_are_taken(policy, monkeypatch):
    monkeypatch.setattr(lerobot, "_PATIENCE", 0.5)
    with (
        running(policy, max_batch=1, lerobot_port=0, max_clients=1) as small,
        connected(small, "first") as first,
        connected(small, "second") as second,
    ):
        first.start()
        waiting = first.calls["GetActions"].future(b"", timeout=PATIENCE)
        while not small.service.counters.clients:
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError, match="1 clients are served already"):
            second.start()
        assert waiting.result() == b""
        second.start()


@pytest.mark.parametrize("steps", [8, 4])
def test_a_robot_goes_on_with_a_new_connection(policy, steps):
    """If only one can be meant: which policy answers must not be a guess."""
    with running(policy, max_batch=1, lerobot_port=0) as server:
        with connected(server, "other") as other, connected(server, "first") as first:
            other.start()
            first.start(instructions(actions_per_chunk=steps)).send(observation(policy, 2))
            first.actions()  # which is lost
        with connected(server, "second") as second:
            if steps == 8:
                second.send(observation(policy, 2, must_go=False))
                assert second.actions()[0].timestep == 2
            else:
                with pytest.raises(grpc.RpcError, match="expected SendPolicyInstructions"):
                    second.send(observation(policy, 2))


def test_a_server_that_stops_ends_the_wait_of_robots(policy):
    with running(policy, max_batch=1, lerobot_port=0) as server:
        robot = Robot(server).start()
        waiting = robot.calls["GetActions"].future(b"", timeout=PATIENCE)
        while not server.service.counters.clients:
            time.sleep(0.01)
    assert waiting.result() == b""
    robot.channel.close()


def test_two_servers_do_not_share_a_port(policy, server):
    with (
        pytest.raises(InputError, match="choose another --lerobot-port"),
        running(policy, max_batch=1, lerobot_port=server.lerobot_port),
    ):
        pass


def test_tokens_and_tls_are_not_for_lerobots_client(tmp_path):
    for settings in (
        {"token_file": tmp_path / "token"},
        {"tls_cert": tmp_path / "cert", "tls_key": tmp_path / "key"},
    ):
        with pytest.raises(InputError, match="knows neither tokens nor TLS"):
            ServeConfig(lerobot_port=0, **settings)


def test_the_extra_is_named_where_it_is_missing(policy, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "qvla_jax.serving.grpc_port")
    with pytest.raises(QvlaError, match=r"pip install 'qvla-jax\[grpc\]'"):
        PolicyServer(policy, ServeConfig(port=0, lerobot_port=0))
