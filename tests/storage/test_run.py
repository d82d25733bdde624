"""The files of a training run: who owns them, what is set aside, the log."""

import json
import os

import pytest
from studies import reliability

import npgpt
from npgpt import GPT, Checkpoint, RequestError
from npgpt.storage.header import Progress
from npgpt.storage.run import RunFiles, log_path, read_log


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path / "model.npz")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def checkpoint(step, evaluated=False):
    progress = Progress(step, history=[[1, 3.0, 3.0, None]] if evaluated else [])
    return Checkpoint(GPT(reliability.TINY, seed=step), reliability.tokenizer(), progress=progress)


def event(name, step):
    return {"event": name, "step": step}


# ---------------------------------------------------------------- paths


def test_the_names_of_the_files(tmp_path):
    files = RunFiles(tmp_path / "a.model.npz")
    found = [path.name for path in files.paths()]
    assert found == ["a.model.npz", "a.model.last.npz", "a.model.jsonl", "a.model.crash.npz"]
    assert files.previous_paths()[0].name == "a.model.previous.npz"
    assert files.log == log_path(files.best)
    with pytest.raises(RequestError, match=r"out must end in \.npz, got .*model\.txt"):
        RunFiles(tmp_path / "model.txt")


# ---------------------------------------------------------------- ownership


def test_claiming_sets_the_files_of_an_earlier_run_aside(files, tmp_path):
    for path in files.paths():
        path.write_text(path.name, encoding="utf-8")
    assert files.claim() is False
    aside = ["model.previous.crash.npz", "model.previous.jsonl", "model.previous.last.npz", "model.previous.npz"]
    assert names(tmp_path) == aside
    assert (tmp_path / "model.previous.last.npz").read_text(encoding="utf-8") == "model.last.npz"


def test_claiming_twice_sets_nothing_aside(files, tmp_path):
    files.claim()
    files.save(checkpoint(3), is_best=True)
    assert files.claim() is True
    assert names(tmp_path) == ["model.last.npz", "model.npz"]


def test_claiming_before_anything_is_saved_sets_nothing_aside(files, tmp_path):
    files.claim()
    files.append_to_log(event("start", 0))
    assert files.claim() is True
    assert names(tmp_path) == ["model.jsonl"]


def test_only_one_earlier_run_is_kept(files, tmp_path):
    files.best.write_text("first", encoding="utf-8")
    files.claim()
    files.best.write_text("second", encoding="utf-8")
    RunFiles(files.best).claim()
    assert names(tmp_path) == ["model.previous.npz"]
    assert files.previous_paths()[0].read_text(encoding="utf-8") == "second"


def test_the_files_set_aside_are_of_one_run(files, tmp_path):
    """A crash file of the run before the last one does not stay beside the files of the last one."""
    for path in files.paths():
        path.write_text("first", encoding="utf-8")
    files.claim()
    files.best.write_text("second", encoding="utf-8")
    RunFiles(files.best).claim()
    assert names(tmp_path) == ["model.previous.npz"]


def test_nothing_to_set_aside_leaves_the_earlier_files(files, tmp_path):
    files.best.write_text("first", encoding="utf-8")
    files.claim()
    RunFiles(files.best).claim()
    assert names(tmp_path) == ["model.previous.npz"]


def test_adopted_files_are_kept(files, tmp_path):
    files.save(checkpoint(3), is_best=True)
    resumed = RunFiles(files.best)
    resumed.adopt(3)
    assert resumed.claim() is True
    assert names(tmp_path) == ["model.last.npz", "model.npz"]


def test_adopted_files_without_a_best_checkpoint(files, tmp_path):
    files.save(checkpoint(3), is_best=True)
    files.best.unlink()
    resumed = RunFiles(files.best)
    resumed.adopt(3)
    assert resumed.claim() is False
    assert names(tmp_path) == ["model.last.npz"]


def test_disowned_files_are_set_aside(files, tmp_path):
    files.save(checkpoint(3), is_best=True)
    files.adopt(3)
    files.disown()
    assert files.claim() is False
    assert names(tmp_path) == ["model.previous.last.npz", "model.previous.npz"]


