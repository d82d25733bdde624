"""Matrix products with a bias in one launch, through cuBLASLt. products.py calls this, and has the products without a bias.

cuBLASLt takes a description of a product, proposes an algorithm for it, and runs that algorithm. Descriptions and algorithms
are kept, about a kilobyte for each shape. The constants are those of cublasLt.h.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from npgpt.kernels.cuda.cublas import check, loaded_library
from npgpt.kernels.cuda.operands import Operand
from npgpt.kernels.reference import Array

TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER, BIAS_TYPE = 3, 4, 7, 8, 26  # of cublasLtMatmulDescAttributes_t
ADD_BIAS = 4  # of cublasLtEpilogue_t
MOST_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)  # of cublasLtMatmulPreferenceAttributes_t; the second for A, B, C and D
BEST_ALIGNMENT = 256  # bytes; cuBLASLt asks for no more
FLOAT32 = 0  # of cudaDataType_t
SIZE_OF_RESULT = 128  # bytes; more than cublasLtMatmulHeuristicResult_t has. It begins with the algorithm

Sizes = tuple[int, int, int]  # (m, n, k)
Kinds = tuple[int, int]  # the type of all arrays, and the type of the computation


class Plan(NamedTuple):
    """A described product: its description, the layouts of a, b and the result, and the algorithm."""

    product: ctypes.c_void_p
    layouts: list[ctypes.c_void_p]
    algorithm: Any


class CublasLt:
    """out (m, n) = a (m, k) @ b (k, n) + bias (m,) for each column, on a given stream. Only one thread may call it."""

    def __init__(self, cublas: Any, version: int, workspace: Array) -> None:
        """cublas: CuPy's module for cuBLAS. version: of CUDA, such as 13020. workspace: bytes that a product may write to."""
        self._library = _library(cublas, version)
        self._handle, self._workspace = ctypes.c_void_p(), workspace
        check(self._library.cublasLtCreate(ctypes.byref(self._handle)))
        self._plans: dict[Any, Plan | None] = {}
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)

    def __call__(
        self, operands: tuple[Operand, Operand, Operand], bias: Array, sizes: Sizes, kinds: Kinds, stream: int
    ) -> bool:
        """Compute the product of the operands a and b into out. False if cuBLASLt has no algorithm for it."""
        addresses = [operand.array.data.ptr for operand in operands]
        # address & -address is the lowest bit that is set: the largest power of two that divides the address.
        alignments = tuple(min(address & -address, BEST_ALIGNMENT) for address in (*addresses, bias.data.ptr))
        layouts = tuple((operand.transposed, operand.leading) for operand in operands)
        key = layouts, alignments, sizes, kinds
        if key not in self._plans:
            self._plans[key] = self._plan(layouts, alignments, sizes, kinds, bias)
        plan = self._plans[key]
        if plan is None:
            return False
        self._describe(plan.product, BIAS_POINTER, ctypes.c_void_p(bias.data.ptr))
        (a, b, out), (of_a, of_b, of_out) = addresses, plan.layouts
        one, zero = ctypes.byref(self._one), ctypes.byref(self._zero)
        arrays = (one, a, of_a, b, of_b, zero, out, of_out, out, of_out)
        workspace = (self._workspace.data.ptr, self._workspace.size)
        check(self._library.cublasLtMatmul(self._handle, plan.product, *arrays, plan.algorithm, *workspace, stream))
        return True

    def _plan(self, layouts: Any, alignments: Any, sizes: Sizes, kinds: Kinds, bias: Array) -> Plan | None:
        library, (kind, computing), (m, n, k) = self._library, kinds, sizes
        product = ctypes.c_void_p()
        check(library.cublasLtMatmulDescCreate(ctypes.byref(product), computing, FLOAT32))
        numbers = {TRANSPOSE_A: layouts[0][0], TRANSPOSE_B: layouts[1][0], EPILOGUE: ADD_BIAS, BIAS_TYPE: kind}
        for name, number in numbers.items():
            self._describe(product, name, ctypes.c_int32(number))
        self._describe(product, BIAS_POINTER, ctypes.c_void_p(bias.data.ptr))

        described = []
        for shape, (transposed, leading) in zip(((m, k), (k, n), (m, n)), layouts, strict=True):
            described.append(ctypes.c_void_p())
            stored = shape[::-1] if transposed else shape
            check(library.cublasLtMatrixLayoutCreate(ctypes.byref(described[-1]), kind, *stored, leading))

        preference = ctypes.c_void_p()
        check(library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        a, b, out, _ = alignments  # the description of the product has the address of the bias
        for name, number in ((MOST_WORKSPACE, self._workspace.size), *zip(ALIGNMENTS, (a, b, out, out), strict=True)):
            value = ctypes.c_uint64(number) if name == MOST_WORKSPACE else ctypes.c_uint32(number)
            check(library.cublasLtMatmulPreferenceSetAttribute(preference, name, ctypes.byref(value), ctypes.sizeof(value)))

        algorithm, found = ctypes.create_string_buffer(SIZE_OF_RESULT), ctypes.c_int(0)
        arguments = (product, *described, described[-1], preference, 1, algorithm, ctypes.byref(found))
        status = library.cublasLtMatmulAlgoGetHeuristic(self._handle, *arguments)
        check(library.cublasLtMatmulPreferenceDestroy(preference))
        return Plan(product, described, algorithm) if status == 0 and found.value else None

    def _describe(self, product: ctypes.c_void_p, name: int, value: Any) -> None:
        check(self._library.cublasLtMatmulDescSetAttribute(product, name, ctypes.byref(value), ctypes.sizeof(value)))


def _library(cublas: Any, version: int) -> ctypes.CDLL:
    library = loaded_library(cublas, "cublasLt", version)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.cublasLtCreate.argtypes = [pointer]
    library.cublasLtMatmulDescCreate.argtypes = [pointer, integer, integer]
    library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, integer, pointer, size]
    library.cublasLtMatrixLayoutCreate.argtypes = [pointer, integer, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64]
    library.cublasLtMatmulPreferenceCreate.argtypes = [pointer]
    library.cublasLtMatmulPreferenceDestroy.argtypes = [pointer]
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = [pointer, integer, pointer, size]
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = [*[pointer] * 7, integer, pointer, pointer]
    library.cublasLtMatmul.argtypes = [*[pointer] * 14, size, pointer]
    return library
