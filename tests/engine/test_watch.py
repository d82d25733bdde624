"""Watching operations: numbers that are not finite, and arrays that are changed in place."""

import numpy as np
import pytest

from npgpt import GPT, GPTConfig, Tensor, ops
from npgpt.engine.watch import InPlaceError, NonFiniteError, detect_anomaly


def test_the_first_operation_that_is_not_finite_is_named():
    a = Tensor([1.0, 0.0], requires_grad=True)
    with (
        np.errstate(divide="ignore"),
        detect_anomaly(),
        pytest.raises(NonFiniteError, match=r"the forward pass of Tensor\.log gave 1 of 2"),
    ):
        a.log().sum()


@pytest.mark.parametrize("which", ["input", "result"])
def test_an_array_changed_in_place_is_found(which):
    a = Tensor([1.0, 2.0], requires_grad=True)
    with detect_anomaly():
        middle = a.exp()
        loss = (middle * middle).sum()
        (a if which == "input" else middle).data[0] = 5.0
        op = r"Tensor\.exp" if which == "input" else r"Tensor\.__mul__"
        with pytest.raises(InPlaceError, match=f"an input or the result of {op} was changed in place"):
            loss.backward()


def test_a_model_changes_nothing_in_place():
    model = GPT(GPTConfig(7, block_size=4, n_layer=2, n_head=2, n_embd=8, dropout=0.2), seed=1)
    ids = np.random.default_rng(0).integers(0, 7, (2, 4))
    rng = model.backend.generator(1, 2, 3)
    with detect_anomaly():
        _, loss = model(ids, ids, rng)
        loss.backward()
    expected = model.flat.grad.copy()
    model.zero_grad()
    model(ids, ids, model.backend.generator(1, 2, 3))[1].backward()
    np.testing.assert_array_equal(model.flat.grad, expected)
    with detect_anomaly():
        _, loss = model(ids, ids)
        model.blocks[0].mlp.fc.weight.data *= 2
        with pytest.raises(InPlaceError, match="of linear was changed in place"):
            loss.backward()


def test_operations_outside_are_not_watched():
    a = Tensor([1.0, 0.0], requires_grad=True)
    with np.errstate(divide="ignore"):
        y = ops.relu(a).log().sum()
    assert np.isinf(y.item())
