"""The table of all operations: the shapes of their inputs, and the same operation in PyTorch.

The finite-difference, property, kernel and parity tests run over this table. A test fails if an operation of the engine or of
ops.py has no row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt import Tensor, ops


@dataclass(frozen=True)
class Dims:
    """The sizes from which a case makes the shapes of its inputs."""

    lead: tuple[int, ...] = (2, 3)  # leading axes; there may be none, and they may have size 0
    a: int = 4
    b: int = 5
    c: int = 3
    past: int = 2


# The sizes of the finite-difference tests and of the comparison with PyTorch.
GRADIENT_DIMS = [Dims(), Dims(lead=(), a=7, b=2, c=1, past=0), Dims(lead=(1,), a=1, b=1, c=2, past=3)]
PARITY_DIMS = [Dims(), Dims(lead=(), a=7, b=2, c=1, past=0), Dims(lead=(5, 4), a=16, b=33, c=8, past=31)]


@dataclass(frozen=True)
class Case:
    """One operation.

    fn takes float Tensors of the shapes shapes(dims). torch(module) returns the same function for PyTorch's tensors; None: fn
    works for both. views: the output may be a view of an input. positive: the inputs must be positive.
    """

    fn: Callable[..., Tensor]
    shapes: Callable[[Dims], list[tuple[int, ...]]]
    torch: Callable[[Any], Callable[..., Any]] | None = None
    views: bool = False
    positive: bool = False


def ids(n, *shape):
    """Integers from 0 to n - 2, with repetition. The id n - 1 does not occur."""
    return (np.arange(int(np.prod(shape))) * 7 // 3 % max(1, n - 1)).reshape(shape)


def mask(*shape):
    """A boolean pattern. Every value of its last row is true."""
    pattern = np.arange(int(np.prod(shape))).reshape(shape) * 5 % 3 == 0
    if len(shape) > 1 and shape[-2] > 1:
        pattern[..., -1, :] = True
    return pattern


def draws():
    return np.random.Generator(np.random.SFC64(3))


def kept(shape, p):
    """The array that dropout with `draws()` multiplies by."""
    return ops.dropout(Tensor(np.ones(shape)), p, draws()).data


def attention_in_torch(torch, q, k, v, weight=None):
    """Causal attention by its definition. `weight` multiplies the probabilities."""
    n_query, n_key = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(n_query, n_key, dtype=torch.bool).triu(1 + n_key - n_query)
    p = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
    return (p if weight is None else p * torch.from_numpy(weight).to(p.dtype)) @ v


def self_attention_in_torch(torch, qkv, weight=None):
    return attention_in_torch(torch, *(part.transpose(1, 2) for part in qkv.unbind(2)), weight).transpose(1, 2)


def rotations(n, inner, head_dim):
    """The rotations of the positions 5 .. 5 + n - 1, (n, 1, head_dim), by their definition."""
    angles = [[m / 10_000 ** (2 * i / head_dim) for i in range(head_dim // 2)] for m in range(5, 5 + n)]
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(n, 1, head_dim)


def rotated_in_torch(torch, x):
    """Rotary positions by complex numbers, as their authors have it. x (..., T, inner, head_dim)."""
    turns = torch.view_as_complex(torch.from_numpy(rotations(*x.shape[-3:])).unflatten(-1, (-1, 2)))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns.to(
        torch.complex64 if x.dtype == torch.float32 else torch.complex128
    )
    return torch.view_as_real(turned).flatten(-2)


def _same(d):
    return [(*d.lead, d.a)]


def _pair(d):
    return [(*d.lead, d.a), (d.a,)]


def _heads(d):
    batch = d.lead[0] if d.lead else 1
    return [(batch, 2, d.a, d.c), *[(batch, 2, d.a + d.past, d.c)] * 2]


def _square(d):
    return [(len(d.lead) + 1, 2, d.a, d.c)] * 3


CASES: dict[str, Case] = {
    "add": Case(lambda a, b: a + b, _pair),
    "add broadcast both ways": Case(lambda a, b: a + b, lambda d: [(*d.lead, 1, d.a), (d.b, 1)]),
    "subtract": Case(lambda a, b: a - b, _pair),
    "multiply": Case(lambda a, b: a * b, lambda d: [(*d.lead, 1, d.a), (d.b, 1)]),
    "divide": Case(lambda a, b: a / b, _pair, positive=True),
    "numbers": Case(lambda a: 2 - a * 3 + 1 / a - (-a) / 4 + (1 - a) + 3 * a, _same, positive=True),
    "array operand": Case(
        lambda a: np.arange(1.0, 4.0) * a - np.ones(3) + a / np.full(3, 2.0),
        lambda d: [(*d.lead, 3)],
        lambda torch: lambda a: torch.arange(1.0, 4.0, dtype=a.dtype) * a - 1 + a / 2,
    ),
    "negate": Case(lambda a: -a, _same),
    "power": Case(lambda a: a**3 + a**0.5 + a**1 + a**0 + a**-1, _same, positive=True),
    "tensor power": Case(lambda a, b: a**b, _pair, positive=True),
    "power of a number": Case(lambda a: 2.5**a, _same),
    "matmul": Case(lambda a, b: a @ b, lambda d: [(d.a, d.b), (d.b, d.c)]),
    "array matmul": Case(
        lambda a: np.ones((2, a.shape[0])) @ a,
        lambda d: [(d.a, d.b)],
        lambda torch: lambda a: torch.ones(2, a.shape[0], dtype=a.dtype) @ a,
    ),
    "matmul batched": Case(lambda a, b: a @ b, lambda d: [(*d.lead, d.a, d.b), (d.b, d.c)]),
    "matmul broadcast": Case(lambda a, b: a @ b, lambda d: [(2, 1, d.a, d.b), (3, d.b, d.c)]),
    "matrix vector": Case(lambda a, b: a @ b, lambda d: [(*d.lead, d.a, d.b), (d.b,)]),
    "vector matrix": Case(lambda a, b: a @ b, lambda d: [(d.b,), (*d.lead, d.b, d.c)]),
    "vector vector": Case(lambda a, b: a @ b, lambda d: [(d.a,), (d.a,)]),
    "exp": Case(lambda a: a.exp(), _same),
    "log": Case(lambda a: a.log(), _same, positive=True),
    "sqrt": Case(lambda a: a.sqrt(), _same, positive=True),
    "tanh": Case(lambda a: a.tanh(), _same),
    "sum": Case(lambda a: a.sum(), _same),
    "sum of an axis": Case(lambda a: a.sum(axis=-1), _same),
    "sum of axes, kept": Case(lambda a: a.sum(axis=(0, -1), keepdims=True) * a, lambda d: [(d.b, *d.lead, d.a)]),
    "mean": Case(lambda a: a.mean() * a, lambda d: [(d.b, d.a)]),
    "mean of an axis": Case(lambda a: a.mean(axis=-1, keepdims=True) * a, _same),
    "astype": Case(
        lambda a: (a.astype(np.float64 if a.dtype == np.float32 else np.longdouble) * 2).astype(a.dtype),
        _same,
        lambda torch: lambda a: a * 2,
    ),
    "reshape": Case(lambda a: a.reshape(-1), _same, views=True),
    "transpose": Case(
        lambda a: a.transpose(1, 0, -1), lambda d: [(d.a, d.b, d.c)], lambda torch: lambda a: a.permute(1, 0, 2), views=True
    ),
    "transposed": Case(lambda a: a.T, lambda d: [(d.a, d.b)], views=True),
    "swapaxes": Case(lambda a: a.swapaxes(0, -1), lambda d: [(*d.lead, d.a)], views=True),
    "slice": Case(
        lambda a: a[..., ::-1], _same, lambda torch: lambda a: a.flip(-1), views=True
    ),
    "slices of a result": Case(lambda a: (lambda b: 2 * b[0] + b[1:].sum(axis=0))(a * a), lambda d: [(d.a, *d.lead)]),
    "slices and the whole": Case(lambda a: (lambda b: b[:1] * b[1:] + b.sum() + b[0])(a * a), lambda d: [(d.a + 1, d.b)]),
    "the whole, then slices": Case(lambda a: (lambda b: (b * 3).sum() * b[1:] * b[0] + b.sum())(a * a), lambda d: [(d.a, d.b)]),
    "repeated index": Case(lambda a: a[[0, 1, 1]] * a[np.array([1, 1, 0])], lambda d: [(d.a + 1, *d.lead)]),
    "boolean index": Case(
        lambda a: a[mask(*a.shape)],
        lambda d: [(d.a, d.b)],
        lambda torch: lambda a: a[torch.from_numpy(mask(*a.shape))],
    ),
    "linear": Case(
        ops.linear, lambda d: [(*d.lead, d.a), (d.a, d.b), (d.b,)], lambda torch: lambda x, w, b: x @ w + b
    ),
    "linear without bias": Case(
        ops.linear, lambda d: [(*d.lead, d.a), (d.a, d.b)], lambda torch: lambda x, w: x @ w
    ),
    "softmax": Case(ops.softmax, _same, lambda torch: lambda x: torch.softmax(x, dim=-1)),
    "softmax over axis 0": Case(
        lambda x: ops.softmax(x, axis=0), lambda d: [(d.a, *d.lead)], lambda torch: lambda x: torch.softmax(x, dim=0)
    ),
    "masked fill": Case(
        lambda x: ops.masked_fill(x, mask(*x.shape), -3.0),
        _same,
        lambda torch: lambda x: x.masked_fill(torch.from_numpy(mask(*x.shape)), -3.0),
    ),
    "layer norm": Case(
        ops.layer_norm,
        lambda d: [(*d.lead, d.a + 2), (d.a + 2,), (d.a + 2,)],
        lambda torch: lambda x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b),
    ),
    "layer norm without bias": Case(
        ops.layer_norm,
        lambda d: [(*d.lead, d.a + 2), (d.a + 2,)],
        lambda torch: lambda x, w: torch.nn.functional.layer_norm(x, w.shape, w),
    ),
    "layer norm, large eps": Case(
        lambda x, w, b: ops.layer_norm(x, w, b, eps=0.5),
        lambda d: [(*d.lead, d.a), (d.a,), (d.a,)],
        lambda torch: lambda x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b, eps=0.5),
    ),
    "gelu": Case(
        lambda x: ops.gelu(x * 2), _same, lambda torch: lambda x: torch.nn.functional.gelu(x * 2, approximate="tanh")
    ),
    "relu": Case(ops.relu, _same, lambda torch: torch.relu),
    "dropout": Case(
        lambda x: ops.dropout(x, 0.4, draws()),
        _same,
        lambda torch: lambda x: x * torch.from_numpy(kept(tuple(x.shape), 0.4)).to(x.dtype),
    ),
    "residual": Case(lambda x, branch: ops.residual(x, branch), lambda d: _same(d) * 2),
    "residual with dropout": Case(
        lambda x, branch: ops.residual(x, branch, 0.4, draws()),
        lambda d: _same(d) * 2,
        lambda torch: lambda x, branch: x + branch * torch.from_numpy(kept(tuple(branch.shape), 0.4)).to(branch.dtype),
    ),
    "dropout of everything": Case(lambda x: ops.dropout(x, 1.0, draws()) + x, _same, lambda torch: lambda x: 0 * x + x),
    "embedding": Case(
        lambda w: ops.embedding(w, ids(w.shape[0], 3, 5)),
        lambda d: [(d.a + 1, d.b)],
        lambda torch: lambda w: torch.nn.functional.embedding(torch.from_numpy(ids(w.shape[0], 3, 5)), w),
    ),
    "rotary": Case(
        lambda x: ops.rotary(x, rotations(*x.shape[-3:])),
        lambda d: [(*d.lead, d.a, d.b, 2 * d.c)],
        lambda torch: lambda x: rotated_in_torch(torch, x),
    ),
    "cross-entropy": Case(
        lambda x: ops.cross_entropy(x, ids(x.shape[-1], *x.shape[:-1])),
        lambda d: [(d.c, *d.lead[:1], d.b + 1) if all(d.lead) else (d.c, d.b + 1)],
        lambda torch: lambda x: torch.nn.functional.cross_entropy(
            x.flatten(0, -2), torch.from_numpy(ids(x.shape[-1], *x.shape[:-1])).flatten()
        ),
    ),
    "cross-entropy, each": Case(
        lambda x: ops.cross_entropy(x, ids(x.shape[-1], *x.shape[:-1]), reduction="none"),
        lambda d: [(d.c, *d.lead, d.b + 1)],
        lambda torch: lambda x: torch.nn.functional.cross_entropy(
            x.flatten(0, -2), torch.from_numpy(ids(x.shape[-1], *x.shape[:-1])).flatten(), reduction="none"
        ).reshape(x.shape[:-1]),
    ),
    "attention": Case(
        ops.causal_attention, _square, lambda torch: lambda q, k, v: attention_in_torch(torch, q, k, v)
    ),
    "attention with a past": Case(
        ops.causal_attention, _heads, lambda torch: lambda q, k, v: attention_in_torch(torch, q, k, v)
    ),
    "self-attention": Case(
        ops.self_attention,
        lambda d: [(d.a, d.b + 1, 3, d.c, 4)],
        lambda torch: lambda qkv: self_attention_in_torch(torch, qkv),
    ),
    "self-attention with dropout": Case(
        lambda qkv: ops.self_attention(qkv, 0.3, draws()),
        lambda d: [(d.a, d.b + 1, 3, d.c, 4)],
        lambda torch: lambda qkv: self_attention_in_torch(
            torch, qkv, kept((qkv.shape[0], qkv.shape[3], qkv.shape[1], qkv.shape[1]), 0.3)
        ),
    ),
    "attention with dropout": Case(
        lambda q, k, v: ops.causal_attention(q, k, v, 0.3, draws()),
        _square,
        lambda torch: lambda q, k, v: attention_in_torch(torch, q, k, v, kept((*q.shape[:3], k.shape[2]), 0.3)),
    ),
}  # fmt: skip


def inputs_of(case, dims, rng):
    """Float64 arrays for a case. They are positive and not close to zero if the case needs that."""
    arrays = [rng.standard_normal(shape) for shape in case.shapes(dims)]
    return [np.abs(a) + 0.5 for a in arrays] if case.positive else arrays
