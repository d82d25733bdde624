"""Wrong requests: the answer is one line on stderr and exit status 2, and no file is written."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from support.commands import npgpt_command

import npgpt
import npgpt.cli

FILES = {
    "empty.txt": b"",
    "one.txt": b"a",
    "other.txt": b"the bell rang over the water. " * 100,
    "short.txt": b"too short for a window",
    "binary.txt": bytes(range(256)) * 20,
    "latin1.txt": "déjà vu, ".encode("latin-1") * 100,
    "utf16.txt": "the bell ".encode("utf-16") * 100,
    "damaged.txt.gz": gzip.compress(b"the bell " * 1000)[:-20],
    "text.gz": b"the bell",
    "book.tar.gz": gzip.compress(b"bell".ljust(257, b"\0") + b"ustar".ljust(255, b"\0")),
    "book.pdf": b"%PDF-1.7 the bell",
    "strange.txt": "the bell € ".encode() * 100,
    "not-a-checkpoint.npz": b"PK not really",
}
WRONG = {
    "train": [
        ("none.txt", "no such file"),
        ("folder.npz", "the folder folder.npz holds no text file"),
        ("text.txt none.txt", "no such file: none.txt"),
        ("text.txt --val-text none.txt", "no such file: none.txt"),
        ("text.txt --val-text text.txt --val-fraction 0.2", "give --val-text or --val-fraction, not both"),
        ("text.txt --val-text=", "the name of a text file is empty"),
        ("- -", r"standard input \(-\) can be read only once"),
        ("- --val-text -", r"standard input \(-\) can be read only once"),
        ("damaged.txt.gz", "damaged.txt.gz is damaged, or not complete"),
        ("text.gz", "is not a gzip file, though its name ends in .gz"),
        ("book.tar.gz", "tar archive; unpack it, and give the folder"),
        ("book.pdf", "is not a text file but a PDF"),
        ("empty.txt", "is empty"),
        ("one.txt", "too short"),
        ("short.txt --block-size 64", "too short.*smaller block_size"),
        ("binary.txt", "NUL byte"),
        ("latin1.txt", "not UTF-8 text: byte 0xe9 at offset 1"),
        ("utf16.txt", "UTF-16"),
        ("model.npz --out other.npz", "not a text file"),
        ("text.txt --n-embd 10 --n-head 4", "multiple of n_head"),
        ("text.txt --n-embd 0", "n_embd must be a whole number at least 1, got 0"),
        ("text.txt --steps 0", "steps must be"),
        ("text.txt --steps many", "got 'many'"),
        ("text.txt --lr -1", "lr must be a number above 0"),
        ("text.txt --minutes 0", "minutes must be a number above 0 and at most 100000, got '0'"),
        ("text.txt --minutes soon", "got 'soon'"),
        ("text.txt --minutes nan", "got 'nan'"),
        ("text.txt --minutes 1 --steps 5", "give --minutes or --steps, not both"),
        ("text.txt --minutes 1 --preset nano", "give --minutes or --preset, not both"),
        ("text.txt --minutes 1 --resume", "give --minutes or --resume, not both"),
        ("text.txt --minutes 0.0001", "no step fits into|no time for one is left.*raise --minutes"),
        ("text.txt --n-embd 65536 --n-layer 90", "this machine has .* GiB of memory, but this run needs roughly"),
        ("short.txt --minutes 0.1", "too short"),
        ("text.txt --lr nan", "lr must be"),
        ("text.txt --min-lr 1", "min_lr must not be above lr"),
        ("text.txt --dropout 1", "below 1"),
        ("text.txt --val-fraction 1", "val_fraction must be"),
        ("text.txt --activation swish", "gelu"),
        ("text.txt --device tpu", "auto"),
        ("text.txt --stpes 5", "did you mean --steps"),
        ("text.txt --step 5", "did you mean --steps"),
        ("text.txt extra", "no such file: extra"),
        ("", "expected DATA, a text file"),
        ("text.txt --out nowhere/m.npz", "no folder nowhere"),
        ("text.txt --out text.txt", "must end in .npz"),
        ("text.txt --out z.last.npz", "must not end in .last"),
        ("model.jsonl", "one of the files this run would write"),
        ("text.txt --out folder.npz", "got a folder"),
        ("text.txt --resume none.npz", "nothing to resume: there is no none.npz"),
        ("text.txt --resume not-a-checkpoint.npz", "not a checkpoint"),
        ("short.txt --resume model.npz --block-size 4", "cannot resume: the text is not the one"),
        ("text.txt --resume model.npz", "nothing to do"),
        (
            "text.txt --resume model.npz --steps 9 --n-embd 32",
            "n_embd was 16 and is now 32; a model keeps its shape; start a new",
        ),
        ("text.txt --resume model.npz --steps 9 --val-fraction 0.2", "val_fraction was 0.1 .* would hold out text that it was"),
        ("text.txt --resume model.npz --steps 9 --min-lr 0.1", "min_lr must not be above lr"),
        ("strange.txt --resume model.npz --steps 9", "cannot resume: strange.txt has unknown character '€' .*start a new run"),
        ("other.txt --resume model.npz --steps 9", "cannot resume: the text is not the one"),
        ("text.txt --resume text.txt", "not a checkpoint"),
        ("--resume text.txt", "nothing to do"),
        ("text.txt --resume folder.npz", "folder|cannot read"),
        ("text.txt --out none.npz --resume", "nothing to resume: there is no none.last.npz"),
        ("text.txt --preset fast", "invalid choice: 'fast'|quick"),
        ("text.txt --preset char --n-head 5", "multiple of n_head"),
        ("text.txt --batch-size 0", "batch_size must be a whole number at least 1 and at most 100000, got 0"),
        ("text.txt --batch-size 1.5", "batch_size must be a whole number at least 1 and at most 100000, got '1.5'"),
        ("text.txt --batch-size", "expected one argument"),
        ("text.txt --block-size -3", "block_size must be"),
        ("text.txt --n-layer 0", "n_layer must be"),
        ("text.txt --n-head 0", "n_head must be"),
        ("text.txt --d-ff 0", "d_ff must be"),
        ("text.txt --lr 0", "lr must be a number above 0"),
        ("text.txt --lr inf", "lr must be"),
        ("text.txt --lr fast", "lr must be a number above 0, got 'fast'"),
        ("text.txt --beta1 1", "beta1 must be"),
        ("text.txt --beta2 -0.1", "beta2 must be"),
        ("text.txt --weight-decay -1", "weight_decay must be"),
        ("text.txt --grad-clip -1", "grad_clip must be"),
        ("text.txt --eval-interval 0", "eval_interval must be"),
        ("text.txt --eval-tokens -1", "eval_tokens must be"),
        ("text.txt --patience -1", "patience must be"),
        ("text.txt --log-interval 0", "log_interval must be"),
        ("text.txt --sample-tokens -1", "sample_tokens must be"),
        ("text.txt --warmup-steps -1", "warmup_steps must be"),
        ("text.txt --val-fraction -0.1", "val_fraction must be"),
        ("text.txt --schedule linear", "cosine"),
        ("text.txt --seed -1", "seed must be"),
        ("text.txt --seed 1e3", "seed must be"),
        ("text.txt --threads 0", "threads must be"),
        ("text.txt --micro-batch 0", "micro_batch must be"),
        ("text.txt --watch 99999", "port must be a whole number from 0 to 65535"),
        ("text.txt --steps 3 --tensorboard text.txt/tb", "--tensorboard: text.txt.tb cannot be written to"),
        ("text.txt --no-biass", "did you mean --no-bias"),
        ("one.txt --block-size 1", "too short"),
    ],
    "generate": [
        ("", "required: --ckpt"),
        ("--ckpt none.npz", "no such checkpoint"),
        ("--ckpt text.txt", "not a checkpoint"),
        ("--ckpt not-a-checkpoint.npz", "not a checkpoint"),
        ("--ckpt folder.npz", "folder|cannot read"),
        ("--ckpt model.npz --prompt 5€", "unknown characters?.*'€' "),
        ("--ckpt model.npz --temperature -1", "temperature must be a number at least 0, got -1.0"),
        ("--ckpt model.npz --temperature warm", "temperature must be a number"),
        ("--ckpt model.npz --top-k 0", "top_k must be a whole number at least 1, got 0"),
        ("--ckpt model.npz --top-k 2.5", "top_k"),
        ("--ckpt model.npz --top-p 0", "top_p"),
        ("--ckpt model.npz --top-p 1.1", "top_p"),
        ("--ckpt model.npz --max-new-tokens -1", "max_new_tokens"),
        ("--ckpt model.npz --num-samples 0", "num_samples"),
        ("--ckpt model.npz --min-p 2", "min_p"),
        ("--ckpt model.npz --repetition-penalty 0", "repetition_penalty must be a number at least 0.01 and at most 100"),
        ("--ckpt model.npz --window wide", "exact"),
        ("--ckpt model.npz --unknown guess", "error"),
        ("--ckpt model.npz --prompt-file none.txt", "no such file"),
        ("--ckpt model.npz --threads 0", "threads must be a whole number at least 1"),
        ("--ckpt model.npz --device tpu", "auto"),
        ("--ckpt model.npz --prompt a --prompt-file text.txt", "not allowed with"),
        ("--ckpt model.npz --prompt 5€ --unknown error", "--unknown skip"),
        ("--ckpt model.npz --seed -1", "seed"),
        ("--ckpt model.npz --stop=", "--stop must be a text"),
        ("--ckpt model.npz --stop a€", "can never occur: the model does not know '€'"),
        ("--ckpt model.npz --promt HOB", "did you mean --prompt"),
    ],
    "evaluate": [
        ("", "required: --ckpt"),
        ("--ckpt model.npz empty.txt", "empty"),
        ("--ckpt model.npz one.txt", "at least 2 tokens"),
        ("--ckpt none.npz text.txt", "no such checkpoint"),
        ("--ckpt model.npz --sample-tokens -1", "sample_tokens must be"),
        ("--ckpt model.npz --sample-tokens few", "sample_tokens must be"),
    ],
    "gradcheck": [
        ("--n-embd 5", "multiple of n_head"),
        ("--steps 5", "unknown argument"),
        ("--ckpt none.npz", "no such checkpoint"),
        ("--ckpt model.npz --n-layer 2", "leave out --ckpt or --n-layer"),
    ],
    "compare": [
        ("model.npz", "two checkpoints or more"),
        ("model.npz model.npz", "named twice"),
        ("model.npz none.npz", "no such checkpoint"),
        ("model.npz model.last.npz --text none.txt", "model.npz: no such file"),
        ("", "required: FILE"),
    ],
    "report": [
        ("", "required: FILE"),
        ("none.npz", "no such checkpoint"),
        ("text.txt", "not a checkpoint"),
        ("model.npz --out report.pdf", "--out must end in .html, got report.pdf"),
        ("model.npz --out nowhere/report.html", "no folder nowhere"),
        ("model.npz model.npz", "named twice"),
    ],
    "inside": [
        ("", "required: FILE"),
        ("none.npz", "no such checkpoint"),
        ("model.npz --prompt 5€", "unknown character"),
        ("model.npz --prompt a --out inside.txt", "--out must end in .html"),
        ("model.npz --prompt € --unknown skip", "nothing is left of it"),
    ],
    "serve": [
        ("", "required: --ckpt"),
        ("--ckpt none.npz", "no such checkpoint"),
        ("--ckpt model.npz --port 99999", "port must be a whole number from 0 to 65535, got '99999'"),
        ("--ckpt model.npz --port -1", "port must be|expected one argument"),
        (
            "--ckpt model.npz --host 0.0.0.0",
            "other computers in; give a key with --api-key or NPGPT_API_KEY, or --no-api",
        ),
        (
            "--ckpt model.npz --host 198.51.100.1 --no-api-key",
            "cannot listen on .198.51.100.1. .*--host takes an address of this computer",
        ),
        ("--ckpt model.npz --host nowhere.invalid --no-api-key", "cannot listen on .nowhere.invalid."),
        ("--ckpt model.npz --api-key a --no-api-key", "not allowed with"),
        ("--ckpt model.npz --api-key é", "printable ASCII"),
        ("--ckpt model.npz --api-key=", "--host, --api-key and --allow-host must not be empty"),
        ("--ckpt model.npz --window slide", "window slide needs a model with rotary positions"),
        ("--ckpt model.npz --side-by-side 0", "side_by_side must be"),
        ("--ckpt model.npz --side-by-side 999999999 --threads 2", "2 x 999999999 texts need .* GiB .*lower --side-by-side"),
        ("--ckpt model.npz --queue none", "queue must be"),
        ("--ckpt model.npz --max-tokens 0", "max_tokens must be"),
        ("--ckpt model.npz --threads 0", "threads must be"),
    ],
    "replay": [
        ("none.npz", "no such checkpoint"),
        ("model.npz", "is not a crash file"),
        ("text.txt", "not a checkpoint"),
        ("", "required: FILE"),
    ],
    "inspect": [("none.npz", "no such checkpoint"), ("text.txt", "not a checkpoint"), ("", "required: FILE")],
    "trian": [("", "did you mean train")],
}


@pytest.mark.parametrize(("name", "arguments", "words"), [(n, a, w) for n, rows in WRONG.items() for a, w in rows])
def test_a_wrong_request_is_one_line(name, arguments, words, workshop, capsys, monkeypatch):
    """`npgpt.cli.main` runs in this process, because starting a process for each request would be slow."""
    monkeypatch.chdir(workshop)
    for file, content in FILES.items():
        Path(file).write_bytes(content)
    Path("folder.npz").mkdir(exist_ok=True)
    before = {p.name: p.stat().st_mtime_ns for p in workshop.iterdir()}
    try:
        status = npgpt.cli.main([name, *arguments.split()])
    except SystemExit as stopped:  # argparse ends the process this way
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert re.search(words, captured.err), captured.err
    assert {p.name: p.stat().st_mtime_ns for p in workshop.iterdir()} == before  # no file was written


def test_wrong_requests_as_processes(workshop):
    for arguments in (["train", "none.txt"], ["generate", "--ckpt", "none.npz"], ["train", "text.txt", "--stepz", "3"]):
        result = npgpt_command(*arguments, cwd=workshop)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_device_cuda_without_a_gpu_is_one_line(workshop, capsys, monkeypatch):
    from npgpt.engine.backend import DeviceError, select

    try:
        select("cuda")
    except DeviceError:
        monkeypatch.chdir(workshop)
        assert npgpt.cli.main(["train", "text.txt", "--device", "cuda"]) == 2
        assert re.search("device 'cuda' cannot be used: .*(install|--device cpu)", capsys.readouterr().err)
    else:
        np.testing.assert_array_equal(select("cuda").xp.ones(2).get(), [1, 1])
