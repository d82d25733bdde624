"""Random arrays, and equality up to rounding."""

import numpy as np

BFLOAT16_EPS = 2**-8  # half the distance from 1 to the next number in bfloat16


def close(found, expected, dtype, size=1.0):
    """Assert equality up to the rounding of terms of this size: a small result may be the difference of large terms."""
    assert type(found) is type(expected)
    if found is None:
        return
    assert found.dtype == expected.dtype == dtype
    assert found.shape == expected.shape
    scale = np.abs(expected).max(initial=size)
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=50 * np.finfo(dtype).eps)


def normal(dtype, *shape, seed=0):
    return np.random.default_rng(sum(shape) + seed).standard_normal(shape).astype(dtype)
