"""The data of the inside page: the numbers of `npgpt.inside`, packed, whatever the text holds."""

import base64
import json

import numpy as np
import pytest
from support.hostile import HOSTILE

import npgpt
from npgpt import GPT, BPETokenizer, CharTokenizer, GPTConfig, RequestError
from npgpt.report import inside_page as page_module
from npgpt.report.inside_page import inside_data, inside_page, shown_token


def unpacked(packed, dtype):
    return np.frombuffer(base64.b64decode(packed), dtype=dtype)


def softmax(logits):
    p = np.exp(logits.astype(float) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_the_numbers_are_those_of_inside(tokenizer, position):
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=32, n_layer=3, n_head=2, n_embd=16, position=position), seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    data = inside_data(model, tokenizer, "HOB:\nThe bell")
    ids = tokenizer.encode("HOB:\nThe bell")
    found, n = npgpt.inside(model, ids), len(ids)
    assert data["tokens"] == ids
    assert [data["text"][i] for i in ids] == list("HOB:\nThe bell")
    p = softmax(found.logits)
    np.testing.assert_allclose(data["surprisal"][1:], -np.log2(p[np.arange(n - 1), ids[1:]]), atol=1e-3)
    top, logits = unpacked(data["topIds"], "<u4").reshape(n, -1), unpacked(data["topLogits"], "<f4").reshape(n, -1)
    assert top.shape == (n, data["nTop"]) == (n, tokenizer.vocab_size)
    assert np.array_equal(np.take_along_axis(found.logits, top.astype(int), axis=1), logits)
    assert (np.diff(logits) <= 0).all()
    assert data["tails"] == [[]] * n
    weights = (unpacked(data["attention"], np.uint8) / 255.0).reshape(3, 2, n * (n + 1) // 2) ** 2
    rows, columns = np.tril_indices(n)
    np.testing.assert_allclose(weights, found.attention[:, :, rows, columns], atol=0.005)
    lens_ids = unpacked(data["lensIds"], "<u4").reshape(4, n, 5)
    assert np.array_equal(lens_ids[:, :, 0], found.layer_logits.argmax(axis=-1))
    lens_p = unpacked(data["lensP"], np.uint8).reshape(4, n, 5) / 255
    np.testing.assert_allclose(lens_p[..., 0], softmax(found.layer_logits).max(axis=-1), atol=0.003)


def test_a_large_vocabulary_is_cut_off(monkeypatch):
    """The page knows of the rest how many ids have about which logit, so its probabilities stay right."""
    monkeypatch.setattr(page_module, "MOST_LOGITS", 20)
    tokenizer = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 500))))
    model = GPT(GPTConfig(512, block_size=8, n_layer=1, n_head=1, n_embd=8), seed=1)  # with padding
    model.parameters().data += np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    data = inside_data(model, tokenizer, "一丁丂")
    logits = npgpt.inside(model, [0, 1, 2]).logits[:, :500].astype(float)
    top = unpacked(data["topLogits"], "<f4").reshape(3, 20).astype(float)
    assert unpacked(data["topIds"], "<u4").max() < 500
    for row in range(3):
        assert sum(count for _, count in data["tails"][row]) == 480
        for temperature in (0.5, 1.0, 2.0):
            whole = np.exp(logits[row] / temperature).sum()
            packed = np.exp(top[row] / temperature).sum()
            packed += sum(count * np.exp(logit / temperature) for logit, count in data["tails"][row])
            assert packed == pytest.approx(whole, rel=0.02)


def test_long_texts(clear_model, tokenizer, text, monkeypatch):
    data = inside_data(clear_model, tokenizer, text[:100])
    assert (data["nGiven"], data["nRead"], len(data["tokens"])) == (100, 16, 16)
    assert data["tokens"] == tokenizer.encode(text[84:100])
    whole = data["surprisal"]
    monkeypatch.setattr(page_module, "MOST_WEIGHTS", 200)
    data = inside_data(clear_model, tokenizer, text[:100])
    assert (data["nRead"], len(data["tokens"])) == (16, 10)
    assert data["surprisal"] == whole[6:]
    assert None not in data["surprisal"]
    assert len(unpacked(data["attention"], np.uint8)) == 4 * 55
    assert inside_data(clear_model, tokenizer, "")["tokens"] == tokenizer.start_ids
    assert inside_data(clear_model, tokenizer, "H")["surprisal"] == [None]


def test_wrong_requests(clear_model, tokenizer):
    with pytest.raises(RequestError, match="unknown character '中'"):
        inside_data(clear_model, tokenizer, "中")
    clear_model.parameters().data[:] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="not finite"):
        inside_data(clear_model, tokenizer, "HOB")


def test_tokens_can_be_read():
    bpe = BPETokenizer.train(["é" * 50], 258)
    assert shown_token(bpe, bpe.encode("é")[0]) == "é"
    assert "<C3>" in [shown_token(bpe, i) for i in range(256)]
    assert "␀" in [shown_token(bpe, i) for i in range(256)]
    long = BPETokenizer.train(["ab" * 5000], 300)
    assert max(len(shown_token(long, i)) for i in range(long.vocab_size)) <= 61


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_page_of_any_text(hostile):
    bpe = BPETokenizer.train(["some text"], 260)
    model = GPT(GPTConfig(bpe.vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=8), seed=1)
    if "\ud800" in hostile:
        with pytest.raises(RequestError, match="the tokenizer has no token for it"):
            inside_page("x", model, bpe, hostile)
        return
    page = inside_page(hostile[:100], model, bpe, hostile)
    assert page.isprintable() is False  # it has line breaks
    assert page.count("<script") == 3
    data = page.split('id="inside-data">')[1].split("</script>")[0]
    shown = "".join(json.loads(data)["text"].values())
    assert "\x00" not in shown
    page.encode()
