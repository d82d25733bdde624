"""The CPU kernels, in NumPy and in C: each override gives the results and gradients of the reference, for unusual shapes."""

import numpy as np
import pytest
from support.arrays import adds_to_sums, close, normal
from support.native import native_kernels

from npgpt import GPT, AdamW, Dataset, GPTConfig
from npgpt.engine import backend
from npgpt.engine.backend import CPU
from npgpt.kernels import cpu
from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.decode import DecodeKernels, few_rows_product
from npgpt.kernels.native import kernels as native
from npgpt.kernels.native import library
from npgpt.kernels.native.library import PROCESSORS
from npgpt.kernels.reference import Kernels
from npgpt.kernels.updates import AdamWStep
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers

REFERENCE = Kernels(np)


@pytest.fixture(params=["tiny blocks", "usual blocks", *PROCESSORS])
def fast(request, monkeypatch):
    """The CPU kernels: those in NumPy, and those in C for each kind of processor.

    With tiny blocks, every loop over blocks runs several times, and its last block is incomplete.
    """
    monkeypatch.setattr(cpu, "BLOCK", 7 if request.param == "tiny blocks" else 65_536)
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 3 if request.param in ("tiny blocks", "any") else 64)
    return native_kernels(request.param) if request.param in PROCESSORS else CpuKernels()


def same(fast, name, inputs, dtype, *rest, seed=None, size=1.0):
    """Run forward and backward of both kernels with equal inputs and generators, and compare all results."""
    for array in inputs:
        if array is not None:
            array.flags.writeable = False  # an operation that writes to its input fails here
    results = []
    for kernels in (REFERENCE, fast):
        extra = rest if seed is None else (*rest, np.random.Generator(np.random.SFC64(seed)))
        y, saved = getattr(kernels, f"{name}_forward")(*inputs, *extra)
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
        dy.flags.writeable = False
        gradients = getattr(kernels, f"{name}_backward")(dy, saved)
        results.append((y, *(gradients if isinstance(gradients, tuple) else (gradients,))))
        adds_to_sums(kernels, name, dy, saved, results[-1], size)
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype, size)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 1), (17,), (0, 4)])
def test_gelu(fast, dtype, shape):
    x = normal(dtype, *shape)
    same(fast, "gelu", (x * 3,), dtype)
    if len(shape) > 1:
        same(fast, "gelu", (x[::-1, ..., ::-1].T,), dtype)  # not contiguous


@pytest.mark.parametrize("shape", [(2, 5, 2, 3, 8), (1, 1, 2), (4, 6), (0, 3, 1, 4), (2, 3, 130)])
def test_rotary(fast, dtype, shape):
    x, rotation = normal(dtype, *shape), normal(dtype, shape[1], *[1] * (len(shape) - 3), shape[-1], seed=1)
    if len(shape) == 2:
        rotation = normal(dtype, shape[-1])
    same(fast, "rotary", (x, rotation), dtype)
    same(fast, "rotary", (normal(dtype, *shape[:-1], 3 * shape[-1])[..., shape[-1] : 2 * shape[-1]], rotation), dtype)
    same(fast, "rotary", (normal(dtype, *shape[:-1], 2 * shape[-1])[..., ::2], rotation), dtype)  # as the reference does it
    same(fast, "rotary", (x, rotation.astype(np.float64)), dtype)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 2), (0, 4), (9, 40)])
def test_layer_norm(fast, dtype, shape):
    x, weight, bias = normal(dtype, *shape) + 3, normal(dtype, shape[-1]), normal(dtype, shape[-1], 1)[:, 0]
    same(fast, "layer_norm", (x, weight, bias), dtype)
    same(fast, "layer_norm", (x[::-1], weight, None), dtype, 0.1)


@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (7, 7), (8, 8), (9, 9), (2, 6), (1, 5), (65, 65), (130, 130)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", [1.0, 8.0], ids=["small scores", "large scores"])  # only large ones use the row maximum
def test_attention(fast, dtype, n_query, n_key, dropout, size):
    q, k, v = (size * normal(dtype, 2, n, 3, 4).transpose(0, 2, 1, 3) for n in (n_query, n_key, n_key))
    same(fast, "causal_attention", (q, k, v), dtype, dropout, seed=5, size=10 * size**3)


