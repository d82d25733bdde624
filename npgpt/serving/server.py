"""Runs an application on a port, until a signal or `stop`. Needs the extra [serve]."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

import uvicorn

from npgpt.config.fields import RequestError
from npgpt.serving.protection import App

SECONDS_TO_FINISH = 10  # after SIGTERM, for requests that are under way
MOST_CONNECTIONS = 1000  # beyond this, uvicorn answers 503
EVERY_ADDRESS = ("0.0.0.0", "::")


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket that listens. port: 0 for any free one. flag: with which the user can ask for another port.

    Raises RequestError if this computer has no such address, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # else a port stays taken for a while; on Windows two servers could then share it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        listening.close()
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise RequestError(f"cannot listen on port {port} ({error.strerror}); choose another with {flag} N") from None
        raise RequestError(f"cannot listen on {host[:100]!r} ({error}); --host takes an address of this computer") from None
    return listening


def address(listening: socket.socket) -> str:
    """The address of a page on this socket, for a browser."""
    host, port = listening.getsockname()[:2]
    if host in EVERY_ADDRESS:
        host = own_addresses()[0]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def own_addresses() -> list[str]:
    """The names and addresses of this computer. The first is the one that other computers are most likely to reach."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # an address that nobody has; nothing is sent
        found.append(str(outward.getsockname()[0]))
    found += [socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError):  # its own name cannot be looked up
        found += [str(information[4][0]) for information in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys(found))


class Servable(Protocol):
    """What can be served: an ASGI application, and a function that ends the requests that are under way."""

    app: App

    def stop(self) -> None: ...


class _Server(uvicorn.Server):
    """uvicorn's server, which lets requests finish for a while before it ends them."""

    def __init__(self, served: Servable, seconds_to_finish: float, early: Sequence[int] = ()) -> None:
        """early: the signals that have come before uvicorn handles them."""
        super().__init__(
            uvicorn.Config(
                served.app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=round(seconds_to_finish) + 5,  # after that, connections are cut
            )
        )
        self._served, self._seconds_to_finish, self._early = served, seconds_to_finish, early

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests finish. A second one ends the process at once."""
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
        # os.write, because the signal may have interrupted a print.
        with contextlib.suppress(OSError):
            words = f"stopping; requests have {self._seconds_to_finish:.0f} s to finish; press Ctrl-C again to stop at once"
            os.write(2, f"\n{words}\n".encode())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._early:
            self.handle_exit(self._early[0], None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._seconds_to_finish, self._served.stop)
        await super().shutdown(sockets)


def run(served: Servable, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. Requests that are under way may finish first. Then the signal has its usual effect."""
    early: list[int] = []  # a signal while the server starts would end one of its tasks, and it would hang
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: early.append(number)) for number in numbers}
    try:
        _Server(served, SECONDS_TO_FINISH, early).run(sockets=[listening])  # at its end, uvicorn raises the signal again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if early:
        signal.raise_signal(early[0])


@contextlib.contextmanager
def running(served: Servable, listening: socket.socket) -> Iterator[None]:
    """Inside `with`, an application is served by a thread. At the end, requests that are under way end at once."""
    server = _Server(served, 0.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
