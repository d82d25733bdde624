"""Operations and gradients on the backend of a GPU. A pretended device computes on the CPU; tests marked gpu use a real GPU."""

import numpy as np
import pytest
from support.arrays import close
from support.op_cases import CASES, Dims, inputs_of

from npgpt import (
    GPT,
    GPTConfig,
    Tensor,
    ops,
)
from npgpt.engine import backend
from npgpt.engine.backend import CPU
from npgpt.engine.gradcheck import check_tensors
from npgpt.engine.streams import Stream

NUMPY_S_OWN = {"array operand", "array matmul", "astype"}  # cases that use NumPy's arrays or long doubles
DRAWN = {name for name in CASES if "dropout" in name}


@pytest.mark.parametrize("dims", [Dims(), Dims(lead=(), a=7, b=2, c=1, past=0), Dims(lead=(33,), a=65, b=40, c=8)])
@pytest.mark.parametrize("name", sorted(set(CASES) - NUMPY_S_OWN - DRAWN))
def test_every_operation_on_a_device(device, name, dims, dtype):
    """The results and gradients equal those of the CPU."""
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


def test_the_gradients_of_a_model(device):
    model = GPT(GPTConfig(7, block_size=5, n_layer=1, n_head=2, n_embd=8, dropout=0.2), dtype=np.float64, backend=device)
    rng = np.random.default_rng(0)
    model.flat.data += device.asarray(0.3 * rng.standard_normal(model.num_parameters()))
    x, y = rng.integers(0, 7, (2, 2, 5))

    def loss():
        logits, _ = model(x, rng=device.generator(0, Stream.DROPOUT))
        return ops.cross_entropy(logits, y, reduction="none")

    assert len(list(check_tensors(loss, dict(model.named_parameters()), rtol=1e-7, max_elements=1))) == len(model.parameters())


def test_arrays_of_two_devices_do_not_mix(device):
    with pytest.raises(TypeError, match="one device"):
        Tensor(device.asarray([1.0, 2.0])) + np.ones(2, np.float32)
