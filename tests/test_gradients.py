"""Every backward pass against finite differences in float64, to one part in a billion."""

import numpy as np
import pytest

from npgpt import GPT, GPTConfig, GradientError, Tensor, gradcheck, ops
from npgpt.backend import Stream, generator
from npgpt.gradcheck import check_tensors
from npgpt.tensor import record

IDS = np.array([[1, 2, 2], [0, 3, 2]])  # an id that repeats and one (4) that never occurs
MASK = np.array([[True, False, False, True, False], [False, False, True, False, True], [True] * 5])


def fixed():
    return np.random.default_rng(3)


# name: (function, shapes of its float inputs)
CASES = {
    "add broadcast": (lambda a, b: a + b, [(2, 1, 3), (4, 1)]),
    "subtract": (lambda a, b: a - b, [(3, 4), (4,)]),
    "multiply broadcast": (lambda a, b: a * b, [(2, 1, 3), (4, 1)]),
    "divide": (lambda a, b: a / (b * b + 1), [(3, 4), (3, 1)]),
    "numbers": (lambda a: 2 - a * 3 + 1 / (a * a + 2) - (-a) / 4, [(5,)]),
    "array operand": (lambda a: np.arange(3.0) * a - np.ones(3), [(2, 3)]),
    "power": (lambda a: a**3 + (a * a + 1) ** 0.5 + a**1 + a**0, [(5,)]),
    "tensor power": (lambda a, b: (a * a + 0.5) ** b, [(2, 3), (3,)]),
    "matmul": (lambda a, b: a @ b, [(3, 4), (4, 2)]),
    "matmul batched": (lambda a, b: a @ b, [(2, 1, 3, 4), (5, 4, 2)]),
    "matrix vector": (lambda a, b: a @ b, [(2, 3, 4), (4,)]),
    "vector matrix": (lambda a, b: a @ b, [(4,), (2, 4, 3)]),
    "vector vector": (lambda a, b: a @ b, [(4,), (4,)]),
    "exp": (lambda a: a.exp(), [(4,)]),
    "log sqrt": (lambda a: (a * a + 1).log() + (a * a + 1).sqrt(), [(4,)]),
    "tanh": (lambda a: a.tanh(), [(4,)]),
    "sum": (lambda a: a.sum() * a.sum(axis=1) + a.sum(axis=(0, -1), keepdims=True), [(2, 2, 3)]),
    "mean": (lambda a: a.mean() * a.mean(axis=-1, keepdims=True) * a, [(2, 3)]),
    "reshape transpose": (lambda a: (a.reshape(3, 2, 2).transpose(1, 0, -1) * a.T.reshape((2, 3, 2))).exp(), [(2, 3, 2)]),
    "swapaxes": (lambda a: a.swapaxes(0, 2).tanh(), [(2, 3, 4)]),
    "slices of a result": (lambda a: 2 * (a * a)[0] + (a * a)[1:].sum(axis=0), [(3, 2)]),
    "slices and the whole": (lambda a: (lambda b: b[:2] * b[1:] + b.sum() + b[1])(a * a), [(3, 2)]),
    "the whole and slices": (lambda a: (lambda b: b.sum() * b[0] + (b * 3).sum() * b[1:])(a * a), [(3, 2)]),
    "slices": (lambda a: a[1:, ::-1] * a[0] + a[..., None][:, :, 0][1], [(3, 3)]),
    "repeated index": (lambda a: a[[0, 1, 1]] * a[np.array([2, 2, 0])], [(3, 2)]),
    "boolean index": (lambda a: a[MASK], [(3, 5)]),
    "input used twice": (lambda a: a * a + a, [(3,)]),
    "diamond": (lambda a: (a.exp() * a.tanh()) / (a.exp() + 1), [(4,)]),
    "linear": (ops.linear, [(2, 3, 4), (4, 5), (5,)]),
    "linear without bias": (ops.linear, [(3, 4), (4, 5)]),
    "linear of a vector": (ops.linear, [(4,), (4, 5), (5,)]),
    "softmax": (ops.softmax, [(2, 3, 4)]),
    "softmax axis 0": (lambda a: ops.softmax(a, axis=0), [(4, 3)]),
    "masked fill": (lambda a: ops.masked_fill(a, MASK, -3.0), [(3, 5)]),
    "masked softmax": (lambda a: ops.softmax(ops.masked_fill(a, MASK, -np.inf)), [(3, 5)]),  # last row fully masked
    "layer norm": (ops.layer_norm, [(2, 3, 8), (8,), (8,)]),
    "layer norm without bias": (ops.layer_norm, [(3, 8), (8,)]),
    "layer norm, large eps": (lambda x, w, b: ops.layer_norm(x, w, b, eps=0.5), [(3, 8), (8,), (8,)]),
    "gelu": (lambda a: ops.gelu(a * 3), [(30,)]),
    "relu": (ops.relu, [(30,)]),
    "dropout": (lambda a: ops.dropout(a, 0.4, fixed()), [(6, 5)]),
    "dropout of everything": (lambda a: ops.dropout(a, 1.0, fixed()) + a, [(4,)]),
    "embedding": (lambda w: ops.embedding(w, IDS), [(5, 3)]),
    "cross-entropy": (lambda x: ops.cross_entropy(x, IDS), [(2, 3, 5)]),
    "cross-entropy, each": (lambda x: ops.cross_entropy(x, IDS, reduction="none"), [(2, 3, 5)]),
    "attention": (ops.causal_attention, [(2, 2, 5, 3)] * 3),
    "attention of one token": (ops.causal_attention, [(1, 2, 1, 3)] * 3),
    "attention with a past": (ops.causal_attention, [(2, 2, 2, 3), (2, 2, 5, 3), (2, 2, 5, 3)]),
    "attention with dropout": (lambda q, k, v: ops.causal_attention(q, k, v, 0.3, fixed()), [(2, 2, 5, 3)] * 3),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient(name, rng):
    fn, shapes = CASES[name]
    reports = gradcheck(fn, [rng.standard_normal(shape) for shape in shapes], rtol=1e-9)
    assert len(reports) == len(shapes)
    assert all(r.checked > 0 for r in reports)


def test_every_op_has_a_case():
    public = {name for name, value in vars(ops).items() if callable(value) and value.__module__ == ops.__name__}
    public = {name for name in public if not name.startswith("_")}
    used = {f.__name__ for f, _ in CASES.values()} | {n for f, _ in CASES.values() for n in f.__code__.co_names}
    assert public <= used, f"no gradient check of {public - used}"


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"tie_weights": True}, {"bias": False}])
def test_whole_model(options):
    config = GPTConfig(7, block_size=4, n_layer=2, n_head=2, n_embd=8, dropout=0.2, **options)
    model = GPT(config, dtype=np.float64)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.data[...] += 0.3 * rng.standard_normal(p.shape)
    x, y = rng.integers(0, 7, (2, 2, 4))

    def loss():
        logits, _ = model(x, rng=generator(0, Stream.DROPOUT))
        return ops.cross_entropy(logits, y, reduction="none")

    parameters = dict(model.named_parameters())
    reports = list(check_tensors(loss, parameters, op="GPT", rtol=1e-7, max_elements=4))
    assert [r.name for r in reports] == list(parameters)


