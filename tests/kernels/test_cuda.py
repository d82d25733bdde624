"""The CUDA kernels: compiled for GPUs that are not here, run on the CPU against the reference, and, where there is one, on
a GPU."""

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import cuda_on_cpu, device_array
from support.arrays import close, normal
from support.op_cases import CASES, Dims, inputs_of

from npgpt import (
    GPT,
    AdamW,
    CharTokenizer,
    Dataset,
    GPTConfig,
    RequestError,
    Tensor,
    TrainConfig,
    evaluate,
    generate,
    load,
    ops,
    save,
)
from npgpt.engine import backend
from npgpt.engine.backend import CPU, Backend, _why_no_cuda, select
from npgpt.engine.gradcheck import check_tensors
from npgpt.engine.streams import Stream
from npgpt.kernels.cuda import kernels as cuda
from npgpt.kernels.cuda import launch
from npgpt.kernels.cuda.kernels import CudaKernels, Key
from npgpt.kernels.cuda.products import product
from npgpt.kernels.reference import AdamWStep, Kernels
from npgpt.parallel.step import ParallelStep
from npgpt.parallel.workers import Workers
from npgpt.training import trainer
from npgpt.training.events import Evaluation, Outcome, Step
from npgpt.training.optim import Update, clip_grad_norm
from npgpt.training.trainer import Trainer

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
def fast(monkeypatch):
    monkeypatch.setattr(cuda, "THREADS", 64)  # two warps: enough to tell rows apart
    return CudaKernels(np, cuda_on_cpu.launch, cuda_on_cpu.Gemm())


def same(fast, name, inputs, dtype, *rest, key=None, size=1.0):
    """Run forward and backward of both with equal inputs and draws, compare everything."""
    before = [None if a is None else a.copy() for a in inputs]
    results = []
    for kernels in (SameDraws(fast), fast):
        y, saved = getattr(kernels, f"{name}_forward")(*inputs, *rest, *([] if key is None else [Key(key)]))
        if kernels is fast:
            # The way back through a table needs nothing of the way there but the reference's.
            assert isinstance(saved, cuda.CudaSaved) or name == "embedding" or not inputs[0].size, "not the kernel"
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
        gradients = getattr(kernels, f"{name}_backward")(dy, saved)
        every = (y, *(gradients if isinstance(gradients, tuple) else (gradients,)))
        results.append([np.asarray(a) if isinstance(a, np.generic) else a for a in every])  # of no dimensions
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
    monkeypatch.setattr(cuda, "MAX_PARTIAL", 60)
    same(fast, "embedding", (normal(dtype, 5, 3), np.array(ids, dtype=np.uint8)), dtype, size=20)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (1, 1), (40, 65), (2, 200)])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cross_entropy(fast, dtype, shape, size):
    targets = np.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]
    same(fast, "cross_entropy", (size * normal(dtype, *shape), targets), dtype, size=size)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (40,), (33, 65)])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_residual(fast, dtype, shape, p):
    same(fast, "residual", (normal(dtype, *shape), normal(dtype, *shape, seed=4)), dtype, p, key=7)


@on_cpu
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 8), (8,), (140, 65)])
def test_linear(fast, dtype, shape):
    weight, bias = normal(dtype, shape[-1], 7), normal(dtype, 7)
    same(fast, "linear", (normal(dtype, *shape), weight, bias), dtype, size=20)
    same(fast, "linear", (normal(dtype, *shape)[::-1], normal(dtype, 7, shape[-1]).T, None), dtype, size=20)
    y, saved = fast.linear_forward(normal(dtype, *shape), weight, bias)
    assert [d is None for d in fast.linear_backward(y, saved, (False, True, False))] == [True, False, True]


# ---------------------------------------------------------------- bfloat16

EPS = 2**-8  # of bfloat16


@pytest.fixture
def bf16():
    try:
        return backend.bfloat16()
    except backend.DeviceError as error:
        pytest.skip(str(error))


