"""GGUF files: the weights that are in one compute the model's logits, the tokens spell the tokenizer's, and one never comes.

`make interop` runs such files in llama.cpp.
"""

import json

import numpy as np
import pytest

import npgpt
from npgpt import GPT, CharTokenizer, Checkpoint, GPTConfig, RequestError
from npgpt.exchange.gguf import write_gguf
from npgpt.text.bpe_description import BYTE_OF

gguf = pytest.importorskip("gguf")
TOKENIZER = CharTokenizer("\n aébc中😀\u2019")


def model_of(**shape):
    config = GPTConfig(12, **{"block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8, "d_ff": 20} | shape)
    model = GPT(config, seed=1)
    rng = np.random.default_rng(2)
    model.flat.data[...] += 0.2 * rng.standard_normal(model.flat.data.shape).astype(np.float32)
    return model


def read(path):
    """(the tensors, the fields) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    return {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}, reader.fields


def norm(x, t, name):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * t[name + ".weight"] + t[name + ".bias"]


def linear(x, t, name):
    return x @ t[name + ".weight"].T + t[name + ".bias"]


def turned(x):
    """Rotary positions as llama.cpp's "neox" kind: the first half of the coordinates with the second half. (T, H, D)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


def logits_of(t, ids, n_layer=2, n_head=2):
    """The logits that the tensors of a file stand for, computed straight from their definition."""
    x = t["token_embd.weight"][ids]
    rotary = "position_embd.weight" not in t
    if not rotary:
        x = x + t["position_embd.weight"][: len(ids)]
    for layer in range(n_layer):
        name = f"blk.{layer}."
        qkv = linear(norm(x, t, name + "attn_norm"), t, name + "attn_qkv").reshape(len(ids), 3, n_head, -1)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        if rotary:
            q, k = turned(q), turned(k)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((len(ids), len(ids)), dtype=bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", p, v).reshape(len(ids), -1), t, name + "attn_output")
        h = linear(norm(x, t, name + "ffn_norm"), t, name + "ffn_up")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, t, name + "ffn_down")
    return norm(x, t, "output_norm") @ t["output.weight"].T


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize(("tie_weights", "bias"), [(False, True), (True, True), (False, False)])
def test_the_weights_compute_the_same_logits(tmp_path, position, tie_weights, bias):
    model = model_of(position=position, tie_weights=tie_weights, bias=bias)
    write_gguf(Checkpoint(model, TOKENIZER), tmp_path / "m.gguf")
    tensors, fields = read(tmp_path / "m.gguf")
    ids = [1, 5, 8, 0, 2, 2]
    found, expected = logits_of(tensors, ids), model(np.array([ids]))[0].numpy()[0]
    assert found.shape == (6, 10)  # the characters and the end of a text; the padding of the model is not there
    assert len(tensors["token_embd.weight"]) == 10
    np.testing.assert_allclose(found[:, :9], expected[:, :9], atol=3e-5)
    np.testing.assert_allclose(found[:, 9], -100, atol=1e-2)
    architecture = "gptneox" if position == "rotary" else "gpt2"
    assert fields["general.architecture"].contents() == architecture
    assert fields["npgpt.block_size"].contents() == 6
    assert fields[f"{architecture}.context_length"].contents() == (6 if position == "rotary" else 256)


def test_positions_are_padded(tmp_path):
    notes = write_gguf(Checkpoint(model_of(), TOKENIZER), tmp_path / "m.gguf")
    assert any("so use -c 6, and no longer texts" in note for note in notes)
    table = read(tmp_path / "m.gguf")[0]["position_embd.weight"]
    assert len(table) == 256
    np.testing.assert_array_equal(table[6:], np.repeat(table[5:6], 250, axis=0))
    assert write_gguf(Checkpoint(model_of(block_size=256), TOKENIZER), tmp_path / "n.gguf") == []


def test_a_weight_of_the_last_norm_near_zero(tmp_path):
    model = model_of(position="rotary")
    model.ln_f.weight.data[3] = 0
    (note,) = write_gguf(Checkpoint(model, TOKENIZER), tmp_path / "m.gguf")
    assert "1 weights of the last layer norm were nearly 0" in note
    found = logits_of(read(tmp_path / "m.gguf")[0], [1, 5, 8])
    np.testing.assert_allclose(found[:, :9], model(np.array([[1, 5, 8]]))[0].numpy()[0, :, :9], atol=2e-2)


def test_tokens_of_characters(tmp_path):
    write_gguf(Checkpoint(model_of(), TOKENIZER), tmp_path / "m.gguf")
    _, fields = read(tmp_path / "m.gguf")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [bytes(BYTE_OF[c] for c in token).decode() for token in tokens[:9]] == list(TOKENIZER.characters)
    assert tokens[9] == "<|endoftext|>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 9
    assert fields["tokenizer.ggml.token_type"].contents() == [1] * 9 + [3]
    merges = {tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()}
    for token in tokens[:9]:  # the bytes of every character merge, from the left
        assert all((token[:k], token[k]) in merges for k in range(1, len(token)))
    assert fields["tokenizer.ggml.pre"].contents() == "trillion"


def test_tokens_of_a_bpe(tmp_path, text):
    pytest.importorskip("tokenizers")
    tokenizer = npgpt.BPETokenizer.train([text], 300)
    model = GPT(GPTConfig(300, block_size=6, n_layer=1, n_head=2, n_embd=8), seed=1)
    write_gguf(Checkpoint(model, tokenizer), tmp_path / "m.gguf")
    _, fields = read(tmp_path / "m.gguf")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [bytes(BYTE_OF[c] for c in token) for token in tokens[:300]] == [tokenizer.token_bytes(i) for i in range(300)]
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in tokenizer.merges()]


def test_other_tokens_of_a_bpe(tmp_path, text):
    """A token that was added is found before a text is split. A tokenizer that splits in another way is refused."""
    pytest.importorskip("tokenizers")
    parts = json.loads(npgpt.BPETokenizer.train([text], 300).json)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    parts["added_tokens"] = [{"id": 300, "content": "<a>", "special": False} | flags]
    parts["added_tokens"] += [{"id": 301, "content": "<|endoftext|>", "special": True} | flags]
    model = GPT(GPTConfig(302, block_size=6, n_layer=1, n_head=2, n_embd=8), seed=1)
    write_gguf(Checkpoint(model, npgpt.BPETokenizer(json.dumps(parts))), tmp_path / "m.gguf")
    tensors, fields = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.token_type"].contents() == [1] * 300 + [4, 3]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 301
    assert len(tensors["output.weight"]) == 302  # it has a token that ends a text
    digits = {"type": "Digits", "individual_digits": True}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, parts["pre_tokenizer"]]}
    with pytest.raises(RequestError, match="its tokenizer splits texts in another way than GPT-2"):
        write_gguf(Checkpoint(model, npgpt.BPETokenizer(json.dumps(parts))), tmp_path / "n.gguf")


def test_half_precision(tmp_path):
    model = model_of()
    write_gguf(Checkpoint(model, TOKENIZER), tmp_path / "m.gguf", "f16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_qkv.weight"] == kinds["output.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.attn_qkv.bias"] == kinds["position_embd.weight"] == kinds["output_norm.weight"] == "F32"
    model.blocks[0].mlp.fc.weight.data[0, 0] = 1e5
    with pytest.raises(RequestError, match="too large for float16"):
        write_gguf(Checkpoint(model, TOKENIZER), tmp_path / "n.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"llama\.cpp has no relu"):
        write_gguf(Checkpoint(model_of(activation="relu"), TOKENIZER), tmp_path / "m.gguf")
    (tmp_path / "there.gguf").write_text("x")
    with pytest.raises(RequestError, match="exists already"):
        write_gguf(Checkpoint(model_of(), TOKENIZER), tmp_path / "there.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RequestError, match=r"python -m pip install 'npgpt\[gguf\]'"):
        write_gguf(Checkpoint(model_of(), TOKENIZER), tmp_path / "m.gguf")
