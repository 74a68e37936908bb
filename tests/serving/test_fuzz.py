"""A million damaged messages: each is decoded or refused. `pytest -m long -rP tests/serving`."""

import random
import time

import numpy as np
import pytest

from qvla_jax.errors import InputError

pytest.importorskip("msgpack")

from qvla_jax.serving import json_numpy, msgpack_numpy

CASES = 500_000
SEED = 0


def seeds(encode):
    """Honest messages that damage starts from."""
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    observation = {"image": image, "state": np.ones(8, np.float32), "instruction": "go \u00e9"}
    yield encode(observation)
    yield encode({f"observation/{key}": value for key, value in observation.items()})
    yield encode({"a": [1, -1, 2**40, 0.5, True, None, {"b": []}], "prompt": ""})


def damage(message, rng, others):
    """Changes, drops, repeats or inserts bytes, or splices two messages, a few times over."""
    message = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at, length = rng.randrange(len(message) + 1), rng.choice((1, 1, 2, 4, 16))
        way = rng.randrange(6)
        if way == 0 and at < len(message):
            message[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < len(message):
            message[at] = rng.choice(b'\x00\x7f\x80\x90\xc0\xc6\xdb\xdd\xdf\xff[]{}",:\\')
        elif way == 2:
            del message[at : at + length]
        elif way == 3:
            message[at:at] = message[at : at + length] * rng.choice((1, 2, 50))
        elif way == 4:
            message[at:at] = rng.randbytes(length)
        else:
            other = rng.choice(others)
            message[at:] = other[rng.randrange(len(other)) :]
    return bytes(message)


@pytest.mark.long
@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (msgpack_numpy.encode, msgpack_numpy.decode),
        (lambda c: json_numpy.encode(c).encode(), lambda m: json_numpy.decode(m)[0]),
    ],
    ids=["msgpack", "json"],
)
def test_damaged_messages_are_decoded_or_refused(encode, decode):
    rng = random.Random(SEED)
    honest = list(seeds(encode))
    pool, decoded, slowest = list(honest), 0, 0.0
    for _ in range(CASES):
        message = damage(rng.choice(pool), rng, honest)
        start = time.perf_counter()
        try:
            content = decode(message)
        except InputError:
            content = None
        slowest = max(slowest, time.perf_counter() - start)
        if content is not None:
            assert isinstance(content, dict)
            decoded += 1
            # What still is a message is damaged further.
            if len(pool) < 2000 and len(message) < 2000:
                pool.append(message)
    print(f"{CASES} cases, {decoded} decoded, the slowest took {1e3 * slowest:.1f} ms")
    assert 0 < decoded < CASES
