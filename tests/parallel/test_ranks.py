"""Several processes that train together: their operations, the losses of 1, 2 and 4 ranks, bytes, faults."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from studies import rank_faults, reliability
from support import ranks

import npgpt
from npgpt import RequestError
from npgpt.cli import main
from npgpt.parallel.nccl import NcclSum
from npgpt.parallel.ranks import LAUNCHERS, ONE_RANK, SIZES, open_ranks

LATE = """
import os, time
from npgpt.parallel.ranks import MpiRanks
with MpiRanks(1) as ranks:
    time.sleep({0: 30, 1: 2.5, 2: 0}[ranks.rank])
    ranks.gather(1)
"""
DIFFERENT = """
from npgpt.parallel.ranks import MpiRanks
ranks = MpiRanks()
try:
    ranks.together(lambda: 1) if ranks.rank == 1 else ranks.gather(2)
except Exception as error:
    print(type(error).__name__ + "\\n", end="", flush=True)
"""
with_mpi = pytest.mark.skipif(ranks.MISSING is not None, reason=str(ranks.MISSING))
FLAGS = f"{reliability.TINY_FLAGS} --batch-size 8 --micro-batch 1 --threads 1 --log-interval 1 --eval-interval 6"
TINY = FLAGS.split()
CONSTANT = ("--schedule", "constant", "--warmup-steps", "2")
CHANGING = """
import os, sys
from npgpt.cli import main
rank, args = os.environ["PMI_RANK"], sys.argv[2:]
{change}
sys.exit(main(args))
"""  # a program whose ranks have different arguments


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(reliability.TEXT, encoding="utf-8")
    return path


def losses(out):
    log = [json.loads(line) for line in out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([event["loss"] for event in log if event["event"] == "step"])


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    for name in (*LAUNCHERS, *SIZES):
        monkeypatch.delenv(name, raising=False)
    assert open_ranks() is ONE_RANK
    monkeypatch.setenv("PMI_RANK", "0")
    assert open_ranks("none") is ONE_RANK
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        RequestError, match=r"PMI_RANK=0.*install it with: .* -m pip install 'npgpt\[mpi\]', or use --ranks none"
    ):
        open_ranks()
    monkeypatch.setenv("PMI_SIZE", "1")
    assert open_ranks() is ONE_RANK
    monkeypatch.setenv("PMI_SIZE", "2")
    world = SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1)))
    monkeypatch.setitem(sys.modules, "mpi4py", world)
    with pytest.raises(RequestError, match="mpi4py uses another MPI than the launcher, which has started 2"):
        open_ranks()
    array = np.ones(3)
    with ONE_RANK as one:
        one.add_up(array)
        assert (one.size, one.rank, one.gather(5), one.broadcast(6), one.on_first(lambda: 7)) == (1, 0, [5], 6, 7)
    assert array.sum() == 3


@with_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_operations(tmp_path, n):
    status, out, err = ranks.run(n, tmp_path, "operations")
    assert status == 0, err
    assert out == f"all operations of {n} ranks\n"


@with_mpi
def test_any_number_of_ranks_trains_alike(tmp_path, text):
    """Batches and masks are the same. The losses differ by rounding; an equal number of ranks gives equal bytes."""
    found = {}
    for name, n in [("1", 1), ("2", 2), ("2 again", 2), ("4", 4)]:
        out = tmp_path / name / "model.npz"
        out.parent.mkdir()
        status, _, err = ranks.run(n, tmp_path, "train", text, "--out", out, "--steps", 12, *TINY)
        assert status == 0, err
        found[name] = out
    for name in ("2", "4"):
        np.testing.assert_allclose(losses(found[name]), losses(found["1"]), rtol=1e-5)
    for name in ("model.npz", "model.last.npz"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "2 again" / name).read_bytes()
    assert npgpt.load(found["4"]).machine["ranks"] == "4"


@with_mpi
def test_a_rank_without_work(tmp_path, text):
    """Three ranks share two micro-batches."""
    flags = ("--steps", 6, *TINY, "--micro-batch", 4, *CONSTANT, "--lr", "0.01")
    assert main(["train", str(text), "--out", str(tmp_path / "one.npz"), *map(str, flags)]) == 0
    status, _, err = ranks.run(3, tmp_path, "train", text, "--out", tmp_path / "three.npz", *flags)
    assert status == 0, err
    assert "3 ranks on " in err
    assert "only 2 have work, because a batch has 2 micro-batches (--micro-batch)" in err
    np.testing.assert_allclose(losses(tmp_path / "three.npz"), losses(tmp_path / "one.npz"), rtol=1e-5)


class _Nccl:
    """Records what NCCL is asked for."""

    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16, NCCL_SUM = 7, 8, 9, 0

    def __init__(self):
        self.calls = []

    def get_unique_id(self):
        return (1, 2, 3)

    def NcclCommunicator(self, size, unique_id, rank):  # noqa: N802 (CuPy's name)
        self.calls.append((size, unique_id, rank))
        return SimpleNamespace(allReduce=lambda *arguments: self.calls.append(arguments))


@pytest.mark.parametrize(("dtype", "number"), [("float32", 7), ("float64", 8), ("bfloat16", 9)])
def test_sums_of_gpus(dtype, number):
    """The calls of NCCL: in place, with the number of elements, their type, and the current stream."""
    nccl = _Nccl()
    cupy = SimpleNamespace(cuda=SimpleNamespace(nccl=nccl, get_current_stream=lambda: SimpleNamespace(ptr=77)))
    array = SimpleNamespace(dtype=SimpleNamespace(name=dtype), data=SimpleNamespace(ptr=4096), size=10)
    NcclSum(cupy, NcclSum.unique_id(cupy), 4, 3).add_up(array)
    assert nccl.calls == [(4, (1, 2, 3), 3), (4096, 4096, 10, number, _Nccl.NCCL_SUM, 77)]


@with_mpi
def test_a_run_continues_with_other_numbers_of_ranks(tmp_path, text):
    """2, 4 and 1 ranks, one after the other, and a straight run with 1; `--resume auto` starts and continues."""
    out, straight = tmp_path / "model.npz", tmp_path / "straight.npz"
    assert main(["train", str(text), "--out", str(straight), "--steps", "12", *TINY, *CONSTANT]) == 0
    for n, steps in [(2, 4), (4, 8), (1, 12)]:
        flags = ("--out", out, "--steps", steps, "--resume", "auto", *TINY, *CONSTANT)
        status, _, err = ranks.run(n, tmp_path, "train", text, *flags)
        assert status == 0, err
        assert ("the numbers will differ slightly" in err) == (n != 2)
    np.testing.assert_allclose(losses(out), losses(straight), rtol=1e-5)


@with_mpi
def test_a_resumed_run_with_ranks_writes_the_same_bytes(tmp_path, text):
    for folder in ("straight", "split"):
        (tmp_path / folder).mkdir()
    flags = ("--out", "model.npz", "--resume", "auto", *TINY, *CONSTANT)
    for folder, steps in [("split", 7), ("split", 13), ("straight", 13)]:
        status, _, err = ranks.run(2, tmp_path, "train", text, *flags, "--steps", steps, cwd=tmp_path / folder)
        assert status == 0, err
    split, straight = (
        npgpt.load(tmp_path / folder / "model.last.npz", with_optimizer=True) for folder in ("split", "straight")
    )
    np.testing.assert_array_equal(split.model.flat.data, straight.model.flat.data)
    for name, state in straight.optimizer_state.items():
        np.testing.assert_array_equal(split.optimizer_state[name], state)
    status, _, err = ranks.run(2, tmp_path, "train", text, *flags, "--steps", 13, cwd=tmp_path / "split")
    assert status == 0
    assert "nothing to do: the run is at step 13 already" in err


@pytest.fixture
def changing(tmp_path):
    """Makes a program whose ranks change their arguments, `args`."""

    def make(change):
        program = tmp_path / "program.py"
        program.write_text(CHANGING.format(change=change), encoding="utf-8")
        return program

    return make


@with_mpi
@pytest.mark.parametrize(
    ("name", "change"),
    [("text", "args[1] = ['text.txt', 'other.txt'][int(rank)]"), ("--seed", "args += ['--seed', '1' + rank]")],
)
def test_ranks_with_other_files_or_flags_are_refused(tmp_path, text, changing, name, change):
    """Before the first step, in one line, and no file is written."""
    (tmp_path / "other.txt").write_text(reliability.TEXT[::-1], encoding="utf-8")
    command = ("train", "text.txt", "--out", "model.npz", "--steps", 12, *TINY)
    status, _, err = ranks.run(2, tmp_path, *command, cwd=tmp_path, program=changing(change))
    assert status == 2
    assert f"rank 1 has another {name} than rank 0; all ranks need the same files, flags and kind of processor" in err
    assert err.count("npgpt train:") == 1
    assert not (tmp_path / "model.last.npz").exists()


@with_mpi
def test_the_first_rank_can_read_the_text_for_all(tmp_path, text, changing):
    program = changing("args[1] = ['text.txt', 'nowhere.txt'][int(rank)]")
    command = ("train", "text.txt", "--out", "model.npz", "--steps", 2, *TINY)
    status, _, err = ranks.run(2, tmp_path, *command, cwd=tmp_path, program=program)
    assert status != 0
    assert "npgpt train: rank 1 on " in err
    assert "nowhere.txt" in err
    status, _, err = ranks.run(2, tmp_path, *command, "--text-from-rank-0", cwd=tmp_path, program=program)
    assert status == 0, err


@with_mpi
@pytest.mark.parametrize(
    ("rank", "error", "shown"),
    [
        (1, "ZeroDivisionError('boom')", "npgpt: rank 1 on .*: ZeroDivisionError: boom"),
        (1, "MemoryError()", "npgpt: out of memory: this run needs roughly"),
        (0, "OSError(28, 'No space left on device', 'model.jsonl')", "npgpt: .*No space left on device"),
    ],
)
def test_an_error_in_the_middle_of_one_rank_ends_all(tmp_path, text, changing, rank, error, shown):
    """At once, and not when --rank-timeout is over."""
    program = changing(
        f"from npgpt.training.optim import Update\ndef fail(*_): raise {error}\nif rank == '{rank}': Update.step = fail"
    )
    command = ("train", "text.txt", "--out", "model.npz", "--steps", 100, *TINY)
    status, _, err = ranks.run(2, tmp_path, *command, cwd=tmp_path, program=program)
    assert status != 0
    assert len(re.findall(shown, err)) == 1, err


@with_mpi
def test_the_missing_one_of_three_ranks_is_named(tmp_path):
    """The others do not begin to wait at the same time."""
    program = tmp_path / "program.py"
    program.write_text(LATE, encoding="utf-8")
    status, _, err = ranks.run(3, tmp_path, program=program)
    assert status != 0
    assert len(re.findall(r"npgpt: no answer from rank 0 on \S+ for 1 seconds", err)) == 1, err
    assert err.count("npgpt:") == 1


@with_mpi
def test_ranks_that_do_different_things_are_told_so(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(DIFFERENT, encoding="utf-8")
    status, out, err = ranks.run(3, tmp_path, program=program)
    assert (status, sorted(out.split())) == (0, ["OtherRankError", "OtherRankError", "RequestError"]), err


@with_mpi
@pytest.mark.parametrize("wrong", [("train", "--wrong"), ("train", "text.txt", "--out", "nowhere/model.npz")])
def test_a_wrong_command_line_is_reported_once(tmp_path, text, wrong):
    status, _, err = ranks.run(2, tmp_path, *wrong, cwd=tmp_path)
    assert status == 2
    assert sum(line.startswith("npgpt") for line in err.splitlines()) == 1, err


@with_mpi
def test_faults_of_ranks(tmp_path):
    assert reliability.sound(rank_faults.faults(tmp_path, 6)).tried == 6  # R17


@with_mpi
def test_a_number_that_is_not_finite_stops_all_ranks(tmp_path, text):
    flags = ("--out", tmp_path / "model.npz", "--steps", 50, *TINY, "--lr", "1e30", "--warmup-steps", 0)
    status, _, err = ranks.run(2, tmp_path, "train", text, *flags)
    assert status == 1
    assert "not finite" in err
    assert (tmp_path / "model.crash.npz").exists()
