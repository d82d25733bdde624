"""Who may ask the server, and how much: hosts, origins, the key, sizes, slow bodies. And what its pages may do."""

import asyncio
import json
import socket
import time

import pytest
from support.serving import server

from npgpt.serving import protection


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST:9999", "[::1]:8000", "127.0.0.1:80"])
def test_hosts_of_this_computer_are_allowed(client, host):
    assert client.send("GET", "/v1/models", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "\xff", "evil@localhost"]
)
def test_other_hosts_are_refused(client, host):
    """A web page could reach the server through a name of its own that leads to 127.0.0.1."""
    for path in ("/", "/v1/models", "/health"):
        status, _, raw = client.send("GET", path, headers={"Host": host})
        assert status in (400, 403)
        if status == 403:
            assert "--allow-host NAME" in json.loads(raw)["error"]["message"]


def test_a_request_without_a_host_or_with_two_is_refused(client):
    for lines in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(f"GET /health HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
            assert connection.recv(100).split()[1] in (b"400", b"403")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://localhost.evil.example"])
def test_pages_of_other_servers_are_refused(client, origin):
    assert client.send("POST", "/v1/completions", b"{}", {"Origin": origin})[0] == 403
    own = f"http://127.0.0.1:{client.port}"
    assert client.send("POST", "/v1/completions", b"{}", {"Origin": own})[0] == 200


def test_the_key(model, tokenizer):
    with server(model, tokenizer, api_key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer \xff"}):
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/inside")):
                status, _, raw = client.send(method, path, b"{}" if method == "POST" else None, headers)
                assert (status, json.loads(raw)["error"]["code"]) == (401, "invalid_api_key")
        assert client.send("POST", "/v1/completions", b"{}", {"Authorization": "Bearer secret"})[0] == 200
        assert client.send("GET", "/health")[0] == 200
        assert client.send("GET", "/")[0] == 200


def test_a_body_has_a_largest_size(client):
    large = b'{"prompt": "' + b"a" * protection.LARGEST_BODY + b'"}'
    status, _, raw = client.send("POST", "/v1/completions", large)
    assert (status, json.loads(raw)["error"]["message"]) == (413, "a request body may have at most 1,048,576 bytes")


def test_endless_headers_are_refused(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        try:
            for _ in range(200):
                connection.sendall(b"a" * 0x10000)
            answer = b""
        except OSError:  # the server has closed the connection
            answer = b"400"
        assert b"400" in (answer or connection.recv(1000))


def test_an_endless_body_is_not_read_to_its_end(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent, chunk = 0, b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        try:
            while sent < 50 * protection.LARGEST_DISCARDED:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:  # the server has closed the connection
            pass
    assert sent < 5 * protection.LARGEST_DISCARDED
    assert client.send("GET", "/health")[0] == 200


def test_a_body_must_arrive_in_time(client, monkeypatch):
    monkeypatch.setattr(protection, "SLOWEST_BODY", 0.3)
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).split()[1] == b"408"
    assert time.monotonic() - started < 5


def test_headers_of_every_answer(client):
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("GET", "/nothing"), ("POST", "/v1/completions")):
        _, headers, _ = client.send(method, path, b"{}" if method == "POST" else None)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "Server" not in headers
        assert "Access-Control-Allow-Origin" not in headers
    _, headers, _ = client.send("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_the_key_is_compared_in_constant_time(monkeypatch):
    """By hmac.compare_digest, whatever the key."""
    compared = []
    monkeypatch.setattr(protection.hmac, "compare_digest", lambda *keys: compared.append(keys) or False)
    guard = protection.Protection(None, ["localhost"], "secret", lambda status: None)
    sent = []

    async def ask():
        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer guess")]
        scope = {"type": "http", "path": "/v1/models", "headers": headers}

        async def send(message):
            sent.append(message)

        await guard(scope, None, send)

    asyncio.run(ask())
    assert compared == [(b"guess", b"secret")]
    assert sent[0]["status"] == 401
