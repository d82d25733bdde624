"""Generation: the context that is used, streaming, several samples, stop texts, wrong requests."""

import numpy as np
import pytest
from support.models import model_with_clear_logits
from threadpoolctl import threadpool_info

from npgpt import GPT, CharTokenizer, GenerateConfig, RequestError, generate
from npgpt.generation import decode
from npgpt.generation.generate import TokenStream, generate_text, generate_texts
from npgpt.generation.side_by_side import Token


@pytest.fixture
def tokenizer():
    return CharTokenizer("\nabcdefgh")


@pytest.fixture
def model(tokenizer):
    return model_with_clear_logits(tokenizer)


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


def test_threads_sets_the_threads_of_the_blas(model, monkeypatch):
    seen = []

    def decode(self, ids, cache):
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return np.zeros((len(ids), 9), np.float32)

    monkeypatch.setattr(GPT, "decode", decode)
    before = threadpool_info()
    for threads in (1, 2):
        list(TokenStream(model, [1], GenerateConfig(max_new_tokens=2, threads=threads)))
    assert seen == [1, 2]
    assert threadpool_info() == before


def test_every_token_is_drawn_from_the_logits_of_its_window(model):
    """With temperature 0 and far past block_size, each token is the likeliest of the logits that its window alone gives."""
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


def test_a_sliding_window_needs_rotary_positions(model):
    with pytest.raises(
        RequestError, match="window slide needs a model with rotary positions, this one's are learned; use exact"
    ):
        TokenStream(model, [1], GenerateConfig(window="slide"))


def test_rotary_positions_slide_by_default(tokenizer):
    """Far past block_size, one more token costs one position; each is the likeliest of a cache that is fed by hand."""
    model = model_with_clear_logits(tokenizer, position="rotary")
    tokens = list(TokenStream(model, [3, 1, 4], GenerateConfig(max_new_tokens=40, temperature=0)))
    ids, cache = [3, 1, 4, *(token.id for token in tokens)], model.new_cache()
    for at, given in enumerate(ids[:-1]):
        logits = model.decode(np.array([given]), cache)[0]
        if at >= 2:
            assert logits.argmax() == ids[at + 1]
    for window in ("exact", "half"):
        other = list(TokenStream(model, [3, 1, 4], GenerateConfig(max_new_tokens=40, temperature=0, window=window)))
        assert [t.id for t in other[:5]] == ids[3:8]  # they differ only past the window


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
    assert next(first_run) == text[0]  # the first text comes before the rest is sampled


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


def test_no_more_threads_than_cores(model, monkeypatch):
    """More threads than cores wait for each other: with sixteen on two cores, a text took minutes."""
    seen = []
    real = decode.blas_threads
    monkeypatch.setattr(decode, "blas_threads", lambda threads: seen.append(threads) or real(threads))
    monkeypatch.setattr(decode, "available_cores", lambda: 2)
    for threads in (1, 2, 16):
        list(TokenStream(model, [1], GenerateConfig(max_new_tokens=2, threads=threads, seed=0)))
    assert seen == [1, 1, 2, 2, 2, 2]
