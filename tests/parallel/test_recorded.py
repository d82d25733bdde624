"""A recorded step: each replay computes what the step itself would. On a real GPU the recording is a CUDA graph."""

import numpy as np
import pytest
from support.steps import CONFIG, batch

from npgpt import GPT
from npgpt.engine.backend import to_numpy
from npgpt.parallel.step import ParallelStep, dropout_generators, forward_backward, micro_batches
from npgpt.parallel.workers import Workers


def loss_and_gradient(step, x, y, number):
    step.model.flat.grad[...] = 99.0  # an old gradient, which the step must overwrite
    loss = float(step(x, y, seed=3, number=number))
    return loss, to_numpy(step.model.flat.grad).tobytes()


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_gives_the_bytes_of_the_step(device, bf16, micro_batch, dtype):
    """With other tokens, other dropout masks and other weights at each step."""
    model = GPT(CONFIG, seed=1, backend=device)
    x, y = batch()
    losses = []
    with Workers(1) as workers:
        step = ParallelStep(model, workers, micro_batch, bf16=dtype == "bfloat16")
        for number in range(5):
            found = loss_and_gradient(step, x, y, number)
            share = list(enumerate(micro_batches(len(x), x.shape[1], micro_batch or len(x))))
            there = device.asarray(x), device.asarray(y)
            loss = forward_backward(model, *there, share, dropout_generators(model, 3, number), step.dtype)
            assert found == (float(loss), to_numpy(model.flat.grad).tobytes())
            losses.append(found[0])
            x, y = y, x
            model.flat.data *= 1.01
    assert len(set(losses)) == 5


def test_another_batch_shape_and_other_arrays_need_another_recording(device):
    model = GPT(CONFIG, seed=1, backend=device)
    x, y = batch()
    with Workers(1) as workers:
        step = ParallelStep(model, workers)
        for rows in (7, 7, 7, 2, 2, 7):
            found = loss_and_gradient(step, x[:rows], y[:rows], 4)
            assert found == loss_and_gradient(ParallelStep(model, workers), x[:rows], y[:rows], 4)
        before = step._recorded
        data = device.xp.zeros(model.flat.data.shape, dtype=np.float32)
        model.flat.bind(data, device.xp.zeros(data.shape, dtype=np.float32))
        assert float(step(x, y, seed=3, number=4)) == pytest.approx(np.log(CONFIG.vocab_size), abs=1e-5)
        assert step._recorded is not before


def test_an_earlier_loss_keeps_its_value(device):
    model = GPT(CONFIG, seed=1, backend=device)
    with Workers(1) as workers:
        step = ParallelStep(model, workers)
        losses = [step(*batch(), seed=3, number=number) for number in range(4)]
        assert len({float(loss) for loss in losses}) == 4
