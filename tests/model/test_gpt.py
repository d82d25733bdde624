"""The GPT: shapes, names, masking, initialisation, the flat buffer."""

import copy
import math
import pickle

import numpy as np
import pytest

from npgpt import (
    GPT,
    AdamW,
    GPTConfig,
    ops,
)
from npgpt.engine.streams import Stream, generator


@pytest.fixture
def model(small_config):
    return GPT(small_config, seed=1)


def test_logits_and_loss(model, rng):
    ids = rng.integers(0, model.config.vocab_size, (3, 10))
    logits, loss = model(ids)
    assert logits.shape == (3, 10, model.config.vocab_size)
    assert loss is None
    _, loss = model(ids, ids)
    assert loss.shape == ()
    assert abs(loss.item() - math.log(model.config.vocab_size)) < 0.2  # before training, every token is about equally likely
    np.testing.assert_allclose(loss.item(), ops.cross_entropy(logits, ids).item(), rtol=1e-6)


def test_a_future_token_changes_no_earlier_logit(model, rng):
    ids = rng.integers(0, model.config.vocab_size, (1, 16))
    before = model(ids)[0].data
    for position in (1, 8, 15):
        changed = ids.copy()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        after = model(changed)[0].data
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(axis=-1).all()


def test_state_names(small_config):
    names = list(GPT(small_config).state_dict())
    assert names[:2] == ["wte.weight", "wpe.weight"]
    block = [
        f"{layer}.{p}" for layer in ("ln_1", "attn.qkv", "attn.out", "ln_2", "mlp.fc", "mlp.proj") for p in ("weight", "bias")
    ]
    assert names[2:] == [f"blocks.{i}.{n}" for i in (0, 1) for n in block] + ["ln_f.weight", "ln_f.bias", "lm_head.weight"]


def test_options_change_the_parameters(small_config):
    fields = vars(small_config)
    tied = GPT(GPTConfig(**fields | {"tie_weights": True}))
    assert "lm_head.weight" not in tied.state_dict()
    assert not [n for n in GPT(GPTConfig(**fields | {"bias": False})).state_dict() if n.endswith("bias")]
    wide = GPT(GPTConfig(**fields | {"d_ff": 24}))
    assert wide.state_dict()["blocks.0.mlp.fc.weight"].shape == (16, 24)


