"""The CUDA kernels: compiled for GPUs that are not here, run on the CPU against the reference, and, where there is one, on
a GPU."""

import cuda_on_cpu
import numpy as np
import pytest
from test_kernels import close, normal

from npgpt.kernels import cuda
from npgpt.kernels.cuda import CudaKernels, Key
from npgpt.kernels.reference import Kernels

on_cpu = pytest.mark.skipif(cuda_on_cpu.MISSING is not None, reason=cuda_on_cpu.MISSING or "")


class SameDraws(Kernels):
    """The reference, dropping out what the CUDA kernels would."""

    def __init__(self, fast):
        super().__init__(np)
        self.dropout_draws = fast.dropout_draws


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def fast():
    return CudaKernels(np, cuda_on_cpu.launch)


def same(fast, name, inputs, dtype, *rest, key=None, size=1.0):
    """Run forward and backward of both with equal inputs and draws, compare everything."""
    before = [None if a is None else a.copy() for a in inputs]
    results = []
    for kernels in (SameDraws(fast), fast):
        y, saved = getattr(kernels, f"{name}_forward")(*inputs, *rest, *([] if key is None else [Key(key)]))
        if kernels is fast:
            assert isinstance(saved, cuda.Own | tuple), "not the kernel"
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
        gradients = getattr(kernels, f"{name}_backward")(dy, saved)
        results.append((y, *(gradients if isinstance(gradients, tuple) else (gradients,))))
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype, size)
    for array, untouched in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, untouched)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 1), (17,), (1, 700)])
def test_gelu(fast, dtype, shape):
    x = normal(dtype, *shape) * 3
    same(fast, "gelu", (x,), dtype)
    same(fast, "gelu", (x.T,), dtype)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 2), (9, 40), (130, 65), (3, 300)])
def test_layer_norm(fast, dtype, shape):
    x, weight, bias = normal(dtype, *shape) + 3, normal(dtype, shape[-1]), normal(dtype, shape[-1], 1)[:, 0]
    same(fast, "layer_norm", (x, weight, np.ascontiguousarray(bias)), dtype, size=4)
    same(fast, "layer_norm", (x[::-1], weight, None), dtype, 0.1, size=4)


@on_cpu
@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (7, 7), (8, 8), (2, 6), (1, 5), (33, 33), (70, 70), (3, 300)])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.3, 1.0])
def test_attention(fast, dtype, n_query, n_key, dropout):
    q, k, v = (normal(dtype, 2, n, 3, 4).transpose(0, 2, 1, 3) for n in (n_query, n_key, n_key))
    rest = [] if dropout is None else [dropout]
    same(fast, "causal_attention", (q, k, v), dtype, *rest, key=None if dropout is None else 5, size=10)


@on_cpu
def test_attention_of_huge_scores_stays_finite(fast):
    q = np.full((1, 1, 4, 2), 1e4, dtype=np.float32)
    out, saved = fast.causal_attention_forward(q, -q, q)
    assert np.isfinite(out).all()
    assert all(np.isfinite(d).all() for d in fast.causal_attention_backward(out, saved))


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 17), (40,), (33, 65)])
@pytest.mark.parametrize("p", [0.25, 1.0, 1e-6])
def test_dropout(fast, dtype, shape, p):
    same(fast, "dropout", (normal(dtype, *shape),), dtype, p, key=7)


@on_cpu
def test_draws_are_philox(fast):
    """The published first output of Philox4x32-10 for a key and counter of zeros (Random123's known answers)."""
    draws, threshold = fast.dropout_draws((2, 9), 0.25, Key(0))
    assert threshold == 16384
    np.testing.assert_array_equal(draws[0, :8].view(np.uint32), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    key = Key(2**62 + 3)
    many = [fast.dropout_draws((200, 50), 0.25, key)[0] for _ in range(2)]
    assert (many[0] != many[1]).mean() > 0.99  # another use
    assert len({row.tobytes() for row in many[0]}) == 200
    counts = np.bincount(many[0].reshape(-1) // 4096, minlength=16)
    assert ((counts - 625) ** 2 / 625).sum() < 50  # chi-square, 15 degrees of freedom, a level of 1e-5
    np.testing.assert_array_equal(fast.dropout_draws((200, 50), 0.25, Key(2**62 + 3))[0], many[0])


@on_cpu
@pytest.mark.parametrize("ids", [[[3, 0, 3], [3, 1, 1]], [2], [[4, 3], [2, 1]], [1, 2, 3] * 70])
def test_embedding(fast, dtype, ids, monkeypatch):
    same(fast, "embedding", (normal(dtype, 5, 3), np.array(ids, dtype=np.int64)), dtype, size=20)
    monkeypatch.setattr(cuda, "MOST_PARTIAL", 60)
    same(fast, "embedding", (normal(dtype, 5, 3), np.array(ids, dtype=np.uint8)), dtype, size=20)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 1), (40, 65), (2, 200)])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cross_entropy(fast, dtype, shape, size):
    targets = np.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]
    same(fast, "cross_entropy", (size * normal(dtype, *shape), targets), dtype, size=size)


@on_cpu
def test_adamw(fast, dtype):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(1000).astype(dtype) for _ in range(2)] + [rng.random(1000).astype(dtype) for _ in range(2)]
    results = []
    for kernels in (Kernels(np), fast):
        arrays = [a.copy() for a in start]
        kernels.adamw(*arrays, step=3, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        results.append(arrays)
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype)


@on_cpu
def test_nothing_to_do_is_no_launch(fast, dtype):
    same(fast, "gelu", (normal(dtype, 0, 4),), dtype)
    same(fast, "layer_norm", (normal(dtype, 0, 4), normal(dtype, 4), None), dtype)
    same(fast, "dropout", (normal(dtype, 0, 4),), dtype, 0.5, key=1)
    same(fast, "embedding", (normal(dtype, 5, 3), np.zeros(0, np.int64)), dtype)
    same(fast, "cross_entropy", (normal(dtype, 0, 4), np.zeros(0, np.int64)), dtype)
    same(fast, "causal_attention", [normal(dtype, 1, 1, n, 4) for n in (0, 3, 3)], dtype)
