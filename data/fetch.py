"""Fetch tiny Shakespeare into this folder. Needs a network and only Python's standard library.

The file has a temporary name until it is complete and its checksum is right. An interrupted download continues where it
stopped.
"""

import hashlib
import sys
import urllib.error
import urllib.request
from pathlib import Path

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TARGET = Path(__file__).parent / "tinyshakespeare.txt"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(url: str = URL, target: Path = TARGET, size: int = SIZE, digest: str = SHA256) -> str:
    """Download and verify `target`, unless it is there already. Returns a line that says what was done.

    Raises SystemExit with a line that says what is wrong and what to do.
    """
    if target.exists() and sha256(target) == digest:
        return f"{target} is already there, with the right checksum"
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have >= size:  # complete but never verified, or another file
        part.unlink()
        have = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            resumed = response.status == 206
            with part.open("ab" if resumed else "wb") as file:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
    except OSError as error:  # urllib.error.URLError is one
        reason = getattr(error, "reason", error)
        kept = f" ({part.stat().st_size:,} bytes are kept for the next try)" if part.exists() else ""
        sys.exit(f"could not fetch {url}: {reason}{kept}; check the network, or put the file at {target} yourself")
    found = part.stat().st_size
    if found < size:
        sys.exit(f"the download stopped at {found:,} of {size:,} bytes; run the same command again to continue")
    if sha256(part) != digest:
        part.unlink()
        sys.exit(f"the file from {url} is not the expected one (wrong SHA-256), so it was deleted; try again later")
    part.replace(target)
    return f"{target}: {size:,} bytes, SHA-256 as expected"


if __name__ == "__main__":
    print(fetch())
