"""The reliability programme: `make test` runs it with small numbers of tries, `make soak` with large ones.

Each function tries one thing a number of times and returns a Tally. The faults are those of an operating system: processes
are killed, writes fail, bits flip. No function of npgpt is replaced, except in `not_finite`, because nothing else can put a
NaN into a gradient. R1 to R10 are the rows of the table in docs/reliability.md.
"""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

import npgpt
from npgpt import GPT, AdamW, CharTokenizer, Checkpoint, CheckpointError, Dataset, GPTConfig, TrainConfig, Trainer
from npgpt.engine.backend import CPU
from npgpt.storage.header import Progress
from npgpt.storage.run import RunFiles
from npgpt.text.record import TextRecord

ROOT = Path(__file__).parent.parent.parent
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 30
TINY = GPTConfig(len(set(TEXT)), block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.2)
TINY_FLAGS = "--block-size 8 --n-layer 1 --n-head 2 --n-embd 8 --dropout 0.2 --batch-size 4 --sample-tokens 3 --threads 2"


@dataclass
class Tally:
    """The results of a number of tries.

    survived: the promised state is there. lost: only an earlier good state is there. wrong: the state is unreadable, has
    other numbers than were written, or there was no clear message.
    """

    tried: int = 0
    lost: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def survived(self):
        return self.tried - self.lost - self.wrong

    def check(self, good, note, lost=False):
        """Count a try. A try that is not good counts as lost if `lost` is true, else as wrong."""
        self.tried += 1
        if not good:
            self.lost += lost
            self.wrong += not lost
            self.notes.append(note)


def tokenizer():
    return CharTokenizer.build_vocab(TEXT)


def write_checkpoint(path, seed=1, optimizer=True):
    """Write a small checkpoint that has every field. The seed decides the weights."""
    model = GPT(TINY, seed=seed)
    checkpoint = Checkpoint(
        model,
        tokenizer(),
        TrainConfig(batch_size=4),
        Progress(seed, seed, 2.5, history=[[seed, 3.0, 2.5, 0.1]]),
        text=TextRecord(("text.txt", "more"), "0" * 64, 40),
        optimizer_state=AdamW(model.parameters()).state_dict() if optimizer else None,
        machine={"threads": "2"},
    )
    npgpt.save(path, checkpoint)


def contents(path):
    """All contents of a checkpoint, for comparison with `==`."""
    c = npgpt.load(path, with_optimizer=True)
    state = c.optimizer_state or {}
    arrays = {**c.model.state_dict(), **{k: v for k, v in state.items() if k != "steps"}}
    said = (c.config, c.tokenizer.characters, c.train_config, c.progress, c.text, c.val_text, c.machine, c.format)
    return said, state.get("steps"), {name: a.tobytes() for name, a in arrays.items()}


# ---------------------------------------------------------------- R1, R8: processes


