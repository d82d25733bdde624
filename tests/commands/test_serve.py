"""`serve` as a process: its address, the key, signals, a port that is taken."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from support.commands import ROOT, npgpt_command


@contextlib.contextmanager
def serving(workshop, *flags, **environment):
    """A server process; yields (process, its address)."""
    with subprocess.Popen(
        [sys.executable, "-m", "npgpt", "serve", "--ckpt", "model.npz", "--port", "0", *flags],
        cwd=workshop,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            line = process.stderr.readline()
            address = re.search(r"http://\S+:\d+/", line)
            assert address, line + process.stderr.read()
            yield process, address[0]
        finally:
            process.kill()


def ask(address, path="v1/completions", body=None, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=30) as response:
        return json.load(response)


def test_a_text_is_what_generate_writes(workshop):
    with serving(workshop) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        found = ask(address, body={"prompt": "the", "max_tokens": 40, "seed": 3, "temperature": 0.8})
        assert found["model"] == "model"
        process.terminate()
        assert process.wait(timeout=30) in (-signal.SIGTERM, 143, 1)
        assert "Traceback" not in process.stderr.read()
    result = npgpt_command(
        "generate", "--ckpt", "model.npz", "--prompt", "the", "--max-new-tokens", "40", "--seed", "3", cwd=workshop
    )
    assert "the" + found["choices"][0]["text"] + "\n" == result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_requests_under_way_finish_after_sigterm(workshop):
    with serving(workshop) as (process, address):
        port = int(address.rsplit(":", 1)[1].strip("/"))
        body = json.dumps({"prompt": "the", "max_tokens": 1500, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            received = connection.recv(1000)
            process.send_signal(signal.SIGTERM)
            wait_until_refused(port)
            while part := connection.recv(65536):
                received += part
        assert b'"finish_reason":"length"' in received
        assert b"data: [DONE]" in received
        assert process.wait(timeout=30) == -signal.SIGTERM
        stopping = "stopping; requests have 10 s to finish; press Ctrl-C again to stop at once"
        assert process.stderr.read().split("\n") == ["", stopping, ""]


def wait_until_refused(port):
    """Wait until nobody new is let in."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionError:
            return
        time.sleep(0.02)
    raise AssertionError("new connections were still accepted")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_it(workshop):
    with serving(workshop) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in process.stderr.read()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_second_ctrl_c_ends_it_at_once(workshop):
    with serving(workshop) as (process, address):
        port = int(address.rsplit(":", 1)[1].strip("/"))
        body = json.dumps({"max_tokens": 4096, "n": 16, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.recv(1000)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert process.stderr.readline().startswith("stopping; ")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=5) == 130
        assert process.stderr.read() == ""


def test_the_key_may_come_from_the_environment(workshop):
    with serving(workshop, "--host", "0.0.0.0", NPGPT_API_KEY="secret") as (_, address):
        local = re.sub(r"//[^:]+:", "//127.0.0.1:", address)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(local, "v1/models")
        assert ask(local, "v1/models", key="secret")["data"][0]["id"] == "model"


def test_an_address_for_others_is_printed_and_allowed(workshop):
    with serving(workshop, "--host", "0.0.0.0", "--no-api-key") as (_, address):
        assert "0.0.0.0" not in address
        assert ask(address, "v1/models")["data"]


def test_another_name_must_be_allowed(workshop):
    for flags, status in (([], 403), (["--allow-host", "my.example"], 200)):
        with serving(workshop, *flags) as (_, address):
            request = urllib.request.Request(address + "health", headers={"Host": "my.example"})
            with contextlib.closing(answer_to(request)) as answer:
                assert answer.status == status


def answer_to(request):
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        return error


def test_a_port_that_is_taken_is_one_line(workshop):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments in (["serve", "--ckpt", "model.npz", "--port", port], ["train", "text.txt", "--watch", port]):
            result = npgpt_command(*arguments, cwd=workshop)
            assert result.returncode == 2
            assert re.fullmatch(
                rf"npgpt \w+: cannot listen on port {port} \(.*\); choose another with --(port|watch) N\n", result.stderr
            )
