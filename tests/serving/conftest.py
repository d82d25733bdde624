"""The servers that the tests share: a small model of characters, and one with a BPE."""

import pytest
from support.models import model_with_clear_logits
from support.serving import server

from npgpt import BPETokenizer, CharTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer("\nabcdefgh")


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_with_clear_logits(tokenizer, position="rotary")


@pytest.fixture(scope="module")
def client(model, tokenizer):
    with server(model, tokenizer, threads=2, side_by_side=16) as client:
        yield client


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(["le café du 中国 😀 et le thé\n" * 50], 280)
