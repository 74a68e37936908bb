"""OpenVLA's REST API: POST /act with an observation in JSON, arrays as json-numpy writes them.

What the clients of OpenVLA's and OpenVLA-OFT's `vla-scripts/deploy.py` expect: the body of the
reply is the action itself, an array [a] if the policy decides one step at a time, or a list of such
arrays if it predicts chunks; encoded twice if the request was. Times go into the header
Server-Timing. Errors have a status and a message, where the reference replies "error".
"""

import asyncio
import dataclasses
import time
from http import HTTPStatus

import numpy as np
from aiohttp import web

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError, PolicyError
from qvla_jax.serving import json_numpy
from qvla_jax.serving.service import Service


async def act(service: Service, request: web.Request) -> web.Response:
    """Answers one observation."""
    body = await _body(service, request)
    if isinstance(body, web.Response):
        service.counters.refused += 1
        return body
    received = time.monotonic()
    twice = False

    def decode(body: bytes) -> dict[str, object]:
        nonlocal twice
        content, twice = json_numpy.decode(body)
        return content

    try:
        answer = await service.answer(service.named(request.query), decode, body, received=received)
    except InputError as error:
        return failure(HTTPStatus.BAD_REQUEST, str(error))
    except PolicyError as error:
        return failure(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
    times = dataclasses.asdict(answer.times)
    timing = ", ".join(f"{key.removesuffix('_ms')};dur={ms:.3f}" for key, ms in times.items())
    return web.json_response(
        text=action_text(answer.actions, twice=twice), headers={"Server-Timing": timing}
    )


async def _body(service: Service, request: web.Request) -> bytes | web.Response:
    """The body of a request, or the reply to one that is too large or too slow."""
    limit, seconds = service.config.max_message, service.config.io_timeout
    too_large = failure(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is larger than {limit} bytes"
    )
    if (request.content_length or 0) > limit:
        return too_large
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError:
        text = f"the request did not arrive within {seconds:g} s"
        return failure(HTTPStatus.REQUEST_TIMEOUT, text)
    except web.HTTPRequestEntityTooLarge:
        return too_large


def action_text(actions: Float[np.ndarray, "h a"], *, twice: bool = False) -> str:
    """The body of a reply: one action as an array, a chunk as a list of them."""
    text = json_numpy.encode(actions[0] if len(actions) == 1 else list(actions))
    return json_numpy.encode(text) if twice else text


def failure(status: HTTPStatus, text: str) -> web.Response:
    """A reply with an error message."""
    return web.json_response({"error": text}, status=status)
