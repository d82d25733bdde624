"""Random numbers as pure functions of a seed, a purpose and counters. There is no global generator."""

from __future__ import annotations

import enum

import numpy as np


class Stream(enum.IntEnum):
    """What random numbers are for.

    Two streams never share numbers. So drawing more from one stream, for a longer sample or another evaluation, changes
    nothing in the others.
    """

    INIT = 0
    BATCH = 1
    DROPOUT = 2
    SAMPLE = 3


def seed_sequence(seed: int, stream: Stream, *counters: int) -> np.random.SeedSequence:
    """The entropy for (seed, stream, counters)."""
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *counters))


def generator(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """A NumPy generator that depends only on (seed, stream, counters).

    With the step as a counter, step 7 of a run draws the same numbers whether or not step 6 was computed in the same
    process.
    """
    return np.random.Generator(np.random.SFC64(seed_sequence(seed, stream, *counters)))
