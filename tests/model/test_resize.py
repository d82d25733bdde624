"""A model with more characters or a shorter context keeps its weights."""

import dataclasses

import numpy as np
import pytest

from npgpt import GPT, GPTConfig, RequestError
from npgpt.model.resize import check_resizable, resized


def logits(model, ids):
    return model(np.array([ids]))[0].numpy()[0]


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_new_rows_change_nothing_about_the_old_ones(tie_weights, position):
    config = GPTConfig(10, block_size=8, n_layer=2, n_head=2, n_embd=8, tie_weights=tie_weights, position=position)
    model = GPT(config, seed=1)
    more = resized(model, dataclasses.replace(config, vocab_size=13, dropout=0.5), n_known=9, seed=2)
    ids = [0, 3, 8, 2]
    np.testing.assert_allclose(logits(more, ids)[:, :9], logits(model, ids)[:, :9], rtol=1e-6)
    fresh = GPT(more.config, seed=2)
    np.testing.assert_array_equal(more.wte.weight.data[9:], fresh.wte.weight.data[9:])  # also the row of the padding
    assert not np.array_equal(more.wte.weight.data[9], model.wte.weight.data[9])
    assert more.config.dropout == 0.5


def test_a_shorter_context():
    config = GPTConfig(10, block_size=8, n_layer=1, n_head=2, n_embd=8)
    model = GPT(config, seed=1)
    shorter = resized(model, dataclasses.replace(config, block_size=5), n_known=10, seed=2)
    np.testing.assert_array_equal(logits(shorter, [1, 2, 3]), logits(model, [1, 2, 3]))
    assert shorter.wpe.weight.shape == (5, 8)


def test_shapes_that_stay():
    config = GPTConfig(10, block_size=8, n_layer=1, n_head=2, n_embd=8)
    with pytest.raises(RequestError, match="keeps its shape: n_layer was 1 and is now 2, bias was True and is now False"):
        check_resizable(config, dataclasses.replace(config, n_layer=2, bias=False))
    with pytest.raises(RequestError, match="has learned 8 positions, so block_size cannot be 9; use at most 8"):
        check_resizable(config, dataclasses.replace(config, block_size=9))
    rotary = dataclasses.replace(config, position="rotary")
    check_resizable(rotary, dataclasses.replace(rotary, block_size=9))
    model = GPT(rotary, seed=1)
    longer = resized(model, dataclasses.replace(rotary, block_size=16), n_known=10, seed=2)
    np.testing.assert_allclose(logits(longer, [1, 2, 3]), logits(model, [1, 2, 3]), rtol=1e-6)
