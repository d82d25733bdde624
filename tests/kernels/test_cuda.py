"""The arithmetic of the CUDA kernels: compiled for a CPU, they agree with the reference; on a GPU, they agree with the CPU."""

import numpy as np
import pytest
from support import cuda_on_cpu
from support.arrays import BFLOAT16_EPS, adds_to_sums, close, normal
from support.devices import on_cpu

from npgpt.engine import backend
from npgpt.engine.backend import select
from npgpt.kernels.cuda import attention, base, launch
from npgpt.kernels.cuda import kernels as cuda
from npgpt.kernels.cuda.kernels import CudaKernels
from npgpt.kernels.cuda.random import Key
from npgpt.kernels.reference import Kernels
from npgpt.kernels.updates import AdamWStep


def key_of(number, xp=np):
    return Key(xp.asarray(np.array([number], dtype=np.uint64)))


class Launches:
    """Launches kernels, and keeps their names. `tensor_cores`: whether those for tensor cores may run."""

    def __init__(self, cuda_kernels, tensor_cores=True):
        self.names, self.has_tensor_cores, self._launch = [], tensor_cores, cuda_kernels._launch
        cuda_kernels._launch = self

    def __call__(self, name, *rest):
        self.names.append(name)
        self._launch(name, *rest)


FUSED = ["attention_forward", "attention_backward_queries", "attention_backward_keys"]


class SameDraws(Kernels):
    """The reference with the dropout masks of the CUDA kernels."""

    def __init__(self, cuda_kernels):
        super().__init__(np)
        self.dropout_draws = cuda_kernels.dropout_draws


def same(cuda_kernels, name, inputs, dtype, *rest, key=None, size=1.0):
    """Run forward and backward of both kernels with equal inputs and draws, and compare all results."""
    before = [None if a is None else a.copy() for a in inputs]
    results = []
    for kernels in (SameDraws(cuda_kernels), cuda_kernels):
        y, saved = getattr(kernels, f"{name}_forward")(*inputs, *rest, *([] if key is None else [key_of(key)]))
        if kernels is cuda_kernels:
            # The backward pass of an embedding saves the same as the reference's.
            assert isinstance(saved, base.CudaSaved) or name == "embedding" or not inputs[0].size, "not the kernel"
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
        gradients = getattr(kernels, f"{name}_backward")(dy, saved)
        every = (y, *(gradients if isinstance(gradients, tuple) else (gradients,)))
        results.append([np.asarray(a) if isinstance(a, np.generic) else a for a in every])  # scalars become arrays
        adds_to_sums(kernels, name, dy, saved, every, size)
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype, size)
    for array, untouched in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, untouched)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 1), (17,), (1, 700)])
def test_gelu(cuda_kernels, dtype, shape):
    x = normal(dtype, *shape) * 3
    same(cuda_kernels, "gelu", (x,), dtype)
    same(cuda_kernels, "gelu", (x.T,), dtype)


@on_cpu
@pytest.mark.parametrize(
    ("shape", "along"), [((2, 5, 2, 3, 8), (5, 1, 1, 8)), ((3, 7, 4), (7, 4)), ((4, 6), (6,)), ((2, 3, 2), (1, 1, 2))]
)
def test_rotary(cuda_kernels, dtype, shape, along):
    same(cuda_kernels, "rotary", (normal(dtype, *shape), normal(dtype, *along, seed=1)), dtype)
    same(cuda_kernels, "rotary", (normal(dtype, *shape[::-1]).T, normal(dtype, *along, seed=1)), dtype)


@on_cpu
@pytest.mark.parametrize(
    "shape", [(5, 3), (2, 3, 8), (1, 2), (9, 40), (130, 65), (3, 300), (20, 504), (3, 513), (20, 520), (9, 1000), (2, 1032)]
)
def test_layer_norm(cuda_kernels, dtype, shape, monkeypatch):
    """With rows that fill one to five groups of a thread, and rows that do not begin at a multiple of 16 bytes.

    Each warp works on several rows.
    """
    monkeypatch.setattr(cuda, "MAX_NORM_ROWS", 4)
    x, weight, bias = normal(dtype, *shape) + 3, normal(dtype, shape[-1]), normal(dtype, shape[-1], 1)[:, 0]
    same(cuda_kernels, "layer_norm", (x, weight, np.ascontiguousarray(bias)), dtype, size=4)
    same(cuda_kernels, "layer_norm", (x[::-1], weight, None), dtype, 0.1, size=4)