@pytest.mark.parametrize(
    ("n_query", "n_key", "head_dim"), [(60, 500, 33), (385, 385, 64), (3, 50, 384), (3, 50, 385), (49, 49, 1), (50, 51, 20)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_of_other_sizes(fast, dtype, n_query, n_key, head_dim, dropout):
    """Many keys, and all kinds of heads. Queries, keys and values are views, with rows apart or with columns apart."""
    qkv = normal(dtype, 2, n_key, 3, 2, head_dim).transpose(2, 0, 3, 1, 4)
    same(fast, "causal_attention", (qkv[0, :, :, -n_query:], qkv[1], qkv[2]), dtype, dropout, seed=5, size=20)
    columns = normal(dtype, 1, 2, head_dim, n_key).swapaxes(2, 3)
    same(fast, "causal_attention", (columns[:, :, :n_query], columns, columns[:, ::-1, ::-1]), dtype, dropout, seed=5, size=20)


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 1), (5, 3), (49, 16), (97, 33)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_self_attention(fast, dtype, tokens, head_dim, dropout):
    """Also if queries, keys and values lie elsewhere than side by side."""
    same(fast, "self_attention", (normal(dtype, 2, tokens, 3, 2, head_dim),), dtype, dropout, seed=5, size=20)
    same(fast, "self_attention", (normal(dtype, 3, 2, tokens, 2, head_dim).transpose(1, 2, 0, 3, 4),), dtype, dropout, seed=5)


def test_attention_of_huge_scores_stays_finite(fast):
    q = np.full((1, 1, 4, 2), 1e4, dtype=np.float32)
    out, saved = fast.causal_attention_forward(q, -q, q)
    assert np.isfinite(out).all()
    assert all(np.isfinite(d).all() for d in fast.causal_attention_backward(out, saved))


def test_attention_without_queries(fast, dtype):
    same(fast, "causal_attention", (normal(dtype, 1, 1, 0, 4), normal(dtype, 1, 1, 3, 4), normal(dtype, 1, 1, 3, 4)), dtype)


@pytest.mark.parametrize("value", [7.0, 1000.0, 1e6])
def test_layer_norm_of_constant_rows(fast, value):
    x, ones = np.full((3, 384), value, dtype=np.float32), np.ones(384, dtype=np.float32)
    np.testing.assert_array_equal(fast.layer_norm_forward(x, ones, ones)[0], np.ones((3, 384)))


@pytest.mark.parametrize("p", [0.3, 1.0, 1e-6])
def test_dropout_and_the_residual_sum(fast, dtype, p):
    """With the masks of the reference."""
    x, branch = normal(dtype, 5, 37), normal(dtype, 5, 37, seed=1)
    same(fast, "dropout", (x,), dtype, p, seed=5)
    same(fast, "dropout", (normal(dtype, 37, 5).T,), dtype, p, seed=5)
    same(fast, "residual", (x, branch), dtype, p, seed=5)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 40), (1, 1), (33, 65)])
def test_cross_entropy(fast, dtype, shape):
    targets = np.arange(np.prod(shape[:-1])).reshape(shape[:-1]) * 7 % shape[-1]
    same(fast, "cross_entropy", (5 * normal(dtype, *shape), targets), dtype, size=10)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 40), (0, 4)])
def test_linear(fast, dtype, shape):
    weight, bias = normal(dtype, shape[-1], 17), normal(dtype, 17)
    same(fast, "linear", (normal(dtype, *shape), weight, bias), dtype, size=10)
    same(fast, "linear", (normal(dtype, *shape)[::-1], np.asfortranarray(weight), bias), dtype, size=10)


@pytest.mark.parametrize("ids", [[[3, 0, 3], [3, 1, 1]], [2], [], [[4, 3], [2, 1]]])
def test_embedding(fast, dtype, ids):
    same(fast, "embedding", (normal(dtype, 5, 3), np.array(ids, dtype=np.int64)), dtype)


