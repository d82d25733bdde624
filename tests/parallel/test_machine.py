"""What npgpt finds out about this computer: the BLAS, and whether malloc keeps freed memory."""

import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

from npgpt.parallel import machine


@pytest.mark.parametrize(
    ("kernel", "avx512", "words"),
    [
        ("SkylakeX", True, r"openblas 0\.3 \(SkylakeX kernels\)$"),
        ("Haswell", True, "AVX-512 is unused"),
        ("Haswell", False, r"kernels\)$"),
    ],
)
def test_the_blas_is_described(monkeypatch, kernel, avx512, words):
    library = {"user_api": "blas", "internal_api": "openblas", "version": "0.3", "architecture": kernel}
    monkeypatch.setattr(machine, "_blas", lambda: SimpleNamespace(info=lambda: [library]))
    monkeypatch.setattr(machine, "_has_avx512", lambda: avx512)
    monkeypatch.setenv("OPENBLAS_CORETYPE", kernel)
    assert re.search(words, machine.describe_blas())
    assert ("OPENBLAS_CORETYPE=Haswell" in machine.describe_blas()) == (words == "AVX-512 is unused")


@pytest.mark.parametrize(("built_with", "warns"), [("scipy-openblas", True), ("accelerate", False)])
def test_a_blas_that_is_not_found_is_said_with_the_remedy(monkeypatch, built_with, warns):
    monkeypatch.setattr(machine, "_blas", lambda: SimpleNamespace(info=lambda: [], lib_controllers=[]))
    monkeypatch.setattr(machine, "_built_with", lambda: built_with)
    found = machine._blas_libraries.__wrapped__
    with pytest.warns(RuntimeWarning, match=r"\(scipy-openblas\).* pip install -U threadpoolctl") if warns else nullcontext():
        assert found() == []
    assert machine.describe_blas() == f"BLAS {built_with}"


def test_any_thread_may_set_the_number_of_blas_threads():
    """threadpoolctl 3.8 ignores every thread but the first one that sets it, while that thread lives."""

    def number():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    def within(threads, seen):
        with machine.blas_threads(threads):
            seen.append(number())

    before, seen = number(), []
    with machine.blas_threads(2):
        seen.append(number())
        thread = threading.Thread(target=within, args=(1, seen))
        thread.start()
        thread.join()
        seen.append(number())
    within(1, seen)
    assert seen == [[2], [1], [2], [1]]
    assert number() == before
    controller = ThreadpoolController()
    with controller.limit(limits=1, user_api="blas"):  # other code in this process may still set it too
        assert number() == [1]
    assert number() == before


def test_what_numpy_was_built_with_has_a_name():
    assert machine._built_with() != "unknown"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has glibc")
def test_later_steps_take_no_new_memory_pages():
    """With glibc, later steps cause few page faults. A separate process counts them.

    A step may need more memory than all steps before it, if the workers overlap differently. So the best of several steps
    counts.
    """
    program = (
        "import resource, numpy as np\n"
        "from npgpt import GPT, GPTConfig\n"
        "from npgpt.parallel.machine import keep_freed_memory\n"
        "from npgpt.parallel.step import ParallelStep\n"
        "from npgpt.parallel.workers import Workers\n"
        "ids = np.zeros((8, 128), dtype=int)\n"
        "with Workers(2) as workers:\n"
        "    step = ParallelStep(GPT(GPTConfig(65, n_layer=2, n_embd=128)), workers, 4)\n"
        "    faults = []\n"
        "    for number in range(8):\n"
        "        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "        step(ids, ids, 0, number)\n"
        "        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "assert min(faults) < 200 or not keep_freed_memory(), faults\n"
    )
    root = str(Path(__file__).parent.parent.parent)
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": root}, check=True, timeout=100)
