"""Sampling: the distribution drawn from, the context used, streaming and stopping."""

import numpy as np
import pytest

from npgpt import GPT, CharTokenizer, GenerateConfig, GPTConfig, RequestError, generate
from npgpt.generate import generate_text, next_logits, sample_id


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
    rng = np.random.default_rng(0)
    arguments = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    drawn = [sample_id(np.array(logits), rng=rng, **arguments) for _ in range(n)]
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
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"temperature": 1e-320}, [0, 0, 0, 1]),
    ],
)
def test_distribution(settings, expected):
    found = frequencies(LOGITS, **settings)
    expected = np.array(expected)
    assert (found[expected == 0] == 0).all()
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-12)


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
    np.testing.assert_array_equal(next_logits(model, tail), model(np.array([tail]))[0].data[0, -1])


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
