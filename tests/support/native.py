"""The kernels in C for one kind of processor, or a skipped test."""

import pytest

from npgpt.kernels.native.kernels import NativeKernels
from npgpt.kernels.native.library import library, processors


def native_kernels(processor):
    """The kernels for this kind of processor. Skips the test if this machine cannot run them."""
    found = processors()
    if not found:
        pytest.skip("the kernels in C are not built: there was no C compiler when npgpt was installed, or NPGPT_NATIVE is 0")
    if processor not in found:
        pytest.skip(f"this processor has no {processor}")
    return NativeKernels(library(processor))