@on_cpu
@pytest.mark.parametrize(
    ("n_query", "n_key"), [(1, 1), (7, 7), (8, 8), (2, 6), (1, 5), (33, 33), (70, 70), (3, 300), (65, 131)]
)
@pytest.mark.parametrize("dropout", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_attention(cuda_kernels, dtype, n_query, n_key, dropout, tensor_cores):
    launches = Launches(cuda_kernels, tensor_cores)
    q, k, v = (normal(dtype, 2, n, 3, 4).transpose(0, 2, 1, 3) for n in (n_query, n_key, n_key))
    rest = [] if dropout is None else [dropout]
    same(cuda_kernels, "causal_attention", (q, k, v), dtype, *rest, key=None if dropout is None else 5, size=10)
    names = [name for name in launches.names if "attention" in name]
    assert names == (FUSED if tensor_cores and dtype == np.float32 else [])


@on_cpu
@pytest.mark.parametrize("head_dim", [1, 3, 16, 20, 64, 65])
@pytest.mark.parametrize("dropout", [None, 0.3])
def test_self_attention(cuda_kernels, dtype, head_dim, dropout):
    """On tensor cores, heads are read and written where they are. In float32 they are not too large up to 64."""
    rest, key = ([], None) if dropout is None else ([dropout], 5)
    launches = Launches(cuda_kernels)
    qkv = normal(dtype, 2, 70, 3, 2, head_dim)
    same(cuda_kernels, "self_attention", (qkv,), dtype, *rest, key=key, size=10)
    if dtype == np.float32 and head_dim <= 64:
        assert [name for name in launches.names if name != "draw"] == FUSED
    else:
        assert not set(FUSED) & set(launches.names)
    same(cuda_kernels, "self_attention", (qkv[::-1],), dtype, *rest, key=key, size=10)
    same(cuda_kernels, "self_attention", (np.asfortranarray(qkv),), dtype, *rest, key=key, size=10)


@on_cpu
def test_attention_of_views(cuda_kernels):
    """Views without rows of heads are copied first: heads apart from each other, one row for all, a gradient that repeats."""
    every_second = [normal(np.float32, 2, 9, 6, 8, seed=i)[:, :, ::2].swapaxes(1, 2) for i in range(3)]
    same(cuda_kernels, "causal_attention", every_second, np.float32, size=10)
    q, k, v = (normal(np.float32, 2, 3, 9, 8, seed=i) for i in range(3))
    same(cuda_kernels, "causal_attention", (q, k, v), np.float32, size=10)
    same(cuda_kernels, "causal_attention", (q[:, ::2], k[:, 1:], v[:, :2]), np.float32, size=10)
    same(cuda_kernels, "causal_attention", (q[..., ::2], k[..., ::2], v[..., ::2]), np.float32, size=10)
    same(cuda_kernels, "causal_attention", (q, np.broadcast_to(k[:1, :1], k.shape), v), np.float32, size=10)
    for kernels in (cuda_kernels, Kernels(np)):
        out, saved = kernels.causal_attention_forward(q, k, v)
        gradients = kernels.causal_attention_backward(np.broadcast_to(np.float32(1), out.shape), saved)
        if kernels is cuda_kernels:
            found = gradients
    for a, b in zip(found, gradients, strict=True):
        close(a, b, np.float32, 10)


@on_cpu
def test_attention_in_tf32(cuda_kernels):
    """With TF32, a number of 10 bits is taken for each operand. Without, the error is that of float32."""
    q, k, v = (normal(np.float32, 1, 2, 70, 20, seed=i) for i in range(3))
    expected, _ = Kernels(np).causal_attention_forward(*(x.astype(np.float64) for x in (q, k, v)))
    errors = []
    for tf32 in (False, True):
        cuda_kernels.gemm.tf32 = tf32
        found, _ = cuda_kernels.causal_attention_forward(q, k, v)
        errors.append(np.abs(found - expected).max())
    assert errors[0] < 2e-6
    assert 1e-4 < errors[1] < 2e-3


@on_cpu
def test_with_as_many_threads_as_on_a_gpu(dtype):
    """Other tests give a block two warps."""
    kernels = CudaKernels(np, cuda_on_cpu.launch, cuda_on_cpu.Gemm())
    assert base.THREADS == 256
    x, weight, bias = normal(dtype, 70, 65), normal(dtype, 65), normal(dtype, 65, seed=1)
    same(kernels, "layer_norm", (x, weight, bias), dtype, size=4)
    same(kernels, "linear", (x, normal(dtype, 65, 300), normal(dtype, 300)), dtype, size=20)
    same(kernels, "gelu", (x,), dtype)
    same(kernels, "dropout", (x,), dtype, 0.3, key=3)
    same(kernels, "residual", (x, x * 2), dtype, 0.3, key=3)
    same(kernels, "self_attention", (normal(dtype, 2, 11, 3, 2, 20),), dtype, 0.3, key=3, size=10)
    same(kernels, "rotary", (normal(dtype, 4, 6), normal(dtype, 6, seed=1)), dtype)
    same(kernels, "embedding", (normal(dtype, 5, 300), np.arange(200) % 5), dtype, size=40)
    same(kernels, "embedding", (normal(dtype, 1030, 33), np.arange(200) * 5), dtype, size=40)


@on_cpu
@pytest.mark.parametrize("head_dim", [3, 8, 20])
def test_sums_of_gradients(cuda_kernels, dtype, head_dim, monkeypatch):
    """Of whole arrays, and into the slices of an array that three heads share. The kernels run, and write to nothing else."""
    launched = []
    launch = cuda_kernels._launch
    monkeypatch.setattr(cuda_kernels, "_launch", lambda name, *rest: (launched.append(name), launch(name, *rest)))
    a, b = normal(dtype, 2, 5, 3, 2, head_dim), normal(dtype, 2, 5, 2, head_dim, seed=1)
    np.testing.assert_array_equal(cuda_kernels.add(a, a[::-1]), a + a[::-1])
    expected = a.copy()
    for values, index in [(b, np.s_[:, :, 1]), (b.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3), np.s_[:, :, 2])]:
        expected[index] += values
        cuda_kernels.add_into(a, index, values)
        np.testing.assert_array_equal(a, expected)
    assert launched == ["dropout", "copy", "copy"]
    cuda_kernels.add_into(a, np.s_[0, 1], b[0, 0, 0])  # of one dimension, broadcast: not the kernel
    expected[0, 1] += b[0, 0, 0]
    np.testing.assert_array_equal(a, expected)


