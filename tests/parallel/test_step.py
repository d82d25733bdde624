"""A step over worker threads: the same loss and gradient as on one thread, and micro-batches."""

import numpy as np
import pytest
from support.steps import CONFIG, batch

from npgpt import GPT, ops
from npgpt.engine.streams import Stream, generator
from npgpt.parallel.step import ParallelStep, micro_batches
from npgpt.parallel.workers import Workers


def gradient_of(threads, micro_batch, dtype=np.float64):
    model = GPT(CONFIG, seed=1, dtype=dtype)
    model.parameters().grad[...] = 99.0  # an old gradient, which the step must overwrite
    with Workers(threads) as workers:
        loss = ParallelStep(model, workers, micro_batch)(*batch(), seed=3, number=4)
    return loss, model.flat.grad.copy()


def test_threads_do_not_change_the_step():
    loss, gradient = gradient_of(1, 2)
    for threads in (2, 3, 8):
        other_loss, other = gradient_of(threads, 2)
        assert other_loss == pytest.approx(loss, rel=1e-14)
        np.testing.assert_allclose(other, gradient, rtol=1e-10, atol=1e-14)


def test_same_threads_same_bytes():
    first, second = gradient_of(3, 1, np.float32), gradient_of(3, 1, np.float32)
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])


def test_micro_batches_add_up_to_the_batch():
    """The gradient equals a sum by hand: each micro-batch has its own generator and is weighted by its share of the batch."""
    model = GPT(CONFIG, seed=1, dtype=np.float64)
    x, y = batch()
    total = 0.0
    for i, piece in enumerate([slice(0, 2), slice(2, 4), slice(4, 7)]):
        logits, _ = model(x[piece], rng=generator(3, Stream.DROPOUT, 4, i))
        loss = ops.cross_entropy(logits, y[piece], reduction="none").sum() / y.size
        loss.backward()
        total += loss.item()
    loss, gradient = gradient_of(2, 3)
    assert loss == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(gradient, model.flat.grad, rtol=1e-10, atol=1e-14)


def test_workers_see_new_weights():
    model = GPT(CONFIG, seed=1)
    with Workers(2) as workers:
        step = ParallelStep(model, workers, 1)
        before = step(*batch(), seed=0, number=0)
        model.parameters().data *= 2
        assert step(*batch(), seed=0, number=0) != before


@pytest.mark.parametrize(("rows", "tokens", "size"), [(32, 128, None), (12, 64, None), (1, 500, None), (7, 8, 3), (5, 2000, 9)])
def test_micro_batches_cover_the_batch(rows, tokens, size):
    pieces = micro_batches(rows, tokens, size)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(rows))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1
