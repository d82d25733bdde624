"""The same GPT in PyTorch, as its users would write it: fused attention, torch.optim.AdamW. It is only for comparison."""

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import nn


class Attention(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.qkv, self.out = nn.Linear(w.n_embd, 3 * w.n_embd), nn.Linear(w.n_embd, w.n_embd)
        self.n_head, self.p, self.dropout = w.n_head, w.dropout, nn.Dropout(w.dropout)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(b, t, c)))


class Block(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(w.n_embd), Attention(w), nn.LayerNorm(w.n_embd)
        self.fc, self.proj = nn.Linear(w.n_embd, 4 * w.n_embd), nn.Linear(4 * w.n_embd, w.n_embd)
        self.dropout = nn.Dropout(w.dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.dropout(self.proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")))


class TorchGPT(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(w.vocab_size, w.n_embd), nn.Embedding(w.block_size, w.n_embd)
        self.dropout = nn.Dropout(w.dropout)
        self.blocks = nn.Sequential(*[Block(w) for _ in range(w.n_layer)])
        self.ln_f, self.lm_head = nn.LayerNorm(w.n_embd), nn.Linear(w.n_embd, w.vocab_size, bias=False)

    def forward(self, ids, targets=None):
        x = self.dropout(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        x = self.blocks(x)
        if targets is None:  # as in nanoGPT: the logits of the last position only
            return self.lm_head(self.ln_f(x[:, -1:]))
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(workload, mode):
    """A function that does one training step on x and y. mode: "eager float32", "compiled bfloat16 cuda", ..."""
    compiled, dtype, device = [*mode.split(), "cpu"][:3]
    torch.manual_seed(0)
    model = TorchGPT(workload).to(device)
    torch.set_float32_matmul_precision("high" if dtype == "TF32" else "highest")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    forward = torch.compile(model) if compiled == "compiled" else model
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step(x, y):
        with autocast:
            loss = forward(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


@torch.inference_mode()
def draw_without_cache(workload, tokens, context=1):
    """Sample as nanoGPT does: compute the whole window again for each token."""
    model = TorchGPT(workload).eval()
    ids = torch.zeros((1, context), dtype=torch.long)
    for _ in range(tokens):
        p = F.softmax(model(ids[:, -workload.block_size :])[:, -1], dim=-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)


def hugging_face(workload):
    """A function that draws a number of tokens with Hugging Face's generate, which has a KV cache."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=workload.vocab_size,
        n_positions=workload.block_size,
        n_embd=workload.n_embd,
        n_layer=workload.n_layer,
        n_head=workload.n_head,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    start = torch.zeros((1, 1), dtype=torch.long)

    def draw(tokens):
        model.generate(
            start, max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0, attention_mask=torch.ones_like(start)
        )

    return draw