@on_cpu
@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("number", ["NaN of NumPy", "NaN of a GPU", "inf"])
@pytest.mark.parametrize("tf32", [False, True])
def test_attention_does_not_hide_what_is_not_finite(cuda_kernels, bf16, tensor_cores, number, tf32):
    Launches(cuda_kernels, tensor_cores)
    cuda_kernels.gemm.tf32 = tf32
    bits = {"NaN of NumPy": 0x7FC00000, "NaN of a GPU": 0x7FFFFFFF, "inf": 0x7F800000}[number]
    for dtype in (np.dtype(np.float32), bf16):
        for changed in range(4):
            q, k, v, dy = (normal(np.float32, 1, 1, 70, 8, seed=i).astype(dtype) for i in range(4))
            integers = np.uint32 if dtype == np.float32 else np.uint16
            (q, k, v, dy)[changed].view(integers)[0, 0, 5, 3] = bits >> 8 * (4 - dtype.itemsize)
            with np.errstate(invalid="ignore"):
                out, saved = cuda_kernels.causal_attention_forward(q, k, v)
                gradients = cuda_kernels.causal_attention_backward(dy, saved)
            finite = [np.isfinite(a.astype(np.float32)).all() for a in (out, *gradients)]
            assert finite[0] == (changed == 3)
            assert not all(finite[1:])


