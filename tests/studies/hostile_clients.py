"""Clients that send what no client should: wrong JSON, wrong HTTP, hostile headers, and clients that vanish. Used by tests.

The server must answer each with a status of 400 to 499, or close the connection where there is nothing to answer. It must
stay alive, and its memory must stay bounded.
"""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from studies.reliability import Tally
from support.hostile import HOSTILE

import npgpt
from npgpt import GPT, CharTokenizer, GenerateConfig, GPTConfig
from npgpt.generation.generate import generate_text

ROOT = Path(__file__).parent.parent.parent
MOST_GROWTH = 64 << 20  # bytes of memory that the server may take on for all of this
VALID = {"prompt": "ab", "max_tokens": 8, "seed": 1, "temperature": 1.0, "n": 1}
NUMBERS = ["a", [], {}, "", [1], True, -1, -0.5, 1e999, float("nan"), 10**400, -(2**70), "9" * 5000]
WRONG = {  # for each argument, values that are never right
    "prompt": [5, True, {}, [[]], [-1], [2**40], ["a", 1], [[["a"]]], "xyz", "\ud800", "\x00", ["a"] * 100, [1.5], 1e999],
    "max_tokens": [*NUMBERS, 1.5, 10**9],
    "n": [*NUMBERS, 0, 10**6, 1.5],
    "temperature": NUMBERS,
    "top_p": [*NUMBERS, 0, 1.5],
    "top_k": [value for value in NUMBERS if value != 10**400] + [0, 1.5],  # a very large top-k is like none
    "min_p": [*NUMBERS, 2],
    "repetition_penalty": [*NUMBERS, 0, 1000],
    "seed": [value for value in NUMBERS if value != -1] + [1.5, 2**65],
    "logprobs": [*NUMBERS, 100, 1.5],
    "stop": [5, True, {}, "", [""], [5], ["a"] * 50, "a" * 5000, [["a"]]],
    "stream": [0, 1, "true", [], {}, 2.5],
    "echo": [0, 1, "true", [], {}],
    "stream_options": [1, "a", [1], True, {"include_usage": 3}],
    "best_of": [5, "a", [], -1],
    "presence_penalty": [1, "a", [], 0.1],
    "frequency_penalty": [1, "a", [], -2],
    "logit_bias": [{"1": 5}, "a", [1], 3],
    "suffix": ["x", 3, [1]],
}


def request(method="POST", path="/v1/completions", body=b"", headers=(), host="localhost", version="1.1", length=None):
    """The bytes of a request. length: another Content-Length than the right one."""
    lines = [f"{method} {path} HTTP/{version}"]
    lines += [] if host is None else [f"Host: {host}"]
    lines += [f"Content-Length: {len(body) if length is None else length}", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace") + body


def _wrong_argument(rng):
    name = rng.choice(list(WRONG))
    return request(body=json.dumps(VALID | {name: rng.choice(WRONG[name])}).encode())


def _unknown_argument(rng):
    return request(body=json.dumps(VALID | {rng.choice(HOSTILE)[:50] + "?": 1}).encode())


def _not_an_object(rng):
    return request(body=json.dumps(rng.choice([[], 3, "a", None, True, [VALID], 1e999])).encode())


def _cut_json(rng):
    body = json.dumps(VALID).encode()
    return request(body=body[: rng.randrange(len(body))])


def _damaged_json(rng):
    """A bracket that is missing, so that no damage elsewhere can make it right."""
    body = bytearray(json.dumps(VALID).encode()[:-1])
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(len(body))] = rng.choice([i for i in range(256) if i != ord("}")])
    return request(body=bytes(body))


def _random_bytes(rng):
    return request(body=b"\xff" + rng.randbytes(rng.randint(0, 3000)))


def _deep_json(rng):
    return request(body=rng.choice([b"[", b'{"a":', b'{"prompt":[']) * rng.choice([1000, 50_000, 90_000]))


def _large_body(rng):
    return request(body=b'{"prompt": "' + b"a" * (1 << 20) + b'"}')


def _wrong_path(rng):
    paths = ["/v1", "/v1/chat/completions", "/..%2f..%2fetc/passwd", "/v1/models/" + "a" * 2000, "//", "/%00", "/x?<script>"]
    return request("GET", rng.choice(paths))


def _wrong_method(rng):
    return request(rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"]), "/v1/completions")


def _wrong_host(rng):
    hosts = ["evil.example", "localhost.evil.example", "", "[::1", "127.0.0.1@evil.example", "a" * 5000, "\xff\xfe", None]
    return request("GET", "/v1/models", host=rng.choice(hosts))


def _wrong_origin(rng):
    origin = rng.choice(["http://evil.example", "null", "http://localhost:1", "file://", "", "http://localhost.evil.example"])
    return request(body=json.dumps(VALID).encode(), headers=[f"Origin: {origin}"])


def _two_hosts(rng):
    return request("GET", "/v1/models", headers=["Host: evil.example"])


def _wrong_http(rng):
    return rng.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(100),  # a browser that speaks TLS
            b"GET\r\n\r\n",
            b"\r\n" * 50 + b"x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 200_000,
            request(length=rng.choice(["-1", "abc", "1e9", "9" * 40])),
            request(headers=["Transfer-Encoding: chunked"], length=5, body=b"zz\r\n"),
            request(headers=["Transfer-Encoding: gzip"], body=b"{}"),
            rng.randbytes(rng.randint(1, 500)) + b"\r\n\r\n",
        ]
    )


