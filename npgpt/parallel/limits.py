"""How many cores and how much memory this process may use: affinity, cgroups, OMP_NUM_THREADS, ulimit. Nothing is set here.

A container is a process in a control group (cgroup) with limits. Linux has two versions of cgroups, and groups can be
nested; the smallest limit on the way up applies. On other systems only the limits that exist there are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where cgroups are mounted
OWN_CGROUPS = Path("/proc/self/cgroup")  # which groups this process is in
OWN_MEMORY = Path("/proc/self/statm")  # the memory that this process uses, in pages


@dataclass(frozen=True)
class Limit:
    """A number of cores or of bytes, and where it comes from, for messages."""

    value: int
    source: str


def core_limit() -> Limit:
    """The number of cores this process may use, at least 1."""
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [Limit(visible, "cores")]
    quota = _cpu_quota()
    if quota is not None:
        cores = "1 core" if quota == 1 else f"{quota:g} cores"
        limits.append(Limit(max(1, math.ceil(quota)), f"the CPU quota of its cgroup, {cores}"))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        limits.append(Limit(int(asked), f"OMP_NUM_THREADS={asked}"))
    return min(limits, key=lambda limit: limit.value)


def available_cores() -> int:
    """The number of cores this process may use."""
    return core_limit().value


def memory_limit(processes: int = 1) -> Limit | None:
    """The memory that this process may still take, in bytes; None if the system does not tell.

    processes: how many such processes share this machine.
    """
    resident, virtual = _own_memory()
    limits = []
    machine = _physical_memory()
    if machine is not None:
        shared = f" for {processes} ranks" if processes > 1 else ""
        limits.append(Limit(machine // processes, f"this machine has {_gib(machine)} GiB of memory{shared}"))
    group = _cgroup_memory()
    if group is not None:
        limits.append(Limit(max(0, group - resident), f"the cgroup of this process allows {_gib(group)} GiB of memory"))
    address_space = _address_space()
    if address_space is not None:
        source = f"`ulimit -v` allows this process {_gib(address_space)} GiB of memory"
        limits.append(Limit(max(0, address_space - virtual), source))
    return min(limits, key=lambda limit: limit.value, default=None)


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f}" if n >= 2**30 else f"{n / 2**30:.2f}"


def _physical_memory() -> int | None:
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not hasattr(os, "sysconf") or not set(names) <= os.sysconf_names.keys():
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1])


def _own_memory() -> tuple[int, int]:
    """(resident, virtual) memory of this process in bytes; zeros if the system does not tell."""
    text = _read(OWN_MEMORY)
    if text is None:
        return 0, 0
    virtual, resident = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in text.split()[:2])
    return resident, virtual


def _address_space() -> int | None:
    """The limit of `ulimit -v` in bytes; None if there is none."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


# ---------------------------------------------------------------- cgroups


def _cpu_quota() -> float | None:
    """The smallest CPU quota of the process's cgroups, in cores; None if there is none."""
    quotas = []
    for folder in _own_folders("cpu"):
        period = quota = None
        if (text := _read(folder / "cpu.max")) is not None:  # version 2: "200000 100000" or "max 100000"
            quota, period = text.split()[:2]
        elif (text := _read(folder / "cpu.cfs_quota_us")) is not None:  # version 1: -1 for no limit
            quota, period = text.strip(), _read(folder / "cpu.cfs_period_us")
        if quota and period and quota.isdecimal() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_memory() -> int | None:
    """The smallest memory limit of the process's cgroups, in bytes; None if there is none."""
    limits = []
    for folder in _own_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1
            text = (_read(folder / name) or "").strip()
            if text.isdecimal() and int(text) < 2**60:  # version 1 writes a very large number for no limit
                limits.append(int(text))
    return min(limits, default=None)


def _own_folders(controller: str) -> Iterator[Path]:
    """The folders of the process's cgroups that have a controller, from its own group up to the root."""
    for line in (_read(OWN_CGROUPS) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one hierarchy for all controllers
            roots = [CGROUPS, CGROUPS / "unified"]
        elif controller in controllers.split(","):
            roots = [CGROUPS / controllers, CGROUPS / controller]
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            # In a container the path may be that of the host, which is not visible: then the root is the own group.
            yield from [f for f in (folder, *folder.parents) if f == root or root in f.parents]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