def test_initialisation_is_gpt2s():
    config = GPTConfig(65, n_layer=8, n_head=4, n_embd=64)
    state = GPT(config, seed=3).state_dict()
    for name, array in state.items():
        if name.endswith("bias"):
            assert not array.any()
        elif ".ln_" in name or name.startswith("ln_"):
            assert (array == 1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith(("out.weight", "proj.weight")) else 0.02
            assert abs(array.std() / expected - 1) < 5 / math.sqrt(2 * array.size), name  # five standard errors
    np.testing.assert_array_equal(GPT(config, seed=3).state_dict()["wte.weight"], state["wte.weight"])
    assert not np.array_equal(GPT(config, seed=4).state_dict()["wte.weight"], state["wte.weight"])


def test_parameters_and_gradients_are_views_into_flat_buffers(model, rng):
    flat = model.parameters()
    assert model.parameters() is flat
    assert flat.data.shape == flat.grad.shape == (model.num_parameters(),)
    assert flat.data.dtype == np.float32
    assert all(np.shares_memory(p.data, flat.data) and np.shares_memory(p.grad, flat.grad) for p in flat)
    assert [p.ndim >= 2 for p in flat] == sorted((p.ndim >= 2 for p in flat), reverse=True)
    assert flat.n_decay == sum(p.size for p in flat if p.ndim >= 2)
    ids = rng.integers(0, model.config.vocab_size, (2, 8))
    model(ids, ids)[1].backward()
    np.testing.assert_array_equal(np.concatenate([p.grad.ravel() for p in flat]), flat.grad)
    assert flat.grad.any()
    model.zero_grad()
    assert not any(p.grad.any() for p in flat)
    model.blocks[0].attn.qkv.weight.grad = None
    with pytest.raises(RuntimeError, match="replaced"):
        AdamW(flat).step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_its_own_weights(model, rng, copied):
    before = model.flat.data.copy()
    other = copied(model)
    ids = rng.integers(0, model.config.vocab_size, (2, 8))
    other(ids, ids)[1].backward()
    AdamW(other.parameters(), lr=0.1).step()
    np.testing.assert_array_equal(model.flat.data, before)
    assert not np.array_equal(other.wte.weight.data, model.wte.weight.data)
    assert np.shares_memory(other.flat.data, other.wte.weight.data)


def test_a_deep_copy_keeps_the_gradients(model, rng):
    ids = rng.integers(0, model.config.vocab_size, (2, 8))
    model(ids, ids)[1].backward()
    np.testing.assert_array_equal(copy.deepcopy(model).flat.grad, model.flat.grad)


def test_a_shallow_copy_of_the_parameters_leaves_the_original_whole(model):
    same = copy.copy(model.parameters())
    assert list(same) == list(model.parameters())
    model.flat.check()


def test_clearing_some_gradients_keeps_the_flat_array_whole(model, rng):
    ids = rng.integers(0, model.config.vocab_size, (2, 8))
    model(ids, ids)[1].backward()
    model.blocks[0].zero_grad()
    AdamW(list(model.parameters())[:2]).zero_grad()
    model.flat.check()
    assert not model.blocks[0].attn.qkv.weight.grad.any()
    assert not model.wte.weight.grad.any()
    assert model.blocks[1].attn.qkv.weight.grad.any()


def test_listing_the_parameters_of_a_block_changes_nothing(model):
    flat = model.parameters()
    assert sum(p.size for p in model.blocks[0].parameters()) < model.num_parameters()
    flat.check()


def test_dropout_acts_only_with_a_generator(model, rng):
    ids = rng.integers(0, model.config.vocab_size, (2, 8))
    plain = model(ids)[0].data
    np.testing.assert_array_equal(model(ids)[0].data, plain)
    dropped = model(ids, rng=generator(0, Stream.DROPOUT, 0))[0].data
    assert not np.array_equal(dropped, plain)
    np.testing.assert_array_equal(model(ids, rng=generator(0, Stream.DROPOUT, 0))[0].data, dropped)
    assert not np.array_equal(model(ids, rng=generator(0, Stream.DROPOUT, 1))[0].data, dropped)


def test_every_parameter_gets_a_gradient(model, rng):
    ids = rng.integers(0, model.config.vocab_size, (4, 16))
    model(ids, np.roll(ids, 1))[1].backward()
    assert all(p.grad.any() for p in model.parameters())


def test_float64_agrees_with_float32(small_config, rng):
    narrow = GPT(small_config, seed=1)
    wide = GPT(small_config, seed=1, dtype=np.float64)
    ids = rng.integers(0, small_config.vocab_size, (2, 16))
    np.testing.assert_allclose(narrow(ids)[0].data, wide(ids)[0].data, atol=2e-5)


def test_state_dict_round_trip_and_errors(small_config, model, rng):
    other = GPT(small_config, seed=2)
    state = model.state_dict()
    other.load_state_dict(state)
    ids = rng.integers(0, small_config.vocab_size, (1, 16))
    np.testing.assert_array_equal(model(ids)[0].data, other(ids)[0].data)
    other.parameters().check()
    bad = dict(state)
    bad["blocks.9.x"] = bad.pop("wpe.weight")
    bad["wte.weight"] = bad["wte.weight"].T
    with pytest.raises(ValueError, match=r"missing wpe.weight; unknown blocks.9.x; wte.weight has shape"):
        other.load_state_dict(bad)


def test_bad_requests(model):
    for ids in (np.zeros((1, 17), dtype=int), np.zeros(4, dtype=int), np.zeros((1, 0), dtype=int)):
        with pytest.raises(ValueError, match="block_size 16"):
            model(ids)
    with pytest.raises(IndexError):
        model([[model.config.vocab_size]])


def test_dtypes_of_activations():
    model = GPT(GPTConfig(7, block_size=8, n_layer=1, n_head=2, n_embd=8))
    ids = np.zeros((1, 2), np.int64)
    assert model(ids, dtype="float32")[0].dtype == np.float32
    with pytest.raises(ValueError, match="dtype must be None, float32, or on a GPU bfloat16, got int8"):
        model(ids, dtype=np.int8)
    with pytest.raises(ValueError, match="leave out `cache` or `dtype`"):
        model(np.zeros((1, 2), np.int64), cache=model.new_cache(), dtype=np.float64)
