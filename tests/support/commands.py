"""Run `npgpt` as a process, with settings that train in about a second."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SMALL_MODEL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]
QUICK = [*SMALL_MODEL, "--batch-size", "4", "--steps", "6", "--eval-interval", "3", "--sample-tokens", "20"]


def npgpt_command(*arguments, cwd, timeout=60, stdin=None):
    """Run `python -m npgpt ...`; returns the finished process, whose output is text."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-m", "npgpt", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        check=False,
    )
