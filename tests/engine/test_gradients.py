"""Every backward pass agrees with finite differences to one part in a billion, and the checker finds wrong gradients."""

import numpy as np
import pytest
from support.op_cases import CASES, GRADIENT_DIMS, inputs_of, mask

from npgpt import GPT, GPTConfig, GradientError, Tensor, gradcheck, ops
from npgpt.engine.backend import CPU
from npgpt.engine.gradcheck import check_tensors
from npgpt.engine.streams import Stream, generator
from npgpt.engine.tensor import record

MASK = mask(3, 5)
COMPOSITES = {
    "masked softmax": (lambda a: ops.softmax(ops.masked_fill(a, MASK, -np.inf)), [(3, 5)]),  # one row fully masked
    "linear of a vector": (ops.linear, [(4,), (4, 5), (5,)]),
    "attention of one token": (ops.causal_attention, [(1, 2, 1, 3)] * 3),
    "attention over several blocks": (ops.causal_attention, [(1, 1, 70, 2)] * 3),
    "gelu far out": (lambda a: ops.gelu(a * 4), [(30,)]),
    "input used twice": (lambda a: a * a + a, [(3,)]),
    "diamond": (lambda a: (a.exp() * a.tanh()) / (a.exp() + 1), [(4,)]),
    "slices of no dimensions": (lambda a: (lambda b: (b * 2 + b[None]).sum() + b)(a.sum()), [(3,)]),
    "slices of slices": (lambda a: a[1:, ::-1] * a[0] + a[..., None][:, :, 0][1], [(3, 3)]),
    "shapes": (lambda a: (a.reshape(3, 2, 2).transpose(1, 0, -1) * a.T.reshape((2, 3, 2))).exp(), [(2, 3, 2)]),
}


@pytest.mark.parametrize("dims", GRADIENT_DIMS, ids=["usual", "no leading axes", "ones"])
@pytest.mark.parametrize("name", CASES)
def test_every_element_of_every_operation(name, dims, rng):
    case = CASES[name]
    arrays = inputs_of(case, dims, rng)
    reports = gradcheck(case.fn, arrays, rtol=1e-9)
    assert len(reports) == len(arrays)
    assert all(r.checked == a.size for r, a in zip(reports, arrays, strict=True))


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name, rng):
    fn, shapes = COMPOSITES[name]
    reports = gradcheck(fn, [rng.standard_normal(shape) for shape in shapes], rtol=1e-9)
    assert all(r.checked > 0 for r in reports)


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


# ---------------------------------------------------------------- the checker


def test_a_wrong_gradient_is_named():
    def squared_wrongly(a, b):
        good = a.data**2
        return record(good, (a,), lambda dy: (dy * 2.0 * a.data * (1 + 1e-7),)) + b * 0

    with pytest.raises(GradientError, match=r"squared_wrongly: gradient of a at index .*relative error 1\.\d+e-07"):
        gradcheck(squared_wrongly, [np.array([1.0, 2.0]), np.ones(2)], names=["a", "b"])


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "self_attention", "embedding", "linear", "cross_entropy"])
def test_the_first_wrong_operation_of_a_model_is_named(name, monkeypatch):
    kernels = type(CPU.kernels)
    real = getattr(kernels, f"{name}_backward")

    def wrong(gradient):
        return None if gradient is None else gradient * (1 + 1e-4)

    def slightly_wrong(self, dy, *rest):
        result = real(self, dy, *rest)
        return tuple(map(wrong, result)) if isinstance(result, tuple) else wrong(result)

    monkeypatch.setattr(kernels, f"{name}_backward", slightly_wrong)
    model = GPT(GPTConfig(7, block_size=4, n_layer=1, n_head=2, n_embd=8), dtype=np.float64)
    model.parameters().data[...] += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters())
    x, y = np.random.default_rng(1).integers(0, 7, (2, 2, 4))
    with pytest.raises(GradientError, match=f"the first wrong operation on the way back: .*{name}$"):
        list(check_tensors(lambda: model(x, y)[1], dict(model.named_parameters()), rtol=1e-7, max_elements=2))


def test_a_small_error_is_found_where_it_is():
    def good(a):
        return record(a.data * 2, (a,), lambda dy: (dy * 2,))

    def bad(a):
        return record(a.data * 3, (a,), lambda dy: (dy * 3 * (1 + 5e-9),))

    leaf = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    leaf.grad = kept = np.array([7.0, 7.0])
    with pytest.raises(GradientError, match=r"the first wrong operation on the way back: bad$"):
        list(check_tensors(lambda: bad(good(leaf)), {"a": leaf}))
    assert leaf.grad is kept
    assert (kept == 7).all()


def test_a_missing_gradient_is_found():
    with pytest.raises(GradientError, match="input 0"):
        gradcheck(lambda a: Tensor(a.data * 2) + a * 0, [np.ones(3)])


def test_kinks_are_counted_and_limited():
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
