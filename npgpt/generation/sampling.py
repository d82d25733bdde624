"""From logits to ids: temperature, top-k, top-p, min-p, repetition penalty. Knows no model and no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from npgpt.config.settings import GenerateConfig

LARGEST_EXPONENT = 700.0  # exp of more is no float64


def sample_ids(
    logits: np.ndarray,
    settings: GenerateConfig,
    draws: Sequence[float],
    seen: Sequence[Iterable[int]],
    tolerance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one id for each row of logits: (B, V) -> ids (B,), is_close (B,).

    draws: one random number for each row, uniform in [0, 1). seen: for each row, the ids that occur in its text. The id of a
    row depends only on its logits, its draw and its text. With temperature 0 the likeliest id is taken; among equals, the
    lowest id.
    tolerance: (B,), how far each logit of a row may be from the true one. `is_close` says for which rows the true logits could
    give another id. Without a tolerance, it is False.
    """
    weights, doubtful = _weights(logits, settings, seen, tolerance)
    rows = np.arange(len(weights))
    if settings.temperature == 0:
        ids = weights.argmax(axis=1)
        return ids, np.zeros(len(ids), dtype=bool) if tolerance is None else _two_are_close(weights, tolerance)
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1]
    drawn = np.asarray(draws) * total
    ids = (cumulative > drawn[:, None]).argmax(axis=1)
    if tolerance is None:
        return ids, np.zeros(len(ids), dtype=bool)
    relative = _relative_error(tolerance, settings)
    in_doubt: float | np.ndarray = 0.0
    is_close = np.zeros(len(ids), dtype=bool)
    if doubtful is not None:
        is_close, in_doubt = doubtful[rows, ids] > 0, doubtful.sum(axis=1)
    for limit in (cumulative[rows, ids] - weights[rows, ids], cumulative[rows, ids]):
        # If every logit before the limit were higher and every other one lower by the tolerance, the share c of what is
        # before the limit would grow by this factor times c (1 - c) at most; and the other way round.
        c = limit / total
        is_close |= np.abs(drawn - limit) <= c * (1 - c) * relative * total + in_doubt
    # With a temperature near 0, only the likeliest ids count.
    is_cold = 2 * tolerance >= settings.temperature * LARGEST_EXPONENT
    return ids, np.where(is_cold, _two_are_close(logits, tolerance), is_close)


def _two_are_close(logits: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """(B,): whether the two largest logits of a row could change places."""
    if logits.shape[1] < 2:
        return np.zeros(len(logits), dtype=bool)
    return np.diff(np.partition(logits, -2)[:, -2:])[:, 0] <= 2 * tolerance


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The natural logarithm of the probability of one id in each row: logits (B, V), ids (B,) -> (B,)."""
    return logits[np.arange(len(ids)), ids] - _log_total(logits)


def likeliest_ids(logits: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    """logits (V,) -> the n likeliest ids, each with its log-probability."""
    n = min(n, len(logits))
    if not n:
        return ()
    ids = np.sort(np.argpartition(-logits, n - 1)[:n])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return tuple(zip(ids.tolist(), (logits[ids] - _log_total(logits[None])).tolist(), strict=True))


def _log_total(logits: np.ndarray) -> np.ndarray:
    """(B, V) -> (B,): the logarithm of the sum of exp(logits), by which probabilities are normalised."""
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1))


def _weights(
    logits: np.ndarray, settings: GenerateConfig, seen: Sequence[Iterable[int]], tolerance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(B, V). With temperature 0: logits. Otherwise: probabilities that are not normalised.

    And (B, V): the weights of the ids that the restrictions may wrongly keep or drop, given the tolerance; None if there are
    none.

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
        for own, ids in zip(logits, seen, strict=True):
            found = np.fromiter(ids, dtype=np.int64)
            own[found] = np.where(own[found] > 0, own[found] / penalty, own[found] * penalty)
    if settings.temperature == 0:
        return logits, None
    top, unrestricted = logits.max(axis=1, keepdims=True), logits
    in_doubt = np.zeros(logits.shape if tolerance is not None else (0, 0), dtype=bool)
    error = None if tolerance is None else _relative_error(tolerance, settings)
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        kth = np.partition(logits, -settings.top_k)[:, -settings.top_k, None]
        if tolerance is not None:
            following = np.partition(logits, -settings.top_k - 1)[:, -settings.top_k - 1, None]
            reach = 2 * tolerance[:, None]
            in_doubt |= (logits >= kth - reach) & (logits <= following + reach)
        logits = np.where(logits < kth, -np.inf, logits)
    with np.errstate(over="ignore"):  # a temperature near 0 sends all logits but the highest to -inf, as it should
        p = np.exp((logits - top) / settings.temperature)
    total = np.ones((len(p), 1))
    if settings.top_p is not None:
        total = p.sum(axis=1, keepdims=True)
        p /= total
        order = np.argsort(-p, axis=1, kind="stable")
        descending = np.take_along_axis(p, order, axis=1)
        before = np.cumsum(descending, axis=1) - descending  # the sum of all higher probabilities
        if error is not None:
            for row in range(len(p)):
                doubt_before = p[row, in_doubt[row]].sum()
                in_doubt[row, order[row, _near(descending[row], before[row], settings.top_p, error[row], doubt_before)]] = True
        descending[before >= settings.top_p] = 0
        np.put_along_axis(p, order, descending, axis=1)
    if settings.min_p is not None:
        least = settings.min_p * p.max(axis=1, keepdims=True)
        if error is not None:
            in_doubt |= np.abs(p - least) <= error[:, None] * least
        p[p < least] = 0
    if not in_doubt.any():
        return p, None
    with np.errstate(over="ignore"):
        return p, np.where(in_doubt, np.exp((unrestricted - top) / settings.temperature) / total, 0.0)


def _relative_error(tolerance: np.ndarray, settings: GenerateConfig) -> np.ndarray:
    """(B,): the largest relative error of a probability if each logit may be wrong by the tolerance."""
    return np.expm1(np.minimum(2 * tolerance / settings.temperature, LARGEST_EXPONENT))


def _near(descending: np.ndarray, before: np.ndarray, top_p: float, error: float, more: float) -> slice:
    """The places (in descending order) of the ids that top-p may wrongly keep or drop.

    before: (V,), for each id the sum of all higher probabilities. error: the relative error of a probability. more: a further
    error of the sums.
    """
    of_sum = top_p * (1 - top_p) * error + more
    first, end = np.searchsorted(before, (top_p - of_sum, top_p + of_sum)).tolist()
    if first == end:  # no sum is close to top_p; but the last id that is kept may change places with the next one
        if not 0 < first < len(before) or descending[first] < descending[first - 1] * (1 - error):
            return slice(0, 0)
        first, end = first - 1, first + 1
    highest, lowest = descending[first] * (1 + error), descending[end - 1] * (1 - error)
    first, end = np.searchsorted(-descending, (-highest, -lowest)).tolist()
    return slice(first, end + 1)
