"""Decoding token by token: the logits with a cache and those of `model.decode` equal the logits of the whole sequence."""

import numpy as np
import pytest
from support.models import model_with_clear_logits

from npgpt import GPT, CharTokenizer, GPTConfig, ops
from npgpt.engine.graph import no_grad
from npgpt.kernels.native.library import processors
from npgpt.parallel.machine import blas_threads


@pytest.fixture(autouse=True, params=[1, 2])
def threads_of_the_blas(request):
    """With one thread, other kernels are used."""
    with blas_threads(request.param):
        yield


@pytest.fixture
def tokenizer():
    return CharTokenizer("\nabcdefgh")


@pytest.fixture
def model(tokenizer):
    return model_with_clear_logits(tokenizer)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_weights": True}, {"bias": False, "n_layer": 3}, {"activation": "relu", "d_ff": 20}, {"position": "rotary"}],
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
            model(ids[:, : 2 if "position" in options else 1], cache=cache)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_sequences_of_different_lengths_are_decoded_side_by_side(position):
    """Each has the logits that it has alone, after caches were joined, and after one sequence was removed."""
    model = GPT(GPTConfig(11, block_size=12, n_layer=2, n_head=2, n_embd=8, position=position), seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    ids = np.random.default_rng(1).integers(0, 11, (3, 12))
    cache = model.new_cache(0)
    with no_grad():
        whole = model(ids)[0].data
        for row, first in enumerate([5, 2, 7]):
            own = model.new_cache()
            model(ids[row : row + 1, :first], cache=own)
            cache.append(own, [0])
    rows, at = np.arange(3), np.array([5, 2, 7])
    assert np.array_equal(cache.lengths, at)
    with pytest.raises(ValueError, match=r"differ in length: \[5, 2, 7\]"):
        assert cache.length
    for _ in range(5):
        np.testing.assert_allclose(model.decode(ids[rows, at], cache), whole[rows, at], rtol=0, atol=1e-5)
        at = at + 1
        if at[0] == 7:
            cache.remove(0)
            rows, at = rows[[2, 1]], at[[2, 1]]


def logits_by_definition(model, ids, window):
    """The logits at every position of a model with rotary positions, where each position attends to the last `window` ones.

    Written from the definitions, in float64, position by position: ids (T,) -> (T, V).
    """
    p = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    config = model.config
    head_dim = config.n_embd // config.n_head

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def turned(x, position):
        """x (head_dim,): each pair as a complex number, times e^(i angle)."""
        angles = position * 10_000.0 ** (-2 * np.arange(head_dim // 2) / head_dim)
        return (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)

    x = p["wte.weight"][ids]
    for layer in range(config.n_layer):
        q, k, v = (
            part.reshape(len(ids), config.n_head, head_dim)
            for part in np.split(linear(norm(x, f"blocks.{layer}.ln_1"), f"blocks.{layer}.attn.qkv"), 3, axis=1)
        )
        y = np.zeros_like(q)
        for t in range(len(ids)):
            seen = range(max(0, t - window + 1), t + 1)
            for h in range(config.n_head):
                scores = np.array([(turned(q[t, h], t) * turned(k[s, h], s).conj()).real.sum() for s in seen])
                weights = np.exp(scores / np.sqrt(head_dim))
                y[t, h] = weights / weights.sum() @ v[list(seen), h]
        x = x + linear(y.reshape(len(ids), -1), f"blocks.{layer}.attn.out")
        hidden = linear(norm(x, f"blocks.{layer}.ln_2"), f"blocks.{layer}.mlp.fc")
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(hidden, f"blocks.{layer}.mlp.proj")
    return norm(x, "ln_f") @ p["lm_head.weight"]


def test_a_sliding_window_is_what_its_definition_says(rng):
    """Past block_size, each position attends to the last block_size ones, at its own position in the whole text."""
    model = GPT(GPTConfig(11, block_size=6, n_layer=2, n_head=2, n_embd=8, position="rotary"), seed=1, dtype=np.float64)
    model.parameters().data += 0.3 * rng.standard_normal(model.num_parameters())
    ids = rng.integers(0, 11, 25)
    expected = logits_by_definition(model, ids, window=6)
    assert np.abs(logits_by_definition(model, ids, window=7) - expected)[7:].max() > 1e-3
    with no_grad():
        np.testing.assert_allclose(model(ids[None, :6])[0].data[0], expected[:6], rtol=0, atol=1e-10)
        for first in (0, 4, 6):
            cache, on_tensors = model.new_cache(1), model.new_cache(1)
            for c in (cache, on_tensors) if first else ():
                model(ids[None, :first], cache=c)
            for at in range(first, 25):
                np.testing.assert_allclose(model.decode(ids[at : at + 1], cache)[0], expected[at], rtol=0, atol=1e-10)
                logits = model(ids[None, at : at + 1], cache=on_tensors)[0].data[0, 0]  # as on a GPU
                np.testing.assert_allclose(logits, expected[at], rtol=0, atol=1e-10)


def test_a_sliding_window_of_several_sequences(rng):
    model = GPT(GPTConfig(11, block_size=6, n_layer=2, n_head=2, n_embd=8, position="rotary"), seed=1)
    model.parameters().data += 0.3 * rng.standard_normal(model.num_parameters(), dtype=np.float32)
    ids, cache = rng.integers(0, 11, (3, 20)), model.new_cache(3)
    for at in range(20):
        if at == 13:
            cache.remove(0)
            ids = ids[[2, 1]]
        logits = model.decode(ids[:, at], cache)
    for row, text in zip(logits, ids, strict=True):
        np.testing.assert_allclose(row, logits_by_definition(model, text, window=6)[-1], rtol=0, atol=1e-4)


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


def test_decoding_uses_the_weights_that_the_model_has_now():
    """A cache knows where the weights were. New arrays may take their place, also arrays that the kernels in C cannot read."""
    model, ids = GPT(GPTConfig(11, block_size=12, n_layer=2, n_head=2, n_embd=24), seed=1), np.array([3])
    proj, cache, fresh = model.blocks[1].mlp.proj.weight, model.new_cache(), model.new_cache()
    with blas_threads(1):
        before = [model.decode(ids, cache) for _ in range(2)]
        proj.data = 2 * proj.data
        after = [model.decode(ids, fresh) for _ in range(3)]
        assert np.abs(after[1] - before[1]).max() > 1e-3
        np.testing.assert_array_equal(model.decode(ids, cache), after[2])
        assert (cache.addresses is not None) == bool(processors())
        expected = model.decode(ids, fresh)
        proj.data = np.asfortranarray(proj.data)
        np.testing.assert_allclose(model.decode(ids, cache), expected, rtol=1e-4, atol=1e-6)
        assert cache.addresses is None
