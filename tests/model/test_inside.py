"""`npgpt.inside`: the logits are the model's, attention is what the model uses, and the names are those of other tools."""

import numpy as np
import pytest

import npgpt
from npgpt import GPT, GPTConfig
from npgpt.engine import backend as backends
from npgpt.kernels.reference import Kernels


@pytest.fixture
def reference(monkeypatch):
    """The models of a test use the reference kernels."""
    monkeypatch.setitem(backends._backends, np.ndarray, backends.Backend("cpu", np, Kernels(np)))


@pytest.fixture(params=["reference", "cpu"])
def kernels(request):
    if request.param == "reference":
        request.getfixturevalue("reference")


SHAPES = [
    {},
    {"position": "rotary"},
    {"tie_weights": True, "bias": False},
    {"activation": "relu", "n_layer": 1, "n_head": 4},
]


def model_of(**options) -> GPT:
    model = GPT(GPTConfig(17, **({"block_size": 12, "n_layer": 3, "n_head": 2, "n_embd": 16} | options)), seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    return model


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("length", [1, 5, 12])
def test_the_logits_are_those_of_the_model_to_the_last_bit(kernels, options, length):
    model = model_of(**options)
    ids = np.random.default_rng(2).integers(0, 17, length)
    found = npgpt.inside(model, ids)
    assert np.array_equal(found.logits, model(ids[None])[0].numpy()[0])
    config = model.config
    assert found.attention.shape == (config.n_layer, config.n_head, length, length)
    assert found.residual.shape == (config.n_layer + 1, length, config.n_embd)
    assert found.layer_logits.shape == (config.n_layer + 1, length, 17)
    assert np.array_equal(found.layer_logits[-1], found.logits)
    np.testing.assert_allclose(found.attention.sum(axis=-1), 1, rtol=0, atol=1e-6)
    assert (found.attention[..., ~np.tri(length, dtype=bool)] == 0).all()
    assert (found.attention >= 0).all()


@pytest.mark.parametrize("options", SHAPES)
def test_attention_is_what_the_model_uses(reference, monkeypatch, options):
    """On the reference kernels it equals the probabilities that attention itself has saved."""
    used = []
    forward = Kernels.causal_attention_forward

    def saving(self, *arguments):
        y, saved = forward(self, *arguments)
        used.append(saved[4][0])
        return y, saved

    monkeypatch.setattr(Kernels, "causal_attention_forward", saving)
    found = npgpt.inside(model_of(**options), [3, 1, 4, 1, 5, 9, 2, 6])
    assert np.array_equal(found.attention, np.stack(used))


def test_each_residual_is_what_a_shorter_model_reads():
    """The lens of the first n blocks is a model that has only these blocks."""
    model, ids = model_of(), [3, 1, 4, 1, 5]
    found = npgpt.inside(model, ids)
    for n in (1, 2):
        shorter = GPT(GPTConfig(17, block_size=12, n_layer=n, n_head=2, n_embd=16), seed=None)
        names = shorter.state_dict()
        shorter.load_state_dict({name: array for name, array in model.state_dict().items() if name in names})
        assert np.array_equal(found.layer_logits[n], shorter(np.array([ids]))[0].numpy()[0])
        assert np.array_equal(found.residual[: n + 1], npgpt.inside(shorter, ids).residual)


def test_the_names_of_other_tools():
    found = npgpt.inside(model_of(), [3, 1, 4])
    model = model_of()
    assert np.array_equal(found.cache["hook_embed"], model.wte.weight.numpy()[[3, 1, 4]])
    assert np.array_equal(found.cache["hook_embed"] + found.cache["hook_pos_embed"], found.cache["blocks.0.hook_resid_pre"])
    assert "hook_pos_embed" not in npgpt.inside(model_of(position="rotary"), [3, 1, 4]).cache
    assert np.array_equal(found.cache["blocks.2.attn.hook_pattern"], found.attention[2])
    assert np.array_equal(found.cache["blocks.1.hook_resid_pre"], found.cache["blocks.0.hook_resid_post"])
    assert len(found.cache) == 2 + 3 * 3


def test_wrong_requests():
    model = model_of()
    for ids in ([], [[1]], list(range(13))):
        with pytest.raises(ValueError, match=r"expected ids of shape \(T,\) with 1 <= T <= block_size 12"):
            npgpt.inside(model, ids)
    with pytest.raises(IndexError, match=r"0\.\.16"):
        npgpt.inside(model, [17])
