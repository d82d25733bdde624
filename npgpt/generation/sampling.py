"""From logits to ids: temperature, top-k, top-p, min-p, repetition penalty. Knows no model and no text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npgpt.config.settings import GenerateConfig


def sample_ids(
    logits: np.ndarray,
    settings: GenerateConfig,
    draws: Sequence[float],
    texts: Sequence[Sequence[int]],
    tolerance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one id for each row of logits: (B, V) -> ids (B,), is_close (B,).

    draws: one random number for each row, uniform in [0, 1). The id depends only on the row's logits, its number and its text.
    With temperature 0 the likeliest id is taken; among equals, the lowest id.
    tolerance: (B,), how far each logit of a row may be from the true one. `is_close` says for which rows the true logits could
    give another id. Without it, `is_close` is False.
    """
    weights, is_close = _weights(logits, settings, texts, tolerance)
    if settings.temperature == 0:
        ids = weights.argmax(axis=1)
        if tolerance is not None and weights.shape[1] > 1:
            is_close |= np.diff(np.partition(weights, -2)[:, -2:])[:, 0] <= 2 * tolerance
        return ids, is_close
    cumulative = np.cumsum(weights, axis=1)
    drawn = np.asarray(draws) * cumulative[:, -1]
    ids = (cumulative > drawn[:, None]).argmax(axis=1)
    if tolerance is not None:
        upper = cumulative[np.arange(len(ids)), ids]
        for limit in (upper - weights[np.arange(len(ids)), ids], upper):
            c = limit / cumulative[:, -1]
            # If every logit before the limit were higher and every other one lower by the tolerance, c would be at most this
            # much larger; and the other way round.
            error = c * (1 - c) * _relative_error(tolerance, settings)
            is_close |= np.abs(drawn - limit) <= error * cumulative[:, -1]
    return ids, is_close


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The natural logarithm of the probability of one id in each row: logits (B, V), ids (B,) -> (B,)."""
    top = logits.max(axis=1)
    return logits[np.arange(len(ids)), ids] - top - np.log(np.exp(logits - top[:, None]).sum(axis=1))


def likeliest_ids(logits: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    """logits (V,) -> the n likeliest ids, each with its log-probability."""
    if not n:
        return ()
    ids = np.argsort(-logits, kind="stable")[:n]
    logprobs = log_probabilities(np.broadcast_to(logits, (len(ids), len(logits))), ids)
    return tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))


def _relative_error(tolerance: np.ndarray, settings: GenerateConfig) -> np.ndarray:
    """(B,): a bound on the relative error of each probability if each logit may be wrong by the tolerance."""
    with np.errstate(over="ignore"):  # a temperature near 0 makes every draw close
        return np.expm1(2 * tolerance / settings.temperature)


def _weights(
    logits: np.ndarray, settings: GenerateConfig, texts: Sequence[Sequence[int]], tolerance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(B, V). With temperature 0: logits. Otherwise: probabilities that are not normalised.

    And (B,): whether a restriction keeps or drops an id only just, given the tolerance.

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
    is_close = np.zeros(len(logits), dtype=bool)
    if settings.repetition_penalty != 1:
        penalty = settings.repetition_penalty
        for own, ids in zip(logits, texts, strict=True):
            seen = np.unique(np.asarray(ids, dtype=np.int64))
            own[seen] = np.where(own[seen] > 0, own[seen] / penalty, own[seen] * penalty)
    if settings.temperature == 0:
        return logits, is_close
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        kth = np.partition(logits, -settings.top_k)[:, -settings.top_k, None]
        if tolerance is not None:
            is_close |= (logits >= kth - 2 * tolerance[:, None]).sum(axis=1) > settings.top_k
        logits[logits < kth] = -np.inf
    with np.errstate(over="ignore"):  # a temperature near 0 sends all logits but the highest to -inf, as it should
        p = np.exp((logits - logits.max(axis=1, keepdims=True)) / settings.temperature)
    error = None if tolerance is None else _relative_error(tolerance, settings)[:, None]
    if settings.top_p is not None:
        p /= p.sum(axis=1, keepdims=True)
        order = np.argsort(-p, axis=1, kind="stable")
        descending = np.take_along_axis(p, order, axis=1)
        before = np.cumsum(descending, axis=1) - descending  # the sum of all higher probabilities
        kept = before < settings.top_p
        if error is not None:
            only_just = np.abs(before - settings.top_p) <= error
            # The last id that is kept could change places with the next one.
            only_just[:, 1:] |= kept[:, :-1] & ~kept[:, 1:] & (descending[:, 1:] >= descending[:, :-1] * (1 - error))
            is_close |= (only_just & (descending > error)).any(axis=1)
        descending[~kept] = 0
        np.put_along_axis(p, order, descending, axis=1)
    if settings.min_p is not None:
        least = settings.min_p * p.max(axis=1, keepdims=True)
        if error is not None:
            is_close |= ((np.abs(p - least) <= error * least) & (p > 0)).any(axis=1)
        p[p < least] = 0
    return p, is_close