def start_training(folder, *flags):
    """Start `npgpt train` on a small text as a process. It evaluates and saves at every step."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    command = [sys.executable, "-m", "npgpt", "train", "text.txt", "--steps", "100000", "--eval-interval", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--patience", "0", *TINY_FLAGS.split(), *flags],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def logged_step(log):
    """The step of the last evaluation whose line in the log is complete."""
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return max([0] + [e["step"] for e in map(json.loads, lines) if e["event"] == "evaluation"])


def again(out):
    return ["--resume"] if RunFiles(out).last.exists() else []


MUON = ("--optimizer", "muon", "--position", "rotary")


def kills(folder, n, flags=(), seed=0):
    """R1: kill a run that saves at every step at a random moment, resume it, and so on `n` times.

    Every third run has worker processes. flags: of every run.
    """
    tally, rng = Tally(), random.Random(seed)
    out, reached = folder / "model.npz", 0
    for i in range(n):
        start = () if RunFiles(out).last.exists() else flags  # a resumed run keeps its settings
        process = start_training(folder, *again(out), *start, *["--processes"] * (i % 3 == 0))
        for _ in range(5 if i % 2 else 1):  # every second kill comes during training
            if not process.stderr.readline():
                raise RuntimeError(f"training ended by itself: status {process.wait()}")
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.communicate()
        logged = logged_step(RunFiles(out).log)
        if not RunFiles(out).last.exists():
            tally.check(logged == 0, f"kill {i}: step {logged} was logged, but nothing is saved", lost=True)
            continue
        try:
            step = npgpt.load(RunFiles(out).last, with_optimizer=True).step
            if out.exists():
                npgpt.load(out, with_optimizer=True)
        except CheckpointError as error:
            tally.check(False, f"kill {i}: {error}")
            continue
        tally.check(step >= max(logged, reached), f"kill {i}: step {logged} was logged, but {step} is saved", lost=True)
        reached = step
    leftovers = list(folder.glob(".*.tmp"))
    process = start_training(folder, "--resume")
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.kill()
    process.communicate()
    tally.check(reached > 0, "no step was ever saved")
    if leftovers and set(leftovers) & set(folder.glob(".*.tmp")):
        tally.check(False, f"temporary files were not removed: {leftovers}")
    return tally


def signals(folder, n, seed=0):
    """R8: send SIGINT and SIGTERM by turns at random moments.

    Every fifth run gets a second signal, and every third has worker processes.
    """
    tally, rng = Tally(), random.Random(seed)
    out = folder / "model.npz"
    for i in range(n):
        number, status = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][i % 2]
        process = start_training(folder, *again(out), *["--processes"] * (i % 3 == 0))
        for _ in range(4):  # after these lines training has begun
            process.stderr.readline()
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        if i % 5 == 4:
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
        step = npgpt.load(RunFiles(out).last, with_optimizer=True).step if RunFiles(out).last.exists() else -1
        good = process.returncode == status and "Traceback" not in said
        if i % 5 != 4:
            good = good and f"stopped after step {step}; continue with: python -m npgpt train text.txt --resume" in said
            good = good and not list(folder.glob(".*"))  # no lock and no temporary file
        tally.check(good, f"signal {i}: status {process.returncode}, step {step}, said {said[-300:]!r}")
    return tally


# ---------------------------------------------------------------- R2, R3: the operations of a save


def sound(tally):
    """Assert that no try was lost or wrong; returns the tally."""
    assert tally.tried > 0
    assert (tally.lost, tally.wrong) == (0, 0), tally.notes[:5]
    return tally


class _Disk:
    """Stands between a save and the system: records the operations on files, and can let one of them fail."""

    def __init__(self, fail_at=None, error=errno.ENOSPC):
        self.operations, self._fail_at, self._error = [], fail_at, error

    def note(self, *operation):
        self.operations.append(operation)
        if len(self.operations) - 1 == self._fail_at:
            raise OSError(self._error, os.strerror(self._error))

    @contextlib.contextmanager
    def in_place(self):
        disk, real_open, real_fsync, real_replace = self, builtins.open, os.fsync, os.replace

        class Raw(io.FileIO):
            def write(self, data):
                disk.note("write", self.tell(), bytes(data))
                return super().write(data)

        def opened(file, mode="r", *args, **kwargs):
            if "w" not in mode or not str(file).endswith(".tmp"):
                return real_open(file, mode, *args, **kwargs)
            disk.note("create")
            return io.BufferedWriter(Raw(file, "w"))

        def fsync(descriptor):
            disk.note("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
            real_fsync(descriptor)

        def replace(source, target, **kwargs):
            disk.note("replace")
            real_replace(source, target, **kwargs)

        builtins.open, os.fsync, os.replace = opened, fsync, replace
        try:
            yield
        finally:
            builtins.open, os.fsync, os.replace = real_open, real_fsync, real_replace


def prefixes(folder):
    """R2: stop a save after each of its operations. The old or the new checkpoint must be there, whole."""
    tally, path, new = Tally(), folder / "model.npz", folder / "new.npz"
    write_checkpoint(new, seed=2)
    write_checkpoint(path, seed=1)
    before, disk = path.read_bytes(), _Disk()
    with disk.in_place():
        write_checkpoint(path, seed=2)
    kinds = [operation[0] for operation in disk.operations]
    tally.check(
        [k for k in kinds if k != "write"] == ["create", "sync file", "replace", "sync folder"]
        and "write" not in kinds[kinds.index("sync file") :],
        f"the order is {kinds}",
    )
    expected = {1: contents_of(before, folder), 2: contents(new)}
    for n in range(len(kinds) + 1):
        path.write_bytes(before)
        temporary = bytearray()
        for kind, *what in disk.operations[:n]:
            if kind == "write":
                offset, data = what
                temporary[offset : offset + len(data)] = data
            elif kind == "replace":
                path.write_bytes(temporary)
        found = contents(path)
        tally.check(found == expected[2 if "replace" in kinds[:n] else 1], f"after {n} operations: neither the old nor the new")
    return tally


def contents_of(data, folder):
    (folder / "copy.npz").write_bytes(data)
    return contents(folder / "copy.npz")


def faults(folder):
    """R3: let each operation of a save fail once, as on a full disk and on a broken one.

    The old checkpoint must be whole, and no temporary file may be left.
    """
    tally, path = Tally(), folder / "model.npz"
    write_checkpoint(path, seed=1)
    before, counting = path.read_bytes(), _Disk()
    with counting.in_place():
        write_checkpoint(folder / "other.npz", seed=2)
    for error in (errno.ENOSPC, errno.EIO):
        for n, (kind, *_) in enumerate(counting.operations):
            said = None
            path.write_bytes(before)
            with _Disk(n, error).in_place():
                try:
                    write_checkpoint(path, seed=2)
                except OSError as failure:
                    said = failure.strerror
            whole = path.read_bytes() == before if kind != "sync folder" else contents(path)[0][3].step == 2
            litter = list(folder.glob(".*"))
            tally.check(
                said == os.strerror(error) and whole and not litter, f"{kind} {n}: said {said}, whole {whole}, left {litter}"
            )
    return tally


# ---------------------------------------------------------------- R4, R5: damaged files


def flips(folder, n=None, seed=0):
    """R4: flip `n` bits of a checkpoint, one at a time; None: every bit. `load` must refuse it or find the same contents."""
    path = folder / "model.npz"
    write_checkpoint(path, optimizer=False)
    good, whole, tally = contents(path), path.read_bytes(), Tally()
    bits = range(8 * len(whole))
    if n is not None:  # a random bit in each of n evenly spread bytes
        rng = random.Random(seed)
        bits = [8 * (i * len(whole) // n) + rng.randrange(8) for i in range(n)]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = contents(path)
        except CheckpointError:
            found = good
        tally.check(found == good, f"bit {bit % 8} of byte {bit // 8}: other contents")
    return tally


def truncations(folder, step=1):
    """R5: cut a checkpoint off after every `step`th byte. `load` must refuse it."""
    path, tally = folder / "model.npz", Tally()
    write_checkpoint(path)
    whole = path.read_bytes()
    for n in range(0, len(whole), step):
        path.write_bytes(whole[:n])
        tally.check(refused(path), f"cut at {n}: accepted")
    return tally


def refused(path):
    try:
        npgpt.load(path, with_optimizer=True)
    except CheckpointError:
        return True
    return False


def fuzz(folder, n, seed=0):
    """R5: damage a checkpoint in `n` random ways. `load` must raise CheckpointError or find the same contents.

    It may take one second and 64 MiB beyond the size of the file. More memory goes unnoticed if this process needed as much
    before.
    """
    path, tally, rng = folder / "model.npz", Tally(), random.Random(seed)
    write_checkpoint(path)
    good, whole = contents(path), path.read_bytes()
    memory = _peak_memory()
    for i in range(n):
        damaged = _damage(bytearray(whole), rng)
        path.write_bytes(damaged)
        started = time.process_time()
        try:
            found = contents(path)
        except CheckpointError:
            found = good
        except BaseException as error:  # noqa: BLE001 (the test is that no other error occurs)
            tally.check(False, f"damage {i}: {type(error).__name__}: {error}")
            continue
        seconds = time.process_time() - started
        tally.check(found == good and seconds < 1, f"damage {i}: {seconds:.2f} s, same contents: {found == good}")
    grown = _peak_memory() - memory
    if grown > (64 << 20) + len(whole):
        tally.check(False, f"memory grew by {grown >> 20} MiB")
    return tally


def _damage(data, rng):
    """Damage the bytes of a file in one of eight ways."""
    kind, at = rng.randrange(8), rng.randrange(len(data))
    if kind == 0:  # a few random bytes
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:  # a piece is left out
        del data[at : at + rng.randint(1, 400)]
    elif kind == 2:  # a piece is there twice
        data[at:at] = data[at : at + rng.randint(1, 400)]
    elif kind == 3:  # a piece is overwritten with another
        size, source = rng.randint(1, 400), rng.randrange(len(data))
        data[at : at + size] = data[source : source + size]
    elif kind == 4:  # zeros, which a file system may leave after a crash
        size = rng.randint(1, 4096)
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == 5:  # a number in a zip record becomes extreme
        marks = [i for mark in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6") for i in _all(data, mark)]
        at = rng.choice(marks) + rng.randrange(4, 60)
        data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32)]))
    elif kind == 6:  # a digit changes in a header or in the JSON
        places = [i for i in range(len(data)) if chr(data[i]).isdigit()]
        data[rng.choice(places)] = ord(rng.choice("0123456789-eE.,]}\"'("))
    else:
        data = bytearray(rng.randbytes(rng.randint(0, 2000))) + (data[at:] if rng.random() < 0.5 else b"")
    return bytes(data)


def _all(data, mark):
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _peak_memory():
    """The peak memory of this process in bytes; 0 if the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- R7, R9: a run


