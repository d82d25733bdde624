"""Sampling: the distribution drawn from, the context used, streaming and stopping."""

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from npgpt import GPT, CharTokenizer, GenerateConfig, GPTConfig, RequestError, generate, ops
from npgpt.engine.graph import no_grad
from npgpt.generation.generate import Token, TokenStream, generate_text, generate_texts
from npgpt.generation.sampling import sample_ids
from npgpt.kernels.cpu import few_rows_product


@pytest.fixture
def tokenizer():
    return CharTokenizer("\nabcdefgh")


@pytest.fixture
def model(tokenizer):
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8), seed=1)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.data[...] += rng.standard_normal(p.shape)  # opinions strong enough to test
    return model


def frequencies(logits, n=20_000, **settings):
    rng, ids = np.random.default_rng(0), settings.pop("ids", ())
    config = GenerateConfig(**({"temperature": 1.0} | settings))
    rows = np.vstack([logits, np.roll(logits, 1)])  # the second row is not to matter to the first
    drawn = [sample_ids(rows, config, [rng, rng], [ids, ids])[0] for _ in range(n)]
    return np.bincount(drawn, minlength=len(logits)) / n


LOGITS = np.log([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, np.array([1, 4, 9, 16]) / 30),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_k": 1}, [0, 0, 0, 1]),
        ({"top_k": 4}, [0.1, 0.2, 0.3, 0.4]),
        ({"top_k": 1000}, [0.1, 0.2, 0.3, 0.4]),
        ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.01}, [0, 0, 0, 1]),
        ({"top_p": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0, 3 / 7, 4 / 7]),
        ({"min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"min_p": 0.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"min_p": 1.0}, [0, 0, 0, 1]),
        ({"min_p": 0.3, "temperature": 0.5}, [0, 0, 9 / 25, 16 / 25]),
        # log p is negative, so the penalty multiplies: a seen p becomes p^2, before normalising.
        ({"repetition_penalty": 2.0, "ids": [3, 3]}, np.array([0.1, 0.2, 0.3, 0.16]) / 0.76),
        ({"repetition_penalty": 2.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"repetition_penalty": 100.0, "ids": [3], "temperature": 0}, [0, 0, 1, 0]),
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"temperature": 1e-320}, [0, 0, 0, 1]),
    ],
)
def test_distribution(settings, expected):
    """Chi-square over what may be drawn, at a level of 1e-6; nothing else is drawn."""
    n = 20_000
    found, expected = frequencies(LOGITS, n, **settings), np.array(expected)
    possible = expected > 0
    assert (found[~possible] == 0).all()
    chi_square = n * np.sum((found - expected)[possible] ** 2 / expected[possible])
    assert chi_square < {1: 1e-9, 2: 23.9, 3: 27.6, 4: 30.7}[possible.sum()]  # quantiles for 1, 2, 3 degrees of freedom


def test_a_positive_logit_is_divided_by_the_penalty():
    found = frequencies([2.0, 1.0], repetition_penalty=2.0, ids=[0])
    assert found[0] == pytest.approx(0.5, abs=0.02)


def test_equals_of_the_kth_are_kept():
    found = frequencies([1.0, 1.0, 0.0], n=500, top_k=1)
    assert (found[:2] > 0.3).all()
    assert found[2] == 0


def test_generate_returns_context_and_new_ids(model):
    ids = generate(model, [1, 2], 12, seed=0)
    assert ids[:2] == [1, 2]
    assert len(ids) == 14
    assert all(type(i) is int and 0 <= i < 9 for i in ids)
    assert generate(model, np.array([1, 2]), 12, seed=0) == ids
    assert generate(model, [1, 2], 12, seed=1) != ids
    assert generate(model, [1, 2], 0) == [1, 2]
    assert generate(model, [1, 2], 12) != generate(model, [1, 2], 12)


def test_the_last_block_size_tokens_decide(model):
    tail = [3, 1, 4, 1, 5, 2, 6, 5]
    a = generate(model, tail, 10, temperature=0)[8:]
    b = generate(model, [7, 7, 0, *tail], 10, temperature=0)[11:]
    assert a == b
    greedy = [*tail]
    for _ in range(10):
        logits, _ = model(np.array([greedy[-8:]]))
        greedy.append(int(logits.data[0, -1].argmax()))
    assert greedy[8:] == a


@pytest.mark.parametrize(
    "options", [{}, {"tie_weights": True}, {"bias": False, "n_layer": 3}, {"activation": "relu", "d_ff": 20}]
)
def test_cached_and_uncached_logits_agree(options):
    """At every position, whatever pieces the tokens come in."""
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
        for first in (0, 5):  # the rest token by token, on plain arrays
            cache = model.new_cache(3)
            if first:
                model(ids[:, :first], cache=cache)
            for at in range(first, 12):
                np.testing.assert_allclose(model.decode(ids[:, at], cache), whole[:, at], rtol=0, atol=1e-5)
            assert cache.length == 12
        with pytest.raises(ValueError, match="12 - 12 in the cache"):
            model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("rows", [1, 2, 16, 32, 33])
@pytest.mark.parametrize("shape", [(64, 128), (1537, 384), (1024, 256), (40, 130)])
def test_products_in_pieces(rng, rows, shape):
    """Of any number of rows, columns that are a multiple of a piece or not, one part of the sum or several."""
    x, weight = rng.standard_normal((rows, shape[0])), rng.standard_normal(shape)
    np.testing.assert_allclose(few_rows_product(x, weight), x @ weight, rtol=0, atol=1e-10)