@on_cpu
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_a_query_may_see_only_infinite_scores(cuda_kernels, tensor_cores):
    """Of the first 64 keys, or of all that it sees. In the second case its result is 0."""
    Launches(cuda_kernels, tensor_cores)
    q, k, v = np.full((3, 1, 1, 70, 4), 1, dtype=np.float32)
    q *= 1e20
    k[:, :, :64] = -1e20
    k[:, :, 64:] = 1e-20
    with np.errstate(over="ignore"):
        out, saved = cuda_kernels.causal_attention_forward(q, k, v)
    np.testing.assert_array_equal(out[0, 0, :64], 0)
    np.testing.assert_allclose(out[0, 0, 64:], 1, rtol=1e-6)
    for gradient in cuda_kernels.causal_attention_backward(np.ones_like(out), saved):
        assert np.isfinite(gradient).all()


@on_cpu
def test_heads_of_another_number_are_not_read(cuda_kernels):
    launches = Launches(cuda_kernels)
    q, k = normal(np.float32, 2, 3, 5, 8), normal(np.float32, 2, 1, 5, 8)
    out, _ = cuda_kernels.causal_attention_forward(q, k, k)
    close(out, Kernels(np).causal_attention_forward(q, k, k)[0], np.float32, 10)
    assert not launches.names


@on_cpu
def test_sizes_in_python_and_in_cuda_agree():
    sources = launch.source() + launch.source(launch.Variant(64))
    for line in [
        f"const int WARP = {base.WARP};",
        f"const long long GROUP = {base.GROUP};",
        f"const int ROWS = {attention.ROWS};",
        f"const int PARTS = D > {attention.UNDIVIDED} ? 2 : 1;",
    ]:
        assert line in sources
    assert cuda.BLOCK_COLUMNS == base.WARP * base.GROUP
    assert attention.FUSED_THREADS == attention.ROWS // 16 * base.WARP


@on_cpu
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_attention_of_huge_scores_stays_finite(cuda_kernels, tensor_cores):
    Launches(cuda_kernels, tensor_cores)
    q = np.full((1, 1, 4, 2), 1e4, dtype=np.float32)
    out, saved = cuda_kernels.causal_attention_forward(q, -q, q)
    assert np.isfinite(out).all()
    assert all(np.isfinite(d).all() for d in cuda_kernels.causal_attention_backward(out, saved))


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 17), (40,), (33, 65)])
@pytest.mark.parametrize("p", [0.25, 1.0, 1e-6])
def test_dropout(cuda_kernels, dtype, shape, p):
    same(cuda_kernels, "dropout", (normal(dtype, *shape),), dtype, p, key=7)


@on_cpu
def test_dropout_draws_are_philox(cuda_kernels):
    """The first draws are the published output of Philox4x32-10 for a key and counter of zeros (Random123's known answers).

    Also: every use and every row has other draws, and the draws are uniform.
    """
    draws, threshold = cuda_kernels.dropout_draws((2, 9), 0.25, key_of(0))
    assert threshold == 16384
    np.testing.assert_array_equal(draws[0, :8].view(np.uint32), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    key = key_of(2**62 + 3)
    many = [cuda_kernels.dropout_draws((200, 50), 0.25, key)[0] for _ in range(2)]
    assert (many[0] != many[1]).mean() > 0.99  # a second use of a key has other draws
    assert len({row.tobytes() for row in many[0]}) == 200
    counts = np.bincount(many[0].reshape(-1) // 4096, minlength=16)
    assert ((counts - 625) ** 2 / 625).sum() < 50  # chi-square, 15 degrees of freedom, a level of 1e-5
    np.testing.assert_array_equal(cuda_kernels.dropout_draws((200, 50), 0.25, key_of(2**62 + 3))[0], many[0])


@on_cpu
@pytest.mark.parametrize("ids", [[[3, 0, 3], [3, 1, 1]], [2], [[4, 3], [2, 1]], [1, 2, 3] * 70])
def test_embedding(cuda_kernels, dtype, ids, monkeypatch):
    same(cuda_kernels, "embedding", (normal(dtype, 5, 3), np.array(ids, dtype=np.int64)), dtype, size=20)
    monkeypatch.setattr(cuda, "MAX_PARTIAL", 60)
    same(cuda_kernels, "embedding", (normal(dtype, 5, 3), np.array(ids, dtype=np.uint8)), dtype, size=20)
    monkeypatch.setattr(cuda, "MOST_IN_CHUNKS", 4)  # as for a large table
    for columns in (3, 70):
        same(cuda_kernels, "embedding", (normal(dtype, 5, columns), np.array(ids, dtype=np.int64)), dtype, size=20)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 1), (40, 65), (2, 200)])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cross_entropy(cuda_kernels, dtype, shape, size):
    targets = np.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]
    same(cuda_kernels, "cross_entropy", (size * normal(dtype, *shape), targets), dtype, size=size)


