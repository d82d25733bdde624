"""Training: the model learns, and a run's events, files, resumption, divergence and worker processes are right."""

import dataclasses
import errno
import json
import math
import os

import numpy as np
import pytest

import npgpt
from npgpt import GPT, AdamW, CharTokenizer, Dataset, GPTConfig, RequestError, TrainConfig, Trainer, evaluate
from npgpt.evaluation.loss import Loss
from npgpt.generation.generate import generate_text
from npgpt.parallel.processes import Processes
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.storage.run import RunFiles
from npgpt.training.events import Evaluation, Outcome, Step

GOLDEN_CONFIG = GPTConfig(63, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


# The losses of the first ten steps with seed 1337, in float32. Rounding differs between processors and BLAS kernels. A larger
# difference means that the model, a gradient, a random stream or the optimiser has changed.
GOLDEN_LOSSES = [4.141188, 4.141778, 4.115736, 4.081378, 4.055082, 4.014167, 3.975874, 3.927432, 3.962293, 3.955101]


def run(text, tokenizer, config, train_config, out=None, **keywords):
    dataset = Dataset(
        tokenizer.encode_array(text), config.block_size, train_config.batch_size, train_config.val_fraction, train_config.seed
    )
    trainer = Trainer(GPT(config, seed=train_config.seed), tokenizer, dataset, train_config, out)
    return trainer, list(trainer.run(**keywords))


def quick(**changes):
    settings = {"steps": 6, "batch_size": 4, "eval_interval": 3, "sample_tokens": 5, "warmup_steps": 2, "log_interval": 2}
    return TrainConfig(**settings | changes)


def test_one_batch_is_memorised(text, tokenizer):
    config = GPTConfig(tokenizer.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=64, dropout=0.0)
    model = GPT(config, seed=0)
    x, y = Dataset(tokenizer.encode_array(text), 32, 4).get_batch("train")
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        npgpt.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05


def test_golden_run(text, tokenizer):
    _, events = run(text, tokenizer, GOLDEN_CONFIG, TrainConfig(steps=10, batch_size=8, warmup_steps=5, sample_tokens=0))
    losses = [e.loss for e in events if isinstance(e, Step)]
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=2e-5)


