"""Checks each request before the application sees it: host, origin, API key, size and time.

- A request must name an allowed host. Otherwise a web page could reach the server through a name of its own (DNS rebinding).
- A browser says from which page a request comes. Requests from pages of another origin are refused.
- If there is an API key, every path except / and /health needs it. It is compared in constant time.
- A body has a largest size, and must arrive in time.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from npgpt.serving.completions import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 1 << 20  # bytes
LARGEST_DISCARDED = 1 << 24  # bytes of a larger body that are read, so that the client receives the error
SLOWEST_BODY = 30.0  # seconds
OPEN_PATHS = {"/", "/health"}  # they need no key; the page asks a person for it
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


class Protection:
    """An ASGI application around another one."""

    def __init__(self, app: App, hosts: Sequence[str], api_key: str | None, count: Callable[[int], None]) -> None:
        """hosts: the names that a request may ask for, without ports. count: is told the status of each response."""
        self._app, self._hosts, self._count = app, {host.lower() for host in hosts}, count
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # "lifespan"; websockets are refused by the application
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
            await sending({"type": "http.response.start", "status": error.status, "headers": headers})
            await sending({"type": "http.response.body", "body": error.body})
            return
        await self._app(scope, _Limited(receive), sending)

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        host = headers.get(b"host", [])
        if len(host) != 1 or _name_of(host[0]) not in self._hosts:
            shown = host[0].decode("latin-1")[:100] if host else ""
            raise ApiError(
                f"the Host {shown!r} is not allowed; start the server with --allow-host NAME to allow it", status=403
            )
        for origin in headers.get(b"origin", []):
            if origin.partition(b"://")[2].lower() != host[0].lower():
                shown = origin.decode("latin-1")[:100]
                raise ApiError(f"requests from pages of another origin are refused, got Origin {shown!r}", status=403)
        if self._api_key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", [b""])[0]
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._api_key):
                message = "expected the header Authorization: Bearer KEY, with the key of this server"
                raise ApiError(message, status=401, code="invalid_api_key")


def _name_of(host: bytes) -> str:
    """The name in a Host header, without its port: 127.0.0.1:8000, [::1]:8000, localhost."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        name, closed, _ = text[1:].partition("]")
        return name if closed else ""
    return text.partition(":")[0]


class _Limited:
    """Receives a body of bounded size within bounded time."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._n, self._complete = receive, 0, False
        self._deadline = asyncio.get_running_loop().time() + SLOWEST_BODY

    async def __call__(self) -> Message:
        if self._complete:  # from here on, the message is that the client has gone
            return await self._receive()
        message = await self._next()
        if self._n > LARGEST_BODY:
            while message.get("more_body") and self._n <= LARGEST_DISCARDED:
                message = await self._next()
            raise ApiError(f"a request body may have at most {LARGEST_BODY:,} bytes", status=413)
        self._complete = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:  # on Python 3.10 not yet the built-in one
            raise ApiError(f"the request body did not arrive within {SLOWEST_BODY:.0f} seconds", status=408) from None
        self._n += len(message.get("body", b""))
        return message
