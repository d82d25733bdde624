"""The benchmarks still run: their times are never tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("engine", ["npgpt", "gemm"])
def test_a_contender_answers(engine):
    """The process that `make bench` times does steps when it is asked to."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "contender.py", engine, "nano"]
    result = subprocess.run(command, input="2\n1\n", capture_output=True, encoding="utf-8", cwd=ROOT, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert [len(json.loads(line)["seconds"]) for line in result.stdout.splitlines()] == [2, 1]