@on_cpu
def test_rounding_to_bfloat16(fast, bf16):
    """To the nearest, of two to the even one; infinities and NaN stay what they are."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:6] = 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFFFFFFFF  # ties, the largest, inf, NaN, NaN
    bits = np.concatenate([bits, np.array([0, 1, 0x80000000, 0x8001, 0x7FFF, 0x8000], dtype=np.uint32)])  # denormal numbers
    numbers = bits.view(np.float32)
    found = np.zeros((1, len(numbers)), dtype=bf16)
    fast._launch("add_bias", "bfloat16", (-(-len(numbers) // 64), 1), 64, (found, numbers, *found.shape))
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
        ("causal_attention", [(2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8)], [], [0.3]),
        ("layer_norm", [(9, 40)], [(40,), (40,)], []),
        ("layer_norm", [(2, 70, 33)], [(33,), None], []),
        ("gelu", [(3, 50)], [], []),
        ("dropout", [(33, 65)], [], [0.25]),
        ("residual", [(33, 65)] * 2, [], [0.25]),
        ("cross_entropy", [(4, 10, 65)], [], []),
    ],
)
def test_kernels_in_bfloat16(fast, bf16, name, shapes, parameters, rest):
    """What the reference computes in float32 from the same numbers, rounded; parameters and losses stay float32."""
    inputs = [normal(np.float32, *shape, seed=i).astype(bf16) for i, shape in enumerate(shapes)]
    inputs += [None if shape is None else normal(np.float32, *shape, seed=9) for shape in parameters]
    if name == "cross_entropy":
        inputs.append(np.arange(40).reshape(4, 10))
    before = [None if a is None else a.copy() for a in inputs]
    results = []
    for kernels in (SameDraws(fast), fast):
        given = [a.astype(np.float32) if kernels is not fast and a is not None and a.dtype == bf16 else a for a in inputs]
        y, saved = getattr(kernels, f"{name}_forward")(*given, *rest, *([Key(5)] if rest else []))
        assert kernels is not fast or isinstance(saved, cuda.CudaSaved), "not the kernel"
        dy = np.random.default_rng(1).standard_normal(y.shape).astype(bf16).astype(y.dtype)
        gradients = getattr(kernels, f"{name}_backward")(dy, saved)
        results.append([y, *(gradients if isinstance(gradients, tuple) else (gradients,))])
    wide = {"cross_entropy": [0]}.get(name, [i for i in range(len(results[0])) if i > len(shapes)])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        if expected is None:
            assert found is None or name == "layer_norm"  # the bias's, which ops leaves out
            continue
        assert found.dtype == (np.float32 if i in wide else bf16)
        assert found.shape == expected.shape
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.astype(np.float32) / scale, expected / scale, rtol=0, atol=4 * EPS)
    for array, untouched in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, untouched)


# ---------------------------------------------------------------- products


def test_products_of_views(dtype):
    """Operands as they lie: transposed, cut out, one matrix for all; and copies where BLAS has no word for it."""
    rng = np.random.default_rng(0)
    room = rng.standard_normal((4, 5, 6, 7, 2)).astype(dtype)
    whole = room[..., 0].copy()
    views = {
        "plain": whole,
        "transposed": np.ascontiguousarray(whole.swapaxes(2, 3)).swapaxes(2, 3),
        "cut": rng.standard_normal((4, 5, 9, 11)).astype(dtype)[:, :, 1:7, 2:9],
        "heads": rng.standard_normal((4, 6, 5, 7)).astype(dtype).transpose(0, 2, 1, 3),
        "heads of one": rng.standard_normal((1, 6, 5, 7)).astype(dtype).transpose(0, 2, 1, 3),
        "backwards": whole[:, :, ::-1],
        "every second": room[..., 1],
        "one for all": np.broadcast_to(whole[:1, :1], whole.shape),
        "one number": np.broadcast_to(whole[:1, :1, :1, :1], whole.shape),
        "a row": whole[:, :, :1],
        "a column": whole[:, :, :, :1],
        "no batch": whole[0, 0],
        "no rows": whole[:, :, :0],
        "no sum": whole[..., :0],
    }
    copied = {"heads", "backwards", "every second", "one number"}
    for name, a in views.items():
        b = np.asarray(rng.standard_normal((*a.shape[:-2], a.shape[-1], 3)), dtype=dtype)
        for left, right in ((a, b), (b.swapaxes(-1, -2), a.swapaxes(-1, -2))):
            given = []

            def gemm(first, second, out, sizes, count, given=given):
                given.extend([first.array, second.array])
                cuda_on_cpu.Gemm()(first, second, out, sizes, count)

            found = product(np, gemm, left, right)
            close(found, left @ right, dtype, 10)
            if given:
                assert any(np.shares_memory(x, a) for x in given) == (name not in copied), name


@on_cpu
def test_adamw(fast, dtype):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(1000).astype(dtype) for _ in range(2)] + [rng.random(1000).astype(dtype) for _ in range(2)]
    results = []
    for kernels in (Kernels(np), fast):
        arrays = [a.copy() for a in start]
        kernels.adamw(*arrays, AdamWStep(step=3, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1))
        kernels.adamw(*arrays, AdamWStep(step=4, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, n_decay=300))
        results.append(arrays)
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype)


@on_cpu
def test_arguments_as_they_may_come(fast, dtype):
    """No dimensions, not contiguous, of another float type, more rows than a grid has chunks."""
    scalar = normal(dtype)
    for name, rest, key in [("gelu", [], None), ("dropout", [np.float32(0.25)], 3)]:
        same(fast, name, (scalar,), dtype, *rest, key=key)
    same(fast, "cross_entropy", (normal(dtype, 5), np.array(2)), dtype)
    x, wide, one = normal(dtype, 6, 4), normal(dtype, 8), np.ones(4, np.float16)
    same(fast, "layer_norm", (x, wide[::2], wide[1::2]), dtype, 1, size=4)
    y, saved = fast.layer_norm_forward(x, wide[:4].copy(), one)
    assert not isinstance(saved, cuda.CudaSaved)
    np.testing.assert_array_equal(y, Kernels(np).layer_norm_forward(x, wide[:4].copy(), one)[0])


@on_cpu
def test_grids_have_an_end(fast, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_CHUNKS", 2)
    monkeypatch.setattr(cuda, "MIN_CHUNK", 3)
    same(fast, "layer_norm", (normal(dtype, 20, 5), normal(dtype, 5), None), dtype, size=4)
    same(fast, "embedding", (normal(dtype, 5, 3), np.arange(20) % 5), dtype, size=20)


@on_cpu
def test_nothing_to_do_is_no_launch(fast, dtype):
    same(fast, "gelu", (normal(dtype, 0, 4),), dtype)
    same(fast, "layer_norm", (normal(dtype, 0, 4), normal(dtype, 4), None), dtype)
    same(fast, "dropout", (normal(dtype, 0, 4),), dtype, 0.5, key=1)
    same(fast, "embedding", (normal(dtype, 5, 3), np.zeros(0, np.int64)), dtype)
    same(fast, "cross_entropy", (normal(dtype, 0, 4), np.zeros(0, np.int64)), dtype)
    same(fast, "causal_attention", [normal(dtype, 1, 1, n, 4) for n in (0, 3, 3)], dtype)


@on_cpu
def test_clipping_and_stepping(fast, dtype):
    """The same as the reference: what is multiplied by, what is seen, that a step that is not finite is the last."""
    rng = np.random.default_rng(0)
    results = []
    for kernels in (Kernels(np), fast):
        rng = np.random.default_rng(0)
        p, m, v = (rng.random(3000).astype(dtype) for _ in range(3))
        scale, found = np.ones((), dtype), []
        for step, (size, loss) in enumerate([(1e-3, 2.0), (1.0, 1.0), (1.0, np.nan), (1e-3, 1.0), (np.inf, 1.0)], 1):
            g = (size * rng.standard_normal(3000)).astype(dtype)
            found += [kernels.clip(g, np.array(loss, dtype), 1.0, scale), scale.copy()]
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
    np.testing.assert_array_equal(results[1][7], results[1][-3])  # the weights after step 2 are the last


# ---------------------------------------------------------------- whole models


@pytest.fixture(params=[pytest.param("run on the CPU", marks=on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, fast, monkeypatch):
    """The backend "cuda": computed on the CPU, with arrays that are not NumPy's, and the real one. However slow, steps go in
    rows."""
    monkeypatch.setattr(trainer, "SECONDS_IN_GROUP", 1e9)
    if request.param == "cuda":
        return select("cuda")
    return pretended_device(monkeypatch)


def pretended_device(monkeypatch):
    xp = device_array.Module()
    kernels = CudaKernels(xp, device_array.launch_on(cuda_on_cpu.launch), device_array.gemm_on(cuda_on_cpu.Gemm()))
    pretended = Backend("cuda", xp, kernels)
    monkeypatch.setitem(backend._backends, device_array.ndarray, pretended)
    return pretended


def test_the_gradients_of_a_model(device):
    model = GPT(GPTConfig(7, block_size=5, n_layer=1, n_head=2, n_embd=8, dropout=0.2), dtype=np.float64, backend=device)
    rng = np.random.default_rng(0)
    model.flat.data += device.asarray(0.3 * rng.standard_normal(model.num_parameters()))
    x, y = rng.integers(0, 7, (2, 2, 5))

    def loss():
        logits, _ = model(x, rng=device.generator(0, Stream.DROPOUT))
        return ops.cross_entropy(logits, y, reduction="none")

    assert len(list(check_tensors(loss, dict(model.named_parameters()), rtol=1e-7, max_elements=1))) == len(model.parameters())


def losses_of_training(device, dropout, steps=20, dtype=None):
    model = GPT(GPTConfig(13, block_size=40, n_layer=2, n_head=2, n_embd=24, dropout=dropout), seed=1, backend=device)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    dataset = Dataset(np.arange(5000) ** 2 // 7 % 13, 40, 4)
    losses = []
    with Workers(1) as workers:
        step = ParallelStep(model, workers, dtype=dtype)
        for number in range(steps):
            losses.append(float(step(*dataset.get_batch("train", number), seed=1, number=number)))
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
    return losses


def test_training_is_the_same_as_on_the_cpu(device, monkeypatch):
    found = losses_of_training(device, 0.0)
    np.testing.assert_allclose(found, losses_of_training(CPU, 0.0), rtol=1e-4)
    assert found[-1] < found[0] - 0.1


def test_training_with_dropout_repeats_itself(device):
    first, again = (losses_of_training(device, 0.2) for _ in range(2))
    assert first == again
    assert first != losses_of_training(device, 0.0)
    assert first[-1] < first[0] - 0.1


def test_training_in_bfloat16(device, bf16, monkeypatch):
    """Close to float32, and learning as it does; the weights and their gradients are float32."""
    found, wide = (losses_of_training(device, 0.2, steps=25, dtype=dtype) for dtype in (bf16, None))
    np.testing.assert_allclose(found, wide, rtol=5 * EPS)
    assert found != wide
    assert found[-1] < found[0] - 0.2
    model = GPT(GPTConfig(13, block_size=8, n_layer=1, n_head=2, n_embd=8, tie_weights=True), backend=device)
    logits, loss = model(device.asarray(np.arange(8)[None]), device.asarray(np.arange(8)[None]), dtype=bf16)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (bf16, np.float32)
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert all(device.xp.abs(p.grad).max() > 0 for p in model.parameters())


def run_of_trainer(device, tmp_path, steps=25, **settings):
    model = GPT(GPTConfig(7, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.0), seed=1, backend=device)
    tokenizer = CharTokenizer("abcdefg")
    dataset = Dataset(np.arange(3000) ** 2 // 7 % 7, 16, 4, seed=3)
    config = TrainConfig(
        steps=steps, batch_size=4, seed=3, eval_interval=12, lr=3e-3, warmup_steps=2, sample_tokens=3, threads=1, **settings
    )
    return Trainer(model, tokenizer, dataset, config, tmp_path and tmp_path / f"{device.name}.npz")


def test_a_run(device, tmp_path, monkeypatch):
    """Steps whose losses are asked for after several: the same records and weights as the CPU's."""
    run = run_of_trainer(device, tmp_path)
    found = list(run.run())
    other = run_of_trainer(CPU, tmp_path)
    expected = list(other.run())
    assert [type(e) for e in found] == [type(e) for e in expected]
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, Step):
            assert (a.step, a.tokens, a.lr) == (b.step, b.tokens, b.lr)
            np.testing.assert_allclose([a.loss, a.grad_norm], [b.loss, b.grad_norm], rtol=1e-3)
        elif isinstance(a, Evaluation):
            np.testing.assert_allclose(a.val_loss, b.val_loss, rtol=1e-3)
    assert run.optimizer.steps == run.progress.step == 25
    x, _ = run.dataset.get_batch("train", 3, device)
    assert isinstance(x, device.xp.ndarray)
    np.testing.assert_array_equal(backend.to_numpy(x), other.dataset.get_batch("train", 3)[0])