def trainer(out=None, steps=20, **settings):
    config = TrainConfig(
        **(
            {"steps": steps, "batch_size": 4, "eval_interval": 7, "sample_tokens": 4, "warmup_steps": 3, "threads": 2}
            | settings
        )
    )
    vocabulary = tokenizer()
    dataset = Dataset(vocabulary.encode_array(TEXT), TINY.block_size, config.batch_size, seed=config.seed)
    return Trainer(GPT(TINY, seed=config.seed), vocabulary, dataset, config, out, sources=["text.txt"])


def resumptions(folder, steps, splits, **settings):
    """R7: for each k in `splits`, a run that stops after k steps and resumes must write the same bytes as a run of `steps`.

    Dropout is on. If the learning rate `lr` is too high, the best checkpoint is older than most of the splits.
    """
    tally = Tally()
    straight = folder / "straight" / "model.npz"
    straight.parent.mkdir()
    list(trainer(straight, steps, **settings).run())
    for k in splits:
        out = folder / f"split{k}" / "model.npz"
        out.parent.mkdir()
        first = trainer(out, steps, log_interval=1, sample_tokens=k % 3, **settings)
        list(first.run(lambda t=first, k=k: t.progress.step >= k))
        second = trainer(out, steps, **settings)
        second.resume(npgpt.load(RunFiles(out).last, with_optimizer=True))
        list(second.run())
        pairs = [(out, straight), (RunFiles(out).last, RunFiles(straight).last)]
        tally.check(all(a.read_bytes() == b.read_bytes() for a, b in pairs), f"split after {k} of {steps} steps: other bytes")
    return tally


