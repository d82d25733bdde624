"""Texts that are drawn side by side, that join and leave: each is what it would be alone, to the last token."""

import numpy as np
import pytest
from support.models import model_with_clear_logits

from npgpt import CharTokenizer, GenerateConfig
from npgpt.generation import side_by_side
from npgpt.generation.decode import NextLogits
from npgpt.generation.generate import TokenStream
from npgpt.generation.sampling import sample_ids
from npgpt.generation.side_by_side import SideBySide

MODELS = [("learned", "exact"), ("learned", "half"), ("rotary", "slide"), ("rotary", "half")]


def model_of(position):
    return model_with_clear_logits(CharTokenizer("\nabcdefgh"), position=position)


@pytest.mark.parametrize(("position", "window"), MODELS)
def test_logits_of_texts_of_different_lengths_are_those_of_each_alone(position, window):
    """Before the window is full, while it fills, and past it; texts join and leave in between."""
    model, rng = model_of(position), np.random.default_rng(3)
    together = NextLogits(model, window, threads=1)
    texts, alone = {}, {}
    for step in range(60):
        if step % 4 == 0:  # a text joins, and later leaves
            texts[step] = rng.integers(0, 9, rng.integers(1, 12)).tolist()
            alone[step] = NextLogits(model, window, threads=1)
        if step % 9 == 8:
            del texts[rng.choice(list(texts))]
        logits = together(texts)
        for row, key in enumerate(texts):
            np.testing.assert_allclose(logits[row], alone[key]({0: texts[key]})[0], rtol=0, atol=2e-5)
            texts[key].append(int(rng.integers(0, 9)))


SETTINGS = [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.5, "top_p": 1.0}]


@pytest.mark.parametrize(("position", "window"), MODELS)
def test_texts_that_join_and_leave_are_what_each_is_alone(position, window):
    model, rng = model_of(position), np.random.default_rng(3)
    texts = SideBySide(model, window)
    drawn, asked = {}, {}
    for step in range(50):
        if step % 2 == 0:
            settings = GenerateConfig(**({"temperature": 1.0, "max_new_tokens": 20, "window": window} | SETTINGS[step % 6]))
            asked[step] = (rng.integers(0, 9, rng.integers(1, 12)).tolist(), settings, step % 3)
            texts.add(step, asked[step][0], settings, 7 + step, step % 3)
            drawn[step] = []
        for token in texts.step():
            drawn[token.sample].append(token.id)
            if len(drawn[token.sample]) == 20:
                texts.remove(token.sample)
    for key, (context, settings, sample) in asked.items():
        seeded = GenerateConfig(**(vars(settings) | {"seed": 7 + key}))
        alone = [token.id for token in TokenStream(model, context, seeded, [sample])]
        assert drawn[key] == alone[: len(drawn[key])]
        assert len(drawn[key]) == min(20, 50 - key)


def test_a_close_draw_is_decided_by_the_logits_alone(monkeypatch):
    """Logits among others that are wrong by almost the tolerance change no token, although they change some draws."""
    model = model_of("rotary")
    settings = GenerateConfig(max_new_tokens=200, temperature=1.0, seed=3, window="half")
    alone = {k: [token.id for token in TokenStream(model, [1, 2], settings, [k])] for k in range(4)}
    decided, decode = [], NextLogits.__call__

    def wrong(self, texts):
        logits = decode(self, texts)
        if len(texts) > 1:
            logits += 0.004 * np.random.default_rng(max(map(len, texts.values()))).choice([-1, 1], logits.shape)
        return logits

    def counting(self, text):
        decided.append(text)
        return draw_alone(self, text)

    draw_alone = SideBySide._draw_alone
    monkeypatch.setattr(NextLogits, "__call__", wrong)
    monkeypatch.setattr(SideBySide, "_draw_alone", counting)
    monkeypatch.setattr(
        side_by_side, "ROUNDINGS", 0.004 / np.finfo(np.float32).eps / np.sqrt(8)
    )  # the largest logit is above 1
    found = {k: [] for k in range(4)}
    for token in TokenStream(model, [1, 2], settings, range(4)):
        found[token.sample].append(token.id)
    assert found == alone
    assert 0 < len(decided) <= 4  # once for each text
    monkeypatch.setattr(side_by_side, "ROUNDINGS", 0)
    found = {k: [] for k in range(4)}
    for token in TokenStream(model, [1, 2], settings, range(4)):
        found[token.sample].append(token.id)
    assert found != alone  # so the test can fail


@pytest.mark.parametrize("settings", [*SETTINGS, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7}])
def test_a_draw_that_is_not_close_survives_every_error_within_the_tolerance(settings):
    rng = np.random.default_rng(0)
    config = GenerateConfig(**({"temperature": 1.0} | settings))
    n, tolerance = 4000, 1e-3
    logits, draws = 3 * rng.standard_normal((n, 12)), rng.random(n)
    logits[: n // 4, 0] = logits[: n // 4].max(axis=1)  # ties
    if config.min_p:  # at the limit
        logits[n // 4 : n // 2, 1] = logits[n // 4 : n // 2, 2:].max(axis=1) + config.temperature * np.log(config.min_p)
    texts = [[1, 2]] * n
    ids, is_close = sample_ids(logits, config, draws, texts, np.full(n, tolerance))
    assert np.array_equal(ids, sample_ids(logits, config, draws, texts)[0])
    changed = np.zeros(n, dtype=bool)
    for _ in range(20):
        wrong = logits + tolerance * rng.uniform(-1, 1, logits.shape)
        changed |= sample_ids(wrong, config, draws, texts)[0] != ids
    assert changed.any()
    assert not (changed & ~is_close).any()
    assert is_close[n // 2 :].mean() < 0.1
