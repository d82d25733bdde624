"""Running commands with several ranks of MPI. mpiexec is that of the package mpich, which `pip install 'npgpt[mpi]'` brings."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MPIEXEC = Path(sys.executable).parent / "mpiexec"
MISSING = (
    None if MPIEXEC.exists() and find_spec("mpi4py") else "MPI is not installed; install it with: pip install 'npgpt[mpi]'"
)
PROGRAM = Path(__file__).parent / "rank_main.py"
SECONDS = 60  # no test needs more


def start(n, folder, *arguments, cwd=None, program=PROGRAM):
    """Start `n` ranks of a program with these arguments. They write their process numbers into `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [str(MPIEXEC), "-n", str(n), sys.executable, str(program), str(folder), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(n, folder, *arguments, **options):
    """Run to the end; returns (status, stdout, stderr)."""
    process = start(n, folder, *arguments, **options)
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpiexec then ends its ranks
        process.communicate()
        raise
    return process.returncode, out, err


def send(folder, rank, number):
    """Send a signal to one rank."""
    os.kill(int((folder / f"rank{rank}").read_text(encoding="ascii")), number)
