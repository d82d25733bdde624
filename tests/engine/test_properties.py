"""Properties that every operation has, for inputs of any size and memory layout. The operations are those of op_cases.py.

Each example draws the sizes and a memory layout for each input: plain, Fortran order, every second element, backwards,
read-only, or broadcast. The environment variable GRADCHECK_EXAMPLES sets the number of examples (`make gradcheck-full`: 200).
"""

import gc
import os
import weakref

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.op_cases import CASES, Dims, inputs_of

from npgpt import Tensor, gradcheck, ops
from npgpt.engine import backend
from npgpt.kernels.cpu import CpuKernels
from npgpt.kernels.reference import Kernels

EXAMPLES = int(os.environ.get("GRADCHECK_EXAMPLES", "10"))
LAYOUTS = ["plain", "fortran", "strided", "backwards", "read-only", "broadcast"]

dims = st.builds(
    Dims,
    lead=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    a=st.integers(1, 6),
    b=st.integers(1, 6),
    c=st.integers(1, 4),
    past=st.integers(0, 3),
)
# derandomize: every run on every machine draws the same examples.
usual = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def laid_out(array, layout):
    """The same values in another memory layout. Exception: "broadcast" repeats the values of the first row."""
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout in ("strided", "backwards") and array.ndim:
        step = 2 if layout == "strided" else -1
        room = np.empty(tuple(2 * n for n in array.shape), array.dtype)
        view = room[
            tuple(slice(None, None, 2) if step == 2 else slice(n - 1, None, -1) if n else slice(0, 0) for n in array.shape)
        ]
        view[...] = array
        return view
    if layout == "broadcast" and array.ndim and array.shape[0]:
        return np.broadcast_to(array[:1], array.shape)
    array = array.copy()
    array.flags.writeable = layout != "read-only"
    return array