def test_events_of_a_run(text, tokenizer, small_config, tmp_path):
    out = tmp_path / "model.npz"
    trainer, events = run(text[:4000], tokenizer, small_config, quick(), out)
    assert [e.step for e in events if isinstance(e, Step)] == [1, 2, 3, 4, 5, 6]
    evaluations = [e for e in events if isinstance(e, Evaluation)]
    assert [e.step for e in evaluations] == [3, 6]
    assert all(len(e.sample) == 5 and math.isfinite(e.val_loss) for e in evaluations)
    steps = [e.loss for e in events if isinstance(e, Step)]
    assert evaluations[1].train_loss == pytest.approx(np.mean(steps[3:]))
    assert events[-1].outcome is Outcome.FINISHED
    exact = evaluate(trainer.model, trainer.dataset.val)
    assert evaluations[1].val_loss == exact.loss
    lines = [json.loads(line) for line in RunFiles(out).log.read_text(encoding="utf-8").splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds == ["start", "step", "evaluation", "step", "step", "evaluation", "end"]


def test_evaluations_do_not_change_training(text, tokenizer, small_config):
    trainers = [run(text[:4000], tokenizer, small_config, quick(eval_interval=n))[0] for n in (1, 2, 6)]
    for other in trainers[1:]:
        np.testing.assert_array_equal(trainers[0].model.parameters().data, other.model.parameters().data)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_resuming_gives_the_uninterrupted_run(text, tokenizer, small_config, tmp_path, stop_at):
    straight, again = tmp_path / "straight.npz", tmp_path / "again.npz"
    run(text[:4000], tokenizer, small_config, quick(), straight)
    asked = []
    _, events = run(
        text[:4000], tokenizer, small_config, quick(), again, stop_requested=lambda: asked.append(1) or len(asked) == stop_at
    )
    assert events[-1].outcome is Outcome.INTERRUPTED
    assert events[-1].step == stop_at
    dataset = Dataset(tokenizer.encode_array(text[:4000]), small_config.block_size, 4)
    trainer = Trainer(GPT(small_config, seed=99), tokenizer, dataset, quick(), again)
    trainer.resume(npgpt.load(RunFiles(again).last, with_optimizer=True))
    list(trainer.run())
    assert RunFiles(again).last.read_bytes() == RunFiles(straight).last.read_bytes()
    assert again.read_bytes() == straight.read_bytes()


def test_resume_refuses_another_run(text, tokenizer, small_config, trained):
    last = npgpt.load(RunFiles(trained).last, with_optimizer=True)

    def trainer(text=text[:4000], config=small_config, **changes):
        train_config = dataclasses.replace(last.train_config, **{"steps": 12} | changes)
        ids = tokenizer.encode_array(text)
        dataset = Dataset(ids, config.block_size, train_config.batch_size, train_config.val_fraction, train_config.seed)
        return Trainer(GPT(config), tokenizer, dataset, train_config)

    trainer(threads=1, eval_interval=5).resume(last)
    for other, words in [
        (trainer(text=text[1:4001]), "the text is not the one.*start a new run"),
        (trainer(text=text[:3999]), "the text is not the one"),
        (trainer(config=dataclasses.replace(small_config, n_layer=1)), "n_layer was 2 and is now 1; a model keeps its shape"),
        (
            trainer(text=text[1:4001], config=dataclasses.replace(small_config, n_head=4)),
            "the text is not .* Also, n_head was 2",
        ),
        (trainer(val_fraction=0.2), "val_fraction was 0.1 and is now 0.2, which would hold out text that it was trained on"),
        (trainer(steps=6), "nothing to do"),
    ]:
        with pytest.raises(RequestError, match=words):
            other.resume(last)


CHANGES = [
    {"lr": 3e-4, "min_lr": 0.0},
    {"schedule": "constant"},
    {"warmup_steps": 7},
    {"dropout": 0.3},
    {"batch_size": 8},
    {"micro_batch": 1},
    {"weight_decay": 0.0},
    {"grad_clip": 0.1},
    {"beta1": 0.8, "beta2": 0.999},
    {"eval_tokens": 64},
    {"val_fraction": 0.05},
    {"seed": 5},
    {"characters": 5000},
]


@pytest.mark.parametrize("changed", CHANGES, ids=[" ".join(changed) for changed in CHANGES])
def test_what_a_resumed_run_may_change(text, tokenizer, small_config, trained, changed):
    """It trains as asked from the next step on, says so, logs it, and a run that is resumed again keeps it."""
    files = RunFiles(trained)
    last = npgpt.load(files.last, with_optimizer=True)
    settings = {k: v for k, v in changed.items() if k not in ("dropout", "characters")}
    config = dataclasses.replace(last.train_config, steps=12, **settings)
    model = dataclasses.replace(small_config, dropout=changed.get("dropout", small_config.dropout))
    ids = tokenizer.encode_array(text[: changed.get("characters", 4000)])

    def resumed(config, model):
        dataset = Dataset(ids, model.block_size, config.batch_size, config.val_fraction, config.seed)
        trainer = Trainer(GPT(model), tokenizer, dataset, config, trained)
        trainer.resume(npgpt.load(files.last, with_optimizer=True))
        return trainer

    trainer = resumed(config, model)
    names = {"text" if name == "characters" else name for name in changed}
    assert set(trainer.changes.settings) == {"steps"} | names
    comparable = not names & {"text", "val_fraction", "eval_tokens"}
    assert trainer.changes.comparable == (trainer.progress.best_loss is not None) == comparable
    assert trainer.progress.judged_since == (0 if comparable else 6)
    next(trainer.run())
    again = resumed(config, model)  # the first step of the resumed run was not saved, its settings were
    assert (again.progress.step, again.changes.settings) == (6, {})
    events = list(again.run())
    assert events[-1].step == 12
    after = npgpt.load(files.last, with_optimizer=True)
    assert (after.config.dropout, after.train_config) == (model.dropout, config)
    assert after.text.n_characters == len(ids)
    logged = [json.loads(line) for line in files.log.read_text(encoding="utf-8").splitlines()]
    first = next(event for event in logged if event["event"] == "resume")
    assert set(first["changes"]) == {"steps"} | names
    assert "changes" not in logged[-1]
    assert first["changes"]["steps"] == ["6", "12"]


def test_losses_stay_comparable_if_the_same_tokens_are_judged(text, tokenizer, small_config, tmp_path):
    """More training text, or other eval_tokens than there are, change nothing about the held-out text."""
    ids, val_ids = tokenizer.encode_array(text[:4000]), tokenizer.encode_array(text[5000:5400])
    config = quick(val_fraction=0.0)
    out = tmp_path / "model.npz"

    def trainer(ids, config, val_ids=val_ids):
        dataset = Dataset(ids, small_config.block_size, 4, config.val_fraction, val_ids=val_ids)
        return Trainer(GPT(small_config), tokenizer, dataset, config, out, "a.txt", "b.txt")

    list(trainer(ids, config).run())
    last = npgpt.load(RunFiles(out).last, with_optimizer=True)
    assert (last.text.sources, last.val_text.sources) == (("a.txt",), ("b.txt",))
    config = dataclasses.replace(config, steps=12, eval_tokens=5000)
    resumed = trainer(tokenizer.encode_array(text[:4500]), config)
    resumed.resume(last)
    assert resumed.changes.comparable
    assert resumed.progress.best_loss == last.progress.best_loss
    other = trainer(ids, dataclasses.replace(config, steps=9), val_ids[:-1])
    other.resume(last)
    assert not other.changes.comparable
    assert "held-out text b.txt of 399 characters (was b.txt of 400 characters)" in str(other.changes)
    assert "too few evaluations" in list(other.run())[-1].advice  # those before the change are not counted


def test_held_out_ids_beyond_the_vocabulary_are_refused(text, tokenizer, small_config):
    dataset = Dataset(tokenizer.encode_array(text[:4000]), 16, 4, 0.0, val_ids=[0, 1, 99])
    with pytest.raises(RequestError, match="ids go up to 99"):
        Trainer(GPT(small_config), tokenizer, dataset, quick(val_fraction=0.0))
    for val_ids in ([], [1]):
        with pytest.raises(RequestError, match="held-out text is too short"):
            Dataset(tokenizer.encode_array(text[:4000]), 16, 4, 0.0, val_ids=val_ids)
    with pytest.raises(RequestError, match="val_fraction must be 0"):
        Dataset(tokenizer.encode_array(text[:4000]), 16, 4, val_ids=[1, 2])


def test_a_resumed_run_with_changes_trains_as_asked(text, tokenizer, small_config, trained):
    """Resumed with another dropout and learning rate, the next step is the step of a run that always had them."""
    last = npgpt.load(RunFiles(trained).last, with_optimizer=True)
    config = dataclasses.replace(last.train_config, steps=7, lr=2e-4, min_lr=2e-4, schedule="constant", batch_size=2)
    model = dataclasses.replace(small_config, dropout=0.5)
    dataset = Dataset(tokenizer.encode_array(text[:4000]), model.block_size, 2)
    trainer = Trainer(GPT(model), tokenizer, dataset, config)
    trainer.resume(last)
    by_hand = GPT(model)
    by_hand.load_state_dict(last.model.state_dict())
    optimizer = npgpt.AdamW(by_hand.parameters(), lr=2e-4, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    optimizer.load_state_dict(last.optimizer_state)
    ParallelStep(by_hand, Workers(1), config.micro_batch)(*dataset.get_batch("train", 6), config.seed, 6)
    npgpt.clip_grad_norm(by_hand.parameters(), config.grad_clip)
    optimizer.step()
    list(trainer.run())
    np.testing.assert_allclose(trainer.model.flat.data, by_hand.flat.data, rtol=1e-5, atol=1e-7)


def test_early_stop_keeps_the_best(text, tokenizer, small_config, tmp_path):
    out = tmp_path / "model.npz"
    # With 400 characters and a high learning rate the model over-fits at once.
    config = quick(steps=400, eval_interval=10, patience=2, lr=1e-2, batch_size=8)
    trainer, events = run(text[3000:3400], tokenizer, small_config, config, out)
    assert events[-1].outcome is Outcome.EARLY_STOP
    evaluations = [e for e in events if isinstance(e, Evaluation)]
    best = min(evaluations, key=lambda e: e.val_loss)
    assert evaluations[-1].step == best.step + 20
    assert npgpt.load(out).step == best.step == trainer.progress.best_step
    assert npgpt.load(RunFiles(out).last).step == evaluations[-1].step
    assert "Over-fitting since step" in events[-1].advice


def test_divergence_leaves_the_weights_unchanged(text, tokenizer, small_config, tmp_path):
    out = tmp_path / "model.npz"
    dataset = Dataset(tokenizer.encode_array(text[:4000]), small_config.block_size, 4)
    trainer = Trainer(GPT(small_config), tokenizer, dataset, quick(), out)
    events = trainer.run()
    before = None
    for event in events:
        if isinstance(event, Evaluation):
            trainer.model.lm_head.weight.data[0, 0] = np.inf
            before = trainer.model.parameters().data.copy()
            end = list(events)[-1]
    assert end.outcome is Outcome.DIVERGED
    assert "lower the learning rate" in end.advice
    np.testing.assert_array_equal(trainer.model.parameters().data, before)
    assert np.isfinite(npgpt.load(out).model.parameters().data).all()


def test_an_evaluation_whose_save_fails_is_repeated(text, tokenizer, small_config, tmp_path, monkeypatch):
    """After the disk is free again, iterating once more gives the run that never failed."""
    dataset = Dataset(tokenizer.encode_array(text[:4000]), small_config.block_size, 4)
    straight = Trainer(GPT(small_config), tokenizer, dataset, quick(), tmp_path / "straight.npz")
    list(straight.run())
    trainer = Trainer(GPT(small_config), tokenizer, dataset, quick(), tmp_path / "model.npz")
    failures = iter([False, True])  # the second save fails
    real = trainer.files.save

    def save(checkpoint, is_best):
        if next(failures, False):
            raise OSError("no space left on device")
        real(checkpoint, is_best)

    monkeypatch.setattr(trainer.files, "save", save)
    with pytest.raises(OSError, match="no space left"):
        list(trainer.run())
    list(trainer.run())
    assert trainer.progress == straight.progress
    np.testing.assert_array_equal(trainer.model.flat.data, straight.model.flat.data)


def test_an_infinite_validation_loss_is_the_reason(text, tokenizer, small_config, tmp_path, monkeypatch):
    loss = Loss(math.inf, None, 10)
    monkeypatch.setattr("npgpt.training.trainer.evaluate", lambda *arguments: loss)
    _, events = run(text[:4000], tokenizer, small_config, quick(), tmp_path / "model.npz")
    assert events[-1].outcome is Outcome.DIVERGED
    assert events[-1].reason == "the validation loss or the logits of a sample are not finite"
    assert not RunFiles(tmp_path / "model.npz").crash.exists()


@pytest.mark.parametrize("val_fraction", [0.1, 0.0])
def test_weights_that_are_not_finite_are_not_saved(text, tokenizer, small_config, tmp_path, val_fraction):
    """A step's loss belongs to the weights before the step. Bad weights show at the next evaluation; it must not save them."""
    out = tmp_path / "model.npz"
    config = quick(lr=1e20, warmup_steps=0, eval_interval=1, val_fraction=val_fraction, grad_clip=0.0)
    _, events = run(text[:4000], tokenizer, small_config, config, out)
    assert events[-1].outcome is Outcome.DIVERGED
    for path in (out, RunFiles(out).last):
        if path.exists():
            assert np.isfinite(npgpt.load(path).model.parameters().data).all()


def test_a_new_run_keeps_the_earlier_one(text, tokenizer, small_config, trained):
    names = ["model.npz", "model.last.npz", "model.jsonl"]
    before = [(trained.parent / name).read_bytes() for name in names]
    run(text[:4000], tokenizer, small_config, quick(), trained)
    kept = ["model.previous.npz", "model.previous.last.npz", "model.previous.jsonl"]
    assert [(trained.parent / name).read_bytes() for name in kept] == before


def test_a_run_stopped_before_its_first_evaluation_leaves_a_model(text, tokenizer, small_config, tmp_path):
    out = tmp_path / "model.npz"
    run(text[:4000], tokenizer, small_config, quick(), out, stop_requested=lambda: True)
    assert npgpt.load(out).step == npgpt.load(RunFiles(out).last).step == 1


def test_a_dataset_with_other_settings_is_refused(text, tokenizer, small_config):
    dataset = Dataset(tokenizer.encode_array(text[:4000]), small_config.block_size, 8)
    with pytest.raises(RequestError, match="batch_size is 8, the run's is 4"):
        Trainer(GPT(small_config), tokenizer, dataset, quick())


def test_a_damaged_training_state_is_refused(text, tokenizer, small_config, trained):
    dataset = Dataset(tokenizer.encode_array(text[:4000]), small_config.block_size, 4)
    too_short = {"steps": 1, "exp_avg": np.zeros(3), "exp_avg_sq": np.zeros(3)}
    last = dataclasses.replace(npgpt.load(RunFiles(trained).last, with_optimizer=True), optimizer_state=too_short)
    trainer = Trainer(GPT(small_config, seed=2), tokenizer, dataset, quick(steps=9))
    before = trainer.model.flat.data.copy()
    with pytest.raises(RequestError, match="damaged"):
        trainer.resume(last)
    np.testing.assert_array_equal(trainer.model.flat.data, before)


def test_without_held_out_text(text, tokenizer, small_config, tmp_path):
    out = tmp_path / "model.npz"
    _, events = run(text[:400], tokenizer, small_config, quick(val_fraction=0.0), out)
    evaluations = [e for e in events if isinstance(e, Evaluation)]
    assert all(e.val_loss is None and e.best for e in evaluations)
    assert npgpt.load(out).step == 6


def test_worker_processes_give_the_bytes_of_threads(text, tokenizer, small_config, monkeypatch):
    used, found = [], []
    monkeypatch.setattr("npgpt.training.trainer.Processes", lambda *arguments: used.append(1) or Processes(*arguments))
    monkeypatch.setattr("npgpt.parallel.processes.SECONDS_TO_PAY_OFF", 0.0)
    for asked in (False, True, None):
        config = quick(steps=14, micro_batch=2, threads=2, processes=asked)
        trainer, events = run(text[:4000], tokenizer, small_config, config)
        losses = [e.loss for e in events if isinstance(e, Step)]
        found.append((losses, trainer.progress.history, trainer.model.flat.data.tobytes()))
    assert found[0] == found[1] == found[2]
    assert len(used) == 2
    run(text[:4000], tokenizer, small_config, quick(steps=5))
    assert len(used) == 2  # the run is too short for worker processes


def test_threads_replace_processes_that_cannot_start(text, tokenizer, small_config, monkeypatch):
    def cannot(*arguments):
        raise OSError("no more processes")

    monkeypatch.setattr("npgpt.training.trainer.Processes", cannot)
    with pytest.warns(RuntimeWarning, match=r"worker processes cannot start \(no more processes\); going on with threads"):
        _, events = run(text[:4000], tokenizer, small_config, quick(threads=2, processes=True))
    assert events[-1].outcome is Outcome.FINISHED


# ---------------------------------------------------------------- a run starts only if it can end


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("long name", OSError, "too long"),
        ("full disk", OSError, "No space left"),
        ("surrogate", RequestError, "this run could not be saved: vocabulary"),
        ("small vocabulary", RequestError, "this run could not be saved: the tokenizer has 63 tokens"),
        ("not finite", RequestError, "this run could not be saved: lm_head.weight"),
    ],
)
def test_a_run_that_cannot_be_saved_does_not_start(text, tokenizer, tmp_path, trained, monkeypatch, damage, error, words):
    """The error comes before the first step, and the files of an earlier run stay where they are."""
    before = files_in(tmp_path)
    out, ids, vocab_size = trained, tokenizer.encode_array(text[:4000]), tokenizer.vocab_size
    if damage == "surrogate":
        tokenizer = CharTokenizer([*tokenizer.characters[:-1], "\udc80"])
    if damage == "small vocabulary":
        ids, vocab_size = ids % 20, 20
    if damage == "long name":
        out = tmp_path / ("x" * 240 + ".npz")
    if damage == "full disk":
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        )
    config = GPTConfig(vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16)
    trainer = Trainer(GPT(config), tokenizer, Dataset(ids, 16, 4), quick(), out)
    if damage == "not finite":
        trainer.model.lm_head.weight.data[0] = np.nan
    with pytest.raises(error, match=words):
        next(trainer.run())
    assert trainer.progress.step == 0
    assert files_in(tmp_path) == before


