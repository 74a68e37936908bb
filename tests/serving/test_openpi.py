"""Policies of openpi behind the server: openpi's own clients of three robots run unchanged."""

import numpy as np
import pytest

from qvla_jax.errors import InputError
from qvla_jax.families.openpi.robots import ROBOTS
from qvla_jax.inference import load_policy
from qvla_jax.inference.quantize import quantize_uniform
from qvla_jax.serving.observations import ObservationReader

from .openpi_policies import PRESETS
from .served import running

# openpi's client opens its connection in a way that websockets 17 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")


def client_message(robot: str, seed: int = 0) -> dict:
    """What openpi's example of a robot sends, of noise: keys, dtypes and layouts."""
    rng = np.random.default_rng(seed)
    image, wrist, third = rng.integers(0, 256, (3, 28, 28, 3), np.uint8)
    if robot == "libero":
        return {
            "observation/image": image,
            "observation/wrist_image": wrist,
            "observation/state": rng.random(8),
            "prompt": "do something",
        }
    if robot == "droid":
        return {
            "observation/exterior_image_1_left": image,
            "observation/wrist_image_left": wrist,
            "observation/joint_position": rng.random(7),
            "observation/gripper_position": rng.random(1),
            "prompt": "do something",
        }
    cameras = {"cam_high": image, "cam_low": third, "cam_left_wrist": wrist}
    return {
        "state": rng.random(14),
        "images": {key: value.transpose(2, 0, 1).copy() for key, value in cameras.items()},
    }


def own_observation(robot: str, seed: int = 0) -> dict:
    """The same in our words."""
    sent = client_message(robot, seed)
    if robot == "libero":
        names = ("image", "wrist_image", "state", "instruction")
        return dict(zip(names, sent.values(), strict=True))
    if robot == "droid":
        image, wrist, joints, gripper, prompt = sent.values()
        state = np.concatenate([joints, gripper])
        return {"image": image, "wrist_image": wrist, "state": state, "instruction": prompt}
    images = {key: value.transpose(1, 2, 0) for key, value in sent["images"].items()}
    return {
        "image": images["cam_high"],
        "left_wrist_image": images["cam_left_wrist"],
        "state": sent["state"],
    }


@pytest.fixture
def openpi_client():
    """Connects the published client, which has no way to close its connection."""
    package = pytest.importorskip(
        "openpi_client.websocket_client_policy",
        reason="pip install --no-deps openpi-client (it asks for numpy < 2, and works with 2)",
    )
    pytest.importorskip("aiohttp")
    clients = []

    def connect(server):
        clients.append(package.WebsocketClientPolicy("127.0.0.1", server.port))
        return clients[-1]

    yield connect
    for client in clients:
        client._ws.close()


@pytest.mark.parametrize("robot", PRESETS)
def test_openpis_clients_run_unchanged(policies, openpi_client, robot):
    policy = policies[robot]
    noise = np.random.default_rng(7).normal(size=(10, 16)).astype(np.float32)
    with running(policy, max_batch=1) as server:
        client = openpi_client(server)
        metadata = client.get_server_metadata()
        replies = [
            client.infer(client_message(robot, seed=1) | added)
            for added in ({}, {"seed": 0}, {"seed": 3}, {"noise": noise}, {"noise": noise})
        ]
        with pytest.raises(RuntimeError, match="'inference_delay': real-time chunking is not"):
            client.infer(client_message(robot) | {"inference_delay": 2})
    reset = [0.0, -1.5, 1.5, 0.0, 0.0, 0.0] if robot == "aloha" else None
    assert metadata.get("reset_pose") == reset
    observation = own_observation(robot, seed=1)
    actions = [reply["actions"] for reply in replies]
    assert actions[0].shape == (10, ROBOTS[robot].action_dim)
    for found, how in zip(actions, ({}, {}, {"seed": 3}, {"noise": noise}), strict=False):
        np.testing.assert_allclose(found, policy.infer(observation, **how), atol=1e-6)
    np.testing.assert_array_equal(actions[0], actions[1])
    np.testing.assert_array_equal(actions[3], actions[4])
    assert np.abs(actions[0] - actions[2]).max() > 1e-3
    assert replies[1]["policy_timing"]["infer_ms"] > 0
    assert replies[1]["server_timing"].keys() >= {"infer_ms", "prev_total_ms"}


def test_a_packed_policy_answers_openpis_client(policies, openpi_client, tmp_path):
    quantize_uniform(policies["libero"], 8).save(tmp_path / "eight.qvla")
    policy = load_policy(tmp_path / "eight.qvla")
    with running(policy, max_batch=1) as server:
        found = openpi_client(server).infer(client_message("libero"))["actions"]
    np.testing.assert_allclose(found, policy.infer(own_observation("libero")), atol=1e-6)


