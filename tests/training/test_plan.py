"""Choosing a model and its settings for a given time. The tests check the choices, not the measured times."""

import time

import numpy as np
import pytest

from npgpt import RequestError
from npgpt.config.settings import PRESETS, GPTConfig, TrainConfig
from npgpt.engine.backend import CPU
from npgpt.text.corpus import Corpus
from npgpt.training.plan import CANDIDATES, Candidate, dropout_for, plan

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "batch_size": 2}


def in_seconds(seconds, ids, tokenizer, fixed=None, candidates=CANDIDATES):
    return plan(time.perf_counter() + seconds, Corpus(tokenizer, ids), CPU, fixed or {}, candidates)


@pytest.fixture
def ids(text, tokenizer):
    return tokenizer.encode_array(text[:20_000])


def test_expected_losses_are_interpolated():
    candidate = Candidate({}, ((100, 3.0), (10_000, 1.0)))
    assert candidate.expected_loss(99) is None
    assert candidate.expected_loss(100) == 3.0
    assert candidate.expected_loss(1000) == pytest.approx(2.0)
    assert candidate.expected_loss(10**6) == 1.0


def test_candidates_are_consistent():
    """Losses fall with steps, every setting is valid, and each candidate has more work per step than the one before it."""
    work = []
    for candidate in CANDIDATES:
        steps, losses = zip(*candidate.reached, strict=True)
        assert list(steps) == sorted(set(steps))
        assert list(losses) == sorted(losses, reverse=True)
        of_model = {k: v for k, v in candidate.settings.items() if k in vars(GPTConfig(65))}
        of_training = {k: v for k, v in candidate.settings.items() if k not in of_model}
        model, training = GPTConfig(65, **of_model), TrainConfig(**of_training)
        work.append(model.num_parameters() * model.block_size * training.batch_size)
    assert work == sorted(work)
    assert len(CANDIDATES) > 2
    assert CANDIDATES[-1].settings.items() <= PRESETS["char"].items()


def test_the_best_candidate_for_the_time_is_chosen(ids, tokenizer):
    quick = Candidate(SMALL | {"lr": 0.1}, ((1, 3.0), (10**6, 2.0)))
    better = Candidate(SMALL | {"lr": 0.2}, ((1, 2.9), (10**6, 1.5)))
    never = Candidate(SMALL | {"lr": 0.3}, ((10**9, 0.1),))
    chosen = in_seconds(2, ids, tokenizer, candidates=(quick, better, never))
    assert chosen.training.lr == 0.2
    assert chosen.training.min_lr == 0
    assert chosen.training.patience == 0
    assert 1 <= chosen.training.steps < 100_000
    assert chosen.training.steps / chosen.training.eval_interval <= 8
    assert chosen.training.warmup_steps <= chosen.training.steps / 10
    assert "n_embd 8" in chosen.reasons[0]
    assert "n_layer 1" in chosen.reasons[0]
    longer = in_seconds(60, ids, tokenizer, candidates=(quick, better, never))
    assert longer.training.steps > chosen.training.steps


def test_settings_that_the_user_gave_are_kept(ids, tokenizer):
    fixed = {
        "n_embd": 24,
        "n_head": 3,
        "dropout": 0.35,
        "lr": 0.5,
        "eval_interval": 7,
        "seed": 5,
        "eval_tokens": 99,
        "processes": False,
    }
    chosen = in_seconds(1.5, ids, tokenizer, fixed)
    assert (vars(chosen.model) | vars(chosen.training)).items() >= fixed.items()
    assert "your settings; the others are from a measured candidate" in chosen.reasons[0]


def test_a_width_without_rotary_positions_still_gets_a_fast_learner(ids, tokenizer):
    candidate = Candidate(SMALL | {"position": "rotary", "optimizer": "muon"}, ((1, 3.0),))
    chosen = in_seconds(2, ids, tokenizer, {"n_embd": 6, "processes": False}, (candidate,))
    assert (chosen.model.n_embd // chosen.model.n_head, chosen.model.position) == (3, "learned")
    assert chosen.training.optimizer == "muon"


def test_dropout_grows_with_the_number_of_epochs():
    found = [dropout_for(epochs, 1_000_000) for epochs in (1, 10, 100)]
    assert found == sorted(set(found))
    assert dropout_for(10, 1_000_000) == dropout_for(100, 100_000)


def test_a_plan_that_diverges_is_refused(ids, tokenizer):
    with pytest.raises(RequestError, match=r"diverges at step \d: lower the learning rate"):
        in_seconds(60, ids, tokenizer, {"lr": 1e30, "processes": False}, (Candidate(SMALL, ((1, 3.0),)),))


def test_too_little_time_and_too_little_text(ids, tokenizer):
    with pytest.raises(RequestError, match=r"no step fits into|no time for one is left.*raise --minutes"):
        in_seconds(0, ids, tokenizer)
    with pytest.raises(RequestError, match="too short"):
        in_seconds(1, ids[:30], tokenizer)
    tiny = Candidate(SMALL, ((1, 3.0),))
    wide = Candidate(SMALL | {"block_size": 64}, ((1, 1.0),))
    assert in_seconds(2, np.resize(ids, 50), tokenizer, candidates=(tiny, wide)).model.block_size == 8
