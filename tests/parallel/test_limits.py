"""Limits of cores and memory: cgroups of both versions, nested and unlimited, OMP_NUM_THREADS, ulimit."""

import os
import subprocess
import sys

import pytest
from support.commands import ROOT

from npgpt.parallel import limits
from npgpt.parallel.limits import core_limit, memory_limit

MIB = 1 << 20


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes cgroup files: cgroups(lines of /proc/self/cgroup, {file: content})."""
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(limits, "OWN_MEMORY", tmp_path / "none")  # as if the process used no memory yet
    monkeypatch.setattr(limits, "_address_space", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)

    def write(own, files):
        (tmp_path / "own").write_text(own, encoding="utf-8")
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")

    return write


V2, V1 = "0::/app/worker\n", "5:memory:/app\n4:cpu,cpuacct:/app\n1:name=systemd:/app\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (V2, {"app/worker/cpu.max": "100000 100000\n"}, 1),
        (V2, {"app/worker/cpu.max": "150000 100000\n"}, 2),
        (V2, {"app/worker/cpu.max": "50000 100000\n"}, 1),
        (V2, {"app/worker/cpu.max": "max 100000\n"}, 16),
        (V2, {"app/worker/cpu.max": "max 100000\n", "app/cpu.max": "300000 100000\n"}, 3),
        (V2, {"app/worker/cpu.max": "400000 100000\n", "app/cpu.max": "200000 100000\n"}, 2),
        (V2, {"cpu.max": "200000 100000\n"}, 2),  # in a container that sees only its own group
        (V2, {}, 16),
        (V1, {"cpu,cpuacct/app/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/app/cpu.cfs_period_us": "100000\n"}, 2),
        (V1, {"cpu,cpuacct/app/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/app/cpu.cfs_period_us": "100000\n"}, 16),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("", {}, 16),
    ],
)
def test_the_cpu_quota(cgroups, own, files, cores):
    cgroups(own, files)
    assert core_limit().value == cores
    assert ("CPU quota" in core_limit().source) == (cores < 16)


@pytest.mark.parametrize(("asked", "cores"), [("2", 2), ("64", 16), ("0", 16), ("many", 16), ("", 16)])
def test_omp_num_threads(cgroups, monkeypatch, asked, cores):
    cgroups("", {})
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert core_limit().value == cores


@pytest.mark.parametrize(
    ("own", "files", "mib"),
    [
        (V2, {"app/worker/memory.max": f"{150 * MIB}\n"}, 150),
        (V2, {"app/worker/memory.max": "max\n", "app/memory.max": f"{300 * MIB}\n"}, 300),
        (V2, {"app/worker/memory.max": f"{400 * MIB}\n", "app/memory.max": f"{200 * MIB}\n"}, 200),
        (V1, {"memory/app/memory.limit_in_bytes": f"{150 * MIB}\n"}, 150),
        (V1, {"memory/app/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        (V2, {"app/worker/memory.max": "max\n"}, None),
        ("", {}, None),
    ],
)
def test_the_memory_of_a_cgroup(cgroups, own, files, mib):
    cgroups(own, files)
    found = memory_limit()
    if mib is None:
        assert found is None or found.source.startswith("this machine has")
    else:
        assert found.value == mib * MIB
        assert found.source.startswith("the cgroup of this process allows")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits are Linux's")
def test_a_limited_address_space():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from npgpt.parallel.limits import memory_limit\n"
        "limit = memory_limit()\n"
        "assert 0 < limit.value < 2 << 30 and 'ulimit -v' in limit.source, limit\n"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