def test_the_last_position_alone_is_as_among_the_others(model, rng):
    model.parameters().data += 0.3 * rng.standard_normal(model.num_parameters(), dtype=np.float32)
    ids, targets = rng.integers(0, 9, (3, 8)), rng.integers(0, 9, (3, 1))
    logits, loss = model(ids, targets, last_only=True)
    assert logits.shape == (3, 1, 9)
    np.testing.assert_allclose(logits.data, model(ids)[0].data[:, -1:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss.item(), ops.cross_entropy(model(ids)[0][:, -1:], targets).item(), atol=1e-5)
    cache = model.new_cache(3)
    model(ids[:, :5], cache=cache, last_only=True)
    np.testing.assert_allclose(model(ids[:, 5:], cache=cache, last_only=True)[0].data, logits.data, rtol=0, atol=1e-5)


def test_threads_are_those_of_the_blas(model, monkeypatch):
    seen = []

    def decode(self, ids, cache, blas_threads):
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return np.zeros((len(ids), 9), np.float32)

    monkeypatch.setattr(GPT, "decode", decode)
    before = threadpool_info()
    for threads in (1, 2):
        list(TokenStream(model, [1], GenerateConfig(max_new_tokens=2, threads=threads)))
    assert seen == [1, 2]
    assert threadpool_info() == before


def test_every_token_is_drawn_from_the_logits_of_its_window(model):
    """Greedy, far past block_size: as if each had been computed from nothing."""
    for window in ("exact", "half"):
        settings = GenerateConfig(max_new_tokens=40, temperature=0, window=window)
        tokens = list(TokenStream(model, [3, 1, 4], settings))
        ids = [3, 1, 4]
        seen = 3
        for token in tokens:
            if window == "exact":
                seen = min(len(ids), 8)
            elif seen > 8:
                seen = 4
            logits = model(np.array([ids[-seen:]]))[0].data[0, -1].astype(float)
            assert token.id == logits.argmax()
            assert token.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), abs=1e-5)
            ids.append(token.id)
            seen += 1


def test_a_sample_is_the_same_alone_and_among_others(model, tokenizer):
    settings = GenerateConfig(max_new_tokens=30, temperature=1.0, seed=3, num_samples=5)
    texts = dict.fromkeys(range(5), "")
    tokens = []
    for piece in generate_texts(model, tokenizer, "ab", settings, tokens=tokens):
        texts[piece.sample] += piece.text
    assert len(set(texts.values())) == 5
    for sample, text in texts.items():
        assert "".join(generate_text(model, tokenizer, "ab", settings, sample=sample)) == text
        assert "".join(tokenizer.itos[token.id] for token in tokens if token.sample == sample) == text
    assert all(isinstance(token, Token) and token.logprob < 0 for token in tokens)


def test_a_sample_that_stops_leaves_the_others_alone(model, tokenizer):
    settings = GenerateConfig(max_new_tokens=30, temperature=1.0, seed=3, num_samples=4)
    whole = ["".join(generate_text(model, tokenizer, "ab", settings, sample=k)) for k in range(4)]
    stop = whole[2][3:5]
    texts, ended = dict.fromkeys(range(4), ""), []
    for piece in generate_texts(model, tokenizer, "ab", settings, [stop]):
        assert piece.sample not in ended
        texts[piece.sample] += piece.text
        ended += [piece.sample] * piece.done
    assert sorted(ended) == [0, 1, 2, 3]
    assert [texts[k] for k in range(4)] == [text.split(stop)[0] for text in whole]


def test_text_streams_and_repeats(model, tokenizer):
    settings = GenerateConfig(max_new_tokens=40, temperature=1.0, seed=3)
    pieces = list(generate_text(model, tokenizer, "ab", settings))
    assert len(pieces) >= 40
    text = "".join(pieces)
    assert tokenizer.encode("ab" + text) == generate(model, tokenizer.encode("ab"), 40, seed=3)
    assert "".join(generate_text(model, tokenizer, "ab", settings, sample=1)) != text
    first_run = generate_text(model, tokenizer, "ab", settings)
    assert next(first_run) == text[0]  # before the rest is drawn


def test_stop(model, tokenizer):
    settings = GenerateConfig(max_new_tokens=40, temperature=1.0, seed=3)
    text = "".join(generate_text(model, tokenizer, "ab", settings))
    for stop in (text[5:8], text[0], text[-3:]):
        stopped = "".join(generate_text(model, tokenizer, "ab", settings, [stop, "not in it"]))
        assert stopped == text[: text.index(stop)]
    assert "".join(generate_text(model, tokenizer, "ab", settings, [text + "x"])) == text


def test_empty_prompt_begins_a_line(model, tokenizer):
    settings = GenerateConfig(max_new_tokens=5, seed=3)
    assert "".join(generate_text(model, tokenizer, "", settings)) == "".join(generate_text(model, tokenizer, "\n", settings))


def test_bad_requests(model, tokenizer):
    for arguments, words in [
        (([], 5), "at least one token"),
        (([9], 5), r"0\.\.8"),
        (([-1], 5), r"0\.\.8"),
        (([1], -1), "max_new_tokens"),
        (([1], 5, -0.1), "temperature must be a number at least 0, got -0.1"),
        (([1], 5, float("nan")), "temperature"),
        (([1], 5, 1.0, 0), "top_k must be a whole number at least 1, got 0"),
        (([1], 5, 1.0, None, 1.5), "top_p"),
    ]:
        with pytest.raises(RequestError, match=words):
            generate(model, *arguments)
    with pytest.raises(RequestError, match="unknown character 'z'"):
        generate_text(model, tokenizer, "az", GenerateConfig())