def test_a_run_that_diverges(device, tmp_path, monkeypatch):
    """In the middle of steps nobody waits for: the weights are left as they were before the first that is not finite."""
    run = run_of_trainer(device, tmp_path)
    batch, before = run.dataset.get_batch, {}

    def get_batch(split, k, where=CPU):
        if k == 15 and not before:
            before["weights"] = backend.to_numpy(run.model.flat.data).copy()
            run.model.wpe.weight.data[3, 2] = np.nan
        return batch(split, k, where)

    monkeypatch.setattr(run.dataset, "get_batch", get_batch)
    end = list(run.run())[-1]
    assert (end.step, end.outcome) == (15, Outcome.DIVERGED)
    assert "wpe.weight" in end.reason
    assert run.optimizer.steps == 15
    after = backend.to_numpy(run.model.flat.data)
    assert np.isnan(after).sum() == 1
    at = ~np.isnan(after)
    np.testing.assert_array_equal(after[at], before["weights"][at])


def test_a_run_goes_on_after_an_exception_and_after_diverging(device, monkeypatch):
    """What was taken counts, and nothing is taken twice."""
    straight = run_of_trainer(device, None)
    list(straight.run())
    expected = backend.to_numpy(straight.model.flat.data)
    run = run_of_trainer(device, None)
    batch, fail = run.dataset.get_batch, [9]

    def get_batch(split, k, where=CPU):
        if k in fail:
            fail.remove(k)
            raise KeyboardInterrupt
        return batch(split, k, where)

    monkeypatch.setattr(run.dataset, "get_batch", get_batch)
    with pytest.raises(KeyboardInterrupt):
        list(run.run())
    assert run.optimizer.steps == run.progress.step == 9
    list(run.run())
    assert run.optimizer.steps == 25
    np.testing.assert_array_equal(backend.to_numpy(run.model.flat.data), expected)

    run = run_of_trainer(device, None)
    good, spoil = run._forward_backward, [14]

    def forward_backward(x, y, seed, number):
        loss = good(x, y, seed, number)
        if number in spoil:
            spoil.remove(number)
            run.model.flat.grad[5] = np.inf
        return loss

    for name in ("close", "diagnose"):
        monkeypatch.setattr(forward_backward, name, getattr(good, name), raising=False)
    run._forward_backward = forward_backward
    end = list(run.run())[-1]
    assert (end.outcome, end.step, run.optimizer.steps) == (Outcome.DIVERGED, 14, 14)
    assert list(run.run())[-1].outcome is Outcome.FINISHED
    np.testing.assert_array_equal(backend.to_numpy(run.model.flat.data), expected)


