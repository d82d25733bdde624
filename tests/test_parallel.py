"""Worker threads: the same numbers as one, errors that arrive, the BLAS given back."""

import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from npgpt import GPT, GPTConfig, ops
from npgpt.backend import Stream, generator
from npgpt.parallel import ParallelStep, Workers, micro_batches

CONFIG = GPTConfig(11, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.2)


def batch(rows=7):
    ids = np.random.default_rng(0).integers(0, 11, (rows, 9))
    return ids[:, :-1], ids[:, 1:]


def gradient_of(threads, micro_batch, dtype=np.float64):
    model = GPT(CONFIG, seed=1, dtype=dtype)
    model.parameters().grad[...] = 99.0  # left over from before; must be forgotten
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
    """By hand: each piece with the generator of its number, weighted by its share of the batch."""
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


def test_map_keeps_the_order_and_runs_side_by_side():
    barrier = threading.Barrier(3, timeout=20)
    with Workers(3) as workers:
        assert workers.map(lambda i: (barrier.wait(), i)[1], [3, 1, 2]) == [3, 1, 2]


def test_an_exception_arrives_with_its_traceback():
    def fail_on_two(i):
        if i == 2:
            raise ArithmeticError("two")
        return i

    with Workers(2) as workers:
        with pytest.raises(ArithmeticError, match="two") as caught:
            workers.map(fail_on_two, range(5))
        assert "fail_on_two" in [entry.name for entry in caught.traceback]
        assert workers.map(fail_on_two, [1]) == [1]


def test_the_blas_is_held_and_given_back():
    def blas_threads():
        return [library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        assert before, "threadpoolctl sees no BLAS here"
        with Workers(2):
            assert all(n == 1 for n in blas_threads())
        assert blas_threads() == before
