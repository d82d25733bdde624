"""GGUF files for llama.cpp: writing a model and its tokenizer into one. Nothing is read here.

The `gguf` library writes the file. A model with learned positions becomes llama.cpp's "gpt2", one with rotary positions its
"gptneox". llama.cpp computes GELU from a table, so its logits differ from npgpt's by about a thousandth.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig
from npgpt.exchange.architectures import halves
from npgpt.exchange.weights import arrays_with_biases, to_dtype
from npgpt.model.layers import LayerNorm, Rotary
from npgpt.storage.checkpoint import Checkpoint
from npgpt.storage.files import atomic_write
from npgpt.text.bpe import END_OF_TEXT, BPETokenizer
from npgpt.text.bpe_description import BYTE_OF
from npgpt.text.tokenizer import Tokenizer

# llama.cpp rounds a context up to a multiple of this, and aborts at a position outside the table.
CONTEXT_MULTIPLE = 256
# llama.cpp splits texts by a named expression. This one is GPT-2's. The one that is named after GPT-2 also removes spaces in
# front of punctuation when it decodes.
PRE_TOKENIZER = "trillion"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens; a text is searched for user-defined ones before it is split
NEVER = -100.0  # the logit of a token that is never drawn
PARTS = {"ln_1": "attn_norm", "attn.qkv": "attn_qkv", "attn.out": "attn_output", "ln_2": "ffn_norm"}
PARTS |= {"mlp.fc": "ffn_up", "mlp.proj": "ffn_down"}
TOP = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
CHARACTER_OF = {byte: c for c, byte in BYTE_OF.items()}


def write_gguf(checkpoint: Checkpoint, path: str | Path, dtype: str = "f32") -> list[str]:
    """Write a model and its tokenizer as a GGUF file. dtype: "f32", or "f16" for the matrices.

    Returns what differs from the model, in words. The file appears when it is complete. Raises RequestError if it exists
    already, or if llama.cpp cannot compute this model, and OSError if it cannot be written.
    """
    library, path, config = _library(), Path(path), checkpoint.config
    if path.exists():
        raise RequestError(f"{path} exists already; choose another name, or remove it first")
    if config.activation != "gelu":
        raise RequestError(f"llama.cpp has no {config.activation} in this kind of model; export it with --format hf")
    if not path.resolve().parent.is_dir():
        raise RequestError(f"there is no folder {path.resolve().parent}; make it first")
    if isinstance(checkpoint.tokenizer, BPETokenizer) and not checkpoint.tokenizer.splits_as_gpt2:
        raise RequestError("its tokenizer splits texts in another way than GPT-2, which this export cannot tell llama.cpp")
    arrays, notes = _arrays(checkpoint)

    def verify(written: Path) -> None:
        found = {tensor.name: tensor.data.nbytes for tensor in library.GGUFReader(written).tensors}
        if found != {name: array.nbytes for name, array in stored.items()}:
            raise OSError(errno.EIO, "what was written reads back differently")

    kind = np.dtype(np.float16 if dtype == "f16" else np.float32)
    stored = {
        name: to_dtype(name, array, kind if array.ndim == 2 and name != "position_embd.weight" else np.dtype(np.float32))
        for name, array in arrays.items()
    }
    with atomic_write(path, verify) as file:
        writer = library.GGUFWriter(file.name, "gptneox" if config.position == "rotary" else "gpt2")
        try:
            _describe(writer, config, len(arrays.get("position_embd.weight", ())) or config.block_size)
            _describe_tokens(writer, checkpoint.tokenizer)
            for name, array in stored.items():
                writer.add_tensor(name, np.ascontiguousarray(array))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return notes


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise RequestError("writing GGUF files needs the gguf library: python -m pip install 'npgpt[gguf]'") from None
    return gguf


def _describe(writer: Any, config: GPTConfig, context_length: int) -> None:
    writer.add_context_length(context_length)
    writer.add_uint32("npgpt.block_size", config.block_size)  # the true length of the context
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(LayerNorm.eps)
    if config.position == "rotary":
        writer.add_rope_dimension_count(config.n_embd // config.n_head)
        writer.add_rope_freq_base(Rotary.base)
        writer.add_parallel_residual(False)


# ---------------------------------------------------------------- weights


def _arrays(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], list[str]]:
    """(the weights under llama.cpp's names, its matrices (out, in); what differs from the model, in words)."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    ours, notes = arrays_with_biases(checkpoint.model), []
    if config.tie_weights:
        ours["lm_head.weight"] = ours["wte.weight"].T
    n = tokenizer.vocab_size  # the rows after these are padding, which llama.cpp might draw
    ours |= {"wte.weight": ours["wte.weight"][:n], "lm_head.weight": ours["lm_head.weight"][:, :n]}
    if tokenizer.end_id is None:
        notes += _add_end_of_text(ours)
    if config.position == "rotary":
        order = _rotary_order(config)
        for layer in range(config.n_layer):
            for kind in ("weight", "bias"):
                name = f"blocks.{layer}.attn.qkv.{kind}"
                ours[name] = ours[name][..., order]
    else:
        table = ours["wpe.weight"]
        more = -len(table) % CONTEXT_MULTIPLE
        if more:
            ours["wpe.weight"] = np.concatenate([table, np.repeat(table[-1:], more, axis=0)])
            notes.append(
                f"llama.cpp rounds the context up to a multiple of {CONTEXT_MULTIPLE}; positions from {len(table)} on repeat "
                f"the last one, so use -c {len(table)}, and no longer texts"
            )
    return {_name(name): array.T if _is_transposed(name, array) else array for name, array in ours.items()}, notes


def _name(ours: str) -> str:
    """llama.cpp's name of a parameter."""
    part, kind = ours.rsplit(".", 1)
    if part in TOP:
        return f"{TOP[part]}.{kind}"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def _is_transposed(name: str, array: np.ndarray) -> bool:
    return array.ndim == 2 and name not in ("wte.weight", "wpe.weight")


def _rotary_order(config: GPTConfig) -> np.ndarray:
    """(3 C,): the columns of qkv with q and k in the order in which llama.cpp turns them."""
    head_dim = config.n_embd // config.n_head
    columns = np.arange(3 * config.n_embd).reshape(3, config.n_head, head_dim)
    columns[:2] = columns[:2, :, halves(head_dim)]
    return columns.reshape(-1)


def _add_end_of_text(arrays: dict[str, np.ndarray]) -> list[str]:
    """Add a token that is never drawn. Without one that ends a text, llama.cpp takes the token with id 11 for it.

    The last layer norm gives y = g z + b, where the C numbers z add up to 0. With b' = b + t g and t = 1 - sum(b / g) / C, the
    numbers y' / g add up to C. So the column -100 / (C g) has the logit -100 for every y'. What b' adds to the other logits is
    the same for every z, t (w . g), and w' = w - t (w . g) / (C g) takes it away again.
    """
    g, b = (arrays[f"ln_f.{kind}"].astype(np.float64) for kind in ("weight", "bias"))
    w = arrays["lm_head.weight"].astype(np.float64)  # (C, V)
    smallest = np.abs(g).max() * 1e-4
    safe = np.where(np.abs(g) < smallest, np.where(g < 0, -smallest, smallest), g)
    c = len(g)
    t = 1 - (b / safe).sum() / c
    arrays["ln_f.weight"], arrays["ln_f.bias"] = safe.astype(np.float32), (b + t * safe).astype(np.float32)
    w = w - np.outer(1 / safe, t * (safe @ w) / c)
    arrays["lm_head.weight"] = np.concatenate([w, NEVER / (c * safe)[:, None]], axis=1).astype(np.float32)
    arrays["wte.weight"] = np.concatenate([arrays["wte.weight"], np.zeros((1, c), np.float32)])
    changed = int((np.abs(g) < smallest).sum())
    if not changed:
        return []
    return [f"{changed} weights of the last layer norm were nearly 0 and are now {smallest:.1g}; logits change a little"]


# ---------------------------------------------------------------- tokens


def _describe_tokens(writer: Any, tokenizer: Tokenizer) -> None:
    tokens, merges, end_id = _vocabulary(tokenizer)
    kinds = {end_id: CONTROL}
    if isinstance(tokenizer, BPETokenizer):
        kinds |= dict.fromkeys(tokenizer.added_ids, USER_DEFINED) | dict.fromkeys(tokenizer.special_ids, CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(i, NORMAL) for i in range(len(tokens))])
    writer.add_token_merges(merges)
    for add in (writer.add_eos_token_id, writer.add_bos_token_id, writer.add_eot_token_id):
        add(end_id)
    writer.add_add_bos_token(False)


def _vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[str], int]:
    """(the tokens, each written as GPT-2 writes bytes; the merges; the id that ends a text)."""
    n = tokenizer.vocab_size
    if isinstance(tokenizer, BPETokenizer):
        tokens, merges = tokenizer.token_texts(), [" ".join(pair) for pair in tokenizer.merges()]
    else:
        tokens = ["".join(CHARACTER_OF[byte] for byte in tokenizer.token_bytes(i)) for i in range(n)]
        # The bytes of one character merge from the left. The first byte of a character is never a later byte of another one.
        merges = list(dict.fromkeys(f"{token[:k]} {token[k]}" for token in tokens for k in range(1, len(token))))
    if tokenizer.end_id is not None:
        return tokens, merges, tokenizer.end_id
    end = END_OF_TEXT
    while end in tokens:
        end = f"<{end}>"
    return [*tokens, end], merges, n