@pytest.mark.parametrize("flag", ["bf16", "tf32"])
def test_fewer_bits_are_for_gpus(flag):
    with pytest.raises(RequestError, match=f"{flag} works on a GPU only, and this run is on the CPU; use --no-{flag}"):
        run_of_trainer(CPU, None, **{flag: True})


def test_a_gpu_left_alone_is_said(monkeypatch):
    monkeypatch.setattr(backend, "_why_no_cuda", lambda: "CuPy is not installed; install it with: pip")
    with pytest.warns(RuntimeWarning, match="the GPU of this machine is not used: CuPy is not installed"):
        assert select("auto") is CPU
    monkeypatch.setattr(backend, "_why_no_cuda", lambda: "there is no NVIDIA driver")
    assert select("auto") is CPU


def test_bfloat16_needs_what_cupy_needs(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.1.0")
    monkeypatch.setitem(sys.modules, "ml_dtypes", sys.modules.get("ml_dtypes") or SimpleNamespace())
    with pytest.raises(backend.DeviceError, match=r"needs NumPy 2\.1\.2 or newer, this is 2\.1\.0"):
        backend.bfloat16()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(backend.DeviceError, match="-m pip install ml_dtypes"):
        backend.bfloat16()


def test_tf32_is_on_for_a_time(fast):
    pretended = Backend("cuda", np, fast)
    seen = []
    for yes in (True, False):
        with backend.tf32(pretended, yes), backend.tf32(pretended, True):
            seen.append(fast.gemm.tf32)
        seen.append(fast.gemm.tf32)
    assert seen == [True, False, True, False]
    with backend.tf32(CPU):
        pass


def test_dtypes_of_activations():
    model = GPT(GPTConfig(7, block_size=8, n_layer=1, n_head=2, n_embd=8))
    ids = np.zeros((1, 2), np.int64)
    assert model(ids, dtype="float32")[0].dtype == np.float32
    with pytest.raises(ValueError, match="dtype must be None, float32, or on a GPU bfloat16, got int8"):
        model(ids, dtype=np.int8)
    with pytest.raises(ValueError, match="leave out `cache` or `dtype`"):
        model(np.zeros((1, 2), np.int64), cache=model.new_cache(), dtype=np.float64)


# ---------------------------------------------------------------- compiled for GPUs that are not here


def nvrtc():
    """NVIDIA's run-time compiler, which needs no GPU; None when it is not installed."""
    found = importlib.util.find_spec("nvidia")
    pattern = "nvrtc64*.dll" if sys.platform == "win32" else "libnvrtc.so*"
    for folder in found.submodule_search_locations or [] if found else []:
        for builtins in Path(folder).rglob("libnvrtc-builtins.so*"):  # some versions do not find it by themselves
            ctypes.CDLL(str(builtins))
        for path in sorted(Path(folder).rglob(pattern)):
            return ctypes.CDLL(str(path))
    return None


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", launch.ELEMENTS)
def test_every_kernel_compiles(architecture, dtype):
    library = nvrtc()
    if library is None:
        pytest.skip("the CUDA compiler is not installed: make nvrtc")
    program = ctypes.c_void_p()
    source = launch.source().encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
    options = [option.encode() for option in (*launch.compiler_options(dtype), f"--gpu-architecture={architecture}")]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert (status, log.value.decode()) == (0, "")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, binary)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    for name in cuda_on_cpu.entry_points(launch.source()):
        assert name.encode() in binary.raw


