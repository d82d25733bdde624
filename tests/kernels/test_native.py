"""The kernels in C: all operations against the reference in float64, the ends of the range of float32, and what is loaded."""

import ctypes
import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.arrays import close, normal
from support.native import native_kernels
from support.op_cases import CASES, Dims, inputs_of

from npgpt import GPT, GPTConfig, Tensor, no_grad
from npgpt.engine import backend
from npgpt.engine.backend import CPU, Backend, DeviceError, bfloat16_products
from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.native import library as native_library
from npgpt.kernels.native.kernels import NativeSaved
from npgpt.kernels.native.library import OBJECT_HEAD, PROCESSORS, hash_of_sources, processors
from npgpt.kernels.reference import Kernels
from npgpt.model import gpt, layers
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers

REFERENCE = Kernels(np)
WITH_FLOAT64 = {"array operand", "array matmul"}  # one operand is an array of float64, and so is the result
OF_FLOATS = np.finfo(np.float32)


@pytest.fixture(params=PROCESSORS)
def kernels(request):
    return native_kernels(request.param)


@pytest.fixture
def use(monkeypatch):
    """Makes these kernels those of the CPU."""

    def use(kernels):
        monkeypatch.setitem(backend._backends, np.ndarray, Backend("cpu", np, kernels))

    return use


@pytest.mark.parametrize(
    "dims", [Dims(), Dims(lead=(), a=7, b=2, c=1, past=0), Dims(lead=(33,), a=65, b=40, c=8), Dims(lead=(0,))]
)
@pytest.mark.parametrize("name", sorted(set(CASES) - WITH_FLOAT64))
def test_every_operation_in_float32(kernels, use, name, dims):
    """The results and gradients equal those of the reference in float64, for each set of kernels."""
    case, results = CASES[name], []
    arrays = inputs_of(case, dims, np.random.default_rng(7))
    for chosen, dtype in [(REFERENCE, np.float64), (CpuKernels(), np.float32), (kernels, np.float32)]:
        use(chosen)
        inputs = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
        y = case.fn(*inputs)
        y.backward(np.random.default_rng(1).standard_normal(y.shape).astype(dtype))
        results.append([np.asarray(y.data), *(x.grad for x in inputs)])
    for exact, *others in zip(*results, strict=True):
        for found in others:
            close(found, exact.astype(np.float32), np.dtype(np.float32), 10)


def test_exponentials_are_within_one_unit_in_the_last_place(kernels):
    """From 1 down to the smallest denormal number. Attention turns a row of scores, whose largest is 0, into exponentials."""
    keys = np.linspace(-104, 0, 1 << 20, dtype=np.float32).reshape(1, 1, -1, 1)
    query, values = np.ones((1, 1, 1, 1), dtype=np.float32), np.ones_like(keys)
    out, saved = kernels.causal_attention_forward(query, keys, values)
    exact = np.exp(keys.reshape(-1).astype(np.float64))
    (found,) = [a for a in saved if isinstance(a, np.ndarray) and a.shape == exact.shape]
    units = np.abs(found - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() <= 1
    np.testing.assert_allclose(out, 1, rtol=1e-4)


def test_exponentials_at_the_ends_of_the_range(kernels):
    """Denormal results, zeros, and rows of infinities."""
    x = np.array([[0, -87.5, -95, -103, -104, -200, -np.inf]], dtype=np.float32)
    _, (p, _) = kernels.cross_entropy_forward(x, np.zeros(1, dtype=np.int64))
    np.testing.assert_allclose(p[0], np.exp(x[0].astype(np.float64)), rtol=1e-6, atol=2 * OF_FLOATS.smallest_subnormal)
    q = np.full((1, 1, 3, 2), 1e30, dtype=np.float32)  # all scores are -inf
    with np.errstate(over="ignore"):
        out, saved = kernels.causal_attention_forward(q, -q, q)
        gradients = kernels.causal_attention_backward(out, saved)
    np.testing.assert_array_equal(out, 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 36])
def test_what_is_not_finite_stays_so(kernels, value, at):
    """One bad number in a row, also in its last, incomplete vector. Other rows do not change."""
    x = normal(np.float32, 3, 37)
    x[1, at] = value
    ones, zeros = np.ones(37, dtype=np.float32), np.zeros(37, dtype=np.float32)
    for name, arguments in [("gelu", ()), ("layer_norm", (ones, zeros)), ("cross_entropy", (np.array([1, 1, 1]),))]:
        clean = np.where(np.isfinite(x), x, 0)
        with np.errstate(invalid="ignore"):
            y, saved = getattr(kernels, f"{name}_forward")(x, *arguments)
            expected, _ = getattr(kernels, f"{name}_forward")(clean, *arguments)
            reference, _ = getattr(REFERENCE, f"{name}_forward")(x.astype(np.float64), *arguments)
            assert isinstance(saved, NativeSaved)
            dx = getattr(kernels, f"{name}_backward")(np.ones_like(y), saved)
        np.testing.assert_array_equal(y[[0, 2]], expected[[0, 2]])
        np.testing.assert_array_equal(np.isnan(y[1]), np.isnan(reference[1]))
        if np.isnan(value):
            assert np.isnan(y[1]).any()
            assert np.isnan((dx[0] if isinstance(dx, tuple) else dx)[1]).any()


