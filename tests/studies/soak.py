"""`make soak`: run the reliability programme with large numbers of tries and print a table. About ten minutes on two cores.

python tests/studies/soak.py [--scale 0.01]
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy reads this when it is imported; the rows run at the same time
sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import numpy as np
from studies import hostile_clients, rank_faults, reliability
from support import ranks

import npgpt


def hostile(folder):
    """R6: each hostile file must be refused."""
    tally = reliability.Tally()
    for name, path in [*reliability.hostile_files(folder), reliability.duplicate_member(folder)]:
        tally.check(reliability.refused(path), f"{name}: accepted")
    return tally


def programme(scale):
    """The rows as (name, function, further arguments...); the function's first argument is a folder. Long rows come first."""

    def times(n):
        return max(1, round(n * scale))

    return [
        ("R5 random and structured damage", reliability.fuzz, times(200_000)),
        ("R1 kill -9 while saving every step", reliability.kills, times(500)),
        ("R1 the same with Muon", reliability.kills, times(250), reliability.MUON),
        ("R4 every bit flipped", reliability.flips, None)
        if scale == 1
        else ("R4 bits flipped", reliability.flips, times(60_000)),
        ("R8 SIGINT and SIGTERM", reliability.signals, times(200)),
        ("R7 every split of 100 steps, resumed", reliability.resumptions, 100, range(1, 100, max(1, round(1 / scale)))),
        ("R5 cut off at every byte", reliability.truncations),
        ("R2 a save stopped after each operation", reliability.prefixes),
        ("R3 each operation of a save failing", reliability.faults),
        ("R6 hostile files", hostile),
        ("R9 NaN and infinities", reliability.not_finite, setattr),
        ("R16 hostile requests to the server", hostile_clients.hostile_requests, times(20_000)),
        ("R10 KeyboardInterrupt, and on in the same process", reliability.interruptions, times(2000)),
        *([] if ranks.MISSING else [("R17 faults of ranks", rank_faults.faults, times(40))]),
    ]


def run(what, function, *arguments):
    """Run one row; returns (name, Tally, seconds)."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = function(Path(folder), *arguments)
    return what, tally, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1, help="fraction of the full numbers of tries (default: 1)")
    args = parser.parse_args()
    started = time.perf_counter()
    rows = programme(args.scale)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = [future.result() for future in [pool.submit(run, *row) for row in rows]]
    print(
        f"npgpt {npgpt.__version__}, {datetime.date.today()}, {platform.system()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, {time.perf_counter() - started:.0f} s\n"
    )
    print("| | tried | survived | lost | wrong | seconds |\n|---|---|---|---|---|---|")
    for what, tally, seconds in sorted(results, key=lambda row: int(row[0].split()[0][1:])):
        print(f"| {what} | {tally.tried:,} | {tally.survived:,} | {tally.lost} | {tally.wrong} | {seconds:.0f} |")
    notes = [f"{what}: {note}" for what, tally, _ in results for note in tally.notes[:10]]
    if ranks.MISSING:
        print(f"\nR17 was left out: {ranks.MISSING}")
    if notes:
        print("\n" + "\n".join(notes))
        sys.exit(1)


if __name__ == "__main__":
    main()