# ---------------------------------------------------------------- on a GPU

NUMPY_S_OWN = {"array operand", "array matmul", "astype"}  # NumPy's arrays, generators and long doubles are the CPU's
DRAWN = {name for name in CASES if "dropout" in name}


@pytest.mark.parametrize("dims", [Dims(), Dims(lead=(), a=7, b=2, c=1, past=0), Dims(lead=(33,), a=65, b=40, c=8)])
@pytest.mark.parametrize("name", sorted(set(CASES) - NUMPY_S_OWN - DRAWN))
def test_every_operation_on_a_device(device, name, dims, dtype):
    """The same results and gradients as the CPU's."""
    case = CASES[name]
    arrays = [a.astype(dtype) for a in inputs_of(case, dims, np.random.default_rng(7))]
    results = []
    for where in (CPU, device):
        inputs = [Tensor(where.asarray(a), requires_grad=True) for a in arrays]
        y = case.fn(*inputs)
        y.backward(where.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype=dtype))
        assert isinstance(y.data, where.xp.ndarray)
        results.append([y.numpy(), *(backend.to_numpy(x.grad) for x in inputs)])
    for expected, found in zip(*results, strict=True):
        close(found, expected, dtype, 10)


@on_cpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", launch.ELEMENTS)
def test_kernels_on_a_gpu_are_those_run_on_the_cpu(dtype):
    """Dropout included, whose masks are the same numbers."""
    gpu, cpu = select("cuda"), CudaKernels(np, cuda_on_cpu.launch, cuda_on_cpu.Gemm())
    element, parameter = (backend.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)), launch.ELEMENTS[dtype][2]
    x, q = normal(np.float64, 33, 65).astype(element), [normal(np.float64, 2, 3, 70, 8).astype(element) for _ in range(3)]
    weight, bias = normal(parameter, 65, 24), normal(parameter, 24)
    for name, inputs, rest in [
        ("linear", [x, weight, bias], []),
        ("dropout", [x], [0.3]),
        ("residual", [x, x + x], [0.3]),
        ("causal_attention", q, []),
        ("causal_attention", q, [0.3]),
        ("gelu", [x], []),
        ("layer_norm", [x, normal(parameter, 65), normal(parameter, 65, seed=1)], []),
        ("cross_entropy", [x, np.arange(33) * 2], []),
    ]:
        results = []
        for kernels, xp in ((cpu, np), (gpu.kernels, gpu.xp)):
            drawn = [Key(5)] if rest else []
            y, saved = getattr(kernels, f"{name}_forward")(*map(xp.asarray, inputs), *rest, *drawn)
            gradients = getattr(kernels, f"{name}_backward")(y, saved)
            results.append([backend.to_numpy(a) for a in (y, *(gradients if isinstance(gradients, tuple) else [gradients]))])
        for expected, found in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            tolerance = 8 * EPS if dtype == "bfloat16" else 500 * np.finfo(dtype).eps
            expected, found = expected.astype(np.float64), found.astype(np.float64)
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", launch.ELEMENTS)
def test_products_on_a_gpu(dtype):
    gpu = select("cuda")
    element, parameter = (backend.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)), launch.ELEMENTS[dtype][2]
    a, b = (normal(np.float64, 2, 3, n, 24).astype(element) for n in (16, 40))
    a_there, b_there = gpu.xp.asarray(a), gpu.xp.asarray(b)
    exact = a.astype(np.float64) @ b.astype(np.float64).swapaxes(-1, -2)
    tolerance = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 1e-6}[dtype]
    for left, right, expected in [
        (a_there, b_there.swapaxes(-1, -2), exact),
        (b_there, a_there.swapaxes(-1, -2), exact.swapaxes(-1, -2)),
        (a_there[1, 2], b_there[1, 2].T, exact[1, 2]),
    ]:
        found = product(gpu.xp, gpu.kernels.gemm, left, right, parameter)
        np.testing.assert_allclose(backend.to_numpy(found), expected, rtol=0, atol=10 * tolerance)
    if dtype == "float32":
        with backend.tf32(gpu):
            rounded = backend.to_numpy(product(gpu.xp, gpu.kernels.gemm, a_there, b_there.swapaxes(-1, -2)))
        assert 1e-6 < np.abs(rounded - exact).max() < 1e-1


