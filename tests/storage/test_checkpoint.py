"""Checkpoint files: they are written whole and read back exactly; damaged and hostile files are refused.

Comments such as R2 name rows of the table in docs/reliability.md.
"""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from studies import reliability

import npgpt
from npgpt import (
    GPT,
    Checkpoint,
    CheckpointError,
    GPTConfig,
    evaluate,
    generate,
    load,
    save,
)
from npgpt.cli import main
from npgpt.storage.header import Progress
from npgpt.text.record import TextRecord

FIXTURES = Path(__file__).parent / "fixtures"
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="counts the operations of POSIX systems")


def test_save_load_identical_logits(tmp_path, tokenizer, small_config, rng):
    model = GPT(small_config, seed=5)
    npgpt.save(tmp_path / "m.npz", model, tokenizer)
    loaded = npgpt.load(tmp_path / "m.npz")
    ids = rng.integers(0, tokenizer.vocab_size, (2, 16))
    np.testing.assert_array_equal(loaded.model(ids)[0].data, model(ids)[0].data)
    assert loaded.tokenizer == tokenizer
    assert loaded.config == small_config
    assert loaded.step == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


def test_numpy_alone_reads_a_checkpoint(trained):
    with np.load(trained, allow_pickle=False) as arrays:
        assert arrays["blocks.0.attn.qkv.weight"].shape == (16, 48)
        assert json.loads(arrays["checkpoint.json"])["progress"]["step"] in (3, 6)


def test_equal_models_give_equal_bytes(tmp_path, tokenizer, small_config):
    for name in "ab":
        npgpt.save(tmp_path / name, GPT(small_config), tokenizer)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_float64_model_is_saved_as_float32(tmp_path, tokenizer, small_config):
    model = GPT(small_config, dtype=np.float64)
    npgpt.save(tmp_path / "m.npz", model, tokenizer)
    loaded = npgpt.load(tmp_path / "m.npz").model
    np.testing.assert_array_equal(loaded.flat.data, model.flat.data.astype(np.float32))
    model.wte.weight.data[0, 0] = 1e300  # infinite in float32
    with pytest.raises(ValueError, match=r"wte.weight has a number that is not finite"):
        npgpt.save(tmp_path / "m.npz", model, tokenizer)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_released_format_loads(number):
    """The files were written by the versions of npgpt that introduced these formats."""
    path = FIXTURES / f"format-{number}.npz"
    checkpoint = npgpt.load(path, with_optimizer=True)
    assert checkpoint.format == number
    assert checkpoint.config == GPTConfig(6, block_size=4, n_layer=1, n_head=2, n_embd=4, dropout=0.1)
    assert checkpoint.tokenizer.characters == "\n abcé"
    assert (checkpoint.step, checkpoint.train_config.steps, str(checkpoint.text)) == (4, 4, "text.txt")
    assert checkpoint.text.n_characters == (None if number < 3 else 260)
    assert checkpoint.optimizer_state["steps"] == 4
    with np.load(path) as arrays:
        for name, p in checkpoint.model.named_parameters():
            np.testing.assert_array_equal(p.data, arrays[name])
        np.testing.assert_array_equal(checkpoint.optimizer_state["exp_avg_sq"], arrays["optimizer.exp_avg_sq"])
    # The weights of the three layer norms are four ones each. All other parameters are close to zero.
    assert checkpoint.model.flat.data.sum(dtype=np.float64) == pytest.approx(12.0, abs=1.5)


