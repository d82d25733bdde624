"""A server in a thread of the test's process, and plain requests to it."""

import contextlib
import http.client
import json

from npgpt.serving.app import Application, ServerSettings
from npgpt.serving.server import listen, running


class Client:
    """Sends one request after another, each on a connection of its own."""

    def __init__(self, port):
        self.port = port

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"

    def send(self, method, path, body=None, headers=None):
        """(status, headers, body as bytes). body: bytes, or anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, body, path="/v1/completions", **headers):
        """(status, body from JSON)."""
        status, _, raw = self.send("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return status, json.loads(raw)

    def events(self, body):
        """The data of the events that a streaming request gets; [DONE] is left as a text."""
        status, _, raw = self.send("POST", "/v1/completions", body | {"stream": True})
        assert status == 200, raw
        lines = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextlib.contextmanager
def server(model, tokenizer, **settings):
    """A Client of a server for this model."""
    served = Application(model, tokenizer, ServerSettings(**({"name": "small"} | settings)))
    listening = listen("127.0.0.1", 0)
    with running(served, listening):
        yield Client(listening.getsockname()[1])
