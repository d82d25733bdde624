"""Folders of Hugging Face: logits as transformers computed them, what is refused, and what comes back after writing.

The folders in fixtures/ were written by transformers 5.24. `expected.json` has the logits that it computed in float64.
`make interop` compares with transformers itself.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt import GPT, CharTokenizer, Checkpoint, GPTConfig, RequestError
from npgpt.exchange.huggingface import read_model, read_tokenizer_of, write_folder
from npgpt.exchange.safetensors import SafetensorsFile, write_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
TOKENIZER = CharTokenizer("\n aébc中😀\u2019")


@pytest.fixture(params=["gpt2", "gpt-neox"])
def folder(request, tmp_path) -> Path:
    """A copy of a folder that transformers has written."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


@pytest.fixture
def gpt2(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "gpt2", tmp_path / "gpt2"))


def change_settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_tensors(folder, change):
    """Rewrite the tensors, a dictionary, after `change` has changed it."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: file.tensor(name) for name in file.shapes}
    file.close()
    change(tensors)
    with path.open("wb") as new:
        write_safetensors(new, {name: a.shape for name, a in tensors.items()}, np.dtype(np.float32), lambda name: tensors[name])


def test_logits_are_those_of_transformers(folder):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    for dtype, tolerance in ((np.float64, 2e-9), (np.float32, 3e-6)):
        imported = read_model(folder, dtype=dtype)
        logits, _ = imported.model(np.array(expected["ids"]))
        np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=tolerance)
    np.testing.assert_array_equal(read_model(folder / "model.safetensors").model.flat.data, imported.model.flat.data)


def test_names_without_a_prefix_and_buffers(gpt2):
    expected = read_model(gpt2).model.flat.data

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 6, 6), np.float32)
        tensors["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(())

    change_tensors(gpt2, change)
    np.testing.assert_array_equal(read_model(gpt2).model.flat.data, expected)


def test_several_files(gpt2):
    expected = read_model(gpt2).model.flat.data
    names: dict[str, str] = {}

    def half(first):
        def change(tensors):
            for i, name in enumerate(sorted(tensors)):
                if (i % 2 == 0) != first:
                    del tensors[name]
                else:
                    names[name] = f"part-{first}.safetensors"

        return change

    whole = (gpt2 / "model.safetensors").read_bytes()
    for first in (True, False):
        (gpt2 / "model.safetensors").write_bytes(whole)
        change_tensors(gpt2, half(first))
        (gpt2 / "model.safetensors").rename(gpt2 / f"part-{first}.safetensors")
    index = gpt2 / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    np.testing.assert_array_equal(read_model(gpt2).model.flat.data, expected)
    for content, words in [
        ({"weight_map": names | {"x": "part-3.safetensors"}}, "part-3.safetensors is missing, one of the 3 files"),
        ({"weight_map": names | {"x": "../part-True.safetensors"}}, "does not say which file"),
        ({"weight_map": [1]}, "does not say which file"),
        ([], "does not say which file"),
    ]:
        index.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(RequestError, match=words):
            read_model(gpt2)
    shutil.copy(gpt2 / "part-True.safetensors", gpt2 / "copy.safetensors")
    index.write_text(json.dumps({"weight_map": names | {"x": "copy.safetensors"}}), encoding="utf-8")
    with pytest.raises(RequestError, match="two of its files have a tensor"):
        read_model(gpt2)


def test_a_stored_output_layer(gpt2):
    """Tied in the settings. If another output layer is stored, it is used, as transformers 5 does."""

    def same(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]

    def other(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    change_tensors(gpt2, same)
    assert read_model(gpt2).model.config.tie_weights
    change_tensors(gpt2, other)
    imported = read_model(gpt2)
    assert not imported.model.config.tie_weights
    assert "its output layer differs from its token embedding, so they are not tied" in imported.notes
    np.testing.assert_array_equal(imported.model.lm_head.weight.data, imported.model.wte.weight.data.T + 1)


def test_cropping(folder):
    ids = np.array([[1, 2, 3]])
    whole, short = read_model(folder).model, read_model(folder, block_size=4).model
    np.testing.assert_array_equal(short(ids)[0].numpy(), whole(ids)[0].numpy())
    assert short.config.block_size == 4
    assert "block_size was 6 and is now 4" in read_model(folder, block_size=4).notes
    if whole.config.position == "learned":
        with pytest.raises(RequestError, match="it has learned 6 positions, so block_size cannot be 7"):
            read_model(folder, block_size=7)


def test_attention_scales_are_in_the_weights_of_q(gpt2):
    plain = read_model(gpt2)
    change_settings(gpt2, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=False)
    scaled = read_model(gpt2)
    q = np.s_[..., :8]
    for layer in (0, 1):
        before, after = (m.model.blocks[layer].attn.qkv for m in (plain, scaled))
        factor = 2 * (layer + 1)  # sqrt(head_dim), and the 1 / (layer + 1) that is no longer there
        np.testing.assert_allclose(after.weight.data[q], before.weight.data[q] * factor, rtol=1e-6)
        np.testing.assert_allclose(after.bias.data[q], before.bias.data[q] * factor, rtol=1e-6)
        np.testing.assert_array_equal(after.weight.data[..., 8:], before.weight.data[..., 8:])
    assert len(scaled.notes) == len(plain.notes) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "its model_type is 'llama', expected gpt2 or gpt_neox"),
        ({"model_type": ["gpt2"]}, r"its model_type is .*, expected gpt2 or gpt_neox"),
        ({"activation_function": []}, r"its activation_function is '\[\]'"),
        ({"activation_function": "gelu"}, "its activation_function is 'gelu', and npgpt has gelu_new"),
        ({"activation_function": "quick_gelu"}, "its activation_function is 'quick_gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "its layer_norm_epsilon is 1e-06, and npgpt has 1e-05"),
        ({"add_cross_attention": True}, "its add_cross_attention is true, which npgpt cannot compute"),
        ({"n_embd": "8"}, "its n_embd is '8', expected a whole number above 0"),
        ({"n_embd": 0}, "its n_embd is '0'"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head"),
        ({"tie_word_embeddings": 1}, "its tie_word_embeddings is '1', expected true or false"),
        ({"resid_pdrop": 2}, "its resid_pdrop is '2', expected a number from 0 to 1"),
        ({"n_layer": 3}, "describes .* parameters, but its tensors have"),
        ({"n_layer": 10**9}, "describes .* parameters, but its tensors have"),
        ({"n_layer": 1}, "its tensor 'transformer.h.1.attn.c_attn.bias' is unknown, and 11 more"),
        ({"n_inner": 11}, r"its tensor transformer.h.0.mlp.c_fc.weight has shape \(8, 12\), expected \(8, 11\)"),
        ({"tie_word_embeddings": False}, "describes .* parameters, but its tensors have"),
    ],
)
def test_models_that_are_refused(gpt2, changes, words):
    change_settings(gpt2, **changes)
    with pytest.raises(RequestError, match=f"cannot import .*gpt2: .*({words})"):
        read_model(gpt2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_parallel_residual": True}, "its use_parallel_residual is true, which npgpt cannot compute"),
        ({"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}, "its rotary positions are not those"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, "its rotary positions are not those"),
        ({"attention_bias": False}, "its attention_bias is false"),
        ({"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
    ],
)
def test_neox_models_that_are_refused(tmp_path, changes, words):
    folder = Path(shutil.copytree(FIXTURES / "gpt-neox", tmp_path / "x"))
    change_settings(folder, **changes)
    with pytest.raises(RequestError, match=words):
        read_model(folder)


def test_tensors_that_are_missing_or_wrong(gpt2):
    whole = (gpt2 / "model.safetensors").read_bytes()

    def refused(change, words):
        (gpt2 / "model.safetensors").write_bytes(whole)
        change_tensors(gpt2, change)
        with pytest.raises(RequestError, match=words):
            read_model(gpt2)

    refused(lambda t: t.update(x=t.pop("transformer.h.0.ln_1.bias")), "its tensor 'x' is unknown")
    refused(lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"].T}), r"has shape \(8, 13\), expected")
    refused(lambda t: t["transformer.ln_f.bias"].fill(np.inf), "ln_f.bias has a number that is not finite")


def test_float64_beyond_float32(gpt2):
    """It would become infinite."""
    path = gpt2 / "model.safetensors"
    file = SafetensorsFile(path)
    arrays = {name: file.tensor(name).astype(np.float64) for name in file.shapes}
    file.close()
    arrays["transformer.ln_f.bias"][0] = 1e300
    data = b"".join(array.tobytes() for array in arrays.values())
    header, end = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F64", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(RequestError, match=r"ln_f.bias has numbers up to 1e\+300, too large for float32"):
        read_model(gpt2)
    assert np.isfinite(read_model(gpt2, dtype=np.float64).model.flat.data).all()


def test_folders_that_are_not_complete(tmp_path, gpt2):
    def refused(words, source=gpt2):
        with pytest.raises(RequestError, match=words):
            read_model(source)

    refused("no such file or folder", tmp_path / "none")
    refused("expected a folder or a .safetensors file", gpt2 / "config.json")
    (gpt2 / "config.json").unlink()
    refused("there is no config.json")
    (gpt2 / "model.safetensors").unlink()
    refused("it has no model.safetensors")
    (gpt2 / "pytorch_model.bin").write_bytes(b"")
    refused(r"pytorch_model.bin alone.*unpickling can run any program; convert it by\n +python -c ")


# ---------------------------------------------------------------- writing


SHAPES = [
    {"position": position, "tie_weights": tie, "bias": bias, "activation": activation}
    for position in ("learned", "rotary")
    for tie, bias, activation in ((False, True, "gelu"), (True, True, "relu"), (False, False, "gelu"))
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_what_is_written_comes_back(tmp_path, shape):
    config = GPTConfig(12, block_size=6, n_layer=2, n_head=2, n_embd=8, d_ff=20, **shape)  # three ids more than characters
    model = GPT(config, seed=1)
    write_folder(Checkpoint(model, TOKENIZER), tmp_path / "out")
    back = read_model(tmp_path / "out").model
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], array)
    ids = np.array([[1, 2, 3, 0, 11, 5]])
    np.testing.assert_allclose(back(ids)[0].numpy(), model(ids)[0].numpy(), atol=1e-6)
    assert read_tokenizer_of(tmp_path / "out", config) == TOKENIZER
    write_folder(Checkpoint(back, TOKENIZER), tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_half_precision(tmp_path):
    model = GPT(GPTConfig(9, block_size=6, n_layer=1, n_head=2, n_embd=8), seed=1)
    write_folder(Checkpoint(model, TOKENIZER), tmp_path / "half", "f16")
    back = read_model(tmp_path / "half").model
    np.testing.assert_array_equal(back.flat.data, model.flat.data.astype(np.float16).astype(np.float32))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    model.wte.weight.data[0, 0] = 1e5
    with pytest.raises(RequestError, match=r"wte.weight has numbers up to 1e\+05, too large for float16; use --dtype f32"):
        write_folder(Checkpoint(model, TOKENIZER), tmp_path / "large", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]  # nothing is half-written


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    checkpoint = Checkpoint(GPT(GPTConfig(9, block_size=6, n_layer=1, n_head=2, n_embd=8), seed=1), TOKENIZER)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    write_folder(checkpoint, tmp_path / "folder")  # it was empty
    for name in ("file", "folder"):
        with pytest.raises(RequestError, match="exists already"):
            write_folder(checkpoint, tmp_path / name)
    with pytest.raises(RequestError, match=r"there is no folder .*none; make it first"):
        write_folder(checkpoint, tmp_path / "none" / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_folder(checkpoint, ".")
    assert (tmp_path / "here" / "config.json").exists()


def test_a_tokenizer_with_too_many_tokens(gpt2):
    with pytest.raises(RequestError, match="has no tokenizer that npgpt can read"):
        read_tokenizer_of(gpt2, read_model(gpt2).model.config)
    model = GPT(GPTConfig(40, block_size=6, n_layer=1, n_head=2, n_embd=8), seed=1)
    write_folder(Checkpoint(model, CharTokenizer("".join(map(chr, range(48, 88))))), gpt2.parent / "many")
    shutil.copy(gpt2.parent / "many" / "tokenizer.json", gpt2)
    with pytest.raises(RequestError, match="the tokenizer has 40 tokens, but the model knows 13 ids"):
        read_tokenizer_of(gpt2, read_model(gpt2).model.config)


def test_a_bpe_comes_back(tmp_path, text):
    pytest.importorskip("tokenizers")
    tokenizer = npgpt.BPETokenizer.train([text], 300)
    model = GPT(GPTConfig(300, block_size=6, n_layer=1, n_head=2, n_embd=8), seed=1)
    write_folder(Checkpoint(model, tokenizer), tmp_path / "out")
    assert read_tokenizer_of(tmp_path / "out", model.config) == tokenizer