def not_finite(folder, patch):
    """R9: put NaN and infinity into a weight, a result, a gradient and a loss.

    The run must stop before it changes a weight, name the source, keep the last good checkpoint and write a crash file.
    `patch(object, name, value)` sets an attribute until the test ends.
    """
    tally = Tally()
    kernels = type(CPU.kernels)
    nan, inf = float("nan"), float("inf")
    cases = [
        *(("weight", name) for name in ("wte.weight", "blocks.0.mlp.fc.bias")),
        *(("forward", name) for name in ("gelu", "self_attention", "layer_norm", "cross_entropy")),
        *(("backward", name) for name in ("gelu", "embedding", "cross_entropy", "residual")),
    ]
    for (kind, name), value in itertools.product(cases, (nan, inf)):
        out = folder / f"{kind} {name} {value}" / "model.npz"
        out.parent.mkdir()
        run = trainer(out, eval_interval=5)
        before = None
        events = run.run()
        for event in events:
            if isinstance(event, npgpt.Step) and event.step == 8:
                break
        good = {path: path.read_bytes() for path in (out, RunFiles(out).last)}
        undo = _put(run, kernels, kind, name, value, patch)
        before = run.model.flat.data.copy()
        end = list(events)[-1]
        found = [
            end.outcome is npgpt.Outcome.DIVERGED,
            end.step == 8,
            name in end.reason and (kind == "weight" or f"the {kind} pass of {name}" in end.reason),
            np.array_equal(run.model.flat.data, before, equal_nan=True),
            all(path.read_bytes() == data for path, data in good.items()),
        ]
        crash = npgpt.load(RunFiles(out).crash)
        found.append(crash.crash == end.reason and np.array_equal(crash.model.flat.data, before, equal_nan=True))
        undo()
        tally.check(all(found), f"{value} in {kind} {name}: {found}, {end.reason!r}")
    return tally


