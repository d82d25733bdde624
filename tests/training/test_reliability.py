"""Runs that are killed, interrupted or resumed, or find a number that is not finite.

Comments such as R1 name rows of the table in docs/reliability.md.
"""

import json
import signal
import sys

import pytest
from studies import reliability

import npgpt
from npgpt import RequestError
from npgpt.parallel import machine
from npgpt.storage.run import RunFiles, read_log

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.mark.parametrize("flags", [(), reliability.MUON], ids=["adamw", "muon"])
def test_killed_runs_continue_from_the_last_save(tmp_path, flags):
    reliability.sound(reliability.kills(tmp_path, 16, flags))  # R1
    assert npgpt.load(tmp_path / "model.last.npz").train_config.optimizer == ("muon" if flags else "adamw")


@posix_only
def test_a_signal_saves_the_state_even_if_stderr_is_closed(tmp_path):
    process = reliability.start_training(tmp_path)
    for _ in range(5):
        process.stderr.readline()
    process.stderr.close()  # `tee` ends this way if it gets the signal too
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert npgpt.load(tmp_path / "model.last.npz", with_optimizer=True).step > 0


@posix_only
def test_signals_end_a_run_in_good_order(tmp_path):
    reliability.sound(reliability.signals(tmp_path, 20))  # R8


def test_a_resumed_run_writes_the_same_bytes(tmp_path):
    reliability.sound(reliability.resumptions(tmp_path, 20, range(1, 20, 2)))  # R7


def test_a_resumed_run_that_gets_worse_writes_the_same_bytes(tmp_path):
    reliability.sound(reliability.resumptions(tmp_path, 20, [8, 10, 15], lr=0.5))  # R7


def test_an_interrupted_run_goes_on_in_the_same_process(tmp_path):
    reliability.sound(reliability.interruptions(tmp_path, 24))  # R10


def test_a_run_that_nobody_iterates_over_says_so():
    with pytest.warns(RuntimeWarning, match="nothing was trained; write: for event in trainer.run"):
        reliability.trainer().run()
    reliability.trainer().run().close()


def test_numbers_that_are_not_finite_stop_a_run(tmp_path, monkeypatch):
    assert reliability.sound(reliability.not_finite(tmp_path, monkeypatch.setattr)).tried >= 12  # R9


def test_a_second_run_on_the_same_files_is_refused(tmp_path):
    events = reliability.trainer(tmp_path / "model.npz").run()
    next(events)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with pytest.raises(RequestError, match="in use by another run"):
        next(reliability.trainer(tmp_path / "model.npz").run())
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
    list(events)
    assert not list(tmp_path.glob(".*"))
    list(reliability.trainer(tmp_path / "model.npz").run())


def test_resuming_names_what_changed_on_the_machine(tmp_path, monkeypatch):
    out = tmp_path / "model.npz"
    first = reliability.trainer(out)
    list(first.run(lambda: first.progress.step >= 3))
    assert reliability.trainer(out).resume(npgpt.load(RunFiles(out).last, with_optimizer=True)) == []
    own = machine.describe_kernels()
    with monkeypatch.context() as change:
        change.setattr(machine.CPU_KERNELS, "description", "other")
        changed = reliability.trainer(out).resume(npgpt.load(RunFiles(out).last, with_optimizer=True))
        assert changed == [f"kernels was {own} and is now other"]
    other = reliability.trainer(out, threads=1)
    assert other.resume(npgpt.load(RunFiles(out).last, with_optimizer=True)) == ["threads was 2 and is now 1"]
    list(other.run())


def test_the_best_and_the_last_are_two_files(tmp_path):
    out = tmp_path / "model.npz"
    run = reliability.trainer(out, steps=12, eval_interval=3)
    for event in run.run():
        if isinstance(event, npgpt.Evaluation):
            best = npgpt.load(out).step
            assert best == run.progress.best_step
            assert npgpt.load(RunFiles(out).last).step == event.step
            if event.best:
                assert out.read_bytes() == RunFiles(out).last.read_bytes()
                run.progress.best_loss = 0.0  # so that no later evaluation is better
    assert best == 3
    assert not out.samefile(RunFiles(out).last)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.jsonl", "model.last.npz", "model.npz"]


