"""Decoding token by token: the logits with a cache and those of `model.decode` equal the logits of the whole sequence."""

import numpy as np
import pytest
from support.models import model_with_clear_logits

from npgpt import GPT, CharTokenizer, GPTConfig, ops
from npgpt.engine.graph import no_grad


@pytest.fixture
def tokenizer():
    return CharTokenizer("\nabcdefgh")


@pytest.fixture
def model(tokenizer):
    return model_with_clear_logits(tokenizer)


@pytest.mark.parametrize(
    "options", [{}, {"tie_weights": True}, {"bias": False, "n_layer": 3}, {"activation": "relu", "d_ff": 20}]
)
def test_cached_and_uncached_logits_agree(options):
    """The logits agree at every position, for every division of the tokens into calls."""
    model = GPT(GPTConfig(11, **({"block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 8} | options)), seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    ids = np.random.default_rng(1).integers(0, 11, (3, 12))
    with no_grad():
        whole = model(ids)[0].data
        for pieces in ([1] * 12, [12], [5, 1, 1, 5], [1, 11]):
            cache, at = model.new_cache(3), 0
            for size in pieces:
                logits = model(ids[:, at : at + size], cache=cache)[0].data
                np.testing.assert_allclose(logits, whole[:, at : at + size], rtol=0, atol=1e-5)
                at += size
        for first in (0, 5):  # decode the rest token by token
            cache = model.new_cache(3)
            if first:
                model(ids[:, :first], cache=cache)
            for at in range(first, 12):
                np.testing.assert_allclose(model.decode(ids[:, at], cache), whole[:, at], rtol=0, atol=1e-5)
            assert cache.length == 12
        with pytest.raises(ValueError, match="12 - 12 in the cache"):
            model(ids[:, :1], cache=cache)


def test_last_only_gives_the_logits_of_the_last_position(model, rng):
    model.parameters().data += 0.3 * rng.standard_normal(model.num_parameters(), dtype=np.float32)
    ids, targets = rng.integers(0, 9, (3, 8)), rng.integers(0, 9, (3, 1))
    logits, loss = model(ids, targets, last_only=True)
    assert logits.shape == (3, 1, 9)
    np.testing.assert_allclose(logits.data, model(ids)[0].data[:, -1:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss.item(), ops.cross_entropy(model(ids)[0][:, -1:], targets).item(), atol=1e-5)
    cache = model.new_cache(3)
    model(ids[:, :5], cache=cache, last_only=True)
    np.testing.assert_allclose(model(ids[:, 5:], cache=cache, last_only=True)[0].data, logits.data, rtol=0, atol=1e-5)
