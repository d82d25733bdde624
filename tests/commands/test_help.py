"""Help, version and streams of all commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import QUICK, ROOT, npgpt_command

import npgpt
import npgpt.cli


@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "gradcheck", "inspect", "report", "inside", "serve"])
def test_help(name, tmp_path):
    result = npgpt_command(name, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert f"examples:\n  python -m npgpt {name} " in result.stdout


def test_help_and_version_of_npgpt(tmp_path):
    assert "npgpt train" in npgpt_command("--help", cwd=tmp_path).stdout
    version = npgpt_command("--version", cwd=tmp_path).stdout
    assert npgpt.__version__ in version
    assert "BLAS" in version or "kernels" in version
    nothing = npgpt_command(cwd=tmp_path)
    assert (nothing.returncode, nothing.stdout, len(nothing.stderr.splitlines())) == (2, "", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX streams")
def test_closed_streams_and_full_devices(workshop):
    def run(command):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PY": sys.executable}
        done = subprocess.run(
            command, shell=True, cwd=workshop, env=environment, capture_output=True, encoding="utf-8", check=False
        )
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done.returncode

    generate = '"$PY" -m npgpt generate --ckpt model.npz --max-new-tokens 3'
    assert run(f"{generate} >&-") == 0
    assert run(f"{generate} 2>&-") == 0
    train = f'"$PY" -m npgpt train text.txt --out closed.npz {" ".join(QUICK)}'
    assert run(f"{train} 2>&-") == 0
    if Path("/dev/full").exists():
        assert run(f"{generate} >/dev/full") == 1
        assert run('"$PY" -m npgpt --help >/dev/full') == 1
        assert run(f"{train} 2>/dev/full") == 0
