"""The texts in data/: the properties of tiny.txt, and the download of tiny Shakespeare by fetch.py."""

import collections
import hashlib
import http.server
import importlib.util
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_tiny_is_a_long_play_without_repetition(text):
    assert len(text) >= 80_000
    lines = [line for line in text.split("\n") if len(line) > 20]
    repeated = sum(n for n in collections.Counter(lines).values() if n > 1)
    assert repeated < 0.02 * len(lines)
    assert text.isascii()
    assert sum(line.endswith(":") and line[:-1].isupper() for line in text.split("\n")) > 500  # speaker names
    assert text.count("[") == text.count("]") > 100  # stage directions


# ---------------------------------------------------------------- the download


@pytest.fixture
def fetch():
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "data" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch


CONTENT = b"What is the city but the people? " * 5000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, from the offset in the request. The server's `breaks_after` is the number of bytes it sends at most."""

    def do_GET(self):
        offset = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.offsets.append(offset)
        body = CONTENT[offset:]
        self.send_response(206 if offset else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.offsets, server.breaks_after = [], None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def arguments(server, folder, content=CONTENT):
    return {
        "url": f"http://127.0.0.1:{server.server_port}/input.txt",
        "target": folder / "text.txt",
        "size": len(CONTENT),
        "digest": hashlib.sha256(content).hexdigest(),
    }


def test_a_file_is_fetched_once(fetch, server, tmp_path):
    assert "as expected" in fetch(**arguments(server, tmp_path))
    assert (tmp_path / "text.txt").read_bytes() == CONTENT
    assert "already there" in fetch(**arguments(server, tmp_path))
    assert server.offsets == [0]
    assert len(list(tmp_path.iterdir())) == 1


def test_fetch_continues_where_it_stopped(fetch, server, tmp_path):
    server.breaks_after = 70_000
    with pytest.raises(SystemExit, match=r"stopped at 70,000|70,000 bytes are kept"):
        fetch(**arguments(server, tmp_path))
    assert not (tmp_path / "text.txt").exists()
    server.breaks_after = None
    fetch(**arguments(server, tmp_path))
    assert server.offsets == [0, 70_000]
    assert (tmp_path / "text.txt").read_bytes() == CONTENT


def test_fetch_refuses_another_file(fetch, server, tmp_path):
    with pytest.raises(SystemExit, match="wrong SHA-256"):
        fetch(**arguments(server, tmp_path, content=b"another"))
    assert list(tmp_path.iterdir()) == []


def test_fetch_offline_is_one_clear_line(fetch, tmp_path):
    with pytest.raises(SystemExit, match=r"could not fetch .*check the network"):
        fetch(url="http://127.0.0.1:9/input.txt", target=tmp_path / "text.txt")