def run(case, arrays, upstream=None):
    """Returns (output, gradients, upstream gradient)."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    y = case.fn(*leaves)
    if upstream is None:
        upstream = np.random.default_rng(5).uniform(0.5, 1.5, y.shape).astype(y.dtype)
    y.backward(upstream)
    return y, [leaf.grad for leaf in leaves], upstream


@pytest.mark.parametrize("name", CASES)
@usual
@given(dims=dims, layouts=st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3), single=st.booleans())
def test_layout_dtype_and_ownership(name, dims, layouts, single):
    """The layout does not change the numbers. Inputs stay as they are, results share no memory, and the dtype is kept."""
    case, dtype = CASES[name], np.float32 if single else np.float64
    arrays = [a.astype(dtype) for a in inputs_of(case, dims, np.random.default_rng(1))]
    arrays = [laid_out(a, layout) for a, layout in zip(arrays, layouts, strict=False)]
    before = [a.copy() for a in arrays]
    y, gradients, upstream = run(case, arrays)
    for a, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, old)
        assert case.views or not np.shares_memory(y.data, a)
    promoted = np.float64 if name.startswith("array") else dtype  # NumPy's rule: a float64 array widens
    assert y.dtype == promoted
    for i, (gradient, a) in enumerate(zip(gradients, arrays, strict=True)):
        assert (gradient.shape, gradient.dtype) == (a.shape, dtype)
        others = [*arrays, y.data, upstream, *gradients[:i]]
        assert not any(np.shares_memory(gradient, other) for other in others)

    plain_y, plain_gradients, _ = run(case, [np.ascontiguousarray(a).reshape(a.shape) for a in arrays], upstream)
    tolerance = 200 * np.finfo(dtype).eps
    for found, expected in [(y.data, plain_y.data), *zip(gradients, plain_gradients, strict=True)]:
        size = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("name", CASES)
@usual
@given(dims=dims)
def test_against_finite_differences(name, dims):
    """Gradients agree with finite differences for any shape. With few examples, large inputs are checked in some elements."""
    case = CASES[name]
    arrays = inputs_of(case, dims, np.random.default_rng(2))
    everything = EXAMPLES >= 200
    gradcheck(case.fn, arrays, rtol=1e-9, max_elements=None if everything else 6, max_kinks=0.5 if name == "relu" else 0.0)


@pytest.mark.parametrize("name", CASES)
@usual
@given(dims=dims)
def test_gradients_accumulate_and_graphs_are_freed(name, dims):
    """A second backward call adds its gradient. The first call frees the graph, without the garbage collector."""
    case = CASES[name]
    leaves = [Tensor(a, requires_grad=True) for a in inputs_of(case, dims, np.random.default_rng(3))]
    once = case.fn(*leaves)
    upstream = np.ones(once.shape)
    once.backward(upstream)
    first = [leaf.grad.copy() for leaf in leaves]
    with pytest.raises(RuntimeError, match="freed"):
        once.backward(upstream)
    case.fn(*leaves).backward(upstream)
    for leaf, gradient in zip(leaves, first, strict=True):
        np.testing.assert_allclose(leaf.grad, 2 * gradient, rtol=1e-14)

    gc.disable()
    try:
        again = case.fn(*leaves)
        watched = weakref.ref(again)
        del again, once
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.shapes(Dims())) == 2])
def test_an_input_used_twice(name):
    """In f(x, x) both gradients arrive at x, and also in f(2x, 3x)."""
    case = CASES[name]
    shapes = case.shapes(Dims(lead=(), a=3, b=3, c=3))
    if shapes[0] != shapes[1]:
        shapes = case.shapes(Dims(lead=(3,), a=3, b=3, c=3))
    rng = np.random.default_rng(4)
    arrays = [np.abs(rng.standard_normal(shape)) + 0.5 for shape in shapes]
    gradcheck(lambda a, b: case.fn(a, b) + case.fn(a * 2, b), arrays)
    if shapes[0] == shapes[1]:
        gradcheck(lambda x: case.fn(x, x) + case.fn(x * 2, x * 3), arrays[:1])


ELEMENTWISE = ["add", "subtract", "multiply", "divide", "numbers", "negate", "power", "tensor power", "power of a number"]
ELEMENTWISE += ["exp", "log", "sqrt", "tanh", "sum", "reshape", "gelu", "relu", "dropout"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_arrays_without_dimensions(name):
    """An array of no dimensions, which holds a single number, has an array as its gradient."""
    case = CASES[name]
    arrays = [np.array(1.5 + i) for i in range(len(case.shapes(Dims())))]
    gradcheck(case.fn, arrays)
    y, gradients, _ = run(case, [a.astype(np.float32) for a in arrays])
    assert all(isinstance(g, np.ndarray) and (g.shape, g.dtype) == ((), np.float32) for g in gradients)
    assert y.dtype == np.float32


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.fn.__module__ == "npgpt.ops" or "ops" in case.fn.__code__.co_names]
)
@usual
@given(dims=dims, single=st.booleans())
def test_cpu_kernels_agree_with_the_reference(name, dims, single):
    """The CPU kernels and the reference give the same results. The test also asserts that each of them ran."""
    case, dtype = CASES[name], np.float32 if single else np.float64
    arrays = [a.astype(dtype) for a in inputs_of(case, dims, np.random.default_rng(6))]
    results = []
    for kernels in (Kernels(np), CpuKernels()):
        device = backend.Backend("cpu", np, kernels)
        real = backend._backends[np.ndarray]
        backend._backends[np.ndarray] = device
        try:
            assert Tensor(arrays[0]).backend.kernels is kernels
            y, gradients, _ = run(case, arrays)
        finally:
            backend._backends[np.ndarray] = real
        results.append([y.data, *gradients])
    tolerance = 200 * np.finfo(dtype).eps
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        size = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


# ---------------------------------------------------------------- every operation and kernel has a row


def test_every_operation_has_a_row():
    public = {name for name, value in vars(ops).items() if callable(value) and getattr(value, "__module__", "") == ops.__name__}
    used = {case.fn.__name__ for case in CASES.values()}
    used |= {name for case in CASES.values() for name in _names(case.fn.__code__)}
    assert {n for n in public if not n.startswith("_")} <= used

    methods = {"exp", "log", "sqrt", "tanh", "sum", "mean", "astype", "reshape", "transpose", "swapaxes", "T"}
    facts = {
        "shape",
        "ndim",
        "size",
        "dtype",
        "backend",
        "numpy",
        "item",
        "detach",
        "backward",
        "data",
        "grad",
        "requires_grad",
    }
    assert {name for name in vars(Tensor) if not name.startswith("_")} == methods | facts, "an operation without a row?"
    assert methods <= used
    operators = {
        "add",
        "sub",
        "mul",
        "truediv",
        "pow",
        "matmul",
        "neg",
        "getitem",
        "radd",
        "rsub",
        "rmul",
        "rtruediv",
        "rpow",
        "rmatmul",
    }
    dunder = {name.strip("_") for name in vars(Tensor) if name.startswith("__") and callable(vars(Tensor)[name])}
    without_gradient = {"init", "repr", "bool", "iter", "float", "int", "array", "format", "reduce", "hash"}
    comparisons = {"eq", "ne", "lt", "le", "gt", "ge"}
    assert dunder - without_gradient - comparisons == operators, "an operator without a row?"


def _names(code):
    """Every name that a function's code uses, and the code of the functions inside it."""
    inner = [c for c in code.co_consts if hasattr(c, "co_names")]
    return {*code.co_names, *(name for c in inner for name in _names(c))}


