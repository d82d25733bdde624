"""Evaluation: the exact loss of a text, its standard error, and the paired comparison of models."""

import dataclasses
import math

import numpy as np
import pytest

from npgpt import GPT, BPETokenizer, CharTokenizer, GPTConfig, RequestError, evaluate, ops
from npgpt.evaluation.comparison import compare
from npgpt.evaluation.loss import Loss


def test_evaluation_is_exact(tokenizer, text, small_config):
    model = GPT(small_config, seed=1)
    ids = tokenizer.encode_array(text[:1000])
    result = evaluate(model, ids)
    assert result.n_targets == 999
    losses = []
    for start in range(0, 999, 16):
        x, y = ids[start : start + 16][: 999 - start], ids[start + 1 : start + 17]
        logits, _ = model(x[None].astype(int))
        losses.append(ops.cross_entropy(logits, y[None].astype(int), reduction="none").data[0])
    assert result.loss == pytest.approx(np.mean(np.concatenate(losses)), rel=1e-6)
    means = [window.mean() for window in losses]
    assert result.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=0.05)
    assert evaluate(model, ids) == result
    assert evaluate(model, ids[:10]).stderr is None
    with pytest.raises(RequestError, match="at least 2"):
        evaluate(model, ids[:1])
    assert evaluate(model, ids, max_tokens=999) == result
    quick_look = evaluate(model, ids, max_tokens=5 * 16)
    assert quick_look.n_targets == 80
    assert quick_look.loss == pytest.approx(np.mean([losses[i * 62 // 5] for i in range(5)]), rel=1e-6)
    assert Loss(math.log(8), None, 1).bits_per_token == pytest.approx(3)
    assert Loss(math.log(8), None, 1).perplexity == pytest.approx(8)


def test_compare_is_the_paired_difference(tokenizer, text, small_config):
    ids = tokenizer.encode_array(text[:2000])
    longer = dataclasses.replace(small_config, block_size=32)
    models = [GPT(small_config, seed=1), GPT(longer, seed=2), GPT(small_config, seed=1)]
    results = compare([(model, ids) for model in models])
    losses = [evaluate(model, ids) for model in models]
    for (loss, _), alone in zip(results, losses, strict=True):
        assert loss.loss == pytest.approx(alone.loss, rel=1e-9)
        assert loss.n_targets == 1999
    assert results[0][1] is None
    other, same = results[1][1], results[2][1]
    assert other.difference == pytest.approx(losses[1].loss - losses[0].loss, rel=1e-6)
    spans = []
    for model in models[:2]:
        x, y = ids[:-1], ids[1:]
        each = []
        for start in range(0, 1984, model.config.block_size):
            piece = slice(start, start + model.config.block_size)
            logits, _ = model(x[None, piece].astype(int))
            each.append(ops.cross_entropy(logits, y[None, piece].astype(int), reduction="none").data[0])
        spans.append(np.concatenate(each)[:1984].reshape(62, 32).sum(axis=1))
    expected = np.std(spans[1] - spans[0], ddof=1) / math.sqrt(62) / 32
    assert other.stderr == pytest.approx(expected, rel=0.05)
    assert (same.difference, same.stderr) == (0, 0)
    with pytest.raises(RequestError, match="the same length in bytes"):
        compare([(models[0], ids), (models[1], ids[1:])], tokenizers=[tokenizer, tokenizer])
    with pytest.raises(RequestError, match="the same number of ids"):
        compare([(models[0], ids), (models[1], ids[1:])])


def test_different_tokenizers_are_aligned_by_bytes(tokenizer, text):
    """No model predicts its first token. So only the bytes after the longest first token are compared."""
    pytest.importorskip("tokenizers")
    judged = " the bell, the bell \u00e9 rang, " + text[:1500]
    characters = CharTokenizer.build_vocab(judged)
    bpe = BPETokenizer.train(["the bell " * 200 + judged], 300)
    config = GPTConfig(300, block_size=16, n_layer=1, n_head=2, n_embd=16)
    runs = [(GPT(config, seed=seed), t.encode_array(judged)) for seed, t in ((1, characters), (2, bpe))]
    first = len(bpe.token_bytes(int(runs[1][1][0])))
    assert first > 1
    results = compare(runs, tokenizers=[characters, bpe])
    n_bytes = len(judged.encode()) - first
    assert [loss.n_targets for loss, _ in results] == [n_bytes] * 2
    for (model, ids), (loss, _), skipped in zip(runs, results, (first - 1, 0), strict=True):
        alone = evaluate(model, ids)
        # The losses of the characters that are left out are those of the first window, spread over its characters.
        window = evaluate(model, ids[:17])
        assert loss.loss * n_bytes == pytest.approx(alone.loss * alone.n_targets - skipped * window.loss, rel=1e-9)
    difference = results[1][1]
    assert difference.difference == pytest.approx(results[1][0].loss - results[0][0].loss)
    swapped = compare(runs[::-1], tokenizers=[bpe, characters])[1][1]
    assert (swapped.difference, swapped.stderr) == pytest.approx((-difference.difference, difference.stderr))
