"""Access control and routing of requests."""

import functools
import hmac
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from qvla_jax.errors import InputError
from qvla_jax.plain import to_plain
from qvla_jax.serving import metrics, rest
from qvla_jax.serving.openpi import OpenpiConversation
from qvla_jax.serving.policies import ServedPolicy
from qvla_jax.serving.service import Service
from qvla_jax.serving.vla_eval import VlaEvalConversation
from qvla_jax.serving.websocket import Conversation, Websockets

# Schemes of the token: that of openpi's client, and the usual one.
_SCHEMES = ("api-key", "bearer")
_HEALTH = "/healthz"


def make_application(service: Service, websockets: Websockets) -> web.Application:
    """The routes of all protocols, behind access control.

    Args:
        service: answers the requests.
        websockets: its connections over websockets.
    """
    application = web.Application(
        middlewares=[_guard(service)], client_max_size=service.config.max_message
    )

    async def connect(
        kind: Callable[[Service, ServedPolicy], Conversation], request: web.Request
    ) -> web.StreamResponse:
        if not web.WebSocketResponse().can_prepare(request):
            text = "clients of openpi and vla-eval connect with a websocket; others POST to /act"
            return rest.failure(HTTPStatus.UPGRADE_REQUIRED, text)
        try:
            served = service.named(request.query)
        except InputError as error:
            return rest.failure(HTTPStatus.BAD_REQUEST, str(error))
        return await websockets(request, kind(service, served))

    async def health(request: web.Request) -> web.Response:
        if service.closing or service.stalled:
            return web.Response(status=HTTPStatus.SERVICE_UNAVAILABLE, text="unavailable\n")
        return web.Response(text="OK\n")

    async def stats(request: web.Request) -> web.Response:
        told = service.metadata(service.policies[0])
        return web.json_response({**told, **to_plain(service.counters.snapshot())})

    async def prometheus(request: web.Request) -> web.Response:
        page = metrics.prometheus(service.counters.snapshot())
        return web.Response(body=page.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    application.router.add_get("/", functools.partial(connect, OpenpiConversation))
    application.router.add_get("/vla-eval", functools.partial(connect, VlaEvalConversation))
    application.router.add_post("/act", functools.partial(rest.act, service))
    application.router.add_get(_HEALTH, health)
    application.router.add_get("/stats", stats)
    application.router.add_get("/metrics", prometheus)
    return application


def _guard(service: Service) -> Middleware:
    counters = service.counters

    def turned_away(status: HTTPStatus, text: str) -> web.Response:
        counters.turned_away += 1
        response = rest.failure(status, text)
        response.force_close()  # do not read what it still sends
        return response

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == _HEALTH:
            return await handler(request)
        # Robots are not browsers; an open web page must not reach their policy.
        if hdrs.ORIGIN in request.headers:
            return turned_away(HTTPStatus.FORBIDDEN, "browsers are not served")
        if service.token is not None and not _knows(service.token, request):
            response = turned_away(
                HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key TOKEN"
            )
            response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
            return response
        if service.closing:
            return turned_away(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down")
        if counters.clients >= service.config.max_clients:
            return turned_away(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{counters.clients} clients are served already; try again later",
            )
        counters.clients += 1
        try:
            return await handler(request)
        finally:
            counters.clients -= 1

    return guard


def _knows(token: str, request: web.Request) -> bool:
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    # In constant time, so that the response does not reveal how much of it was right.
    same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
    return same and scheme.lower() in _SCHEMES