def test_a_dataset_with_another_split_is_refused(text, tokenizer, small_config):
    """Its loss would be of tokens that the model was trained on."""
    dataset = Dataset(tokenizer.encode_array(text[:4000]), small_config.block_size, 4, val_fraction=0.02)
    with pytest.raises(RequestError, match=r"the dataset's val_fraction is 0\.02, the run's is 0\.1"):
        Trainer(GPT(small_config), tokenizer, dataset, quick())


def test_a_padded_vocabulary_trains_saves_and_writes(text, tokenizer, tmp_path):
    """Ids without a character are never drawn, however likely the model thinks they are."""
    config = GPTConfig(128, block_size=16, n_layer=1, n_head=2, n_embd=16)
    dataset = Dataset(tokenizer.encode_array(text[:4000]), 16, 4)
    trainer = Trainer(GPT(config), tokenizer, dataset, quick(), tmp_path / "model.npz")
    list(trainer.run())
    checkpoint = npgpt.load(tmp_path / "model.npz")
    assert (checkpoint.config.vocab_size, checkpoint.tokenizer.vocab_size) == (128, 63)
    checkpoint.model.ln_f.bias.data[...] = 1.0
    checkpoint.model.lm_head.weight.data[:, 63:] = 10.0  # the padding is by far the likeliest
    settings = npgpt.GenerateConfig(max_new_tokens=200, seed=1, temperature=2.0)
    assert len("".join(generate_text(checkpoint.model, tokenizer, "", settings))) == 200


