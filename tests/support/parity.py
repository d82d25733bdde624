"""The same operation in npgpt and in PyTorch, and the distance of two results."""

import numpy as np

from npgpt import Tensor


def relative_error(found, expected):
    """The largest difference, relative to the largest number of the whole array."""
    return float(np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-300))


def ours(case, arrays):
    """Returns [output, gradients...] of npgpt. The upstream gradient is cos(0), cos(1), ..."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    y = case.fn(*leaves)
    y.backward(np.cos(np.arange(y.size, dtype=y.dtype)).reshape(y.shape))
    return [y.data, *(leaf.grad for leaf in leaves)]


def theirs(case, arrays):
    """Returns [output, gradients...] of PyTorch, with the same upstream gradient."""
    import torch

    fn = case.torch(torch) if case.torch else case.fn
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    y = fn(*leaves)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    return [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]
