"""The settings: their ranges, and what is derived from them."""

import numpy as np
import pytest

from npgpt import (
    GPT,
    GPTConfig,
    RequestError,
)
from npgpt.config.fields import fields_of
from npgpt.config.settings import PRESETS, TrainConfig


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"tie_weights": True}, {"d_ff": 7, "n_layer": 3}, {"bias": False, "tie_weights": True}]
)
def test_the_number_of_parameters(changes):
    config = GPTConfig(**({"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8} | changes))
    assert config.num_parameters() == GPT(config, seed=None).num_parameters()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_embd": 10, "n_head": 4}, "multiple of n_head"),
        ({"n_layer": 0}, "n_layer must be a whole number at least 1, got 0"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": float("nan")}, "dropout must be a number"),
        ({"activation": "tanh"}, "'gelu' or 'relu'"),
        ({"bias": 1}, "True or False"),
        ({"block_size": 2.5}, "whole number"),
        ({"n_head": True}, "whole number"),
    ],
)
def test_wrong_values_are_refused(wrong, words):
    with pytest.raises(RequestError, match=words):
        GPTConfig(65, **wrong)


def test_numpy_integers_are_accepted():
    assert GPTConfig(np.int64(65)).vocab_size == 65


def test_a_default_can_follow_another_setting():
    assert GPTConfig(65, n_embd=32).d_ff == 128
    assert GPTConfig(65, n_embd=32, d_ff=7).d_ff == 7
    assert TrainConfig(lr=0.5).min_lr == 0.05
    assert TrainConfig(lr=0.5, min_lr=0.5).min_lr == 0.5
    with pytest.raises(RequestError, match=r"min_lr must not be above lr, got min_lr=0\.6 and lr=0\.5"):
        TrainConfig(lr=0.5, min_lr=0.6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    of_model = {field.name for field in fields_of(GPTConfig)}
    model = {k: v for k, v in PRESETS[name].items() if k in of_model}
    training = {k: v for k, v in PRESETS[name].items() if k not in of_model}
    assert vars(GPTConfig(65, **model)).items() >= model.items()
    assert vars(TrainConfig(**training)).items() >= training.items()