def test_adamw(fast, dtype):
    """In NumPy, the bits are those of the reference."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(100).astype(dtype) for _ in range(2)] + [rng.random(100).astype(dtype) for _ in range(2)]
    results = []
    for kernels in (REFERENCE, fast):
        arrays = [a.copy() for a in start]
        kernels.adamw(*arrays, AdamWStep(step=3, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1))
        kernels.adamw(*arrays, AdamWStep(step=4, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, n_decay=10))
        strided = [np.repeat(a, 2)[::2] for a in start]
        kernels.adamw(*strided, AdamWStep(step=3, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1))
        results.append([*arrays, *strided])
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype)
        if not isinstance(fast, native.NativeKernels):
            np.testing.assert_array_equal(found, expected)


def test_training_with_the_reference_gives_the_same_losses(monkeypatch):
    """The losses of twenty steps with dropout differ only by rounding: reference, NumPy, and C if there is a compiler."""
    config = GPTConfig(13, block_size=70, n_layer=2, n_head=2, n_embd=24, dropout=0.2)
    losses = []
    for kernels in (REFERENCE, CpuKernels(), CPU.kernels):
        monkeypatch.setitem(backend._backends, np.ndarray, backend.Backend("cpu", np, kernels))
        model = GPT(config, seed=1)
        assert model.backend.kernels is kernels
        optimizer = AdamW(model.parameters(), lr=1e-3)
        dataset = Dataset(np.random.default_rng(0).integers(0, 13, 5000), 70, 4)
        with Workers(2) as workers:
            step = ParallelStep(model, workers, 1)
            for number in range(20):
                losses.append(step(*dataset.get_batch("train", number), seed=1, number=number))
                optimizer.step()
    for others in (losses[20:40], losses[40:]):
        np.testing.assert_allclose(losses[:20], others, rtol=2e-5)
    assert losses[19] < losses[0]


def test_every_override_runs_and_is_tested():
    """Each class of kernels uses its own overrides, and has no method that the reference does not have."""
    in_numpy = {"causal_attention", "rotary", "layer_norm", "gelu", "embedding", "adamw"}
    in_c = in_numpy - {"rotary"} | {"linear", "dropout", "residual", "cross_entropy", "self_attention"}
    decoding = {
        "decodes_blocks",
        "block_addresses",
        "blocks_decode",
        "linear_decode",
        "layer_norm_decode",
        "gelu_decode",
        "attention_decode",
    }
    for classes, tested in [((CpuKernels, DecodeKernels), in_numpy), ((native.NativeKernels,), in_c)]:
        members = {name: value for kernels in classes for name, value in vars(kernels).items()}
        methods = {name for name, value in members.items() if callable(value) and not name.startswith("_")}
        assert decoding <= methods
        overridden = methods - decoding
        assert overridden <= set(dir(Kernels)), "an operation that the reference does not have"
        assert {name.removesuffix("_forward").removesuffix("_backward") for name in overridden} == tested
    assert type(CPU.kernels) is (native.NativeKernels if library.processors() else CpuKernels)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 16, 33])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 64), (9, 65), (40, 130), (33, 2100)])
def test_a_few_rows_of_a_linear_layer(fast, dtype, rows, shape):
    x, weight, bias = normal(dtype, rows, shape[0]), normal(dtype, *shape, seed=1), normal(dtype, shape[1], seed=2)
    onto = normal(dtype, rows, shape[1], seed=3)
    exact = (x.astype(np.float64) @ weight.astype(np.float64)).astype(dtype)
    close(fast.linear_decode(x, weight, bias), exact + bias, dtype, 10)
    close(fast.linear_decode(x, np.asfortranarray(weight), None), exact, dtype, 10)
    before = onto.copy()
    assert fast.linear_decode(x, weight, bias, onto) is onto
    close(onto, exact + bias + before, dtype, 10)


@pytest.mark.parametrize("shape", [(1, 3), (5, 40), (2, 384)])
def test_a_few_rows_of_layer_norm_and_gelu(fast, dtype, shape):
    x, weight, bias = normal(dtype, *shape) + 3, normal(dtype, shape[1]), normal(dtype, shape[1], seed=1)
    close(fast.layer_norm_decode(x, weight, bias, 1e-5), REFERENCE.layer_norm_forward(x, weight, bias, 1e-5)[0], dtype, 4)
    close(fast.layer_norm_decode(x, weight, None, 1e-5), REFERENCE.layer_norm_forward(x, weight, None, 1e-5)[0], dtype, 4)
    close(fast.gelu_decode(x), REFERENCE.gelu_forward(x)[0], dtype)


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 4), (17, 16), (40, 33), (129, 64), (30, 150)])
def test_attention_of_one_more_token(fast, dtype, tokens, head_dim):
    """Over a cache with room for more tokens, for queries that are views, and for sequences that lack some keys."""
    cache = normal(dtype, 2, 3, 2, tokens + 5, head_dim)
    k, v = cache[0, :, :, :tokens], cache[1, :, :, :tokens]
    q = normal(dtype, 3, 3, 2, 1, head_dim)[:, 1]  # as in the output of the layer that makes queries, keys and values
    absent = np.zeros((3, 1, tokens, 1), dtype=dtype)
    absent[1, :, tokens // 2 + 1 :] = -np.inf
    scores = np.einsum("bhod,bhsd->bhs", q, k) / np.sqrt(head_dim)
    for given in (None, absent):
        p = np.exp(scores if given is None else scores + given[:, :, :, 0])
        p /= p.sum(axis=-1, keepdims=True)
        close(fast.attention_decode(q, k, v, given), np.einsum("bhs,bhsd->bhd", p, v).astype(dtype), dtype)
    close(fast.attention_decode(q, k[:, ::-1], v[:, ::-1], None)[:, ::-1], fast.attention_decode(q[:, ::-1], k, v, None), dtype)


@pytest.mark.parametrize("rows", [1, 2, 16, 32, 33])
@pytest.mark.parametrize("shape", [(64, 128), (1537, 384), (1024, 256), (40, 130)])
def test_few_rows_product(rng, rows, shape):
    """The product is right for any number of rows, for columns that do not fill the last piece, and for split sums."""
    x, weight = rng.standard_normal((rows, shape[0])), rng.standard_normal(shape)
    np.testing.assert_allclose(few_rows_product(x, weight), x @ weight, rtol=0, atol=1e-10)
