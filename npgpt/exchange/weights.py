"""What other formats need of weights: biases, and another dtype. This file knows no names and no files."""

from __future__ import annotations

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.model.gpt import GPT


def arrays_with_biases(model: GPT) -> dict[str, np.ndarray]:
    """The parameters of a model by name, with biases of zeros if it has none: both other formats always have biases."""
    arrays = {}
    for name, p in model.named_parameters():
        arrays[name] = p.numpy()
        if not model.config.bias and name.startswith(("blocks.", "ln_f.")):
            arrays[name.removesuffix("weight") + "bias"] = np.zeros(p.shape[-1:], dtype=p.dtype)
    return arrays


def to_dtype(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array as another dtype. Raises RequestError if a number becomes infinite."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if not np.isfinite(result).all():
        hint = "; use --dtype f32" if dtype == np.float16 else ""
        raise RequestError(f"{name} has numbers up to {np.abs(array).max():.3g}, too large for {dtype}{hint}")
    return result
