"""Muon: the orthogonalisation against an SVD, steps against a transcription of the formula, workers, state, resuming."""

import dataclasses

import numpy as np
import pytest

import npgpt
from npgpt import GPT, AdamW, Dataset, GPTConfig, TrainConfig, Trainer
from npgpt.parallel.workers import Workers
from npgpt.storage.run import RunFiles
from npgpt.training.muon import Muon, orthogonalised
from npgpt.training.optim import Update

CONFIG = GPTConfig(11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (1, 8), (8, 1), (1, 1)])
def test_the_result_is_close_to_the_orthogonal_factor_of_an_svd(dtype, shape):
    """In the basis of the singular vectors it is close to the unit matrix, whatever the size of the matrix."""
    rng = np.random.default_rng(3)
    n = min(shape)
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], n)))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], n)))
    g = (u * np.geomspace(1, 0.05, n)) @ v.T
    for size in (1e-12, 1.0, 1e6):
        inside = u.T @ orthogonalised((size * g).astype(dtype)) @ v
        off_diagonal = inside - np.diag(np.diag(inside))
        assert np.abs(off_diagonal).max() < 1e-4
        assert 0.6 < np.diag(inside).min() <= np.diag(inside).max() < 1.25
    zeros = np.zeros(shape, dtype=dtype)
    np.testing.assert_array_equal(orthogonalised(zeros), zeros)