def test_a_checkpoint_with_a_bpe(tmp_path):
    """It has a member of its own for the tokenizer, which is hashed and bounded. Decoding needs no library."""
    path = FIXTURES / "format-4-bpe.npz"
    checkpoint = npgpt.load(path)
    assert (checkpoint.format, checkpoint.tokenizer.vocab_size, checkpoint.config.vocab_size) == (4, 262, 264)
    assert checkpoint.tokenizer.decode([checkpoint.tokenizer.start_ids[0]]) == "\n"
    npgpt.save(tmp_path / "again.npz", checkpoint)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "again.npz") as again:
        members = {name: archive.read(name) for name in archive.namelist()}
        assert members == {name: again.read(name) for name in again.namelist()}
    header = json.loads(members["checkpoint.json"])
    tokenizer = members["tokenizer.json"]
    other = json.dumps(json.loads(tokenizer) | {"normalizer": {"type": "Lowercase"}}).encode()
    digest = hashlib.sha256(other).hexdigest()
    for changes, words in [
        ({"tokenizer.json": tokenizer.replace(b"BPE", b"bpe")}, "tokenizer.json is not what was written"),
        ({"tokenizer.json": None}, "expected a vocabulary or a tokenizer.json, found none"),
        ({"checkpoint.json": header | {"vocabulary": "ab"}}, "expected a vocabulary or a tokenizer.json, found both"),
        ({"checkpoint.json": header | {"format": 3}}, "vocabulary is None"),
        (
            {"checkpoint.json": header | {"config": header["config"] | {"vocab_size": 261}}},
            "has 262 tokens, but its vocab_size",
        ),
        (
            {"tokenizer.json": other, "checkpoint.json": header | {"sha256": header["sha256"] | {"tokenizer.json": digest}}},
            "its tokenizer.json cannot be used .its normalizer changes",
        ),
        ({"tokenizer.json": b" " * ((32 << 20) + 1)}, "its tokenizer.json has 33,554,433 bytes, expected at most 33,554,432"),
        ({"other.json": b"{}"}, "its member 'other.json' is not an array"),
    ]:
        with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
            for name, content in (members | changes).items():
                if content is not None:
                    archive.writestr(name, json.dumps(content) if isinstance(content, dict) else content)
        with pytest.raises(CheckpointError, match=words):
            npgpt.load(tmp_path / "bad.npz")


@posix_only
def test_a_save_stopped_anywhere_leaves_the_old_or_the_new(tmp_path):
    reliability.sound(reliability.prefixes(tmp_path))  # R2


