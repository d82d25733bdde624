"""`npgpt gradcheck` as a user runs it."""

import re

from support.commands import npgpt_command

import npgpt
import npgpt.cli
from npgpt.engine.backend import CPU


def test_gradcheck(tmp_path):
    result = npgpt_command("gradcheck", "--n-layer", "1", "--n-embd", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "all gradients agree" in result.stdout
    assert len(result.stdout.splitlines()) == 2 + 17  # a row for each parameter of one block


def test_gradcheck_of_a_checkpoint(workshop):
    result = npgpt_command("gradcheck", "--ckpt", "model.npz", cwd=workshop)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "all gradients agree with finite differences to 1e-7"
    assert result.stderr == ""


def test_gradcheck_names_the_wrong_operation(capsys, monkeypatch):
    kernels = type(CPU.kernels)
    real = kernels.gelu_backward
    monkeypatch.setattr(kernels, "gelu_backward", lambda self, dy, saved: real(self, dy, saved) * 1.001)
    assert npgpt.cli.main(["gradcheck", "--n-layer", "1"]) == 1
    out, err = capsys.readouterr()
    assert "all gradients agree" not in out
    assert re.match(r"npgpt gradcheck: GPT: gradient of \S+ .*the first wrong operation on the way back: gelu\n", err)