def test_their_messages_are_answered_over_rest_too(policies):
    pytest.importorskip("aiohttp")
    requests, json_numpy = map(pytest.importorskip, ("requests", "json_numpy"))
    body = json_numpy.dumps(client_message("droid") | {"seed": 3})
    with running(policies["droid"], max_batch=1) as server:
        reply = requests.post(f"http://127.0.0.1:{server.port}/act", data=body, timeout=60)
    assert reply.status_code == 200, reply.text
    expected = policies["droid"].infer(own_observation("droid"), seed=3)
    np.testing.assert_allclose(np.stack(json_numpy.loads(reply.text)), expected, atol=1e-6)


@pytest.mark.parametrize("robot", PRESETS)
def test_our_own_words_mean_the_same(policies, robot):
    read = ObservationReader(policies[robot], max_image_side=64)
    theirs, ours = read(client_message(robot)), read(own_observation(robot))
    for name, value in vars(theirs.inputs).items():
        np.testing.assert_array_equal(value, getattr(ours.inputs, name))
    # What openpi's clients send in float64 is not rounded: quantiles of a joint that never moves
    # are 1e-6 apart.
    assert theirs.state.dtype == np.float64
    np.testing.assert_array_equal(theirs.state, ours.state)


IMAGE = "observation/image"


@pytest.mark.parametrize(
    ("robot", "change", "message"),
    [
        ("libero", {IMAGE: None}, "observation has no 'observation/image'; it holds: observation/"),
        ("libero", {IMAGE: "red"}, "observation/image: expected an array, got str"),
        ("libero", {IMAGE: np.zeros((8, 8))}, r"observation/image: expected an image .*\[8, 8\]"),
        ("libero", {IMAGE: np.zeros((0, 3, 0))}, "observation/image: expected an image"),
        ("libero", {IMAGE: np.full((8, 8, 3), 2.0)}, "image: a float image must be in"),
        ("libero", {IMAGE: np.zeros((65, 8, 3), np.uint8)}, "image: 65 x 8 pixels"),
        ("libero", {"observation/state": ["x"]}, r"observation/state: expected numbers \[p\]"),
        ("libero", {"observation/state": np.zeros(7)}, r"state: expected \[b, 8\]"),
        ("libero", {"prompt": 3}, "prompt: expected text, got int"),
        ("libero", {"prompt": b"\xff"}, "prompt: not UTF-8"),
        ("libero", {"prompt": None}, "observation has no instruction or prompt"),
        ("libero", {"noise": np.zeros((10, 15))}, r"noise: expected shape \(1, 10, 16\)"),
        ("libero", {"noise": np.full((10, 16), np.nan)}, "noise: holds NaN or inf"),
        ("libero", {"noise": [0.0]}, r"noise: expected floats \[h, a\], got list"),
        ("libero", {"seed": -1}, "seed: expected a whole number below"),
        ("libero", {"seed": 0, "noise": np.zeros((10, 16))}, "noise and seed, which say the same"),
        ("libero", {"prev_chunk_left_over": np.zeros(3)}, "'prev_chunk_left_over': real-time"),
        ("libero", {"unnorm_key": "there"}, "no such statistics; there are: here"),
        ("droid", {"observation/gripper_position": None}, "no 'observation/gripper_position'"),
        ("aloha", {"images": [1]}, "images: expected cameras by name, got list"),
        ("aloha", {"images": {}}, "observation has no 'cam_high'"),
        ("aloha", {"images": {b"cam_high": 1}}, "images: unexpected camera b'cam_high'"),
        ("aloha", {"state": {}}, r"state: expected numbers"),
    ],
)
def test_unusable_messages_are_refused_by_name(policies, robot, change, message):
    sent = {key: v for key, v in (client_message(robot) | change).items() if v is not None}
    with pytest.raises(InputError, match=message):
        ObservationReader(policies[robot], max_image_side=64)(sent)


def test_messages_of_another_robots_client_are_refused(policies):
    with pytest.raises(InputError, match="no 'observation/image'; it holds: observation/exterior"):
        ObservationReader(policies["libero"], max_image_side=64)(client_message("droid"))


def test_grippers_stay_as_openpis_clients_take_them(policies):
    pytest.importorskip("aiohttp")
    with (
        pytest.raises(InputError, match="gripper 'libero': clients of pi05_libero take"),
        running(policies["libero"], gripper="libero"),
    ):
        pass
