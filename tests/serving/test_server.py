"""The server's start: a signal that comes while it starts."""

import signal
import threading

import pytest
import uvicorn

from npgpt.serving.server import listen, run


class Served:
    """An application that does nothing."""

    def __init__(self):
        self.app, self.events = self, []

    async def __call__(self, scope, receive, send):
        while scope["type"] == "lifespan":
            event = (await receive())["type"]
            self.events.append(event)
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return

    def stop(self):
        pass


@pytest.mark.parametrize("when", ["before uvicorn takes signals", "after"])
def test_ctrl_c_while_the_server_starts(monkeypatch, when):
    """It ends in good order. Without care, asyncio would cancel the start, and the server would wait for ever."""
    name, served = {"before uvicorn takes signals": "serve", "after": "startup"}[when], Served()
    real = getattr(uvicorn.Server, name)

    async def interrupted(self, sockets=None):
        signal.raise_signal(signal.SIGINT)
        return await real(self, sockets)

    monkeypatch.setattr(uvicorn.Server, name, interrupted)
    handler, watchdog = signal.getsignal(signal.SIGINT), threading.Timer(30, lambda: signal.raise_signal(signal.SIGTERM))
    watchdog.start()
    try:
        with listen("127.0.0.1", 0) as listening, pytest.raises(KeyboardInterrupt):
            run(served, listening)
    finally:
        watchdog.cancel()
    assert signal.getsignal(signal.SIGINT) is handler
    assert served.events == ["lifespan.startup", "lifespan.shutdown"]
