"""Training on the backend of a GPU. A pretended device computes on the CPU; tests marked gpu use a real GPU."""

import numpy as np
import pytest
from support import device_array
from support.arrays import BFLOAT16_EPS
from support.devices import on_cpu, pretended_device

from npgpt import (
    GPT,
    AdamW,
    CharTokenizer,
    Dataset,
    GPTConfig,
    RequestError,
    TrainConfig,
)
from npgpt.engine import backend
from npgpt.engine.backend import CPU
from npgpt.kernels.cpu import CpuKernels
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.training import trainer
from npgpt.training.events import Evaluation, Outcome, Step
from npgpt.training.muon import Muon
from npgpt.training.optim import Update, clip_grad_norm
from npgpt.training.trainer import Trainer


@pytest.fixture(autouse=True)
def steps_in_groups(monkeypatch):
    """Losses are read in groups of several steps, even if a step takes long."""
    monkeypatch.setattr(trainer, "SECONDS_IN_GROUP", 1e9)


def losses_of_training(device, dropout, steps=20, bf16=False, muon=False, **options):
    config = GPTConfig(13, block_size=40, n_layer=2, n_head=2, n_embd=24, dropout=dropout, **options)
    model = GPT(config, seed=1, backend=device)
    optimizer = Muon(model.flat, model.hidden_matrices(), 3e-3) if muon else AdamW(model.parameters(), lr=3e-3)
    dataset = Dataset(np.arange(5000) ** 2 // 7 % 13, 40, 4)
    losses = []
    with Workers(1) as workers:
        step = ParallelStep(model, workers, bf16=bf16)
        for number in range(steps):
            losses.append(float(step(*dataset.get_batch("train", number), seed=1, number=number)))
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
    return losses


def test_training_is_the_same_as_on_the_cpu(device, monkeypatch):
    for options in ({}, {"position": "rotary", "muon": True}):
        found = losses_of_training(device, 0.0, **options)
        np.testing.assert_allclose(found, losses_of_training(CPU, 0.0, **options), rtol=1e-4)
        assert found[-1] < found[0] - 0.1


def test_training_with_dropout_repeats_itself(device):
    first, again = (losses_of_training(device, 0.2) for _ in range(2))
    assert first == again
    assert first != losses_of_training(device, 0.0)
    assert first[-1] < first[0] - 0.1


def test_training_in_bfloat16(device, bf16, monkeypatch):
    """The losses are close to those in float32. The weights and their gradients are float32."""
    found, wide = (losses_of_training(device, 0.2, steps=3, bf16=yes, position="rotary") for yes in (True, False))
    np.testing.assert_allclose(found, wide, rtol=5 * BFLOAT16_EPS)
    found, wide = (losses_of_training(device, 0.2, steps=25, bf16=yes) for yes in (True, False))
    np.testing.assert_allclose(found, wide, rtol=5 * BFLOAT16_EPS)
    assert found != wide
    assert found[-1] < found[0] - 0.2
    model = GPT(GPTConfig(13, block_size=8, n_layer=1, n_head=2, n_embd=8, tie_weights=True), backend=device)
    logits, loss = model(device.asarray(np.arange(8)[None]), device.asarray(np.arange(8)[None]), dtype=bf16)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (bf16, np.float32)
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert all(device.xp.abs(p.grad).max() > 0 for p in model.parameters())


def run_of_trainer(device, tmp_path, steps=25, **settings):
    model = GPT(GPTConfig(7, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.0), seed=1, backend=device)
    tokenizer = CharTokenizer("abcdefg")
    dataset = Dataset(np.arange(3000) ** 2 // 7 % 7, 16, 4, seed=3)
    config = TrainConfig(
        steps=steps, batch_size=4, seed=3, eval_interval=12, lr=3e-3, warmup_steps=2, sample_tokens=3, threads=1, **settings
    )
    return Trainer(model, tokenizer, dataset, config, tmp_path and tmp_path / f"{device.name}.npz")


def test_a_run_gives_the_records_of_the_cpu(device, tmp_path, monkeypatch):
    """Reading losses in groups gives the same events as a run on the CPU, up to rounding."""
    run = run_of_trainer(device, tmp_path)
    found = list(run.run())
    other = run_of_trainer(CPU, tmp_path)
    expected = list(other.run())
    assert [type(e) for e in found] == [type(e) for e in expected]
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, Step):
            assert (a.step, a.tokens, a.lr) == (b.step, b.tokens, b.lr)
            np.testing.assert_allclose([a.loss, a.grad_norm], [b.loss, b.grad_norm], rtol=1e-3)
        elif isinstance(a, Evaluation):
            np.testing.assert_allclose(a.val_loss, b.val_loss, rtol=1e-3)
    assert run.optimizer.steps == run.progress.step == 25
    x, _ = run.dataset.get_batch("train", 3, device)
    assert isinstance(x, device.xp.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(x), other.dataset.get_batch("train", 3)[0])


def test_a_run_that_diverges(device, tmp_path, monkeypatch):
    """A step in the middle of a group is not finite. The weights stay as they were before that step."""
    run = run_of_trainer(device, tmp_path)
    batch, before = run.dataset.get_batch, {}

    def get_batch(split, k, where=CPU):
        if k == 15 and not before:
            before["weights"] = backend.to_numpy(run.model.flat.data).copy()
            run.model.wpe.weight.data[3, 2] = np.nan
        return batch(split, k, where)

    monkeypatch.setattr(run.dataset, "get_batch", get_batch)
    end = list(run.run())[-1]
    assert (end.step, end.outcome) == (15, Outcome.DIVERGED)
    assert "wpe.weight" in end.reason
    assert run.optimizer.steps == 15
    after = backend.to_numpy(run.model.flat.data)
    assert np.isnan(after).sum() == 1
    at = ~np.isnan(after)
    np.testing.assert_array_equal(after[at], before["weights"][at])


def test_a_run_continues_after_an_exception_and_after_diverging(device, monkeypatch):
    """Steps that were done before the exception count, and no step is done twice."""
    straight = run_of_trainer(device, None)
    list(straight.run())
    expected = backend.to_numpy(straight.model.flat.data)
    run = run_of_trainer(device, None)
    batch, fail = run.dataset.get_batch, [9]

    def get_batch(split, k, where=CPU):
        if k in fail:
            fail.remove(k)
            raise KeyboardInterrupt
        return batch(split, k, where)

    monkeypatch.setattr(run.dataset, "get_batch", get_batch)
    with pytest.raises(KeyboardInterrupt):
        list(run.run())
    assert run.optimizer.steps == run.progress.step == 9
    list(run.run())
    assert run.optimizer.steps == 25
    np.testing.assert_array_equal(backend.to_numpy(run.model.flat.data), expected)

    run = run_of_trainer(device, None)
    good, spoil = run._forward_backward, [14]

    def forward_backward(x, y, seed, number):
        loss = good(x, y, seed, number)
        if number in spoil:
            spoil.remove(number)
            run.model.flat.grad[5] = np.inf
        return loss

    for name in ("close", "diagnose"):
        monkeypatch.setattr(forward_backward, name, getattr(good, name), raising=False)
    run._forward_backward = forward_backward
    end = list(run.run())[-1]
    assert (end.outcome, end.step, run.optimizer.steps) == (Outcome.DIVERGED, 14, 14)
    assert list(run.run())[-1].outcome is Outcome.FINISHED
    np.testing.assert_array_equal(backend.to_numpy(run.model.flat.data), expected)


def test_tf32_is_refused_on_a_cpu():
    with pytest.raises(RequestError, match="tf32 works on a GPU only, and this run is on the CPU; use --no-tf32"):
        run_of_trainer(CPU, None, tf32=True)


def test_bf16_is_refused_on_a_processor_without_it(monkeypatch):
    """The message comes before the first step, and is one line."""
    monkeypatch.setitem(backend._backends, np.ndarray, backend.Backend("cpu", np, CpuKernels()))
    with pytest.raises(
        RequestError, match=r"bf16 needs a GPU, or AVX512-BF16 and the kernels in C, and this run has .*; use --no-bf16"
    ):
        run_of_trainer(backend._backends[np.ndarray], None, bf16=True)


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.2, "tie_weights": True}, {"bias": False, "activation": "relu"}, {"position": "rotary"}]
)
def test_a_step_reads_nothing_back(cuda_kernels, bf16, monkeypatch, dtype, options):
    """A step copies nothing from the device to the host. `results` copies once."""
    device = pretended_device(monkeypatch)
    model = GPT(GPTConfig(7, block_size=16, n_layer=2, n_head=2, n_embd=16, **options), seed=1, backend=device)
    optimizer = AdamW(model.flat) if "position" not in options else Muon(model.flat, model.hidden_matrices())
    update, dataset = Update(optimizer, 1.0), Dataset(np.arange(3000) % 7, 16, 4)
    with Workers(1) as workers:
        step = ParallelStep(model, workers, bf16=dtype == "bfloat16")
        device_array.waits.clear()
        for number in range(3):
            update.step(step(*dataset.get_batch("train", number, device), seed=1, number=number))
        assert device_array.waits == []
        assert len(update.results()) == 3
        assert device_array.waits == ["get"]
