"""vla-eval's protocol: the published harness evaluates a policy; odd messages are refused."""

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest

pytest.importorskip("aiohttp")
msgpack = pytest.importorskip("msgpack")
sync = pytest.importorskip("websockets.sync.client")

from qvla_jax.families.observations import ObservationSpec  # noqa: E402
from qvla_jax.serving import msgpack_numpy  # noqa: E402
from qvla_jax.serving.service import Reply  # noqa: E402
from qvla_jax.serving.vla_eval import VlaEvalConversation  # noqa: E402

from .served import running  # noqa: E402

PATIENCE = 60
IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, max_batch=1, gripper="libero", max_image_side=64) as server:
        yield server


def address(server):
    return f"ws://127.0.0.1:{server.port}/vla-eval"


def observation(policy, seed=0):
    """The same as vla-eval's LIBERO benchmark names it."""
    own = policy.fake_observation(seed)
    return {
        "images": {"agentview": own["image"], "wrist": own["wrist_image"]},
        "task_description": own["instruction"],
        "states": own["state"].astype(np.float64),
        "controller_states": np.zeros(8, np.float32),
    }


def expected(policy, seed=0):
    """The chunk as LIBERO's environments take it."""
    chunk = policy.infer(policy.fake_observation(seed)).copy()
    chunk[:, -1] = np.where(chunk[:, -1] > 0.5, -1.0, 1.0)
    return chunk


def test_the_published_connection_gets_the_steps_of_chunks(policy, server):
    connection = pytest.importorskip("vla_eval.connection")

    async def episode():
        async with connection.Connection(address(server), timeout=PATIENCE) as client:
            found = []
            for _ in range(2):
                await client.start_episode({"task": {"name": "go"}})
                # The steps left of the chunk are those of the first observation.
                seeds = [0] * 3 + [1] * 5 + [2]
                found.append([(await client.act(observation(policy, s)))["actions"] for s in seeds])
                await client.end_episode({"metrics": {"success": False}})
            return client.server_info, found

    told, found = asyncio.run(episode())
    steps = np.concatenate([expected(policy), expected(policy, 2)[:1]])
    np.testing.assert_allclose(found, [steps, steps], atol=2e-5)
    assert told["observation_params"] == {
        "send_wrist_image": True,
        "send_state": True,
        "quat_no_antipodal": True,
    }
    assert told["policy"]["policies"] == ["tiny-test"]


def test_the_published_harness_agrees_that_actions_fit_libero(policy, server):
    specs = pytest.importorskip("vla_eval.specs")
    with running(policy, max_batch=1) as own:
        formats = {}
        for which in (server, own):
            told = hello(which)["action_spec"]
            formats[which] = {k: specs.DimSpec.from_dict(v) for k, v in told.items()}
    libero = {
        "position": specs.POSITION_DELTA,
        "rotation": specs.ROTATION_AA,
        "gripper": specs.GRIPPER_CLOSE_POS,
    }
    assert specs.check_specs(formats[server], libero, {}, {}) == []
    (warning,) = specs.check_specs(formats[own], libero, {}, {})
    assert "action [gripper]" in warning


BENCHMARK = """
    import numpy as np
    from vla_eval.benchmarks.base import StepBenchmark, StepResult

    class Noise(StepBenchmark):
        def __init__(self, seed=0, send_wrist_image=False, send_state=False):
            super().__init__()
            assert send_wrist_image and send_state  # what the server asks for
            self.rng, self.steps = np.random.default_rng(seed), 0

        def get_tasks(self):
            return [{"name": "pick up the black bowl", "suite": "noise"}]

        def reset(self, task):
            self.steps = 0
            return None

        def step(self, action):
            assert action["actions"].shape == (7,)
            self.steps += 1
            return StepResult(obs=None, reward=0.0, done=self.steps == 10, info={})

        def make_obs(self, raw, task):
            images = {k: self.rng.integers(0, 256, (32, 32, 3), np.uint8) for k in "ab"}
            state = self.rng.random(8)
            return {"images": images, "task_description": task["name"], "states": state}

        def get_step_result(self, result):
            return {"success": result.done}
"""


def test_one_command_of_the_published_harness_evaluates_a_policy(server, tmp_path):
    pytest.importorskip("vla_eval.cli.main")
    (tmp_path / "noise_benchmark.py").write_text(textwrap.dedent(BENCHMARK))
    benchmark = {
        "benchmark": "noise_benchmark:Noise",
        "episodes_per_task": 2,
        "params": {"seed": 1},
    }
    (tmp_path / "noise.yaml").write_text(json.dumps({"benchmarks": [benchmark]}))
    command = "import sys; from vla_eval.cli.main import main; main()"
    arguments = ["run", "-c", "noise.yaml", "--server-url", address(server), "--no-docker"]
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments, "--output-dir", "results"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(file.read_text())
    assert found["mean_success"] == 1.0
    assert found["server_info"]["policy"]["policy"] == "tiny-test"


