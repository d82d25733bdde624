"""The same operation in npgpt and in PyTorch, and how far apart two results are."""

import numpy as np

from npgpt import Tensor


def relative_error(found, expected):
    """Of the whole array: the largest difference over the largest number."""
    return float(np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-300))


def ours(case, arrays):
    """[output, gradients...] with the output's own values as upstream gradient, shifted so that it is not uniform."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    y = case.fn(*leaves)
    y.backward(np.cos(np.arange(y.size, dtype=y.dtype)).reshape(y.shape))
    return [y.data, *(leaf.grad for leaf in leaves)]


def theirs(case, arrays):
    import torch

    fn = case.torch(torch) if case.torch else case.fn
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    y = fn(*leaves)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    return [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]