def test_every_kernel_is_called_by_some_row():
    """Each pair of kernels is called by at least one row, so finite differences check it."""
    called = set()

    class Counting(CpuKernels):
        def __getattribute__(self, name):
            called.add(name)
            return super().__getattribute__(name)

    real = backend._backends[np.ndarray]
    backend._backends[np.ndarray] = backend.Backend("cpu", np, Counting())
    try:
        for case in CASES.values():
            run(case, inputs_of(case, Dims(), np.random.default_rng(0)))
    finally:
        backend._backends[np.ndarray] = real
    pairs = {name for name in dir(Kernels) if name.endswith(("_forward", "_backward"))}
    assert pairs <= called, pairs - called


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernels", [Kernels(np), CpuKernels()], ids=["reference", "cpu"])
def test_extremes(dtype, kernels, monkeypatch):
    """Results and gradients are finite and right for the largest numbers that can occur."""
    monkeypatch.setitem(backend._backends, np.ndarray, backend.Backend("cpu", np, kernels))
    largest = np.finfo(dtype).max

    def there_and_back(fn, *arrays):
        leaves = [Tensor(np.array(a, dtype=dtype), requires_grad=True) for a in arrays]
        y = fn(*leaves)
        y.backward(np.ones(y.shape))
        assert np.isfinite(y.data).all()
        assert all(np.isfinite(leaf.grad).all() for leaf in leaves)
        return y.data, *(leaf.grad for leaf in leaves)

    for size in (1e4, largest / 4):
        logits = np.array([[size, -size, 0], [0, 0, 0], [-size, -size, -size]])
        p, _ = there_and_back(ops.softmax, logits)
        np.testing.assert_allclose(p, [[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3], rtol=1e-6)
        losses, gradient = there_and_back(lambda x: ops.cross_entropy(x, np.array([0, 1, 2]), reduction="none"), logits)
        np.testing.assert_allclose(losses, [0, np.log(3), np.log(3)], rtol=1e-6)
        np.testing.assert_allclose(gradient, [[0, 0, 0], [1 / 3, -2 / 3, 1 / 3], [1 / 3, 1 / 3, -2 / 3]], atol=1e-6)
    loss, gradient = there_and_back(lambda x: ops.cross_entropy(x, np.array([1])), [[1e4, -1e4]])
    assert loss == pytest.approx(2e4)
    np.testing.assert_allclose(gradient, [[1, -1]])

    masked, gradient = there_and_back(
        lambda x: ops.softmax(ops.masked_fill(x, np.ones((2, 3), bool), -np.inf)), np.ones((2, 3))
    )
    assert not masked.any()
    assert not gradient.any()

    for row in ([5.0] * 4, [0.0] * 4, [1e-30] * 4, [1e4] * 4):
        y, dx, dw, db = there_and_back(ops.layer_norm, [row], [1.0, 2, 3, 4], [0.5] * 4)
        np.testing.assert_allclose(y, [[0.5] * 4], atol=1e-5)
        np.testing.assert_array_equal(db, [1] * 4)
        assert np.abs(dw).max() <= 1e-5
        assert dx.sum() == pytest.approx(0, abs=1e-2)

    x = np.array([-100.0, -10, -1e-30, 0, 1e-30, 10, 100])
    y, slope = there_and_back(ops.gelu, x)
    np.testing.assert_allclose(y, [0, 0, 0, 0, 0, 10, 100], atol=1e-6)
    np.testing.assert_allclose(slope, [0, 0, 0.5, 0.5, 0.5, 1, 1], atol=1e-6)
    for big in (1e10, -1e10):
        y, slope = there_and_back(ops.gelu, [big])
        assert (y[0], slope[0]) == (max(0, dtype(big)), 1.0 if big > 0 else 0.0)

    for size in (1e4, np.sqrt(largest) / 4):  # scores at the limit: each query attends to its best key only
        q = np.array([size, size]).reshape(1, 1, 2, 1)
        k = np.array([-size, size]).reshape(1, 1, 2, 1)
        out, *_ = there_and_back(ops.causal_attention, q, k, np.array([3.0, 7.0]).reshape(1, 1, 2, 1))
        np.testing.assert_allclose(out.ravel(), [3, 7])
