"""Sampling: the distribution that ids are drawn from."""

import numpy as np
import pytest

from npgpt import GenerateConfig
from npgpt.generation.sampling import sample_ids


def frequencies(logits, n=20_000, **settings):
    rng, ids = np.random.default_rng(0), settings.pop("ids", ())
    config = GenerateConfig(**({"temperature": 1.0} | settings))
    rows = np.vstack([logits, np.roll(logits, 1)])  # the second row must not change the first
    drawn = [sample_ids(rows, config, rng.random(2), [ids, ids])[0][0] for _ in range(n)]
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
        # log p is negative, so the penalty multiplies it: the p of a seen token becomes p^2, before normalising.
        ({"repetition_penalty": 2.0, "ids": [3, 3]}, np.array([0.1, 0.2, 0.3, 0.16]) / 0.76),
        ({"repetition_penalty": 2.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"repetition_penalty": 100.0, "ids": [3], "temperature": 0}, [0, 0, 1, 0]),
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"temperature": 1e-320}, [0, 0, 0, 1]),
    ],
)
def test_distribution(settings, expected):
    """A chi-square test, at a level of 1e-6, over the ids that are possible. No other id is drawn."""
    n = 20_000
    found, expected = frequencies(LOGITS, n, **settings), np.array(expected)
    possible = expected > 0
    assert (found[~possible] == 0).all()
    chi_square = n * np.sum((found - expected)[possible] ** 2 / expected[possible])
    assert chi_square < {1: 1e-9, 2: 23.9, 3: 27.6, 4: 30.7}[possible.sum()]  # quantiles for 1, 2, 3 degrees of freedom


def test_a_positive_logit_is_divided_by_the_penalty():
    found = frequencies([2.0, 1.0], repetition_penalty=2.0, ids=[0])
    assert found[0] == pytest.approx(0.5, abs=0.02)


def test_top_k_keeps_ties_with_the_kth():
    found = frequencies([1.0, 1.0, 0.0], n=500, top_k=1)
    assert (found[:2] > 0.3).all()
    assert found[2] == 0
