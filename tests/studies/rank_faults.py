"""Faults of runs with several ranks: one of them is killed, stopped or asked to end, at random moments (R17).

The run must end within seconds, and the next one must continue from what was saved.
"""

import random
import signal
import subprocess
import time

from studies.reliability import TEXT, TINY_FLAGS, Tally, logged_step
from support import ranks

import npgpt
from npgpt.storage.run import RunFiles

TIMEOUT = 3  # seconds, of --rank-timeout
SLACK = 15  # seconds: to ask who is missing, to end the others, and for a busy machine


def faults(folder, n, seed=0, size=2):
    """R17: `n` runs that continue each other; each ends with a fault of one rank."""
    tally, rng = Tally(), random.Random(seed)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    files = RunFiles(folder / "model.npz")
    command = ["train", "text.txt", "--out", "model.npz", "--resume", "auto", "--steps", "1000000", "--eval-interval"]
    for i in range(n):
        rank, fault = rng.randrange(size), (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT)[i % 4]
        flags = (*TINY_FLAGS.split(), "--micro-batch", 1, "--rank-timeout", TIMEOUT, "--patience", 0)
        process = ranks.start(size, folder, *command, rng.choice((1, 20)), *flags, cwd=folder)
        while not process.stderr.readline().startswith("run "):
            if process.poll() is not None:
                raise RuntimeError(f"training ended by itself: status {process.returncode}")
        time.sleep(rng.uniform(0.1, 1.5))
        if process.poll() is not None:
            tally.check(False, f"fault {i}: before it, the run ended by itself: {process.communicate()[1][-600:]}")
            continue
        started = time.monotonic()
        if fault == signal.SIGINT:  # as Ctrl-C does
            process.send_signal(fault)
        else:
            ranks.send(folder, rank, fault)
        try:
            _, err = process.communicate(timeout=TIMEOUT + SLACK)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            tally.check(False, f"fault {i}: {fault.name} of rank {rank} was not noticed for {TIMEOUT + SLACK} seconds")
            continue
        seconds, logged, note = time.monotonic() - started, logged_step(files.log), f"fault {i}: {fault.name} of rank {rank}: "
        own = [line for line in err.splitlines() if line.startswith(("npgpt", "stopped"))]
        expected = {
            signal.SIGKILL: [],  # the launcher ends the others at once, and says which process died
            signal.SIGSTOP: [f"no answer from rank {rank} on "],
            signal.SIGTERM: ["stopped after step "],
            signal.SIGINT: ["stopped after step "],
        }[fault]
        said = len(own) == len(expected) and all(text in line for text, line in zip(expected, own, strict=True))
        saved = npgpt.load(files.last, with_optimizer=True).step if files.last.exists() else 0
        tally.check(saved >= logged, f"{note}step {logged} was logged, but {saved} is saved", lost=True)
        if not (said and process.returncode):
            tally.wrong += 1
            tally.notes.append(f"{note}status {process.returncode} after {seconds:.1f} s: {err[-600:]}")
    return tally
