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


def adds_to_sums(kernels, name, dy, saved, gradients, size=1.0):
    """The backward pass of an operation with parameters adds their gradients to given arrays, and returns these arrays."""
    parameters = {"linear": 2, "layer_norm": 2, "embedding": 1}.get(name, 0)
    if not parameters:
        return
    gradients = gradients[-parameters:]
    before = [normal(gradient.dtype, *gradient.shape, seed=5) for gradient in gradients]
    sums = [array.copy() for array in before]
    result = getattr(kernels, f"{name}_backward")(dy, saved, onto=tuple(sums) if parameters > 1 else sums[0])
    for found, total in zip(result[-parameters:] if parameters > 1 else [result], sums, strict=True):
        assert found is total
    for total, start, gradient in zip(sums, before, gradients, strict=True):
        close(total, start + gradient, total.dtype, size)
