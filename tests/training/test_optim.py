"""AdamW, clipping and the learning-rate schedule, compared with numbers worked out by hand."""

import math

import numpy as np
import pytest

from npgpt import AdamW, Tensor, clip_grad_norm, learning_rate
from npgpt.model.module import Parameters


def parameter(values, gradient):
    p = Tensor(np.array(values, dtype=np.float64), requires_grad=True)
    p.grad = np.array(gradient, dtype=np.float64)
    return p


def test_adamw_by_hand():
    # Step 1: the corrected means equal the gradient and its square, so the update is lr * sign(g).
    # A matrix first shrinks by the factor 1 - lr * weight_decay; a vector does not.
    matrix, vector = parameter([[2.0]], [[0.5]]), parameter([2.0], [-0.5])
    optimizer = AdamW([vector, matrix], lr=0.1, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.5)
    optimizer.step()
    np.testing.assert_allclose(matrix.data, [[2.0 * 0.95 - 0.1]], rtol=1e-10)
    np.testing.assert_allclose(vector.data, [2.1], rtol=1e-10)
    # Step 2 with gradient 1: m = .9 * .05 + .1 = .145, / (1 - .81); v = .99 * .0025 + .01 = .012475, / (1 - .9801).
    matrix.grad[...] = 1.0
    vector.grad[...] = 0.0
    optimizer.step()
    update = 0.1 * (0.145 / 0.19) / math.sqrt(0.012475 / 0.0199)
    np.testing.assert_allclose(matrix.data, [[1.8 * 0.95 - update]], rtol=1e-10)


def test_adamw_flat_and_plain_agree():
    rng = np.random.default_rng(0)
    shapes = [(3,), (2, 4), (5,), (4, 2)]
    values = [rng.standard_normal(s) for s in shapes]
    plain = [Tensor(v.copy(), requires_grad=True) for v in values]
    flat_tensors = [Tensor(v.copy(), requires_grad=True) for v in values]
    flat = Parameters(flat_tensors)
    optimizers = AdamW(plain, lr=0.1), AdamW(flat, lr=0.1)
    for _ in range(3):
        for a, b, s in zip(plain, flat_tensors, shapes, strict=True):
            a.grad = rng.standard_normal(s)
            b.grad[...] = a.grad
        norms = clip_grad_norm(plain, 1.0), clip_grad_norm(flat, 1.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(plain, flat_tensors, strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-12)
    optimizers[1].zero_grad()
    assert not flat.grad.any()
    optimizers[0].zero_grad()
    assert plain[0].grad is None
    optimizers[0].step()  # without gradients a step changes nothing
    np.testing.assert_allclose(plain[0].data, flat_tensors[0].data, rtol=1e-12)


def test_adamw_state_round_trip():
    a, b = parameter([[1.0, 2.0]], [[0.3, -0.2]]), parameter([[1.0, 2.0]], [[0.3, -0.2]])
    first, second = AdamW([a]), AdamW([b])
    first.step()
    second.load_state_dict(first.state_dict())
    b.data[...] = a.data
    first.step()
    second.step()
    np.testing.assert_array_equal(a.data, b.data)
    with pytest.raises(ValueError, match="shape"):
        second.load_state_dict({"steps": 1, "exp_avg": np.zeros(3), "exp_avg_sq": np.zeros(3)})


def test_clipping_by_hand():
    a, b = parameter([0.0], [3.0]), parameter([[0.0]], [[4.0]])
    assert clip_grad_norm([a, b], 10.0) == 5.0
    np.testing.assert_array_equal([a.grad[0], b.grad[0, 0]], [3, 4])
    assert clip_grad_norm([a, b], 1.0) == 5.0
    np.testing.assert_allclose([a.grad[0], b.grad[0, 0]], [0.6, 0.8])
    a.grad[0] = np.inf
    assert clip_grad_norm([a, b], 1.0) == np.inf
    np.testing.assert_allclose(b.grad, [[0.8]])
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm([a], 0.0)


def test_schedule_by_hand():
    def lr(step, **changes):
        settings = {"steps": 11, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 2, "schedule": "cosine"} | changes
        return learning_rate(step, **settings)

    assert lr(0) == 0.5
    assert lr(1) == lr(2) == 1.0
    assert lr(6) == pytest.approx(0.55)  # half-way between steps 2 and 10
    assert lr(4) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert lr(10) == pytest.approx(0.1)
    assert lr(50) == pytest.approx(0.1)
    assert lr(7, schedule="constant") == 1.0
    assert lr(0, warmup_steps=0) == 1.0


def test_bad_requests():
    p = parameter([1.0], [1.0])
    for wrong in ({"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": 0}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="AdamW needs"):
            AdamW([p], **wrong)
    with pytest.raises(ValueError, match="no parameters"):
        AdamW([])
    with pytest.raises(ValueError, match="AdamW got a parameter twice"):
        AdamW([p, p])
    with pytest.raises(ValueError, match="twice"):
        Parameters([p, p])
    with pytest.raises(ValueError, match="dtype"):
        Parameters([p, Tensor([1.0], requires_grad=True)])
