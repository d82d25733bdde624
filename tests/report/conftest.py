"""What the tests of pages share: a browser, a run with a log, a model with clear logits."""

import numpy as np
import pytest
from support.browser import open_browser

import npgpt
from npgpt.report.runs import Run
from npgpt.storage.run import log_path, read_log


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def run(trained) -> Run:
    """A short run of a small model."""
    return Run("model.npz", npgpt.load(trained), read_log(log_path(trained)))


@pytest.fixture
def clear_model(tokenizer, small_config):
    """A model with clear logits."""
    model = npgpt.GPT(small_config, seed=1)
    model.parameters().data += 0.3 * np.random.default_rng(0).standard_normal(model.num_parameters(), dtype=np.float32)
    return model
