"""The benchmarks still run: their times are never tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from npgpt.engine import backend

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("engine", ["npgpt", "gemm"])
def test_a_contender_answers(engine):
    """The process that `make bench` times does steps when it is asked to."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "contender.py", engine, "nano"]
    result = subprocess.run(command, input="2\n1\n", capture_output=True, encoding="utf-8", cwd=ROOT, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert [len(json.loads(line)["seconds"]) for line in result.stdout.splitlines()] == [2, 1]


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    from bench import training

    return training


def test_a_contender_that_dies_does_not_end_the_others(training):
    rows, failed = training("nano", ["gemm", "not an engine"], 1)
    assert list(rows) == ["gemm"]
    assert rows["gemm"]["steps"] >= 3
    assert list(failed) == ["not an engine"]
    assert "Error" in failed["not an engine"]


def test_a_contender_that_does_not_answer_is_stopped(training):
    rows, failed = training("nano", ["gemm"], 1, patience=0)
    assert (rows, failed) == ({}, {"gemm": "no answer after 0 s"})


def test_the_launches_of_a_step_on_a_gpu_are_counted(monkeypatch):
    """Each block adds a fixed number of launches, whatever its size."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    monkeypatch.setattr(backend, "_backends", backend._backends.copy())
    from launches import count_step
    from workloads import Workload

    counted = [count_step(Workload(n_layer, 2, 16, 8, 4, 0.1), bf16=False) for n_layer in (1, 2, 3)]
    launches = [sum(n for n, _ in rows.values()) for rows in counted]
    assert launches[2] - launches[1] == launches[1] - launches[0] == 33
    assert counted[0]["npgpt", "adamw"][0] == 1
    assert counted[0]["cuBLAS", "product, added to a gradient"][0] == 5
    assert counted[0]["npgpt", "attention_forward"][0] == 1


def test_a_step_in_bfloat16_rounds_all_weights_at_once(monkeypatch, bf16):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    monkeypatch.setattr(backend, "_backends", backend._backends.copy())
    from launches import count_step
    from workloads import Workload

    counted = [count_step(Workload(n_layer, 2, 16, 8, 4, 0.1), bf16=True) for n_layer in (1, 3)]
    assert counted[0]["CuPy", "astype"][0] == counted[1]["CuPy", "astype"][0] == 3  # the weights, x and its gradient