@on_cpu
@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_of_an_odd_vocabulary(cuda_kernels, dtype, is_tied, monkeypatch):
    """The products have columns of zeros; the logits are a view without them, and the cross-entropy reads it where it is."""
    monkeypatch.setattr(cuda, "MOST_UNPADDED", 12)
    x, targets = normal(dtype, 2, 5, 8), np.arange(10).reshape(2, 5)
    weight = normal(dtype, 13, 8).T if is_tied else normal(dtype, 8, 13)
    same(cuda_kernels, "linear", (x, weight, None), dtype, size=20)
    logits, saved = cuda_kernels.linear_forward(x, weight, None)
    assert logits.shape == (2, 5, 13)
    assert logits.strides[1] == saved[1].shape[1] * dtype.itemsize
    assert saved[1].shape[1] * dtype.itemsize % 16 == 0
    assert (saved[1].strides[0] < saved[1].strides[1]) == is_tied
    losses, saved_losses = cuda_kernels.cross_entropy_forward(logits, targets)
    dlogits = cuda_kernels.cross_entropy_backward(np.ones_like(losses), saved_losses)
    assert saved_losses[0] is logits
    reference = Kernels(np)
    expected, saved_expected = reference.cross_entropy_forward(x @ weight, targets)
    close(losses, expected, dtype, 10)
    close(dlogits, reference.cross_entropy_backward(np.ones_like(losses), saved_expected), dtype)
    transposed = np.asfortranarray(logits)  # its rows are not contiguous
    close(cuda_kernels.cross_entropy_forward(transposed, targets)[0], expected, dtype, 10)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (40,), (33, 65)])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_residual(cuda_kernels, dtype, shape, p):
    same(cuda_kernels, "residual", (normal(dtype, *shape), normal(dtype, *shape, seed=4)), dtype, p, key=7)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (8,), (140, 65)])
def test_linear(cuda_kernels, dtype, shape):
    weight, bias = normal(dtype, shape[-1], 7), normal(dtype, 7)
    same(cuda_kernels, "linear", (normal(dtype, *shape), weight, bias), dtype, size=20)
    same(cuda_kernels, "linear", (normal(dtype, *shape)[::-1], normal(dtype, 7, shape[-1]).T, None), dtype, size=20)
    y, saved = cuda_kernels.linear_forward(normal(dtype, *shape), weight, bias)
    assert [d is None for d in cuda_kernels.linear_backward(y, saved, (False, True, False))] == [True, False, True]


@on_cpu
def test_weights_rounded_ahead(cuda_kernels, bf16):
    """All linear layers take parts of one copy, also transposed ones. Results stay the same. Afterwards, weights are read."""
    flat = normal(np.float32, 13 * 8 + 8 * 8 + 8)
    table, square, bias = flat[:104].reshape(13, 8), flat[104:168].reshape(8, 8), flat[168:]
    x = normal(np.float32, 5, 8).astype(bf16)
    layers = [(table.T, None), (square, bias), (square.T, bias), (normal(np.float32, 8, 3), None)]
    expected = [cuda_kernels.linear_forward(x, *layer)[0] for layer in layers]
    with cuda_kernels.weights_rounded_ahead(flat, [table, square, bias], bf16):
        results = [cuda_kernels.linear_forward(x, *layer) for layer in layers]
    for (y, _), same_y in zip(results, expected, strict=True):
        np.testing.assert_array_equal(y, same_y)
    of_table, of_square, transposed, other = (saved[1] for _, saved in results)
    bounds = np.lib.array_utils.byte_bounds
    assert bounds(of_square)[0] - bounds(of_table)[0] == 2 * table.size
    assert np.shares_memory(of_square, transposed)
    assert not np.shares_memory(of_square, other)
    flat *= 2
    np.testing.assert_array_equal(cuda_kernels.linear_forward(x, table.T, None)[0], 2 * expected[0])
    with pytest.raises(ZeroDivisionError), cuda_kernels.weights_rounded_ahead(flat, [table, square, bias], bf16):
        raise ZeroDivisionError
    flat /= 2
    np.testing.assert_array_equal(cuda_kernels.linear_forward(x, square, bias)[0], expected[1])