def _put(run, kernels, kind, name, value, patch):
    """Put a value that is not finite into one element; returns a function that undoes it."""
    if kind == "weight":
        dict(run.model.named_parameters())[name].data.flat[3] = value
        return lambda: None
    attribute = f"{name}_{kind}"
    real = getattr(kernels, attribute)

    def spoiled(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        array = result[0] if isinstance(result, tuple) else result
        if array is not args[-1]:  # else it is a sum of gradients to which the kernel has added
            array = array.copy()
        array.flat[array.size // 2] = value
        return (array, *result[1:]) if isinstance(result, tuple) else array

    patch(kernels, attribute, spoiled)
    return lambda: patch(kernels, attribute, real)


# ---------------------------------------------------------------- R6: hostile files


def hostile_files(folder):
    """Write files that are made to do harm or to pass for a checkpoint; returns (name, path) of each."""
    good = folder / "good.npz"
    write_checkpoint(good)
    with zipfile.ZipFile(good) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    header = json.loads(members["checkpoint.json"])
    config, progress = header["config"], header["progress"]
    wte = members["wte.weight.npy"]

    def write(name, files, compression=zipfile.ZIP_STORED, **more):
        path = folder / f"{name}.npz"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for member, content in files.items():
                archive.writestr(member, content)
            for member, content in more.get("also", []):
                archive.writestr(member, content)
        return name, path

    def with_json(name, text):
        return write(name, members | {"checkpoint.json": text})

    def with_header(name, **changes):
        return with_json(name, json.dumps(header | changes))

    def npy(descr, shape, data=b"", fortran="False"):
        text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
        return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data

    def with_array(name, content):
        return write(name, members | {"wte.weight.npy": content})

    def without(*keys):
        return {k: v for k, v in header.items() if k not in keys}

    pickled = folder / "pickled.npz"
    np.savez(pickled, **{"checkpoint.json": np.array([{"a": 1}], dtype=object)}, allow_pickle=True)
    code = b"cos\nsystem\n(S'touch " + str(folder / "executed").encode() + b"'\ntR."
    big = 10**18
    digits = "1" * 400
    (folder / "appended.npz").write_bytes(good.read_bytes() + b"x")
    (folder / "prepended.npz").write_bytes(b"x" + good.read_bytes())
    return [
        ("something appended", folder / "appended.npz"),
        ("something prepended", folder / "prepended.npz"),
        ("pickled object array", pickled),
        write(
            "zip bomb", {"checkpoint.json": members["checkpoint.json"], "wte.weight.npy": bytes(1 << 24)}, zipfile.ZIP_DEFLATED
        ),
        write("compressed", members, zipfile.ZIP_DEFLATED),
        write("bzip2", members, zipfile.ZIP_BZIP2),
        write("traversal", members | {"../../evil.npy": wte}),
        write("absolute path", members | {"/etc/evil.npy": wte}),
        write("folder", members | {"wte.weight.npy/": b""}),
        write("extra array", members | {"evil.npy": wte}),
        write("extra file", members | {"readme.txt": b"hello"}),
        write("array without its suffix", {k.replace("wte.weight.npy", "wte.weight"): v for k, v in members.items()}),
        write("array with half its suffix", {k.replace("wte.weight.npy", "wte.weight\0npy"): v for k, v in members.items()}),
        write("missing array", {k: v for k, v in members.items() if k != "ln_f.bias.npy"}),
        write("missing moments", {k: v for k, v in members.items() if "exp_avg" not in k}),
        write("no header", {k: v for k, v in members.items() if k != "checkpoint.json"}),
        write("header only", {"checkpoint.json": members["checkpoint.json"]}),
        write("nothing", {}),
        with_array("pickle in place of an array", code),
        with_array("object dtype", npy("'|O'", "(1,)", code)),
        with_array("structured dtype", npy("[('a', '<f4')]", "(1,)", bytes(4))),
        with_array("code as header", npy("__import__('os').system('true')", "(1,)", bytes(4))),
        with_array("deep header", b"\x93NUMPY\1\0" + struct.pack("<H", 60000) + b"(" * 60000),
        with_array("digits as shape", npy("'<f4'", "(" + "1" * 60000 + ",)")),
        with_array("huge shape", npy("'<f4'", f"({big}, {big})", bytes(64))),
        with_array("overflowing shape", npy("'<f4'", f"({2**32}, {2**32})", bytes(64))),
        with_array("negative shape", npy("'<f4'", "(-1, -8)", bytes(32))),
        with_array("many dimensions", npy("'<f4'", "(" + "1, " * 200 + ")", bytes(4))),
        with_array("fortran order", wte.replace(b"False", b"True ")),
        with_array("other byte order", wte.replace(b"<f4", b">f4")),
        with_array("complex", wte.replace(b"<f4", b"<c8")),
        with_array("half precision", wte.replace(b"<f4", b"<f2")),
        with_array("integers", wte.replace(b"<f4", b"<i4")),
        with_array("other shape of the same size", wte.replace(b"(30, 8)", b"(8, 30)")),
        with_array("short array", wte[:-4]),
        with_array("long array", wte + bytes(4)),
        with_array("changed weight", wte[:-4] + struct.pack("<f", 0.5)),
        with_array("NaN weight", wte[:-4] + struct.pack("<f", float("nan"))),
        with_array("format 3.0 array", wte.replace(b"NUMPY\1\0", b"NUMPY\3\0")),
        with_json("no JSON", b"{"),
        with_json("JSON of another kind", b"[1, 2, 3]"),
        with_json("not UTF-8", b"\xff\xfe{}"),
        with_json("deep JSON", b"[" * 200_000 + b"]" * 200_000),
        with_json("name twice", members["checkpoint.json"].replace(b'"format"', b'"format": 2, "format"', 1)),
        with_json("NaN in JSON", members["checkpoint.json"].replace(b"0.2", b"NaN", 1)),
        with_json("infinity in JSON", members["checkpoint.json"].replace(b"0.2", b"1e999", 1)),
        with_json("huge number", members["checkpoint.json"].replace(b"0.2", b"9" * 5000, 1)),
        with_json("long number", members["checkpoint.json"].replace(b"0.2", digits.encode(), 1)),
        with_json("long best loss", members["checkpoint.json"].replace(b"2.5", digits.encode())),
        with_json("long key", json.dumps(header | {"x" * 10_000 + "\n": 1})),
        with_json("many keys", json.dumps(header | {f"\x1b{i}": 1 for i in range(50_000)})),
        with_json("many lists", '{"format": 2, "a": [' + "{}, " * 400_000 + "{}]}"),
        write("member with a line end", members | {"a\nb.npy": wte}),
        write("member with a long name", members | {"a" * 60_000 + ".npy": wte}),
        write("many members", members | {f"{i}.npy": b"" for i in range(20_000)}),
        with_json("long JSON", json.dumps(header | {"machine": {"x": "x" * (5 << 20)}})),
        with_json("missing key", json.dumps(without("vocabulary"))),
        with_json("format 1 with keys of 2", json.dumps(header | {"format": 1})),
        with_header("unknown key", colour=1),
        with_header("future format", format=99),
        with_header("format true", format=True),
        with_header("format text", format="2"),
        with_header("huge model", config=config | {"n_embd": 2**40}),
        with_header("endless layers", config=config | {"n_layer": big}),
        with_header("long context", config=config | {"block_size": big}),
        with_header("wide feed-forward", config=config | {"d_ff": big}),
        with_header("fewer layers", config=config | {"n_layer": 0}),
        with_header("other heads", config=config | {"n_head": 3}),
        with_header("tied", config=config | {"tie_weights": True}),
        with_header("unknown setting", config=config | {"colour": "red"}),
        with_header("configuration is a list", config=[1]),
        with_header("empty vocabulary", vocabulary=""),
        with_header("vocabulary twice", vocabulary="a" * 30),
        with_header("NUL in source", text=header["text"] | {"sources": ["a\0b"]}),
        with_header("escape in source", text=header["text"] | {"sources": ["\x1b[2J"]}),
        with_header("format with a line end", format="a\nb"),
        with_header("setting with a line end", config=config | {"a\nb": 1}),
        with_header("no training loss", progress=progress | {"loss_sum": None}),
        with_header("half a character", vocabulary="\ud800" + header["vocabulary"][1:]),
        with_header("vocabulary is a table", vocabulary={"a": 0}),
        with_header("training is text", train_config="fast"),
        with_header("bad training", train_config=header["train_config"] | {"lr": -1}),
        with_header("progress is a list", progress=[1]),
        with_header("negative step", progress=progress | {"step": -1}),
        with_header("history of texts", progress=progress | {"history": ["a"]}),
        with_header("optimizer steps as text", optimizer_steps="1"),
        with_header("no optimizer steps", optimizer_steps=None),
        with_header("hashes missing", sha256={}),
        with_header("hashes of other kind", sha256=dict.fromkeys(header["sha256"], 1)),
        with_header("crash without a batch", crash="boom"),
        with_header("machine is a list", machine=["x"]),
        with_header("bad fingerprint", text=header["text"] | {"sha256": "abc"}),
        with_header("sources of another type", text=header["text"] | {"sources": "text.txt"}),
        with_header("negative length of the text", text=header["text"] | {"n_characters": -1}),
        with_header("a text without its length", text={"sources": [], "sha256": None}),
        with_header("a held-out text of another type", val_text=[]),
    ]


def duplicate_member(folder):
    """Write a zip with two members of the same name; returns (name, path). zipfile warns when it writes one."""
    path = folder / "duplicate.npz"
    write_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("wte.weight.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("wte.weight.npy", data)
    return "duplicate member", path


# ---------------------------------------------------------------- R10: interruptions of the calling thread


class _InterruptAt:
    """A trace function that raises KeyboardInterrupt before the n-th instruction of this thread, wherever that is."""

    def __init__(self, n):
        self.left = n

    def start(self):
        """Trace this thread from here. Python 3.12 traces instructions only if a frame has asked for them before."""
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self)

    def __call__(self, frame, event, argument):
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def _all_events(run):
    """Iterate to the end. A `for` loop would not: Python's own loop has no instructions to be interrupted at."""
    for _ in run.run():
        pass


@contextlib.contextmanager
def _signal_after(seconds):
    """Send SIGINT to this process after a time, unless the block ends earlier."""
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _run_interrupted(run, instruction, seconds):
    """Run until an instruction, or for some seconds where that is None; returns whether the run was interrupted.

    An interruption between `open` and the next instruction leaves a file that nothing refers to. Python closes it and warns,
    and no code can prevent that. So the warning is ignored here. The run goes on after it, and needs the same lock file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            if instruction is None:
                with _signal_after(seconds):
                    _all_events(run)
            else:
                _InterruptAt(instruction).start()
                _all_events(run)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
    return False


def interruptions(folder, n, seed=0, **settings):
    """R10: a run that KeyboardInterrupt leaves, and that continues in the same process, must write the same bytes.

    Half of the interruptions come before a random instruction, and half at a random time, where there are such signals. The
    BLAS must have as many threads as before.
    """
    tally, rng = Tally(), random.Random(seed)
    straight = folder / "straight" / "model.npz"
    straight.parent.mkdir()
    run, count = trainer(straight, **settings), _InterruptAt(-1)
    started = time.perf_counter()
    count.start()
    try:
        _all_events(run)
    finally:
        sys.settrace(None)
    instructions, seconds = -1 - count.left, time.perf_counter() - started
    threads = [library["num_threads"] for library in ThreadpoolController().info()]
    for i in range(n):
        out = folder / f"try{i}" / "model.npz"
        out.parent.mkdir()
        run = trainer(out, **settings)
        at = None if i % 2 and hasattr(signal, "setitimer") else rng.randrange(1, instructions)
        interrupted = _run_interrupted(run, at, rng.uniform(0, seconds))
        step = run.progress.step
        _all_events(run)
        equal = all((out.with_name(p.name)).read_bytes() == p.read_bytes() for p in straight.parent.glob("*.npz"))
        same = [library["num_threads"] for library in ThreadpoolController().info()] == threads
        tally.check(equal and same, f"interruption {i} ({interrupted}) at step {step}: equal {equal}, BLAS threads {same}")
    return tally