# ---------------------------------------------------------------- the checker itself


def test_a_wrong_gradient_is_named():
    def squared_wrongly(a, b):
        good = a.data**2
        return record(good, (a,), lambda dy: (dy * 2.0 * a.data * (1 + 1e-7),)) + b * 0

    with pytest.raises(GradientError, match=r"squared_wrongly: gradient of a at index .*relative error 1\.\d+e-07"):
        gradcheck(squared_wrongly, [np.array([1.0, 2.0]), np.ones(2)], names=["a", "b"])


def test_a_missing_gradient_is_found():
    with pytest.raises(GradientError, match="input 0"):
        gradcheck(lambda a: Tensor(a.data * 2) + a * 0, [np.ones(3)])


def test_kinks_are_counted_not_forgiven():
    at_kink = np.array([1.0, 0.0, -1.0] + [2.0] * 20)
    (report,) = gradcheck(ops.relu, [at_kink])
    assert report.kinks == 1
    assert report.checked == 22
    with pytest.raises(GradientError, match="not smooth"):
        gradcheck(ops.relu, [np.zeros(5)])


def test_float32_and_randomness_are_refused():
    with pytest.raises(TypeError, match="float64"):
        gradcheck(ops.relu, [np.ones(3, dtype=np.float32)])
    rng = np.random.default_rng()
    with pytest.raises(ValueError, match="two calls"):
        gradcheck(lambda a: ops.dropout(a, 0.5, rng), [np.ones(50)])


def test_random_elements_and_directions():
    (report,) = gradcheck(lambda a: (a * a).sum(), [np.linspace(-1.0, 1.0, 100)], max_elements=10)
    assert report.checked == 13
