"""From logits to ids: temperature, top-k, top-p, min-p, repetition penalty. Knows no model and no text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npgpt.config.settings import GenerateConfig


def sample_ids(
    logits: np.ndarray, settings: GenerateConfig, rngs: Sequence[np.random.Generator], texts: Sequence[Sequence[int]]
) -> np.ndarray:
    """Draw one id for each row of logits: (B, V) -> (B,).

    Each row has a generator of its own. The id drawn for a row depends only on its logits, its generator and its text. With
    temperature 0 the likeliest id is taken; among equals, the lowest id.
    """
    weights = _weights(logits, settings, texts)
    if settings.temperature == 0:
        return weights.argmax(axis=1)
    cumulative = np.cumsum(weights, axis=1)
    drawn = np.array([rng.random() for rng in rngs]) * cumulative[:, -1]
    return (cumulative > drawn[:, None]).argmax(axis=1)


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The natural logarithm of the probability of one id in each row: logits (B, V), ids (B,) -> (B,)."""
    top = logits.max(axis=1)
    return logits[np.arange(len(ids)), ids] - top - np.log(np.exp(logits - top[:, None]).sum(axis=1))


def _weights(logits: np.ndarray, settings: GenerateConfig, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """(B, V). With temperature 0: logits. Otherwise: probabilities that are not normalised.

    The restrictions apply in this order:
    - `repetition_penalty` acts on the logits of ids that occur in the text: a positive logit is divided by it, a negative
      one is multiplied ("CTRL", Keskar et al., 2019);
    - `top_k` keeps the k likeliest ids, and all ids as likely as the k-th;
    - then the logits are divided by the temperature;
    - `top_p` keeps the smallest set of the likeliest ids whose probabilities add up to at least top_p ("The Curious Case of
      Neural Text Degeneration", Holtzman et al., 2020);
    - `min_p` keeps ids with at least this fraction of the highest probability ("Turning Up the Heat: Min-p Sampling",
      Nguyen et al., 2024).
    """
    logits = np.array(logits, dtype=np.float64)
    if settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        for own, ids in zip(logits, texts, strict=True):
            seen = np.unique(np.asarray(ids, dtype=np.int64))
            own[seen] = np.where(own[seen] > 0, own[seen] / penalty, own[seen] * penalty)
    if settings.temperature == 0:
        return logits
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        logits[logits < np.partition(logits, -settings.top_k)[:, -settings.top_k, None]] = -np.inf
    with np.errstate(over="ignore"):  # a temperature near 0 sends all logits but the highest to -inf, as it should
        p = np.exp((logits - logits.max(axis=1, keepdims=True)) / settings.temperature)
    if settings.top_p is not None:
        p /= p.sum(axis=1, keepdims=True)
        order = np.argsort(-p, axis=1, kind="stable")
        descending = np.take_along_axis(p, order, axis=1)
        before = np.cumsum(descending, axis=1) - descending  # the sum of all higher probabilities
        descending[before >= settings.top_p] = 0
        np.put_along_axis(p, order, descending, axis=1)
    if settings.min_p is not None:
        p[p < settings.min_p * p.max(axis=1, keepdims=True)] = 0
    return p