# ---------------------------------------------------------------- a model that was trained before


def test_a_trained_model_is_judged_before_the_first_step(text, tokenizer, small_config, tmp_path):
    """It is kept until an evaluation is better, also if the run stops before the first step and is resumed."""
    config = quick(lr=1e-9, min_lr=0.0)
    data = Dataset(tokenizer.encode_array(text[:4000]), 16, 4, seed=config.seed)
    model = GPT(small_config, seed=9)
    before = model.flat.data.copy()
    trainer = Trainer(model, tokenizer, data, config, tmp_path / "m.npz", pretrained=True)
    run = trainer.run()
    first = next(run)
    assert isinstance(first, Evaluation)
    assert (first.step, first.train_loss, first.best) == (0, None, True)
    assert first.val_loss == evaluate(model, data.val).loss == trainer.progress.best_loss
    assert first.bits_per_character == pytest.approx(first.val_loss / math.log(2))
    run.close()
    np.testing.assert_array_equal(npgpt.load(tmp_path / "m.npz").model.flat.data, before)
    resumed = Trainer(GPT(small_config, seed=1), tokenizer, data, config, tmp_path / "m.npz")
    resumed.resume(npgpt.load(tmp_path / "m.last.npz", with_optimizer=True))
    events = list(resumed.run())
    assert [e.step for e in events if isinstance(e, Evaluation)] == [3, 6]
    logged = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["event"], e["step"]) for e in logged[:3]] == [("start", 0), ("evaluation", 0), ("resume", 0)]
    assert resumed.progress.best_step in (0, 3, 6)
    best = npgpt.load(tmp_path / "m.npz")
    assert best.step == resumed.progress.best_step
    assert resumed.progress.best_loss <= first.val_loss


def test_without_held_out_text_a_trained_model_is_not_judged(text, tokenizer, small_config):
    config = quick(val_fraction=0.0)
    data = Dataset(tokenizer.encode_array(text[:4000]), 16, 4, 0.0, config.seed)
    events = list(Trainer(GPT(small_config), tokenizer, data, config, pretrained=True).run())
    assert isinstance(events[0], Step)