@on_cpu
def test_rounding_to_bfloat16(cuda_kernels, bf16):
    """Numbers are rounded to the nearest, and halfway to the even one. Infinities and NaN stay infinities and NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:6] = 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFFFFFFFF  # ties, the largest, inf, NaN, NaN
    bits = np.concatenate([bits, np.array([0, 1, 0x80000000, 0x8001, 0x7FFF, 0x8000], dtype=np.uint32)])  # subnormal numbers
    numbers = bits.view(np.float32)
    found = np.zeros((1, len(numbers)), dtype=bf16)
    cuda_kernels._launch("add_bias", "bfloat16", (-(-len(numbers) // 64), 1), 64, (found, numbers, *found.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (numbers + np.float32(0)).astype(bf16)
    np.testing.assert_array_equal(np.isnan(found[0].astype(np.float32)), np.isnan(numbers))
    there = ~np.isnan(numbers)
    np.testing.assert_array_equal(found[0, there].view(np.uint16), expected[there].view(np.uint16))


@on_cpu
@pytest.mark.parametrize(
    ("name", "shapes", "parameters", "rest"),
    [
        ("linear", [(6, 5, 8)], [(8, 7), (7,)], []),
        ("linear", [(140, 65)], [(65, 7), None], []),
        ("causal_attention", [(2, 3, 33, 8)] * 3, [], []),
        ("self_attention", [(2, 33, 3, 2, 8)], [], [0.3]),
        ("causal_attention", [(2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8)], [], [0.3]),
        ("self_attention", [(1, 130, 3, 2, 64)], [], [0.3]),
        ("self_attention", [(2, 9, 3, 2, 3)], [], [0.3]),
        ("self_attention", [(1, 9, 3, 3, 20)], [], []),
        ("self_attention", [(1, 70, 3, 2, 80)], [], [0.3]),
        ("self_attention", [(1, 70, 3, 1, 128)], [], []),
        ("self_attention", [(1, 70, 3, 1, 136)], [], [0.3]),
        ("layer_norm", [(9, 40)], [(40,), (40,)], []),
        ("layer_norm", [(2, 70, 33)], [(33,), None], []),
        ("layer_norm", [(20, 520)], [(520,), (520,)], []),
        ("gelu", [(3, 50)], [], []),
        ("rotary", [(2, 5, 2, 3, 8)], [(5, 1, 1, 8)], []),
        ("dropout", [(33, 65)], [], [0.25]),
        ("residual", [(33, 65)] * 2, [], [0.25]),
        ("cross_entropy", [(4, 10, 65)], [], []),
    ],
)
def test_kernels_in_bfloat16(cuda_kernels, bf16, name, shapes, parameters, rest):
    """The result is that of the reference in float32, rounded to bfloat16. Parameters and losses stay float32."""
    launches = Launches(cuda_kernels)
    inputs = [normal(np.float32, *shape, seed=i).astype(bf16) for i, shape in enumerate(shapes)]
    inputs += [None if shape is None else normal(np.float32, *shape, seed=9) for shape in parameters]
    if name == "cross_entropy":
        inputs.append(np.arange(40).reshape(4, 10))
    before = [None if a is None else a.copy() for a in inputs]
    results = []
    for kernels in (SameDraws(cuda_kernels), cuda_kernels):
        given = [
            a.astype(np.float32) if kernels is not cuda_kernels and a is not None and a.dtype == bf16 else a for a in inputs
        ]
        y, saved = getattr(kernels, f"{name}_forward")(*given, *rest, *([key_of(5)] if rest else []))
        assert kernels is not cuda_kernels or isinstance(saved, base.CudaSaved), "not the kernel"
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(bf16).astype(y.dtype)
        gradients = getattr(kernels, f"{name}_backward")(dy, saved)
        results.append([y, *(gradients if isinstance(gradients, tuple) else (gradients,))])
    in_float32 = {"cross_entropy": [0]}.get(name, [i for i in range(len(results[0])) if i > len(shapes)])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        if expected is None:
            assert found is None or name == "layer_norm"  # the gradient of a bias that is None
            continue
        assert found.dtype == (np.float32 if i in in_float32 else bf16)
        assert found.shape == expected.shape
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.astype(np.float32) / scale, expected / scale, rtol=0, atol=4 * BFLOAT16_EPS)
    for array, untouched in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, untouched)
    fused = [launched for launched in launches.names if launched in FUSED]
    assert fused == (FUSED if "attention" in name and shapes[0][-1] <= 128 else [])


@on_cpu
def test_attention_in_bfloat16_by_products(cuda_kernels, bf16):
    """For GPUs without tensor cores that multiply bfloat16."""
    launches = Launches(cuda_kernels, tensor_cores=False)
    qkv = normal(np.float32, 2, 33, 3, 2, 8).astype(bf16)
    dy = normal(np.float32, 2, 33, 2, 8, seed=1).astype(bf16)
    results = []
    for kernels, x, d in ((Kernels(np), qkv.astype(np.float32), dy.astype(np.float32)), (cuda_kernels, qkv, dy)):
        y, saved = kernels.self_attention_forward(x)
        results.append([y, kernels.self_attention_backward(d, saved)])
    for expected, found in zip(*results, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.astype(np.float32) / scale, expected / scale, rtol=0, atol=4 * BFLOAT16_EPS)
    assert not set(FUSED) & set(launches.names)


@on_cpu
def test_adamw(cuda_kernels, dtype):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(1000).astype(dtype) for _ in range(2)] + [rng.random(1000).astype(dtype) for _ in range(2)]
    results = []
    for kernels in (Kernels(np), cuda_kernels):
        arrays = [a.copy() for a in start]
        kernels.adamw(*arrays, AdamWStep(step=3, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1))
        kernels.adamw(*arrays, AdamWStep(step=4, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, n_decay=300))
        results.append(arrays)
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype)


@on_cpu
def test_unusual_arguments(cuda_kernels, dtype):
    """Arrays of no dimensions, arrays that are not contiguous, and parameters of another float type."""
    scalar = normal(dtype)
    for name, rest, key in [("gelu", [], None), ("dropout", [np.float32(0.25)], 3)]:
        same(cuda_kernels, name, (scalar,), dtype, *rest, key=key)
    same(cuda_kernels, "cross_entropy", (normal(dtype, 5), np.array(2)), dtype)
    x, wide, one = normal(dtype, 6, 4), normal(dtype, 8), np.ones(4, np.float16)
    same(cuda_kernels, "layer_norm", (x, wide[::2], wide[1::2]), dtype, 1, size=4)
    y, saved = cuda_kernels.layer_norm_forward(x, wide[:4].copy(), one)
    assert not isinstance(saved, base.CudaSaved)
    np.testing.assert_array_equal(y, Kernels(np).layer_norm_forward(x, wide[:4].copy(), one)[0])


@on_cpu
def test_more_rows_than_a_grid_has_chunks(cuda_kernels, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_CHUNKS", 2)
    monkeypatch.setattr(cuda, "MIN_CHUNK", 3)
    same(cuda_kernels, "embedding", (normal(dtype, 5, 3), np.arange(20) % 5), dtype, size=20)


@on_cpu
def test_sums_of_columns(cuda_kernels, dtype, monkeypatch):
    """Several chunks, several blocks of columns, one after the other: the counters are 0 again after each sum."""
    monkeypatch.setattr(cuda, "MIN_CHUNK", 3)
    for n, c in [(20, 300), (20, 600), (2, 8), (70, 513)]:
        x = normal(dtype, n, c)
        close(cuda_kernels._column_sums(x, None), x.sum(axis=0), dtype, 10)
        assert not cuda_kernels._arrived.any()
    monkeypatch.setattr(cuda, "MOST_BLOCKS", 1)  # more columns than there are counters
    close(cuda_kernels._column_sums(x, x[0].copy()), x.sum(axis=0) + x[0], dtype, 10)


@on_cpu
def test_empty_arrays(cuda_kernels, dtype):
    same(cuda_kernels, "gelu", (normal(dtype, 0, 4),), dtype)
    same(cuda_kernels, "layer_norm", (normal(dtype, 0, 4), normal(dtype, 4), None), dtype)
    same(cuda_kernels, "dropout", (normal(dtype, 0, 4),), dtype, 0.5, key=1)
    same(cuda_kernels, "embedding", (normal(dtype, 5, 3), np.zeros(0, np.int64)), dtype)
    same(cuda_kernels, "cross_entropy", (normal(dtype, 0, 4), np.zeros(0, np.int64)), dtype)
    same(cuda_kernels, "causal_attention", [normal(dtype, 1, 1, n, 4) for n in (0, 3, 3)], dtype)


@on_cpu
def test_clipping_and_adamw_together(cuda_kernels, dtype):
    """Scales, reported norms and weights equal the reference's. After a step that is not finite, nothing changes."""
    rng = np.random.default_rng(0)
    results = []
    for kernels in (Kernels(np), cuda_kernels):
        rng = np.random.default_rng(0)
        p, m, v = (rng.random(3000).astype(dtype) for _ in range(3))
        scale, found = np.ones((), dtype), []
        for step, (size, loss) in enumerate([(1e-3, 2.0), (1.0, 1.0), (1.0, np.nan), (1e-3, 1.0), (np.inf, 1.0)], 1):
            g = (size * rng.standard_normal(3000)).astype(dtype)
            found += [kernels.clip_factor(g, np.array(loss, dtype), 1.0, scale), scale.copy()]
            settings = {"step": step, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
            kernels.adamw(p, g, m, v, AdamWStep(**settings, scale=scale))
            found += [p.copy(), m.copy(), v.copy()]
        results.append(found)
    for expected, found in zip(*results, strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(finite, np.isfinite(found))
        close(np.where(finite, found, 0), np.where(finite, expected, 0), dtype)
    scales = [float(scale) for scale in results[1][1::5]]
    assert scales[0] == 1
    assert 0 < scales[1] < 0.1
    assert scales[2:] == [-1, -1, -1]
    np.testing.assert_array_equal(results[1][7], results[1][-3])  # steps 3 to 5 do not change the weights


@on_cpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", launch.ELEMENTS)
def test_kernels_on_a_gpu_give_the_results_of_the_cpu(dtype):
    """The dropout masks are equal too."""
    gpu, cpu = select("cuda"), CudaKernels(np, cuda_on_cpu.launch, cuda_on_cpu.Gemm())
    element, parameter = (backend.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)), launch.ELEMENTS[dtype][2]
    x, q = normal(np.float64, 33, 65).astype(element), [normal(np.float64, 2, 3, 70, 8).astype(element) for _ in range(3)]
    weight, bias = normal(parameter, 65, 24), normal(parameter, 24)
    heads = [normal(np.float64, 2, 150, 3, 2, n).astype(element) for n in (20, 64, 128)]
    wide = [
        normal(np.float64, 300, 520).astype(element),
        *(normal(parameter, 520, seed=i) for i in (1, 2)),
        normal(parameter, 520, 520),
    ]
    for name, inputs, rest in [
        ("linear", [x, weight, bias], []),
        ("dropout", [x], [0.3]),
        ("residual", [x, x + x], [0.3]),
        ("causal_attention", q, []),
        ("causal_attention", q, [0.3]),
        *(("self_attention", [qkv], rest) for qkv in heads for rest in ([], [0.3])),
        ("layer_norm", wide[:3], []),
        ("linear", [wide[0], wide[3], wide[1]], []),
        ("gelu", [x], []),
        ("rotary", [q[0], normal(parameter, 70, 8)], []),
        ("layer_norm", [x, normal(parameter, 65), normal(parameter, 65, seed=1)], []),
        ("cross_entropy", [x, np.arange(33) * 2], []),
    ]:
        results = []
        for kernels, xp in ((cpu, np), (gpu.kernels, gpu.xp)):
            drawn = [key_of(5, xp)] if rest else []
            y, saved = getattr(kernels, f"{name}_forward")(*map(xp.asarray, inputs), *rest, *drawn)
            gradients = getattr(kernels, f"{name}_backward")(y, saved)
            results.append([backend.to_numpy(a) for a in (y, *(gradients if isinstance(gradients, tuple) else [gradients]))])
        for expected, found in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            tolerance = 8 * BFLOAT16_EPS if dtype == "bfloat16" else 500 * np.finfo(dtype).eps
            expected, found = expected.astype(np.float64), found.astype(np.float64)
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))
