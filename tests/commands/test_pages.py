"""`report` and `inside` as commands: the page is written, in time and small; missing extras are one line."""

import re
import subprocess
import sys

import pytest
from support.commands import ROOT, npgpt_command

import npgpt.cli


def test_report(workshop):
    result = npgpt_command("report", "model.npz", cwd=workshop)
    assert (result.returncode, result.stdout) == (0, "")
    assert re.fullmatch(r"report.html: \d+ kB; open it in a browser\n", result.stderr)
    page = (workshop / "report.html").read_text(encoding="utf-8")
    assert "the training text" in page
    assert "text.txt, 6,000 characters" in page
    (workshop / "other.npz").write_bytes((workshop / "model.npz").read_bytes())
    assert npgpt_command("report", "model.npz", "other.npz", "--out", "both.html", cwd=workshop).returncode == 0
    assert "There is no log beside other.npz" in (workshop / "both.html").read_text(encoding="utf-8")


def test_inside(workshop):
    for flags in (["--prompt", "the\\nbell"], ["--prompt-file", "text.txt"], []):
        result = npgpt_command("inside", "model.npz", *flags, cwd=workshop)
        assert (result.returncode, result.stdout) == (0, "")
        assert "Inside model.npz" in (workshop / "inside.html").read_text(encoding="utf-8")
    assert npgpt_command("inside", "model.npz", "--prompt", "the 5€", "--unknown", "skip", cwd=workshop).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["report", "model.npz"], "matplotlib", "plot"),
        (["serve", "--ckpt", "model.npz", "--port", "0"], "uvicorn", "serve"),
        (["train", "text.txt", "--watch", "0"], "matplotlib", "plot"),
        (["train", "text.txt", "--watch", "0"], "starlette", "serve"),
        (["train", "text.txt", "--tensorboard", "tb"], "tensorboardX", "tensorboard"),
    ],
)
def test_a_missing_extra_is_one_line(workshop, arguments, package, extra, tmp_path):
    """In a process that cannot find the package."""
    program = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *more: None if name == {package!r} else find(name, *more)\n"
        f"sys.modules[{package!r}] = None\n"
        "import npgpt.cli; sys.exit(npgpt.cli.main(sys.argv[1:]))"
    )
    before = sorted(path.name for path in workshop.iterdir())
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=workshop,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert package in result.stderr
    assert f"pip install 'npgpt[{extra}]'" in result.stderr
    assert sorted(path.name for path in workshop.iterdir()) == before


def test_a_full_disk_leaves_the_old_page(workshop, monkeypatch, capsys):
    from npgpt.storage import files

    monkeypatch.chdir(workshop)
    assert npgpt.cli.main(["inside", "model.npz", "--prompt", "the"]) == 0
    before = (workshop / "inside.html").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full)
    assert npgpt.cli.main(["inside", "model.npz", "--prompt", "bell"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (workshop / "inside.html").read_bytes() == before
    assert not list(workshop.glob(".inside*"))
