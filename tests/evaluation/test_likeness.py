"""How alike sampled and real text are: counts of characters, words and copied spans, compared with counts by hand."""

import pytest

from npgpt.evaluation.likeness import likeness


def test_counts_by_hand():
    found = likeness(["The dog sat.\nXyz! Xy"], "The cat sat on the dog.\n")
    assert found.rates["line breaks"] == (1 / 20, 1 / 24)
    assert found.rates["spaces"] == (3 / 20, 5 / 24)
    assert found.rates["punctuation"] == (2 / 20, 1 / 24)
    assert found.rates["capitals"] == (3 / 20, 1 / 24)
    assert (found.characters, found.of) == (20, 24)
    assert found.known_words == 3 / 4  # The, dog and sat are known, Xyz is not; Xy is cut off and does not count as a word
    assert found.longest_copy == "he dog"
    assert found.new_ngrams == 1.0


def test_copies():
    training = "abcdefghijklmnopqrstuvwxyz" * 3
    assert likeness(["0ghijklmnopq0"], training).longest_copy == "ghijklmnopq"
    # Of six spans, the first and the last contain a 0.
    assert likeness(["0ghijklmnopq0"], training).new_ngrams == pytest.approx(2 / 6)
    assert likeness([training[5:40]], training).new_ngrams == 0
    assert len(likeness([training[5:40]], training).longest_copy) == 35


def test_words_with_apostrophes_are_words():
    assert likeness(["don't don\u2019t won't "], "we don't and don\u2019t").known_words == pytest.approx(2 / 3)


def test_an_empty_sample():
    found = likeness([""], "abc")
    assert (found.known_words, found.longest_copy, found.new_ngrams) == (None, "", None)


def test_a_model_that_copies_its_text_is_noticed():
    sentence = "the bell rang over the water, and nobody heard it but the gulls; "
    found = likeness([sentence * 2] * 3 + [sentence[:20]], sentence * 20)
    assert (found.known_words, found.new_ngrams, len(found.longest_copy)) == (1, 0, 2 * len(sentence))
