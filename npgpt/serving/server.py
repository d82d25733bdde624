"""Runs an application on a port, until a signal or `stop`. Needs the extra [serve]."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any, Literal

import uvicorn

from npgpt.config.fields import RequestError

SECONDS_TO_FINISH = 20  # after SIGTERM, for requests that are under way
MOST_CONNECTIONS = 1000  # beyond this, uvicorn answers 503


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. port: 0 for any free one. Raises RequestError if there is no such address or it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise RequestError(f"cannot listen on {host}, port {port} ({error.strerror or error}); try another --port") from None
    return listening


def address(listening: socket.socket) -> str:
    """The address of a page on this socket, for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _server(app: Any, lifespan: Literal["on", "off"], seconds_to_finish: int) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan=lifespan,
            loop="asyncio",
            http="h11",
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=seconds_to_finish,
        )
    )


def run(app: Any, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. Requests that are under way may finish first. Then the signal has its usual effect."""
    _server(app, "on", SECONDS_TO_FINISH).run(sockets=[listening])


@contextlib.contextmanager
def running(app: Any, listening: socket.socket, lifespan: Literal["on", "off"] = "off") -> Iterator[None]:
    """Inside `with`, an application is served by a thread. lifespan: whether it has something to start and to end."""
    server = _server(app, lifespan, 1)  # a browser that looks at the page must not keep the command from ending
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