def test_a_state_that_another_run_changed_is_refused(files, tmp_path):
    files.save(checkpoint(3), is_best=True)
    stale = RunFiles(files.best)
    stale.adopt(3)
    files.save(checkpoint(5), is_best=False)
    with pytest.raises(RequestError, match=r"another run has continued from .*model\.last\.npz in the meantime"):
        stale.claim()
    assert names(tmp_path) == ["model.last.npz", "model.npz"]


def test_a_state_that_was_removed_begins_new_files(files, tmp_path):
    files.save(checkpoint(3), is_best=True)
    resumed = RunFiles(files.best)
    resumed.adopt(3)
    files.last.unlink()
    assert resumed.claim() is False
    assert names(tmp_path) == ["model.previous.npz"]


def test_claiming_removes_what_a_killed_process_left(files, tmp_path):
    (tmp_path / ".model.last.npz.123.tmp").write_bytes(b"half")
    (tmp_path / ".other.npz.123.tmp").write_bytes(b"of another run")
    files.claim()
    assert names(tmp_path) == [".other.npz.123.tmp"]


def test_the_lock_keeps_other_runs_away(files, tmp_path):
    with files.locked():
        with (
            pytest.raises(RequestError, match=rf"model\.npz is in use by another run \(process {os.getpid()}\)"),
            RunFiles(files.best).locked(),
        ):
            pass
        with RunFiles(tmp_path / "other.npz").locked():
            pass
    with RunFiles(files.best).locked():
        pass
    assert names(tmp_path) == []


# ---------------------------------------------------------------- saving


def test_before_the_first_evaluation_the_newest_model_is_kept(files):
    for step in (1, 2):
        files.save(checkpoint(step), is_best=False)
        assert npgpt.load(files.best).step == step


def test_the_best_checkpoint_changes_only_when_it_is_better(files):
    files.save(checkpoint(1), is_best=False)  # there is no best yet
    assert npgpt.load(files.best).step == npgpt.load(files.last).step == 1
    files.save(checkpoint(2, evaluated=True), is_best=False)
    assert (npgpt.load(files.best).step, npgpt.load(files.last).step) == (1, 2)
    files.save(checkpoint(3, evaluated=True), is_best=True)
    assert files.best.read_bytes() == files.last.read_bytes()
    assert files.saved_step == 3


# ---------------------------------------------------------------- the log


def test_a_start_begins_a_new_log(files):
    for line in (event("start", 0), event("step", 1), event("start", 0), event("step", 2)):
        files.append_to_log(line)
    assert read_log(files.log) == [event("start", 0), event("step", 2)]


def test_any_text_is_one_line_of_the_log(files):
    sample = "a\nb\r\u2028\u0085 é €"
    files.append_to_log(event("start", 0) | {"sample": sample})
    assert files.log.read_bytes().count(b"\n") == 1
    assert json.loads(files.log.read_text(encoding="utf-8"))["sample"] == sample
    assert read_log(files.log)[0]["sample"] == sample


def test_cutting_a_log_keeps_what_came_before(files, tmp_path):
    for line in (event("start", 0), event("step", 1), event("step", 2), event("evaluation", 2), event("step", 3)):
        files.append_to_log(line)
    with files.log.open("ab") as log:
        log.write(b'{"event": "st')
    files.cut_log(2)
    assert files.log.read_bytes().endswith(b"\n")
    assert read_log(files.log) == [event("start", 0), event("step", 1), event("step", 2), event("evaluation", 2)]
    assert names(tmp_path) == ["model.jsonl"]


def test_there_may_be_no_log(files, tmp_path):
    assert read_log(files.log) == []
    files.cut_log(5)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "step", "step": 3',
        b"",
        b"[1, 2]",
        b"5",
        b'{"step": 3}',
        b'{"event": "step"}',
        b'{"event": 1, "step": 3}',
        b"\xff",
    ],
)
def test_incomplete_lines_of_a_log_are_left_out(files, line):
    good = json.dumps(event("step", 1)).encode()
    files.log.write_bytes(good + b"\n" + line + b"\n" + good + b"\n" + line)
    assert read_log(files.log) == [event("step", 1)] * 2
