"""The engine: recording a graph, the backward pass, memory, dtypes, and the operations' results by hand."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

from npgpt import Tensor, gradcheck, no_grad, ops
from npgpt.engine.backend import CPU
from npgpt.engine.graph import Watch, watched
from npgpt.engine.tensor import record
from npgpt.parallel.machine import blas_threads


def leaf(*shape, dtype=np.float64):
    return Tensor(np.random.default_rng(0).standard_normal(shape).astype(dtype), requires_grad=True)


def test_numbers_become_float32_and_arrays_keep_their_dtype():
    assert Tensor([1.0, 2.0]).dtype == np.float32
    assert Tensor(3.0).dtype == np.float32
    assert Tensor(np.ones(2)).dtype == np.float64
    assert Tensor([1, 2]).dtype.kind == "i"


@pytest.mark.parametrize("other", [2, 2.5, np.float64(2.5), np.float32(2.5)])
def test_numbers_do_not_widen_the_dtype(other):
    a = Tensor([1.0, 2.0], requires_grad=True)
    for y in (a + other, other + a, a - other, other - a, a * other, other * a, a / other, other / a, a**other):
        assert y.dtype == np.float32


def test_numpy_on_the_left():
    y = np.array([1.0, 2.0], dtype=np.float32) * Tensor([3.0, 4.0], requires_grad=True)
    assert isinstance(y, Tensor)
    np.testing.assert_array_equal(y.data, [3, 8])


def test_gradients_add_up_over_calls():
    a = leaf(3)
    (a * 2).sum().backward()
    (a * 3).sum().backward()
    np.testing.assert_array_equal(a.grad, [5, 5, 5])


def test_leaves_own_their_gradients():
    a, b = leaf(3), leaf(3)
    upstream = np.ones(3)
    (a + b).backward(upstream)
    (a * 1).sum().backward()
    np.testing.assert_array_equal(a.grad, [2, 2, 2])
    np.testing.assert_array_equal(b.grad, [1, 1, 1])
    np.testing.assert_array_equal(upstream, [1, 1, 1])


def test_gradient_has_the_leafs_shape_and_dtype():
    a = leaf(3, 1, dtype=np.float32)
    (a * np.ones((2, 3, 4))).sum().backward()
    assert a.grad.shape == (3, 1)
    assert a.grad.dtype == np.float32


def test_scalars_keep_array_gradients():
    a = Tensor(np.array(2.0), requires_grad=True)
    (a * a).backward()
    assert isinstance(a.grad, np.ndarray)
    assert a.grad == 4


def test_many_uses_of_one_result():
    a = leaf(4)
    b = a * 1
    (b + b * 2 + b * 3 + b.sum()).sum().backward()
    np.testing.assert_allclose(a.grad, np.full(4, 1 + 2 + 3 + 4))


def test_an_input_without_gradient_is_not_kept():
    a, b = leaf(2), Tensor(np.ones(2))
    held = weakref.ref(a.data)
    y = b * a.detach()  # no graph at all
    assert not y.requires_grad
    y = a * b  # the gradient of a needs the values of b; no gradient needs the values of a
    a.data = np.zeros(2)
    assert held() is None
    y.sum().backward()
    assert b.grad is None
    x, w = Tensor(np.ones((2, 3))), leaf(3, 4)
    kernels = CPU.kernels
    _, saved = kernels.linear_forward(x.data, w.data, None)
    dx, dweight, dbias = kernels.linear_backward(np.ones((2, 4)), saved, (False, True, False))
    assert dx is None
    assert dbias is None
    assert dweight.shape == (3, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_of_parameters_are_added_up(dtype):
    """In the array that is there, if it is as a kernel wants it; in a new one under a Watch or for the first gradient."""
    x, w, b = (
        Tensor(np.random.default_rng(0).standard_normal((5, 3)).astype(dtype)),
        leaf(3, 4, dtype=dtype),
        leaf(4, dtype=dtype),
    )
    ids, table, scale = np.array([1, 0, 1]), leaf(3, 4, dtype=dtype), leaf(4, dtype=dtype)

    def backward():
        (ops.linear(x, w, b).sum() + (ops.layer_norm(ops.embedding(table, ids), scale, b) * w.sum()).sum()).backward()
        return [t.grad for t in (w, b, table, scale)]

    first = backward()
    expected = [3 * gradient for gradient in first]
    assert all(found is before for found, before in zip(backward(), first, strict=True))
    with watched(Watch()):
        found = backward()
    for a, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, other, rtol=1e-5, atol=1e-5)
    w.grad, table.grad = np.asfortranarray(w.grad), np.asfortranarray(table.grad)
    b.grad, scale.grad = np.repeat(b.grad, 2)[::2], scale.grad.astype(np.float16 if dtype == np.float32 else np.float32)
    for a, other in zip(backward(), expected, strict=True):
        np.testing.assert_allclose(a, other / 3 * 4, rtol=2e-3, atol=2e-3)
    assert not table.grad.flags.c_contiguous
    assert scale.grad.dtype != dtype


def test_a_kernel_adds_to_the_gradients_of_leaves_alone():
    """The gradient of a result stays as it is, and so does that of a frozen leaf."""
    x, w, b = Tensor(np.ones((2, 3))), leaf(4, 3), leaf(4)
    b.grad, b.requires_grad = np.full(4, 7.0), False
    for _ in range(2):
        transposed = w.T
        transposed.grad = np.zeros((3, 4))
        y = ops.linear(x, transposed, b)
        (ops.layer_norm(y, Tensor(np.ones(4)), b) + y).sum().backward()  # rows of a layer norm always have the sum 0
        assert not transposed.grad.any()
    np.testing.assert_allclose(w.grad, np.full((4, 3), 4.0), rtol=1e-9)
    np.testing.assert_array_equal(b.grad, np.full(4, 7.0))


def test_a_kernel_does_not_add_to_an_array_that_does_not_fit():
    """A gradient of half precision, a read-only one, one of another size, and one of a leaf that was frozen in between."""
    x, w, b = leaf(50, 8, dtype=np.float32), leaf(8, 8, dtype=np.float32), leaf(8, dtype=np.float16)
    with blas_threads(1):  # so that a kernel in C multiplies
        for i in (1, 2):
            ops.linear(x, w, b).sum().backward()
            np.testing.assert_allclose(b.grad, np.full(8, 50.0 * i), rtol=1e-3)

    scale = leaf(8, dtype=np.float32)
    scale.grad = np.zeros(8, dtype=np.float32)
    scale.grad.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        ops.layer_norm(x, scale).sum().backward()

    table = leaf(10, 4, dtype=np.float32)
    y = ops.embedding(table, np.array([8, 9])).sum()
    table.data, table.grad = np.zeros((5, 4), dtype=np.float32), np.zeros((5, 4), dtype=np.float32)
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        y.backward()

    scale.grad, scale.requires_grad = np.zeros(8, dtype=np.float32), False
    y = ops.layer_norm(x, scale).sum()
    scale.requires_grad = True
    y.backward()
    assert not scale.grad.any()


def test_a_gradient_that_a_kernel_reads_too():
    """As the gradient of a result, or as an input: the kernel must not change it while it reads it."""
    x, w = leaf(300, 300, dtype=np.float32), leaf(300, 300, dtype=np.float32)
    with blas_threads(1):
        for as_input in (False, True):
            w.grad = start = np.random.default_rng(1).standard_normal((300, 300)).astype(np.float32)
            if as_input:
                expected = start + start.T @ np.ones((300, 300), dtype=np.float32)
                ops.linear(Tensor(w.grad), w).sum().backward()
            else:
                expected = start + x.data.T @ start
                ops.linear(x, w).backward(w.grad)
            np.testing.assert_allclose(w.grad, expected, rtol=1e-3, atol=1e-2)


def test_no_grad_records_nothing_and_nests():
    a = leaf(2)
    with no_grad():
        with no_grad():
            pass
        assert not (a * 2).requires_grad
    assert (a * 2).requires_grad

    @no_grad()
    def double(x):
        return x * 2

    assert not double(a).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert (a * 2).requires_grad


def test_no_grad_is_per_thread():
    seen = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((leaf(2) * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_long_chains_need_no_recursion():
    a = leaf(1)
    y = a
    for _ in range(100_000):
        y = y + 1.0
    y.sum().backward()
    np.testing.assert_array_equal(a.grad, [1])
    y = a
    for _ in range(100_000):
        y = y + 1.0
    del y  # freeing an unused graph must not recurse either


def test_memory_is_freed_by_reference_count():
    gc.collect()
    gc.disable()
    try:
        a = leaf(10)
        middle = a * 2
        y = (ops.softmax(middle) * middle).sum()
        tensor = weakref.ref(middle)
        del middle
        assert tensor() is None, "the graph holds Tensors"
        y.backward()

        weight, scale = leaf(10, 10), leaf(10)
        for op in (lambda x: ops.linear(x, weight, scale), lambda x: ops.layer_norm(x, scale, scale)):
            middle = a * 2
            y = op(middle)
            tensor = weakref.ref(middle)
            del middle
            assert tensor() is None, "the backward function holds its input Tensors"
            y.sum().backward()

        big = np.zeros(1000)
        array = weakref.ref(big)
        z = (a[0] * big).sum()
        del big
        assert array() is not None  # the backward function of * needs it
        z.backward()
        assert array() is None  # and releases it after use

        big = np.zeros(1000)
        array = weakref.ref(big)
        unused = (a[0] * big).sum()
        del big, unused
        assert array() is None  # a graph is also freed if backward never runs
    finally:
        gc.enable()


def test_a_graph_is_used_once():
    a = leaf(2)
    y = (a * a).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="already gone through"):
        y.backward()


def test_backward_says_what_it_needs():
    with pytest.raises(RuntimeError, match="requires_grad"):
        Tensor([1.0]).backward()
    with pytest.raises(RuntimeError, match="one element"):
        (leaf(2) * 2).backward()
    with pytest.raises(ValueError, match="shape"):
        (leaf(2) * 2).backward(np.ones(3))
    with pytest.raises(TypeError, match="float"):
        Tensor([1, 2], requires_grad=True)
    with pytest.raises(ValueError, match="@ needs"):
        leaf(2) @ 3


def test_detach_stops_the_gradient():
    a = leaf(2)
    (a.detach() * a).sum().backward()
    np.testing.assert_array_equal(a.grad, a.data)


def test_inputs_are_never_written_to():
    rng = np.random.default_rng(1)
    inputs = {"x": rng.standard_normal((4, 6)), "w": rng.standard_normal((6, 6)), "b": rng.standard_normal(6)}
    for array in inputs.values():
        array.flags.writeable = False
    x, w, b = (Tensor(array, requires_grad=True) for array in inputs.values())
    y = ops.gelu(ops.layer_norm(ops.linear(x, w, b), b, b))
    y = ops.softmax(y) + ops.relu(y) + ops.dropout(y, 0.5, np.random.default_rng(0))
    q = (y * 1).reshape(2, 1, 2, 6)
    ops.causal_attention(q, q, q).sum().backward()
    assert all(np.isfinite(t.grad).all() for t in (x, w, b))


def test_gradients_at_awkward_values():
    tiny = Tensor(np.array([1e-25], dtype=np.float32), requires_grad=True)
    (Tensor(np.array([1e-25], dtype=np.float32)) / tiny).sum().backward()
    np.testing.assert_allclose(tiny.grad, [-1e25], rtol=1e-5)
    np.testing.assert_allclose((1 / Tensor([2, 4])).data, [0.5, 0.25])
    a = leaf(3)
    (2**a).sum().backward()
    np.testing.assert_allclose(a.grad, np.log(2) * 2**a.data)
    assert (Tensor(1.0) * 2.5).dtype == np.float32
    assert Tensor(3.0).sum(axis=0).item() == 3.0


def test_a_gradient_of_the_wrong_shape_is_refused():
    a = leaf(2, 3)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) for an input of shape \(2, 3\)"):
        record(a.data.sum(axis=0), (a,), lambda dy: (dy,)).backward(np.ones(3))


def test_unpacking_and_indexing():
    a = leaf(3, 2)
    first, *_ = a
    np.testing.assert_array_equal(first.data, a.data[0])
    with pytest.raises(TypeError, match="no dimensions"):
        list(Tensor(1.0))


def test_bad_requests_to_ops():
    x = leaf(2, 3)
    for error, words, call in [
        (ValueError, "linear", lambda: ops.linear(x, leaf(4, 2))),
        (ValueError, "bias", lambda: ops.linear(x, leaf(3, 2), leaf(3))),
        (ValueError, "layer_norm", lambda: ops.layer_norm(x, leaf(2), leaf(2))),
        (ValueError, "probability", lambda: ops.dropout(x, 1.5, np.random.default_rng(0))),
        (TypeError, "boolean", lambda: ops.masked_fill(x, np.ones((2, 3)), 0.0)),
        (IndexError, "0..1", lambda: ops.embedding(x, [0, 2])),
        (IndexError, "0..1", lambda: ops.embedding(x, [-1])),
        (TypeError, "integers", lambda: ops.embedding(x, [0.5])),
        (IndexError, "0..2", lambda: ops.cross_entropy(x, [0, 3])),
        (ValueError, "shape", lambda: ops.cross_entropy(x, [0])),
        (ValueError, "reduction", lambda: ops.cross_entropy(x, [0, 1], reduction="sum")),
        (ValueError, "causal_attention", lambda: ops.causal_attention(x, x, x)),
        (TypeError, "float tensor", lambda: ops.gelu(Tensor([1, 2]))),
        (TypeError, "float tensor", lambda: ops.dropout(Tensor([1, 2]), 0.5, np.random.default_rng(0))),
        (ValueError, "size", lambda: leaf(1) @ leaf(5)),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_extremes_stay_finite():
    x = Tensor(np.array([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [-np.inf] * 3], dtype=np.float32), requires_grad=True)
    p = ops.softmax(x)
    np.testing.assert_array_equal(p.data, [[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    p.backward(np.ones((3, 3)))
    assert np.isfinite(x.grad).all()
    logits = Tensor(np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32))
    np.testing.assert_allclose(ops.cross_entropy(logits, [0, 1], reduction="none").data, [0, 2e4])
    np.testing.assert_array_equal(ops.gelu(Tensor(np.array([-100.0, 100.0], dtype=np.float32))).data, [0, 100])
    constant = ops.layer_norm(Tensor(np.full((1, 4), 7.0)), Tensor(np.ones(4)), Tensor(np.ones(4)))
    np.testing.assert_allclose(constant.data, np.ones((1, 4)))


def test_forward_values_worked_out_by_hand():
    np.testing.assert_allclose(ops.softmax(Tensor(np.log([[1.0, 3.0]]))).data, [[0.25, 0.75]])
    np.testing.assert_allclose(ops.cross_entropy(Tensor(np.log([[1.0, 3.0]])), [0]).item(), np.log(4))
    np.testing.assert_allclose(ops.gelu(Tensor(np.array([1.0]))).data, [0.8411919906082768], rtol=1e-12)
    normal = ops.layer_norm(Tensor(np.array([[1.0, 3.0]])), Tensor(np.array([2.0, 2.0])), Tensor(np.array([0.0, 1.0])), 0.0)
    np.testing.assert_allclose(normal.data, [[-2, 3]])
    # Two tokens: the first attends to itself only. The second weighs both by exp(q.k / sqrt(1)).
    q, v = np.array([1.0, np.log(3)]).reshape(1, 1, 2, 1), np.array([4.0, 8.0]).reshape(1, 1, 2, 1)
    k = np.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(ops.causal_attention(Tensor(q), Tensor(k), Tensor(v)).data.ravel(), [4, (4 + 3 * 8) / 4])


def test_dropout_statistics():
    x = Tensor(np.ones((400, 500), dtype=np.float32))
    for p in (0.1, 0.5, 0.9):
        y = ops.dropout(x, p, np.random.default_rng(0)).data
        kept = (y != 0).mean()
        assert abs(kept - (1 - p)) < 5 * np.sqrt(p * (1 - p) / y.size)  # five standard errors
        np.testing.assert_allclose(y[y != 0], 1 / (1 - p), rtol=1e-6)
        rows = (y != 0).mean(axis=1)  # each row keeps its share
        assert abs(rows.std() - np.sqrt(p * (1 - p) / 500)) < 0.004
    assert ops.dropout(x, 0.0, np.random.default_rng(0)) is x
    assert ops.dropout(x, 0.5, None) is x


# ---------------------------------------------------------------- what Python and NumPy do with a Tensor


def test_comparisons_give_boolean_tensors():
    a, b = Tensor([0.0, 1.0, 2.0], requires_grad=True), Tensor([2.0, 1.0, 0.0])
    for found, expected in [
        (a == 0, [True, False, False]),
        (a != 0, [False, True, True]),
        (a < b, [True, False, False]),
        (a <= b, [True, True, False]),
        (a > np.ones(3), [False, False, True]),
        (a >= [1, 1, 1], [False, True, True]),
        (a < 1, [True, False, False]),
    ]:
        assert isinstance(found, Tensor)
        assert found.dtype == np.bool_
        assert not found.requires_grad
        np.testing.assert_array_equal(found.data, expected)
    assert (a == None) is False  # noqa: E711
    assert a != "a"
    assert {a: 1}[a] == 1  # Tensors are keys by identity


def test_a_comparison_is_a_mask():
    a = Tensor([0.0, 1.0, 2.0], requires_grad=True)
    y = ops.masked_fill(a, a == 0, -9.0)
    np.testing.assert_array_equal(y.data, [-9, 1, 2])
    y.sum().backward()
    np.testing.assert_array_equal(a.grad, [0, 1, 1])


def test_a_tensor_of_one_element_is_a_number():
    loss = (Tensor([1.5], requires_grad=True) * 2).sum()
    assert float(loss) == 3.0
    assert int(loss) == 3
    assert f"{loss:.3f}" == "3.000"
    assert f"{loss}" == str(loss)
    with pytest.raises(TypeError, match="unsupported format"):
        f"{Tensor([1.0, 2.0]):.3f}"
    with pytest.raises(ValueError, match="size 1"):
        float(Tensor([1.0, 2.0]))


def test_numpy_takes_the_values():
    a = leaf(2, 3)
    np.testing.assert_array_equal(np.asarray(a), a.data)
    assert np.asarray(a, dtype=np.float32).dtype == np.float32
    assert np.shares_memory(np.asarray(a), a.data)
    assert not np.shares_memory(np.array(a), a.data)
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(a)


@pytest.mark.parametrize("base", [np.array([0.5, 2.0, 3.0]), np.array([[1.5], [2.0]]), 0, 1, 2.5])
def test_the_gradient_of_a_power_of_any_base(base):
    gradcheck(lambda x: base**x, [np.array([0.5, 2.0, 3.0])])


def test_powers_of_zero_and_of_negative_numbers_are_numpys():
    x = Tensor(np.array([0.0, 1.0, 2.0]), requires_grad=True)
    for base in (0, -2, np.array([0.0, -2.0, -3.0])):
        y = base**x
        np.testing.assert_array_equal(y.data, np.asarray(base, float) ** x.data)
    (0**x).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0, 0])
    ((-2) ** x).sum().backward()
    assert np.isnan(x.grad).all()  # a power of a negative number has no derivative


@pytest.mark.parametrize("other", [np.arange(3), [0, 1, 2], [0.1, 1.1, 2.1], np.array([True, False, True]), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integers_and_lists_keep_the_dtype(other, dtype):
    a = Tensor(np.ones(3, dtype), requires_grad=True)
    for y in (a + other, other + a, a * other, a - other, other / a):
        assert y.dtype == dtype
    np.testing.assert_array_equal((a * other).data, np.asarray(other, dtype))


def test_leaves_can_be_copied_and_results_cannot():
    a = Tensor([1.0, 2.0], requires_grad=True)
    (a * 3).sum().backward()
    for copied in (copy.copy(a), copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert copied.requires_grad
        np.testing.assert_array_equal(copied.data, a.data)
        np.testing.assert_array_equal(copied.grad, a.grad)
    for copies in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"not be part of its graph; copy tensor\.detach\(\)"):
            copies(a * 2)
    assert not copy.deepcopy((a * 2).detach()).requires_grad
