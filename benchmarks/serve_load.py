"""Load on a server: many clients at once, each of which knows the answers it has to get.

    python benchmarks/serve_load.py --policy libero-mini --clients 64 --seconds 600

Starts `qvla serve` on a free port of the loopback and asks it from this process, by websocket and
by REST, without a pause. Every client has observations of its own, whose answers were computed
beforehand: an answer is wrong if it is not the expected one, and crossed if it is another client's.
With --abuse further clients send garbage, announce too much, leave in the middle and send a byte
now and then. Prints the counts, percentiles of the latency, the rate, and the server's resident
memory. Exit code 1 if an answer was lost, wrong or crossed, or the server did not stop cleanly.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import numpy as np

from qvla_jax.inference import Policy, load_policy
from qvla_jax.serving import json_numpy, msgpack_numpy

# Of un-normalized actions. Answers of one observation differ in rounding between batch sizes.
TOLERANCE = 1e-4


@dataclasses.dataclass
class Outcome:
    """What all clients saw."""

    latencies: dict[str, list[float]]
    counts: collections.Counter[str]
    rss: list[tuple[float, int]]


class Question:
    """An observation in both formats, and the number of its answer."""

    def __init__(self, observation: dict, number: int) -> None:
        self.number = number
        self.binary = msgpack_numpy.encode(observation)
        self.text = json_numpy.encode(observation)


class Checker:
    """Knows all answers."""

    def __init__(self, expected: np.ndarray, counts: collections.Counter[str]) -> None:
        self._expected = expected
        self._counts = counts
        apart = min(
            float(np.abs(expected[n] - expected[n + 1 :]).max(axis=(1, 2)).min(initial=np.inf))
            for n in range(len(expected))
        )
        print(f"the answers are at least {apart:.2g} apart")
        assert apart > 2 * TOLERANCE, "crossed answers could not be told"

    def __call__(self, actions: np.ndarray, number: int) -> None:
        """Counts an answer as right, wrong or crossed."""
        error = np.abs(actions[None] - self._expected).max(axis=(1, 2))
        nearest = int(error.argmin())
        if error[number] < TOLERANCE:
            self._counts["right"] += 1
        elif nearest != number and error[nearest] < TOLERANCE:
            self._counts["crossed"] += 1
        else:
            self._counts["wrong"] += 1


def answers(policy: Policy, observations: list[dict]) -> np.ndarray:
    """The expected answers, f32[n, h, a]."""
    return np.stack([policy.infer(observation) for observation in observations])


async def openpi(session: aiohttp.ClientSession, base: str, until: float, questions, check, out):
    """A robot that speaks openpi's protocol."""
    async with session.ws_connect(f"ws://{base}/", compress=0, max_msg_size=0) as socket:
        await socket.receive_bytes()
        for question in ask(questions, until):
            start = time.perf_counter()
            await socket.send_bytes(question.binary)
            reply = await socket.receive()
            if reply.type is not aiohttp.WSMsgType.BINARY:
                out.counts["lost"] += 1
                return
            out.latencies["openpi"].append(time.perf_counter() - start)
            check(msgpack_numpy.decode(reply.data)["actions"], question.number)


async def openvla(session: aiohttp.ClientSession, base: str, until: float, questions, check, out):
    """A robot that speaks OpenVLA's REST."""
    for question in ask(questions, until):
        start = time.perf_counter()
        async with session.post(f"http://{base}/act", data=question.text) as reply:
            text = await reply.text()
            if reply.status != 200:
                out.counts["lost"] += 1
                return
        out.latencies["openvla"].append(time.perf_counter() - start)
        # An action is an array or a list of them, which `decode` has only inside an object.
        actions = json_numpy.decode(f'{{"actions": {text}}}'.encode())[0]["actions"]
        check(np.stack(actions) if isinstance(actions, list) else actions[None], question.number)


def ask(questions: list[Question], until: float):
    """The questions in turn, until the time is over."""
    turn = 0
    while time.monotonic() < until:
        yield questions[turn % len(questions)]
        turn += 1