def test_steps_are_those_of_the_formula():
    """Ten steps of one model, against a transcription in float64 that knows no flat arrays and no workers."""
    model = GPT(CONFIG, seed=2, dtype=np.float64)
    lr, muon_lr, momentum, decay = 3e-3, 0.03, 0.9, 0.2
    optimizer = Muon(model.flat, model.hidden_matrices(), lr, muon_lr, momentum, weight_decay=decay)
    twin = GPT(CONFIG, seed=2, dtype=np.float64)
    others = AdamW(twin.flat, lr, weight_decay=decay)
    names = [name for name, p in twin.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    weights = {name: p.data.copy() for name, p in twin.named_parameters() if name in names}
    means = {name: np.zeros_like(w) for name, w in weights.items()}
    rng = np.random.default_rng(0)
    for _ in range(10):
        gradient = rng.standard_normal(model.flat.grad.shape)
        model.flat.grad[...], twin.flat.grad[...] = gradient, gradient
        optimizer.step()
        for name, p in twin.named_parameters():
            if name in names:
                means[name] = momentum * means[name] + (1 - momentum) * p.grad
                ahead = momentum * means[name] + (1 - momentum) * p.grad
                thirds = np.split(ahead, 3, axis=1) if "qkv" in name else [ahead]
                updates = []
                for m in thirds:
                    x = m / np.linalg.norm(m)
                    for _ in range(5):
                        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
                    updates.append(x * max(1, m.shape[1] / m.shape[0]) ** 0.5)
                weights[name] = weights[name] * (1 - muon_lr * decay) - muon_lr * np.hstack(updates)
        others.step()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        np.testing.assert_allclose(p.data, weights.get(name, q.data), rtol=0, atol=1e-10, err_msg=name)
    hidden = np.concatenate([np.full(p.size, name in names) for name, p in _in_flat_order(model)])
    assert not optimizer.exp_avg_sq[hidden].any()
    assert optimizer.exp_avg_sq[~hidden].all()


def _in_flat_order(model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [(names[id(p)], p) for p in model.flat]


def test_setting_lr_changes_both_rates():
    model = GPT(CONFIG)
    optimizer = Muon(model.flat, model.hidden_matrices(), 1e-3, 0.02)
    optimizer.lr = 5e-4
    assert optimizer.muon_lr == pytest.approx(0.01)


@pytest.mark.parametrize("block", [5, 65_536])
def test_workers_change_no_bit(monkeypatch, block):
    monkeypatch.setattr("npgpt.parallel.workers.BLOCK", block)
    results = []
    for threads in (1, 2, 3):
        model = GPT(CONFIG, seed=2)
        optimizer = Muon(model.flat, model.hidden_matrices(), 1e-3)
        rng = np.random.default_rng(0)
        with Workers(threads) as workers:
            for _ in range(3):
                model.flat.grad[...] = rng.standard_normal(model.flat.grad.shape)
                optimizer.step(workers)
        results.append(model.flat.data.tobytes())
    assert len(set(results)) == 1


def test_the_gradient_may_be_scaled_on_its_device():
    """As on a GPU: the scale is an array, and a negative one changes nothing."""
    models = [GPT(CONFIG, seed=2, dtype=np.float64) for _ in range(2)]
    first, second = (Muon(m.flat, m.hidden_matrices(), 1e-3) for m in models)
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradient = rng.standard_normal(models[0].flat.grad.shape)
        models[0].flat.grad[...], models[1].flat.grad[...] = 0.25 * gradient, gradient
        first.step()
        second.step(scale=np.array(0.25))
    np.testing.assert_allclose(models[0].flat.data, models[1].flat.data, rtol=0, atol=1e-12)
    before = [array.copy() for array in (models[1].flat.data, second.exp_avg, second.exp_avg_sq)]
    second.step(scale=np.array(-1.0))
    for array, old in zip((models[1].flat.data, second.exp_avg, second.exp_avg_sq), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_clipping_comes_first():
    model = GPT(CONFIG, seed=2)
    optimizer = Muon(model.flat, model.hidden_matrices(), 1e-3)
    model.flat.grad[...] = 1.0
    update = Update(optimizer, max_norm=0.5)
    update.step(1.0)
    assert np.linalg.norm(model.flat.grad) == pytest.approx(0.5, rel=1e-4)
    assert np.linalg.norm(optimizer.exp_avg) < 0.1


def test_wrong_arguments():
    model, other = GPT(CONFIG), GPT(CONFIG)
    for wrong in ({"lr": 0.0}, {"muon_lr": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="Muon needs"):
            Muon(model.flat, model.hidden_matrices(), **wrong)
    with pytest.raises(ValueError, match="not among the parameters"):
        Muon(model.flat, other.hidden_matrices())


def test_only_the_rest_without_hidden_matrices():
    models = [GPT(CONFIG, seed=2) for _ in range(2)]
    optimizers = Muon(models[0].flat, [], 1e-3), AdamW(models[1].flat, 1e-3)
    for model, optimizer in zip(models, optimizers, strict=True):
        model.flat.grad[...] = 0.1
        optimizer.step()
    np.testing.assert_array_equal(models[0].flat.data, models[1].flat.data)


def test_a_resumed_run_gives_the_uninterrupted_one(text, tokenizer, tmp_path):
    """Also with the other positions, and with worker processes in place of threads."""
    model = GPTConfig(tokenizer.vocab_size, 16, 2, 2, 16, position="rotary")
    config = TrainConfig(
        steps=8, batch_size=4, eval_interval=4, sample_tokens=5, warmup_steps=2, optimizer="muon", threads=2, micro_batch=1
    )

    def trainer(out, **changes):
        settings = dataclasses.replace(config, **changes)
        dataset = Dataset(tokenizer.encode_array(text[:4000]), 16, 4)
        return Trainer(GPT(model, seed=config.seed), tokenizer, dataset, settings, out)

    straight, again = tmp_path / "straight.npz", tmp_path / "again.npz"
    list(trainer(straight).run())
    asked = []
    list(trainer(again).run(lambda: asked.append(1) or len(asked) == 3))
    resumed = trainer(again)
    resumed.resume(npgpt.load(RunFiles(again).last, with_optimizer=True))
    assert resumed.progress.step == 3
    list(resumed.run())
    assert RunFiles(again).last.read_bytes() == RunFiles(straight).last.read_bytes()
    by_processes = trainer(None, processes=True)
    list(by_processes.run())
    assert by_processes.model.flat.data.tobytes() == resumed.model.flat.data.tobytes()
    assert by_processes.progress.best_loss < np.log(tokenizer.vocab_size)
    with pytest.raises(npgpt.RequestError, match="the optimizer was muon and is now adamw, which cannot use its state"):
        trainer(None, optimizer="adamw", steps=20).resume(npgpt.load(straight, with_optimizer=True))
