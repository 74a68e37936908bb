"""The published policies of inspect-robots' robots run against the server unchanged."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from qvla_jax.families.prismatic.config import preset
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference.policy import make_policy

from .served import running

pytest.importorskip("aiohttp")
types = pytest.importorskip("inspect_robots.types")
scene = pytest.importorskip("inspect_robots.scene")

# openpi's client opens its connection in a way that websockets 17 warns of, and never closes it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
INSTRUCTION = "pick up the black bowl"
FRAME = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)


def bridge_policy(horizon):
    """One camera, no state: what the arms of BridgeData send."""
    config = dataclasses.replace(
        preset("tiny-test"),
        num_images=1,
        proprio_dim=0,
        action_horizon=horizon,
        unnorm_key="bridge_orig",
    )
    statistics = {"bridge_orig": {"action": {"q01": [-2.0] * 7, "q99": [1.0] * 7}}}
    model = make_model(config, rngs=nnx.Rngs(0))
    return make_policy(config, model, word_files(), statistics, source="x")


def actions_of(client, observation):
    """What one of their policies has its robot do."""
    client.reset(scene.Scene(id="one", instruction=INSTRUCTION))
    return np.stack([action.data for action in client.act(observation).actions])


def test_widowx_asks_over_openvlas_rest_api():
    widowx = pytest.importorskip("inspect_robots_widowx.policy")
    policy = bridge_policy(horizon=1)
    with running(policy, max_batch=1) as server:
        client = widowx.OpenVLAPolicy(
            server_url=f"http://127.0.0.1:{server.port}", jpeg_roundtrip=False
        )
        found = actions_of(client, types.Observation(images={"external_cam": FRAME}))
    image = np.asarray(Image.fromarray(FRAME).resize((256, 256), Image.Resampling.LANCZOS))
    expected = policy.infer({"image": image, "instruction": INSTRUCTION})
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_widowx_asks_over_openpis_protocol():
    widowx = pytest.importorskip("inspect_robots_widowx.policy")
    tools = pytest.importorskip("openpi_client.image_tools")
    policy = bridge_policy(horizon=4)
    with running(policy, max_batch=1) as server:
        client = widowx.OpenpiPolicy(port=server.port)
        found = actions_of(client, types.Observation(images={"external_cam": FRAME}))
    image = tools.resize_with_pad(FRAME, 224, 224)
    expected = policy.infer({"image": image, "instruction": INSTRUCTION})
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_franka_asks_a_droid_policy(policies):
    franka = pytest.importorskip(
        "inspect_robots_franka.policy",
        reason="pip install --no-deps inspect-robots-franka (it asks for OpenCV, for cameras)",
    )
    tools = pytest.importorskip("openpi_client.image_tools")
    state = np.random.default_rng(1).random(8)
    images = {"exterior_cam": FRAME, "wrist_cam": FRAME[::-1].copy()}
    with running(policies["droid"], max_batch=1) as server:
        client = franka.OpenpiPolicy(port=server.port)
        found = actions_of(client, types.Observation(images=images, state={"joint_pos": state}))
    sent = {
        "image": tools.resize_with_pad(images["exterior_cam"], 224, 224),
        "wrist_image": tools.resize_with_pad(images["wrist_cam"], 224, 224),
        "state": np.append(state[:7], 1.0 - state[7]),  # their grippers open at 1, DROID's at 0
        "instruction": INSTRUCTION,
    }
    chunk = policies["droid"].infer(sent)
    speeds = np.clip(chunk[:, :7], -1.0, 1.0)
    joints = state[:7] + 0.2 * np.cumsum(speeds, axis=0)
    np.testing.assert_allclose(found[:, :7], joints, atol=1e-5)
    np.testing.assert_allclose(found[:, 7], 1.0 - chunk[:, 7], atol=1e-5)
