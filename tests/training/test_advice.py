"""The advice at the end of a run: one line that depends on how the losses developed."""

import re

import pytest

from npgpt import GPTConfig, TrainConfig
from npgpt.storage.header import Progress
from npgpt.training.advice import advice
from npgpt.training.events import Outcome


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([[100, 2.5, 2.6, 0.02], [200, 1.5, 2.0, 0.02], [300, 1.0, 2.4, 0.02]], "Over-fitting since step 200"),
        ([[100, 2.5, 2.6, 0.02], [200, 2.2, 2.3, 0.02], [300, 2.0, 2.1, 0.02]], "still falling.*--resume --steps 2000"),
        ([[i, 2.5, 2.6 - 0.1 * min(i, 6), 0.02] for i in range(1, 9)], "levelled off"),  # the fall ended long before
        ([[i, 2.5 - 0.1 * i, 2.6 - 0.1 * min(i, 6), 0.02] for i in range(1, 9)], "begins to learn the text by heart"),
        ([[10, 3.69, 3.68, 0.02], [20, 3.65, 3.63, 0.02]], "still falling"),
        ([[i, 2.5, 2.6 - 0.001 * i, 0.02] for i in range(1, 7)], "levelled off"),
        ([[100, 2.5, 2.6, 0.02], [200, 3.9, 3.9, 0.02], [300, 4.2, 4.1, 0.02]], "diverged: lower the learning rate"),
        ([[100, 2.5, None, None], [200, 2.0, None, None]], "training loss was still falling"),
        ([[100, 90.0, 86.0, 2.0], [200, 12.0, 4.9, 0.2]], r"worse than guessing \(4.17\): lower the learning rate"),
        ([[100, 2.5, 2.6, 0.02]], "too few evaluations to judge"),
    ],
)
def test_advice(history, words):
    progress = Progress(step=history[-1][0], history=history)  # the advice reads the history alone, not best_step
    line = advice(progress, TrainConfig(), GPTConfig(65), Outcome.FINISHED)
    assert re.search(words, line), line
    assert "\n" not in line


def test_the_advice_to_train_longer_names_what_the_schedule_does():
    progress = Progress(step=200, history=[[100, 2.5, 2.6, 0.02], [200, 2.2, 2.3, 0.02]])
    for schedule, words in [("cosine", "--steps 2000; the learning rate rises again first"), ("constant", "--steps 2000)")]:
        assert words in advice(progress, TrainConfig(schedule=schedule), GPTConfig(65), Outcome.FINISHED)


@pytest.mark.parametrize(
    ("losses", "vocab_size", "repeated_share", "words"),
    [
        ([[0.5, 0.4], [0.0, 0.0], [0.0, 0.0]], 1, 0.0, "^The text has one distinct character"),
        ([[2.0, 2.0], [0.5, 0.4], [0.01, 0.001]], 65, 0.0, "^The validation loss is 0.0010: the text is completely learned"),
        ([[2.0, 2.0], [0.5, 0.4], [0.01, 0.001]], 65, 0.8, "^80% of the held-out text also occurs in the training text"),
        ([[2.0, 2.0], [1.5, 1.6], [1.2, 1.3]], 65, 0.01, "still falling"),
    ],
)
def test_losses_that_say_little(losses, vocab_size, repeated_share, words):
    history = [[100 * i, train, val, 0.01] for i, (train, val) in enumerate(losses, 1)]
    progress = Progress(step=300, history=history)
    line = advice(progress, TrainConfig(), GPTConfig(vocab_size), Outcome.FINISHED, repeated_share)
    assert re.search(words, line), line
    if words[0] == "^":
        assert not re.search("still falling|larger model|train longer", line)