def talk(server, *messages):
    """The replies to messages of our own, all of which get one."""
    with sync.connect(address(server), compression=None, max_size=None) as connection:
        for message in messages:
            connection.send(message)
        return [msgpack.unpackb(connection.recv(PATIENCE)) for _ in messages]


def message(kind, payload, seq, **changes):
    content = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time(), **changes}
    return msgpack_numpy.encode(content, text_keys=True)


def hello(server):
    (reply,) = talk(server, message("hello", {"protocol_version": 1}, 1))
    return reply["payload"]


def test_errors_name_what_is_wrong_and_the_connection_lives_on(policy, server):
    good = observation(policy)
    bad = [
        {**good, "images": {"agentview": good["images"]["agentview"]}},
        {**good, "states": {"joints": good["states"]}},
        {key: value for key, value in good.items() if key != "task_description"},
        {**good, "images": [good["images"]["agentview"]]},
    ]
    sent = [message("observation", payload, seq) for seq, payload in enumerate(bad, 1)]
    late = message("observation", good, 5, timestamp="noon")
    *errors, fine = talk(server, *sent, late, message("observation", good, 6))
    assert [(error["type"], error["seq"]) for error in errors] == [
        ("error", n) for n in range(1, 6)
    ]
    texts = [error["payload"]["error"] for error in errors]
    assert texts[0].startswith("images: agentview; the policy takes 2 of them (image, wrist_image)")
    assert texts[1] == "state: expected an array, got dict"
    assert "observation has no instruction" in texts[2]
    assert texts[3].startswith("images: none; the policy takes 2")
    assert "captured_at: expected seconds since 1970" in texts[4]
    assert (fine["type"], fine["seq"]) == ("action", 6)


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b"\xc1", "not a msgpack observation"),
        (msgpack.packb({"image": 1}), "no type; expected a message of vla-eval"),
        (message("dance", {}, 9), "type 'dance'; expected hello, "),
        (message(np.zeros(2), {}, 9), "expected hello, "),
        (message("hello", {"protocol_version": np.ones(2)}, 9), "expected 1"),
        (message("observation", [], 9), "payload: expected a map"),
        (message("observation", {}, "9"), "seq: expected a whole number, got str"),
        (message("hello", {"protocol_version": 2}, 9), "protocol version 2, expected 1"),
        ("text", "expected a message in msgpack, got text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "sent",  # messages hold the time
)
def test_messages_of_another_kind_are_errors(server, sent, text):
    (reply,) = talk(server, sent)
    assert reply["type"] == "error"
    assert text in reply["payload"]["error"]


class Telling:
    """Stands in for the service: answers with two steps, and a text for the next call."""

    def __init__(self):
        self.seen = []

    async def in_thread(self, function):
        return function()

    async def answer(self, served, decode, envelope, *, received):
        self.seen.append(decode(envelope).get("history"))
        return Reply(np.zeros((2, 7)), f"after call {len(self.seen)}", 1, times=None)


def test_a_history_lasts_for_an_episode():
    texts = ("instruction", "history")
    spec = ObservationSpec(cameras=("image",), texts=texts, optional=frozenset({"history"}))
    layout = types.SimpleNamespace(executed_steps=None)
    service = Telling()
    served = types.SimpleNamespace(policy=types.SimpleNamespace(observation=spec, layout=layout))
    conversation = VlaEvalConversation(service, served)
    sent = message("observation", {"images": {"a": IMAGE}, "task_description": "go"}, 1)
    start = message("episode_start", {}, 0)

    async def episodes():
        for step in (start, sent, sent, sent, start, sent):
            await conversation.reply(step, received=0.0, last=None)

    asyncio.run(episodes())
    assert service.seen == [None, "after call 1", None]


def test_a_policy_of_openpi_executes_as_many_steps_as_openpis_client(policies):
    pi05 = policies["libero"]
    first, second = (pi05.fake_observation(seed) for seed in (0, 1))
    with running(pi05, max_batch=1) as server:
        assert hello(server)["action_spec"] == {
            "actions": {"name": "raw", "dims": 0, "format": "raw"}
        }
        sent = [observation(pi05, seed) for seed in [0] * 5 + [1]]
        replies = talk(server, *(message("observation", o, n) for n, o in enumerate(sent, 1)))
    found = [np.frombuffer(reply["payload"]["actions"]["data"], np.float32) for reply in replies]
    np.testing.assert_allclose(found[:5], pi05.infer(first)[:5], atol=1e-5)
    np.testing.assert_allclose(found[5], pi05.infer(second)[0], atol=1e-5)
