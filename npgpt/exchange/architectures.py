"""The two architectures of Hugging Face that a GPT of npgpt is an instance of: their settings, and their tensors' names and
layouts. No files are read or written here.

A model with learned positions is a GPT-2. A model with rotary positions is a GPT-NeoX whose blocks add attention and
feed-forward one after the other. Both compute exactly what npgpt computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npgpt.config.fields import RequestError
from npgpt.config.settings import GPTConfig
from npgpt.model.layers import LayerNorm, Rotary

ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu": "relu"}  # theirs -> ours
DEFAULT_ACTIVATION = {"gpt2": "gelu_new", "gpt_neox": "gelu"}


@dataclass(frozen=True)
class Layout:
    """Where a parameter of npgpt is in the other architecture. The functions turn one array into the other."""

    name: str
    to_theirs: Callable[[np.ndarray], np.ndarray]
    to_ours: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Architecture:
    """One architecture. blocks: the names of the parts of a block. top: those outside the blocks."""

    model_type: str
    class_name: str
    prefix: str  # of all names but that of the output layer; files of some programs leave it out
    block: str
    blocks: Mapping[str, str]
    top: Mapping[str, str]
    transposed: bool  # whether the matrices of the blocks are (out, in)

    def layout(self, name: str, config: GPTConfig) -> Layout:
        """The layout of the parameter with this name in npgpt."""
        if name == "lm_head.weight":
            return Layout(self.top["lm_head"] + ".weight", np.transpose, np.transpose)
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not match:
            part, kind = name.rsplit(".", 1)
            return Layout(f"{self.prefix}{self.top[part]}.{kind}", _same, _same)
        theirs = f"{self.prefix}{self.block}.{match[1]}.{self.blocks[match[2]]}.{match[3]}"
        is_matrix = match[3] == "weight" and not match[2].startswith("ln")
        if not self.transposed:
            return Layout(theirs, _same, _same)
        if match[2] == "attn.qkv":
            order = _neox_order(config)
            back = np.argsort(order)
            return Layout(theirs, lambda a: a.T[order], lambda a: a[back].T)
        return Layout(theirs, np.transpose, np.transpose) if is_matrix else Layout(theirs, _same, _same)


def _same(array: np.ndarray) -> np.ndarray:
    return array


GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    "h",
    {"ln_1": "ln_1", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj", "ln_2": "ln_2", "mlp.fc": "mlp.c_fc"}
    | {"mlp.proj": "mlp.c_proj"},
    {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "lm_head": "lm_head"},
    transposed=False,
)
GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    "layers",
    {"ln_1": "input_layernorm", "attn.qkv": "attention.query_key_value", "attn.out": "attention.dense"}
    | {"ln_2": "post_attention_layernorm", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"},
    {"wte": "embed_in", "ln_f": "final_layer_norm", "lm_head": "embed_out"},
    transposed=True,
)
ARCHITECTURES = {"gpt2": GPT2, "gpt_neox": GPT_NEOX}


def architecture_of(config: GPTConfig) -> Architecture:
    """The architecture that a model of this shape is an instance of."""
    return GPT_NEOX if config.position == "rotary" else GPT2


def halves(head_dim: int) -> np.ndarray:
    """(head_dim,): the order in which GPT-NeoX keeps the coordinates that rotary positions turn.

    npgpt turns neighbours, (0, 1), (2, 3) and so on. GPT-NeoX turns the first half with the second half.
    """
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def _neox_order(config: GPTConfig) -> np.ndarray:
    """(3 C,): for each row of GPT-NeoX's query_key_value, the column of npgpt's qkv.

    npgpt has q, k and v side by side, each with its heads. GPT-NeoX has the heads side by side, each with its q, k and v.
    """
    head_dim = config.n_embd // config.n_head
    columns = np.arange(3 * config.n_embd).reshape(3, config.n_head, head_dim)
    turned = columns[..., halves(head_dim)]
    return np.stack([turned[0], turned[1], columns[2]], axis=1).reshape(-1)


# ---------------------------------------------------------------- settings


def to_their_settings(config: GPTConfig, end_id: int | None) -> dict[str, Any]:
    """The contents of `config.json`."""
    arch = architecture_of(config)
    settings: dict[str, Any] = {"architectures": [arch.class_name], "model_type": arch.model_type}
    settings |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_weights}
    settings |= {"bos_token_id": end_id, "eos_token_id": end_id, "initializer_range": 0.02}
    activation = "gelu_new" if config.activation == "gelu" else config.activation
    if arch is GPT2:
        settings |= {"n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd}
        settings |= {"n_layer": config.n_layer, "n_head": config.n_head, "n_inner": config.d_ff}
        settings |= {"activation_function": activation, "layer_norm_epsilon": LayerNorm.eps}
        return settings | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    settings |= {"hidden_size": config.n_embd, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head}
    settings |= {"intermediate_size": config.d_ff, "hidden_act": activation, "max_position_embeddings": config.block_size}
    settings |= {"layer_norm_eps": LayerNorm.eps, "use_parallel_residual": False, "attention_bias": True}
    settings |= {"rotary_pct": 1.0, "rotary_emb_base": int(Rotary.base)}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": Rotary.base, "partial_rotary_factor": 1.0}}
    return settings | dict.fromkeys(("hidden_dropout", "attention_dropout", "embd_pdrop"), config.dropout)


@dataclass(frozen=True)
class TheirModel:
    """What a `config.json` describes. notes: what npgpt does in another way, in words.

    scales_attention: whether attention divides its scores by sqrt(head_dim). scales_by_layer: whether it also divides them by
    the number of the block.
    """

    architecture: Architecture
    config: GPTConfig
    scales_attention: bool
    scales_by_layer: bool
    notes: list[str]

    def q_scale(self, layer: int) -> float:
        """The factor that belongs into the weights of q of a block, because npgpt always divides by sqrt(head_dim)."""
        scale = 1.0 if self.scales_attention else math.sqrt(self.config.n_embd // self.config.n_head)
        return scale / (layer + 1) if self.scales_by_layer else scale


def from_their_settings(settings: Any) -> TheirModel:
    """The model that a `config.json` describes. Raises RequestError if npgpt cannot compute exactly that."""
    found = settings.get("model_type") if isinstance(settings, dict) else settings
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise RequestError(f"its model_type is {str(found)[:40]!r}, expected {' or '.join(ARCHITECTURES)}")
    arch = ARCHITECTURES[found]
    get = _Getter(settings)
    dropouts: tuple[str, ...]
    if arch is GPT2:
        shape = {"block_size": get.count("n_positions", 1024), "n_layer": get.count("n_layer", 12)}
        shape |= {"n_head": get.count("n_head", 12), "n_embd": get.count("n_embd", 768)}
        d_ff, act, eps = get.count("n_inner", None), "activation_function", "layer_norm_epsilon"
        dropouts, tied = ("resid_pdrop", "embd_pdrop", "attn_pdrop"), get.flag("tie_word_embeddings", True)
        get.refuse("add_cross_attention", False)
    else:
        shape = {"block_size": get.count("max_position_embeddings", 2048), "n_layer": get.count("num_hidden_layers", 44)}
        shape |= {"n_head": get.count("num_attention_heads", 64), "n_embd": get.count("hidden_size", 6144)}
        d_ff, act, eps = get.count("intermediate_size", 24576), "hidden_act", "layer_norm_eps"
        dropouts, tied = ("hidden_dropout",), get.flag("tie_word_embeddings", False)
        rope = settings.get("rope_parameters")
        rope = rope if isinstance(rope, dict) else {}
        rotary = rope.get("partial_rotary_factor", settings.get("rotary_pct", 0.25))
        base = rope.get("rope_theta", settings.get("rotary_emb_base", 10_000))
        if (rotary, base, rope.get("rope_type", "default")) != (1.0, Rotary.base, "default") or settings.get("rope_scaling"):
            raise RequestError("its rotary positions are not those of npgpt: all coordinates, base 10000, no scaling")
        get.refuse("use_parallel_residual", False, default=True)
        get.refuse("attention_bias", True)
    activation = settings.get(act, DEFAULT_ACTIVATION[arch.model_type])
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise RequestError(
            f"its {act} is {str(activation)[:40]!r}, and npgpt has {', '.join(ACTIVATIONS)}; another one changes the logits"
        )
    found_eps = settings.get(eps, LayerNorm.eps)
    if found_eps != LayerNorm.eps:
        raise RequestError(f"its {eps} is {str(found_eps)[:40]}, and npgpt has {LayerNorm.eps:g}; this would change the logits")
    rates = [get.number(name, 0.1 if arch is GPT2 else 0.0) for name in dropouts]
    notes = [] if len(set(rates)) == 1 else [f"it has different dropouts, {rates}; the first is used for all"]
    config = GPTConfig(
        vocab_size=get.count("vocab_size", 50257),
        **shape,
        d_ff=d_ff,
        dropout=rates[0],
        position="learned" if arch is GPT2 else "rotary",
        activation=ACTIVATIONS[activation],
        tie_weights=tied,
    )
    scales_attention = arch is not GPT2 or get.flag("scale_attn_weights", True)
    scales_by_layer = arch is GPT2 and get.flag("scale_attn_by_inverse_layer_idx", False)
    if not scales_attention:
        notes.append("it does not scale attention; the factor that npgpt divides by is in the weights of q")
    if scales_by_layer:
        notes.append("it divides attention by the number of the block; these factors are in the weights of q")
    return TheirModel(arch, config, scales_attention, scales_by_layer, notes)


class _Getter:
    """Values of a `config.json`, checked."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def count(self, name: str, default: int | None) -> Any:
        value = self._settings.get(name, default)
        if value is None:
            value = default
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            raise RequestError(f"its {name} is {str(value)[:40]!r}, expected a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._settings.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise RequestError(f"its {name} is {str(value)[:40]!r}, expected a number from 0 to 1")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._settings.get(name, default)
        if type(value) is not bool:
            raise RequestError(f"its {name} is {str(value)[:40]!r}, expected true or false")
        return value

    def refuse(self, name: str, supported: bool, default: bool | None = None) -> None:
        """Raise RequestError if a flag has another value than the one that npgpt supports."""
        if self.flag(name, supported if default is None else default) != supported:
            raise RequestError(f"its {name} is {str(not supported).lower()}, which npgpt cannot compute")