def _wrong_inside(rng):
    prompt = rng.choice([3, None, [], {}, "xyz", "\ud800", "a" * 200_000])
    return request(path="/inside", body=json.dumps({"prompt": prompt}).encode())


# What the server must answer: "4xx", or "4xx or closed" where the HTTP itself is broken.
KINDS = [
    (_wrong_argument, 40, "4xx"),
    (_unknown_argument, 3, "4xx"),
    (_not_an_object, 3, "4xx"),
    (_cut_json, 6, "4xx"),
    (_damaged_json, 8, "4xx"),
    (_random_bytes, 6, "4xx"),
    (_deep_json, 3, "4xx"),
    (_large_body, 1, "4xx"),
    (_wrong_path, 5, "4xx"),
    (_wrong_method, 4, "4xx"),
    (_wrong_host, 5, "4xx"),
    (_wrong_origin, 4, "4xx"),
    (_two_hosts, 2, "4xx"),
    (_wrong_inside, 4, "4xx"),
    (_wrong_http, 6, "4xx or closed"),
]


@contextlib.contextmanager
def serving(folder):
    """A server process; yields (process, port, what it writes for a valid request). Its messages go into folder/messages."""
    tokenizer = CharTokenizer("\nabcdefgh")
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8), seed=1)
    model.parameters().data += np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    npgpt.save(folder / "small.npz", model, tokenizer)
    settings = GenerateConfig(max_new_tokens=8, temperature=1.0, seed=1)
    expected = "".join(generate_text(model, tokenizer, "ab", settings))
    with (folder / "messages").open("w", encoding="utf-8") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "npgpt", "serve", "--ckpt", "small.npz", "--port", "0"],
            cwd=folder,
            stderr=messages,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            while not (found := re.search(r":(\d+)/ ", (folder / "messages").read_text(encoding="utf-8"))):
                assert process.poll() is None
            yield process, int(found[1]), expected
        finally:
            process.terminate()
            process.wait(timeout=60)


def answer(port, raw, half_close=False, timeout=20):
    """(the status that the server answers, all it sends); None if it closes the connection without a status.

    half_close: say that nothing more will come, as after a body that is shorter than it should be.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
        if half_close:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    return int(status[1]) if status else None, received


def memory_of(process):
    """The memory of a process in bytes; None where the system does not tell."""
    status = Path(f"/proc/{process.pid}/status")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else None


def hostile_requests(folder, n, seed=0):
    """R16: n requests that no client should send, and some clients that vanish or stall among them."""
    rng, tally, stalled = random.Random(seed), Tally(), []
    kinds, weights = [kind for kind, _, _ in KINDS], [weight for _, weight, _ in KINDS]
    wanted = {kind: status for kind, _, status in KINDS}
    valid = request(body=json.dumps(VALID).encode())
    with serving(folder) as (process, port, expected):

        def right():
            status, received = answer(port, valid)
            return status == 200 and json.dumps(expected).encode() in received

        for _ in range(3):
            assert right()
        before = memory_of(process)
        for i in range(n):
            kind = rng.choices(kinds, weights)[0]
            raw = kind(rng)
            status, _ = answer(port, raw, half_close=kind is _wrong_http)
            good = 400 <= status < 500 if status else wanted[kind] != "4xx"
            tally.check(good, f"request {i}, {kind.__name__}: {status} for {raw[-160:]!r}")
            if i % 20 == 0:  # a client that asks for a long text and goes away, and one that never sends its end
                body = json.dumps(VALID | {"max_tokens": 4000, "stream": bool(i % 40)}).encode()
                with socket.create_connection(("127.0.0.1", port)) as gone:
                    gone.sendall(request(body=body))
                stalled.append(socket.create_connection(("127.0.0.1", port)))
                stalled[-1].sendall(request(body=body)[:-1])
                if len(stalled) > 50:
                    stalled.pop(0).close()
            if i % 100 == 99:
                tally.check(right(), f"after request {i}: a valid request is not answered as before")
        for connection in stalled:
            connection.close()
        tally.check(process.poll() is None and right(), "the server has ended")
        after = memory_of(process)
        if before is not None:
            tally.check(after - before < MOST_GROWTH, f"memory grew from {before >> 20} to {after >> 20} MiB")
    messages = (folder / "messages").read_text(encoding="utf-8")
    tally.check("Traceback" not in messages, f"the server printed a traceback: {messages[-2000:]}")
    return tally
