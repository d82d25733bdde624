"""The scripts in bin/ and what `import npgpt` needs."""

import os
import subprocess
import sys

import pytest
from support.commands import ROOT


@pytest.mark.skipif(os.name != "posix", reason="bin/ holds POSIX shell scripts")
def test_bin_scripts(trained, tmp_path):
    python = tmp_path / "python3"  # without a .venv, the scripts take python3 from PATH
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("train", "generate", "evaluate", "gradcheck", "inspect", "report", "inside", "serve"):
        script = ROOT / "bin" / name
        result = subprocess.run([script, "--help"], env=environment, capture_output=True, encoding="utf-8", check=False)
        assert result.returncode == 0, result.stderr
        assert f"bin/{name}" in result.stdout
    linked = tmp_path / "write"
    linked.symlink_to(ROOT / "bin" / "generate")
    result = subprocess.run(
        [linked, "--ckpt", "model.npz", "--prompt", "a  b", "--max-new-tokens", "0"],
        cwd=trained.parent,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.stdout == "a  b\n", result.stderr


def test_import_needs_neither_cupy_nor_torch():
    """The package can be imported and used when cupy and torch cannot be imported."""
    program = (
        "import sys; sys.modules['cupy'] = sys.modules['torch'] = None\n"
        "import npgpt\n"
        "assert npgpt.Tensor([1.0]).backend.name in ('cpu', 'cuda')\n"
        "assert 'tqdm' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "npgpt.Tensor([1.0], requires_grad=True).sum().backward()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr


def test_extras_are_imported_where_they_are_used():
    """Not by `import npgpt`, and not by the command line before a command needs them."""
    extras = {
        "tokenizers",
        "gguf",
        "cupy",
        "zstandard",
        "matplotlib",
        "starlette",
        "uvicorn",
        "prometheus_client",
        "tensorboardX",
    }
    code = f"import npgpt, npgpt.cli, sys; print(sorted({extras} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    assert result.stdout == "[]\n"