def test_gelu_of_huge_and_tiny_values(kernels):
    x = np.array([1e30, -1e30, 1e20, -1e20, 50, -50, 5, -5, 1e-30, -1e-30, 1e-42, 0, -0.0], dtype=np.float32)
    y, saved = kernels.gelu_forward(x)
    dx = kernels.gelu_backward(np.ones_like(x), saved)
    np.testing.assert_allclose(
        y, np.where(np.abs(x) > 40, np.maximum(x, 0), REFERENCE.gelu_forward(x.astype(np.float64))[0]), rtol=2e-6, atol=1e-6
    )
    assert np.isfinite(dx).all()
    np.testing.assert_allclose(dx[np.abs(x) > 40], (x > 0)[np.abs(x) > 40])


SHAPES = [(1, 1, 1), (5, 7, 9), (130, 800, 70), (12, 384, 32), (13, 385, 33), (33, 0, 4), (0, 3, 4), (121, 1, 1), (40, 769, 48)]
LAYOUTS = (np.ascontiguousarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2], lambda a: a[::-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_float32(kernels, shape):
    """For all kinds of processor, and all layouts of the operands."""
    m, k, n = shape
    a, b, bias = normal(np.float32, m, k), normal(np.float32, k, n, seed=1), normal(np.float32, n, seed=2)
    for layout in LAYOUTS:
        x, weight = layout(a), layout(b)
        exact = x.astype(np.float64) @ weight.astype(np.float64)
        for found, expected in [
            (kernels._product("product", x, weight), exact),
            (kernels._product("product", x, weight, bias), exact + bias),
            (kernels._product(None, x, weight, bias), exact + bias),
            (kernels._product("product", x.T.copy().T, weight.T.copy().T), exact),
        ]:
            close(found, expected.astype(np.float32), np.dtype(np.float32), 10)


def test_which_products_are_used(kernels, monkeypatch):
    """A kernel multiplies if the BLAS has one thread, this processor gains from it, and there are rows enough."""
    used = []
    original = kernels._product
    monkeypatch.setattr(
        kernels, "_product", lambda kernel, *rest, **named: used.append(kernel) or original(kernel, *rest, **named)
    )
    x, weight = normal(np.float32, 40, 8), normal(np.float32, 8, 8)
    gains = kernels.description.startswith("native AVX-512")
    for rows, one_thread in [(40, True), (40, False), (31, True)]:
        kernels.threads = 1 if one_thread else 2
        used.clear()
        y, saved = kernels.linear_forward(x[:rows], weight, None)
        kernels.linear_backward(y, saved)
        assert used == (["product"] * 3 if gains and one_thread and rows == 40 else [None] * 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_bfloat16(kernels, shape):
    """Against float64 products of the rounded operands: all layouts of the operands, all gradients."""
    if not kernels.has_bfloat16:
        with pytest.raises(DeviceError, match="AVX512-BF16"), bfloat16_products(Backend("cpu", np, kernels)):
            pass
        return
    m, k, n = shape
    x, weight, bias = normal(np.float32, m, k), normal(np.float32, k, n, seed=1), normal(np.float32, n, seed=2)
    dy = normal(np.float32, m, n, seed=3)
    for layout in LAYOUTS[:3]:
        with bfloat16_products(Backend("cpu", np, kernels)):
            assert kernels.bfloat16_products
            y, saved = kernels.linear_forward(layout(x), layout(weight), bias)
            without, _ = kernels.linear_forward(layout(x), layout(weight), None)
            dx, dweight, dbias = kernels.linear_backward(layout(dy), saved)
        assert not kernels.bfloat16_products
        rounded = [_rounded(a) for a in (x, weight, dy)]
        for found, exact in [
            (y, rounded[0] @ rounded[1] + bias),
            (without, rounded[0] @ rounded[1]),
            (dx, rounded[2] @ rounded[1].T),
            (dweight, rounded[0].T @ rounded[2]),
            (dbias, dy.sum(axis=0, dtype=np.float64)),
        ]:
            close(found, exact.astype(np.float32), np.dtype(np.float32), 10)


def _rounded(x):
    """x, rounded to bfloat16, as float64."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def test_training_with_products_of_bfloat16():
    """Threads round as the caller's thread does, and the losses stay close to those in float32. Evaluations are not rounded."""
    if not getattr(CPU.kernels, "has_bfloat16", False):
        pytest.skip("this processor has no AVX512-BF16")
    config = GPTConfig(13, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    ids = np.random.default_rng(0).integers(0, 13, (8, 17))
    losses = {}
    for bf16, threads in [(False, 1), (True, 1), (True, 2)]:
        model = GPT(config, seed=1)
        with Workers(threads) as workers:
            step = ParallelStep(model, workers, 2, bf16=bf16)
            losses[bf16, threads] = [step(ids[:, :-1], ids[:, 1:], seed=1, number=i) for i in range(3)]
            gradient = model.flat.grad.copy()
        assert gradient.dtype == np.float32
    assert losses[True, 1] != losses[False, 1]
    np.testing.assert_allclose(losses[True, 1], losses[False, 1], rtol=2e-3)
    np.testing.assert_allclose(losses[True, 2], losses[True, 1], rtol=1e-6)


def test_threads_do_not_share_scratch_memory():
    if not getattr(CPU.kernels, "has_bfloat16", False):
        pytest.skip("this processor has no AVX512-BF16")
    x, weight = normal(np.float32, 200, 300), normal(np.float32, 300, 100)
    with Workers(4) as workers, bfloat16_products(CPU):
        many = workers.map(lambda i: CPU.kernels.linear_forward(x * np.float32(i + 1), weight, None)[0], range(40))
        for i, y in enumerate(many):
            np.testing.assert_array_equal(y, CPU.kernels.linear_forward(x * np.float32(i + 1), weight, None)[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"activation": "relu", "d_ff": 20},
        {"d_ff": 90},
        {"position": "rotary"},
        {"n_embd": 66, "n_head": 3},
    ],
)
@pytest.mark.parametrize("lengths", [(0,), (6, 6, 6), (7, 12, 3, 30)])
def test_blocks_for_one_more_token(kernels, monkeypatch, options, lengths):
    """The result and the cache are those of one operation after the other, also where the room in the cache is full."""
    model = GPT(GPTConfig(11, **({"block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 24} | options)), seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    x, results = normal(np.float32, len(lengths), model.config.n_embd), []
    for chosen in (CpuKernels(), kernels):
        cache = model.new_cache(len(lengths) + 1)
        cache.remove(0)  # so there is room for more sequences than there are
        cache.all_memory[:] = normal(np.float32, *cache.all_memory.shape)
        cache._set_lengths(np.array(lengths))
        monkeypatch.setattr(gpt, "CPU_KERNELS", chosen)
        monkeypatch.setattr(layers, "CPU_KERNELS", chosen)
        y = x.copy()
        if chosen is kernels:
            assert model._decode_blocks(y, cache)
        else:
            for block in model.blocks:
                y = block.decode(y, cache)
        results.append((y, cache.all_memory))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=5e-5, atol=5e-5)


def test_blocks_are_decoded_at_once_where_that_is_right(kernels):
    """With a given number of threads, few sequences, and contiguous weights of float32."""
    x = normal(np.float32, 1, 8)
    kernels.threads = 0
    assert not kernels.decodes_blocks(x)
    kernels.threads = 2
    assert [kernels.decodes_blocks(normal(np.float32, rows, 8)) for rows in (0, 1, 64, 65)] == [False, True, True, False]
    assert not kernels.decodes_blocks(x.astype(np.float64))
    assert not kernels.decodes_blocks(normal(np.float32, 8, 2).T)
    c, d_ff = 4, 6
    shapes = [(c,), (c,), (c, 3 * c), (3 * c,), (c, c), (c,), (c,), (c,), (c, d_ff), (d_ff,), (d_ff, c), (c,)] * 2
    weights = [normal(np.float32, *shape) for shape in shapes]
    weights[1] = None  # a bias
    expected = [0 if a is None else a.ctypes.data for a in weights]
    assert kernels.block_addresses(weights, c, d_ff).tolist() == expected
    for i, wrong in [(2, weights[2].astype(np.float64)), (14, np.asfortranarray(weights[14])), (20, weights[20][:, :5].copy())]:
        assert kernels.block_addresses([*weights[:i], wrong, *weights[i + 1 :]], c, d_ff) is None


def _fewer_blocks(model):
    model.blocks = model.blocks[:1]


def _other_order(model):
    model.blocks = model.blocks[::-1]


def _narrower_block(model):
    model.blocks[1] = GPT(GPTConfig(11, block_size=12, n_layer=2, n_head=2, n_embd=24, d_ff=20), seed=2).blocks[1]


def _tables_of_float64(model):
    for table in (model.wte, model.wpe):
        table.weight.data = table.weight.data.astype(np.float64)


def _other_eps(model):
    model.blocks[1].ln_2.eps = 0.5


@pytest.mark.parametrize("change", [_fewer_blocks, _other_order, _narrower_block, _tables_of_float64, _other_eps])
def test_a_changed_model_is_decoded_block_by_block(kernels, monkeypatch, change):
    """The call for all blocks assumes that they are alike and in order. For others, the logits are still those of NumPy."""
    model = GPT(GPTConfig(11, block_size=12, n_layer=2, n_head=2, n_embd=24), seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    change(model)
    results = []
    for chosen in (CpuKernels(), kernels):
        monkeypatch.setattr(gpt, "CPU_KERNELS", chosen)
        monkeypatch.setattr(layers, "CPU_KERNELS", chosen)
        cache = model.new_cache()
        with no_grad():
            model(np.array([[1, 2, 3]]), cache=cache)
        results.append([model.decode(np.array([i]), cache) for i in (4, 5)])
        assert cache.addresses is None
    np.testing.assert_allclose(results[1], results[0], rtol=2e-4, atol=2e-4)


def test_arrays_that_do_not_fit_are_left_to_numpy(kernels):
    """Without dimensions, of float64, or not contiguous: the results are those of NumPy."""
    numpy, x, weight = CpuKernels(), normal(np.float32, 3, 5), normal(np.float32, 5, 4)
    scalar = np.array(0.5, dtype=np.float32)
    assert kernels.gelu_forward(scalar)[0].shape == ()
    bias, onto = normal(np.float64, 4), normal(np.float32, 4, 3).T
    np.testing.assert_allclose(kernels.linear_decode(x, weight, bias), numpy.linear_decode(x, weight, bias), rtol=1e-6)
    expected = numpy.linear_decode(x, weight, None, onto.copy())
    np.testing.assert_allclose(kernels.linear_decode(x, weight, None, onto), expected, rtol=1e-6)
    q = normal(np.float32, 1, 2, 5, 4)
    y, saved = kernels.causal_attention_forward(q, q, q)
    for found, expected in zip(
        kernels.causal_attention_backward(y.astype(np.float64), saved), kernels.causal_attention_backward(y, saved), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    y, saved = kernels.gelu_forward(x)
    np.testing.assert_allclose(kernels.gelu_backward(y.astype(np.float64), saved), kernels.gelu_backward(y, saved))


def test_ids_out_of_range_are_refused(kernels):
    """In C they would write outside of an array."""
    dy, ids = normal(np.float32, 3, 4), np.array([0, 5, 1])
    with pytest.raises(IndexError, match="expected ids from 0 to 4, got one of 5"):
        kernels.embedding_backward(dy, ((5, 4), ids))
    with pytest.raises(IndexError, match="expected ids from 0 to 3, got one of -1"):
        kernels.cross_entropy_forward(dy, np.array([0, -1, 3]))


def test_sums_over_many_rows_are_exact_enough(kernels):
    x = np.full((200_000, 3), 0.1, dtype=np.float32)
    _, saved = kernels.linear_forward(x[:, :1], np.ones((1, 3), dtype=np.float32), None)
    np.testing.assert_allclose(kernels.linear_backward(x, saved)[2], 20_000, rtol=1e-4)


def test_a_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    """One warning says why, and NumPy computes."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    monkeypatch.delenv("NPGPT_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match="cannot be loaded .* so NumPy computes everything; build it again with"):
        assert native_library._loaded.__wrapped__() is None


def test_where_an_array_begins():
    """The library finds the elements of views, of read-only arrays and of arrays without elements."""
    x = normal(np.float32, 6, 5)
    for view in (x, x[2:], x[1, 2:], x[::-1], np.broadcast_to(x[0], (3, 5)), x[:0], x[1, 2, ...]):
        assert ctypes.c_void_p.from_address(id(view) + OBJECT_HEAD).value == view.ctypes.data


def test_the_library_is_of_these_sources():
    """Its hash is that of the files; setup.py computes it in the same way."""
    if not processors():
        pytest.skip("the kernels in C are not built")
    folder = Path(__file__).parent.parent.parent / "npgpt" / "kernels" / "native"
    assert len(hash_of_sources(folder)) == 16
    code = "from npgpt.engine.backend import CPU; print(type(CPU.kernels).__name__)"
    for value, expected in [("1", "NativeKernels"), ("0", "CpuKernels")]:
        environment = os.environ | {"NPGPT_NATIVE": value}
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected
