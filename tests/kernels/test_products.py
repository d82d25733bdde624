"""Matrix products through cuBLAS: the operands that the BLAS is given, and the results."""

import numpy as np
import pytest
from support import cuda_on_cpu
from support.arrays import close, normal

from npgpt.engine import backend
from npgpt.engine.backend import select
from npgpt.kernels.cuda import launch
from npgpt.kernels.cuda.products import product, product_with_bias


def test_products_of_views(dtype):
    """Views that the BLAS can describe are passed as they are, such as transposed matrices. Other views are copied."""
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

            def gemm(first, second, out, sizes, count, add, given=given):
                given.extend([first.array, second.array])
                cuda_on_cpu.Gemm()(first, second, out, sizes, count, add)

            found = product(np, gemm, left, right)
            close(found, left @ right, dtype, 10)
            if given:
                assert any(np.shares_memory(x, a) for x in given) == (name not in copied), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", launch.ELEMENTS)
def test_products_on_a_gpu(dtype):
    gpu = select("cuda")
    element, parameter = (backend.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)), launch.ELEMENTS[dtype][2]
    a, b = (normal(np.float64, 2, 3, n, 24).astype(element) for n in (16, 40))
    a_there, b_there = gpu.xp.asarray(a), gpu.xp.asarray(b)
    bias = normal(np.float64, 40).astype(element)
    with_bias = product_with_bias(gpu.xp, gpu.kernels.gemm, a_there[0, 0], b_there[0, 0].T, gpu.xp.asarray(bias))
    assert (with_bias is None) == (dtype == "float64")  # cuBLASLt has an algorithm for the others
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