def test_resuming_elsewhere_starts_its_own_files(tmp_path):
    out, other = tmp_path / "model.npz", tmp_path / "other.npz"
    first = reliability.trainer(out, eval_interval=5)
    list(first.run(lambda: first.progress.step >= 12))
    reliability.write_checkpoint(other, seed=3)
    second = reliability.trainer(other, eval_interval=5)
    second.resume(npgpt.load(RunFiles(out).last, with_optimizer=True), elsewhere=True)
    list(second.run())
    assert npgpt.load(tmp_path / "other.previous.npz").step == 3
    assert npgpt.load(other).step == second.progress.best_step >= 15


def test_a_stale_state_does_not_overwrite_a_newer_one(tmp_path):
    out = tmp_path / "model.npz"
    first = reliability.trainer(out)
    list(first.run(lambda: first.progress.step >= 5))
    stale = npgpt.load(RunFiles(out).last, with_optimizer=True)
    second, third = reliability.trainer(out), reliability.trainer(out)
    third.resume(stale)
    second.resume(stale)
    list(second.run())
    with pytest.raises(RequestError, match=r"another run has continued from .* in the meantime"):
        next(third.run())
    assert npgpt.load(RunFiles(out).last).step == 20


@pytest.mark.parametrize("leave_at", [3, 10, 12])
def test_a_run_that_is_left_can_continue(tmp_path, leave_at):
    """A run is left before its first save, before an evaluation, or after one. Run again, it writes the files of a full run."""
    straight, out, before = tmp_path / "straight" / "model.npz", tmp_path / "model.npz", tmp_path / "model.previous.npz"
    straight.parent.mkdir()
    list(reliability.trainer(straight, eval_interval=5).run())
    list(reliability.trainer(out, steps=2).run())
    first_log = RunFiles(out).log.read_bytes()
    run = reliability.trainer(out, eval_interval=5)
    for event in run.run():
        if isinstance(event, npgpt.Step) and event.step == leave_at:
            break
    list(run.run())
    assert out.read_bytes() == straight.read_bytes()
    assert RunFiles(out).last.read_bytes() == RunFiles(straight).last.read_bytes()
    assert npgpt.load(before).step == 2
    assert RunFiles(before).log.read_bytes() == first_log
    evaluations = [[e["step"] for e in read_log(RunFiles(path).log) if e["event"] == "evaluation"] for path in (out, straight)]
    assert evaluations[0] == evaluations[1] == [5, 10, 15, 20]
    assert read_log(RunFiles(out).log)[0]["event"] == "start"


def test_killed_between_the_two_files_of_a_save(tmp_path):
    out = tmp_path / "model.npz"
    first = reliability.trainer(out, steps=12, eval_interval=3)
    list(first.run(lambda: first.progress.step >= 6))
    assert first.progress.best_step == 6
    reliability.write_checkpoint(out, seed=3)  # the best checkpoint as it was before step 6
    second = reliability.trainer(out, steps=12, eval_interval=100)
    second.resume(npgpt.load(RunFiles(out).last, with_optimizer=True))
    next(second.run())
    assert npgpt.load(out).step == 6


def test_a_best_model_that_was_removed_is_written_again(tmp_path):
    out = tmp_path / "model.npz"
    first = reliability.trainer(out, eval_interval=4)
    list(first.run(lambda: first.progress.step >= 8))
    out.unlink()
    second = reliability.trainer(out, eval_interval=4)
    second.resume(npgpt.load(RunFiles(out).last, with_optimizer=True))
    list(second.run())
    assert npgpt.load(out).step == second.progress.best_step >= 12


def test_the_log_continues_where_the_run_does(tmp_path):
    out = tmp_path / "model.npz"
    first = reliability.trainer(out, log_interval=1)
    list(first.run(lambda: first.progress.step >= 8))
    with RunFiles(out).log.open("a", encoding="utf-8") as log:  # the lines of a run that was killed before its next save
        log.write('{"event": "step", "step": 8, "sample": "a\u2028b\u0085c"}\n{"event": "step", "step": 9}\n{"event": "ste')
    second = reliability.trainer(out, log_interval=1)
    second.resume(npgpt.load(RunFiles(out).last, with_optimizer=True))
    list(second.run())
    log = [json.loads(line) for line in RunFiles(out).log.read_bytes().split(b"\n")[:-1]]
    assert [e["step"] for e in log if e["event"] == "step"] == [*range(1, 9), 8, *range(9, 21)]
    assert "a\u2028b\u0085c" in [e.get("sample") for e in log]
    assert [e["event"] for e in log if e["event"] in ("start", "resume", "end")] == ["start", "end", "resume", "end"]
