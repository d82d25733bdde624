"""The kernels in C: for one kind of processor, and built from changed sources or with other options."""

import os
import shlex
import subprocess
import sysconfig

import pytest

from npgpt.kernels.native.kernels import NativeKernels
from npgpt.kernels.native.library import hash_of_sources, library, processors

FLAGS = ["-std=gnu11", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-shared", "-fPIC"]  # as in setup.py


def build(folder, *options):
    """Compile the C files of `folder` into the library there. Raises CalledProcessError if they do not compile."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    sources = sorted(folder.glob("processors_*.c"))
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.unlink(missing_ok=True)  # a process may have loaded the old file
    hashed = f'-DSOURCES="{hash_of_sources(folder)}"'
    subprocess.run([*compiler, *FLAGS, *(options or ["-O3"]), hashed, "-o", target, *sources], check=True)


def native_kernels(processor):
    """The kernels for this kind of processor. Skips the test if this machine cannot run them."""
    found = processors()
    if not found:
        pytest.skip("the kernels in C are not built: there was no C compiler when npgpt was installed, or NPGPT_NATIVE is 0")
    if processor not in found:
        pytest.skip(f"this processor has no {processor}")
    kernels = NativeKernels(library(processor))
    kernels.threads = 1  # so that linear layers use the kernels too
    return kernels