@posix_only
def test_a_failing_disk_leaves_the_old_checkpoint(tmp_path):
    assert reliability.sound(reliability.faults(tmp_path)).tried >= 10  # R3


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    reliability.write_checkpoint(path, seed=1)
    before, real = path.read_bytes(), os.fsync

    def a_bad_block(descriptor):
        real(descriptor)
        (temporary,) = tmp_path.glob(".*.tmp")
        data = bytearray(temporary.read_bytes())
        data[len(data) // 2] ^= 1
        temporary.write_bytes(data)

    monkeypatch.setattr(os, "fsync", a_bad_block)
    with pytest.raises(OSError, match="reads back differently"):
        reliability.write_checkpoint(path, seed=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]


def test_a_checkpoint_that_could_not_be_loaded_is_not_saved(tmp_path):
    path, tokenizer = tmp_path / "model.npz", reliability.tokenizer()
    model, ids, of_two = GPT(reliability.TINY), np.zeros((2, 8), np.int64), npgpt.TrainConfig(batch_size=2)
    for more, words in [
        ({"progress": Progress(step=-1)}, "progress cannot be saved"),
        ({"machine": {"threads": 2}}, "machine cannot be saved"),
        ({"text": TextRecord((), "abc", 1)}, "text cannot be saved"),
        ({"val_text": TextRecord((), None, -1)}, "val_text cannot be saved"),
        ({"crash": "boom"}, "needs its batch"),
        ({"crash": "boom", "batch": (ids, ids)}, "needs the train_config"),
        ({"crash": "boom", "batch": (ids, ids[:1]), "train_config": of_two}, r"must have shape \(2, 8\), got \(1, 8\)"),
        ({"crash": "boom", "batch": (ids, ids + 99), "train_config": of_two}, r"ids in 0\.\.29"),
        ({"optimizer_state": {"steps": 1, "exp_avg": ids, "exp_avg_sq": ids}}, r"exp_avg has shape \(2, 8\), expected"),
    ]:
        with pytest.raises(ValueError, match=words):
            npgpt.save(path, Checkpoint(model, tokenizer, **more))
    with pytest.raises(ValueError, match="tokenizer has 31 tokens, but the model's vocab_size is 30"):
        npgpt.save(path, model, npgpt.CharTokenizer(tokenizer.characters + "€"))
    with pytest.raises(ValueError, match="vocabulary cannot be saved"):
        npgpt.save(path, model, npgpt.CharTokenizer(tokenizer.characters[:-1] + "\udc80"))
    with pytest.raises(ValueError, match="float16"):
        npgpt.save(path, GPT(reliability.TINY, dtype=np.float16), tokenizer)
    model.wte.weight.data[0] = np.nan
    with pytest.raises(ValueError, match=r"wte\.weight has a number that is not finite"):
        npgpt.save(path, model, tokenizer)
    assert not list(tmp_path.iterdir())
    npgpt.save(path, Checkpoint(GPT(reliability.TINY), tokenizer, text=TextRecord(("caf\udce9\n.txt",), None, 1)))
    assert npgpt.load(path).text.sources == ("caf\\udce9\\n.txt",)


def test_flipped_bits_are_noticed(tmp_path):
    reliability.sound(reliability.flips(tmp_path, 2000))  # R4


def test_cut_off_files_are_refused(tmp_path):
    reliability.sound(reliability.truncations(tmp_path))  # R5


def test_damaged_files_are_refused_quickly(tmp_path):
    reliability.sound(reliability.fuzz(tmp_path, 2000))  # R5


def test_hostile_files_are_refused_in_one_line(tmp_path, capsys):
    """`load` refuses each file (R6), and `inspect` prints one line about it."""
    files = [*reliability.hostile_files(tmp_path), reliability.duplicate_member(tmp_path)]
    assert len(files) >= 40
    for name, path in files:
        with pytest.raises(CheckpointError) as caught:
            npgpt.load(path, with_optimizer=True)
        assert str(path) in str(caught.value), name
        assert len(str(caught.value)) < 600 + len(str(path)), name
        assert main(["inspect", str(path)]) == 2, name
        out, err = capsys.readouterr()
        assert out == "", name
        assert err.startswith("npgpt inspect: "), name
        assert err.count("\n") == 1, (name, err)
    assert not (tmp_path / "executed").exists()


@posix_only
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        npgpt.load(tmp_path / "pipe")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    for content in (b"", b"hello", b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            npgpt.load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"not an npgpt checkpoint: it has no checkpoint.json, but 'a.npy'"):
        npgpt.load(path)
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(CheckpointError, match=r"no such checkpoint|folder|cannot read"):
            npgpt.load(missing)


def test_the_difference_from_the_configuration_is_named(tmp_path):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    reliability.write_checkpoint(good)
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["checkpoint.json"])

    def changed(**changes):
        return json.dumps(header | changes)

    for text, words in [
        (changed(config=header["config"] | {"tie_weights": True}), "unknown 'lm_head.weight'"),
        (changed(config=header["config"] | {"bias": False}), "unknown 'blocks.0.ln_1.bias'.*and 2 more"),
        (changed(config=header["config"] | {"d_ff": 31}), r"mlp.fc.weight has shape \(8, 32\), expected \(8, 31\)"),
        (changed(config=header["config"] | {"n_layer": 2}), "describes .* parameters|missing blocks.1"),
        (changed(config=header["config"] | {"colour": 1}), "colour"),
        (changed(vocabulary=header["vocabulary"] + "€"), "tokenizer has 31 tokens"),
        (changed(format=99), "format 99, this version reads 1 and 2"),
    ]:
        with zipfile.ZipFile(bad, "w") as archive:
            for name, content in (members | {"checkpoint.json": text}).items():
                archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=words):
            npgpt.load(bad)


def test_a_checkpoint_moves_between_devices(device, tmp_path, tokenizer):
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16), backend=device)
    save(tmp_path / "model.npz", model, tokenizer)
    on_cpu = load(tmp_path / "model.npz").model
    ids = np.arange(12)[None]
    np.testing.assert_allclose(on_cpu(ids)[0].numpy(), model(ids)[0].numpy(), rtol=0, atol=1e-5)
    assert generate(model, [1, 2], 30, temperature=0) == generate(on_cpu, [1, 2], 30, temperature=0)
    there = load(tmp_path / "model.npz", backend=device).model
    np.testing.assert_array_equal(model(ids)[0].numpy(), there(ids)[0].numpy())
    text = np.arange(300) % tokenizer.vocab_size
    np.testing.assert_allclose(evaluate(there, text).loss, evaluate(on_cpu, text).loss, rtol=1e-5)
