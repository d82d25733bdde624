"""PyTorch gives the same numbers: every operation, the whole model, a hundred steps of training.

The tests are skipped if torch is not installed. `make parity` installs it.
"""

import math

import numpy as np
import pytest
from support.op_cases import CASES, PARITY_DIMS, attention_in_torch, inputs_of
from support.parity import ours, relative_error, theirs

from npgpt import GPT, AdamW, GPTConfig, clip_grad_norm, learning_rate

torch = pytest.importorskip("torch", reason="torch is not installed: make parity")

CONFIG = GPTConfig(13, block_size=10, n_layer=3, n_head=2, n_embd=16)


@pytest.mark.parametrize("dims", PARITY_DIMS, ids=["usual", "small", "large"])
@pytest.mark.parametrize("name", CASES)
def test_operation(name, dims, rng):
    """In float64 the results agree to 1e-12. In float32, our error is at most twice that of PyTorch, plus rounding."""
    arrays = inputs_of(CASES[name], dims, rng)
    exact = theirs(CASES[name], arrays)
    for found, expected in zip(ours(CASES[name], arrays), exact, strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= 1e-12
    if name.startswith("array"):
        return  # a float64 array widens the result to float64
    single = [a.astype(np.float32) for a in arrays]
    exact = theirs(CASES[name], [a.astype(np.float64) for a in single])
    for found, other, expected in zip(ours(CASES[name], single), theirs(CASES[name], single), exact, strict=True):
        assert found.dtype == np.float32
        assert relative_error(found, expected) <= 2 * relative_error(other, expected) + 4 * np.finfo(np.float32).eps


class TorchGPT(torch.nn.Module):
    """The same model in PyTorch, with the names of our parameters."""

    def __init__(self, weights, config):
        super().__init__()
        self.config = config
        self.p = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in weights.items()}

    def forward(self, ids, targets):
        config, p = self.config, self.p

        def norm(x, name):
            return torch.nn.functional.layer_norm(x, (config.n_embd,), p[f"{name}.weight"], p.get(f"{name}.bias"))

        def linear(x, name):
            y = x @ p[f"{name}.weight"]
            return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

        b, t = ids.shape
        x = p["wte.weight"][ids]
        if config.position == "learned":
            x = x + p["wpe.weight"][:t]
        for i in range(config.n_layer):
            block = f"blocks.{i}"
            qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.qkv").view(b, t, 3, config.n_head, -1)
            if config.position == "rotary":
                qkv = torch.cat([self.turned(qkv[:, :, :2]), qkv[:, :, 2:]], dim=2)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = attention_in_torch(torch, q, k, v).transpose(1, 2).reshape(b, t, -1)
            x = x + linear(y, f"{block}.attn.out")
            hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.fc")
            hidden = torch.relu(hidden) if config.activation == "relu" else torch.nn.functional.gelu(hidden, approximate="tanh")
            x = x + linear(hidden, f"{block}.mlp.proj")
        head = p["wte.weight"].T if config.tie_weights else p["lm_head.weight"]
        return torch.nn.functional.cross_entropy((norm(x, "ln_f") @ head).flatten(0, 1), targets.flatten())

    def turned(self, x):
        """Rotary positions by complex numbers: x (B, T, 2, n_head, head_dim)."""
        head_dim = x.shape[-1]
        frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None, None].to(x.dtype.to_complex())
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def model_and_twin(dtype=np.float64, **options):
    config = GPTConfig(**(vars(CONFIG) | {"d_ff": None, "dropout": 0.0} | options))
    model = GPT(config, seed=3, dtype=dtype)
    rng = np.random.default_rng(0)
    for p in model.parameters():  # larger weights, so that every path matters to the loss
        p.data[...] += 0.2 * rng.standard_normal(p.shape)
    return model, TorchGPT(model.state_dict(), config)


OPTIONS = [
    {},
    {"activation": "relu"},
    {"tie_weights": True},
    {"bias": False},
    {"d_ff": 24, "n_head": 4},
    {"position": "rotary"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_gradient_of_the_model(options):
    """In float64 the gradients agree to 1e-10."""
    model, twin = model_and_twin(**options)
    x, y = np.random.default_rng(1).integers(0, 13, (2, 4, 10))
    _, loss = model(x, y)
    loss.backward()
    other = twin(torch.from_numpy(x), torch.from_numpy(y))
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-13)
    for name, p in model.named_parameters():
        assert relative_error(p.grad, twin.p[name].grad.numpy()) <= 1e-10, name


def test_a_hundred_steps_of_training():
    """The weights agree to 1e-10 after a hundred steps with weight decay, warm-up and a cosine schedule.

    Clipping acts in some of the steps.
    """
    model, twin = model_and_twin()
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = AdamW(model.parameters(), weight_decay=0.1, **settings)
    decayed = [p for p in twin.p.values() if p.dim() >= 2]
    plain = [p for p in twin.p.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    other_optimizer = torch.optim.AdamW(groups, **settings)
    rng, clipped = np.random.default_rng(2), 0
    for step in range(100):
        x, y = rng.integers(0, 13, (2, 4, 10))
        rate = learning_rate(step, steps=100, lr=3e-3, min_lr=3e-4, warmup_steps=10, schedule="cosine")
        _, loss = model(x, y)
        model.zero_grad()
        loss.backward()
        norm = clip_grad_norm(model.parameters(), 1.5)
        optimizer.lr = rate
        optimizer.step()

        other = twin(torch.from_numpy(x), torch.from_numpy(y))
        other_optimizer.zero_grad()
        other.backward()
        other_norm = torch.nn.utils.clip_grad_norm_(twin.p.values(), math.inf)
        if other_norm > 1.5:  # clip by hand, because PyTorch's function divides by the norm plus 1e-6
            for p in twin.p.values():
                p.grad *= 1.5 / other_norm
        for group in other_optimizer.param_groups:
            group["lr"] = rate
        other_optimizer.step()
        clipped += norm > 1.5
        assert loss.item() == pytest.approx(other.item(), rel=1e-10)
        assert norm == pytest.approx(float(other_norm), rel=1e-10)
    assert 5 < clipped < 95
    for name, p in model.named_parameters():
        assert relative_error(p.data, twin.p[name].detach().numpy()) <= 1e-10, name