def test_a_checkpoint_moves_between_devices(device, tmp_path, tokenizer):
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16), backend=device)
    save(tmp_path / "model.npz", model, tokenizer)
    on_cpu = load(tmp_path / "model.npz").model
    ids = np.arange(12)[None]
    np.testing.assert_allclose(on_cpu(ids)[0].numpy(), model(ids)[0].numpy(), rtol=0, atol=1e-5)
    assert generate(model, [1, 2], 30, temperature=0) == generate(on_cpu, [1, 2], 30, temperature=0)
    there = load(tmp_path / "model.npz", backend=device).model
    np.testing.assert_array_equal(model(ids)[0].numpy(), there(ids)[0].numpy())
    text = np.arange(300) % tokenizer.vocab_size
    np.testing.assert_allclose(evaluate(there, text).loss, evaluate(on_cpu, text).loss, rtol=1e-5)
    with pytest.raises(TypeError, match="one device"):
        Tensor(device.asarray([1.0, 2.0])) + np.ones(2, np.float32)


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.2, "tie_weights": True}, {"bias": False, "activation": "relu"}])
def test_a_step_waits_for_nothing(fast, bf16, monkeypatch, dtype, options):
    """On its way nothing goes to the host; then, once, the losses."""
    device = pretended_device(monkeypatch)
    model = GPT(GPTConfig(7, block_size=16, n_layer=2, n_head=2, n_embd=16, **options), seed=1, backend=device)
    update, dataset = Update(AdamW(model.parameters()), 1.0), Dataset(np.arange(3000) % 7, 16, 4)
    with Workers(1) as workers:
        step = ParallelStep(model, workers, dtype=bf16 if dtype == "bfloat16" else None)
        device_array.waits.clear()
        for number in range(3):
            update.step(step(*dataset.get_batch("train", number, device), seed=1, number=number))
        assert device_array.waits == []
        assert len(update.results()) == 3
        assert device_array.waits == ["get"]


# ---------------------------------------------------------------- without one


def test_what_is_missing_is_said(monkeypatch):
    def driver_of(gpus, version=13_000, init=0):
        def write(value):
            return lambda pointer: setattr(pointer._obj, "value", value) or 0

        return SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=write(gpus), cuDriverGetVersion=write(version))

    def no_driver(name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert "no NVIDIA driver; install one" in _why_no_cuda()
    for driver in (driver_of(0), driver_of(1, init=100)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert "no usable GPU" in _why_no_cuda()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for version, package in [(13_020, "cupy-cuda13x"), (12_080, "cupy-cuda12x")]:
        monkeypatch.setattr(ctypes, "CDLL", lambda name, version=version: driver_of(1, version))
        assert f"-m pip install '{package}[ctk]" in _why_no_cuda()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert _why_no_cuda() is None