async def abuse(session: aiohttp.ClientSession, base: str, until: float, question: Question, out):
    """A client that means no good, in one way after the other."""
    host, port = base.split(":")

    async def garbage():
        async with session.ws_connect(f"ws://{base}/", compress=0) as socket:
            await socket.receive_bytes()
            await socket.send_bytes(random.randbytes(200))
            assert (await socket.receive()).type is aiohttp.WSMsgType.TEXT

    async def bad_request():
        body = question.text[: len(question.text) // 2]
        async with session.post(f"http://{base}/act", data=body) as reply:
            assert reply.status == 400

    async def oversized():
        async with session.ws_connect(f"ws://{base}/", compress=0) as socket:
            await socket.receive_bytes()
            with contextlib.suppress(ConnectionError):
                await socket.send_bytes(bytes(2**24))
            await socket.receive()

    async def leave():
        async with session.ws_connect(f"ws://{base}/", compress=0) as socket:
            await socket.receive_bytes()
            await socket.send_bytes(question.binary)
            await asyncio.sleep(random.uniform(0, 0.05))

    async def drip():
        _, writer = await asyncio.open_connection(host, int(port))
        try:
            for byte in b"POST /act HTTP/1.1\r\nHost: x\r\n":
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1)
        finally:
            writer.close()

    ways: list[Callable[[], Awaitable[None]]] = [garbage, bad_request, oversized, leave, drip]
    while time.monotonic() < until:
        for way in ways:
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await way()
            out.counts[f"abuse: {way.__name__}"] += 1


async def watch(process: int, until: float, out: Outcome) -> None:
    """Notes the server's resident memory twice a second."""
    page = os.sysconf("SC_PAGE_SIZE")
    while time.monotonic() < until:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        out.rss.append((time.monotonic(), page * pages))
        await asyncio.sleep(0.5)


async def load(arguments: argparse.Namespace, base: str, process: int, questions, check, out):
    """All clients at once; returns the server's own counts."""
    until = time.monotonic() + arguments.seconds
    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limit) as session:
        jobs = [
            (openvla if number % 4 == 3 else openpi)(session, base, until, own, check, out)
            for number, own in enumerate(questions)
        ]
        jobs += [abuse(session, base, until, questions[0][0], out) for _ in range(arguments.abuse)]
        results = await asyncio.gather(*jobs, watch(process, until, out), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                out.counts["lost"] += 1
                print(f"a client ended with {result!r}", file=sys.stderr)
        async with session.get(f"http://{base}/stats") as reply:
            return await reply.json()


def main() -> int:
    """Runs the load and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="libero-mini")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--observations", type=int, default=2, help="of each client")
    parser.add_argument("--abuse", type=int, default=0, help="clients that mean no good")
    parser.add_argument("--max-batch", type=int, default=8)
    arguments = parser.parse_args()

    policy = load_policy(arguments.policy)
    count = arguments.clients * arguments.observations
    observations = [policy.fake_observation(seed) for seed in range(count)]
    out = Outcome(collections.defaultdict(list), collections.Counter(), [])
    check = Checker(answers(policy, observations), out.counts)
    asked = [Question(observation, n) for n, observation in enumerate(observations)]
    size = arguments.observations
    questions = [asked[n : n + size] for n in range(0, count, size)]

    command = [sys.executable, "-m", "qvla_jax.cli", "serve", "--policy", arguments.policy]
    command += ["--port", "0", "--max-batch", str(arguments.max_batch)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line:
            return 1
        base = line.split()[3].removeprefix("ws://")
        start = time.monotonic()
        stats = asyncio.run(load(arguments, base, server.pid, questions, check, out))
        seconds = time.monotonic() - start
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    finally:
        server.kill()

    print(f"{arguments.clients} clients, {seconds:.0f} s, load {os.getloadavg()[0]:.1f}")
    for name, values in sorted(out.latencies.items()):
        points = np.percentile(1e3 * np.array(values), [50, 90, 95, 99, 100])
        names = ("p50", "p90", "p95", "p99", "max")
        text = ", ".join(f"{p} {v:.1f}" for p, v in zip(names, points, strict=True))
        print(f"{name}: {len(values)} answers; latency in ms: {text}")
    print(f"{sum(map(len, out.latencies.values())) / seconds:.1f} answers per second")
    print(", ".join(f"{k}: {v}" for k, v in sorted(out.counts.items())))
    half = [rss for _, rss in out.rss[len(out.rss) // 2 :]]
    print(
        f"resident memory in MiB: {out.rss[0][1] / 2**20:.0f} at first, {half[0] / 2**20:.0f} half "
        f"way, {half[-1] / 2**20:.0f} at the end, {max(r for _, r in out.rss) / 2**20:.0f} at most"
    )
    print(f"server: {json.dumps(stats)}")
    failed = out.counts["lost"] + out.counts["wrong"] + out.counts["crossed"]
    print(f"lost, wrong or crossed: {failed}; the server ended with {code}")
    return int(bool(failed or code))


if __name__ == "__main__":
    sys.exit(main())
