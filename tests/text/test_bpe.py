"""Byte-level BPE: training, encoding in pieces, streams of half characters, and files of other programs."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt import BPETokenizer, CharTokenizer, RequestError
from npgpt.text import bpe as bpe_module
from npgpt.text.bpe import NewBPE, _cut
from npgpt.text.bpe_description import BYTE_OF
from npgpt.text.reading import read_texts
from npgpt.text.sources import Sources
from npgpt.text.tokenizer import text_size
from npgpt.text.tokenizer_files import read_tokenizer, tokenizer_named

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def trained(text) -> BPETokenizer:
    return BPETokenizer.train([text], 400)


@pytest.fixture
def description(trained):
    """The description as a dictionary, to be changed."""
    return json.loads(trained.json)


def changed(description: dict, **of_model) -> dict:
    return description | {"model": description["model"] | of_model}


def test_a_trained_tokenizer(text, trained):
    assert trained.vocab_size == 400
    ids = trained.encode_array(text)
    assert ids.dtype == np.uint16
    assert len(ids) < 0.6 * len(text)
    assert trained.decode(ids) == text
    assert trained.encode(text[:100]) == trained.encode_array(text[:100]).tolist()
    assert trained.encode("") == []
    assert BPETokenizer.train([text], 400) == trained == BPETokenizer(trained.json)
    assert {trained.token_bytes(i) for i in range(400)} >= {bytes([b]) for b in range(256)}
    assert (trained.start_ids, trained.end_id) == (trained.encode("\n"), None)
    assert BPETokenizer.train(["ab ab"], 10_000).vocab_size < 300  # a short text gives fewer tokens
    with pytest.raises(RequestError, match="at least 256, got 255"):
        BPETokenizer.train([text], 255)


@given(st.text())
def test_every_text_comes_back(trained, text):
    text = "".join(c for c in text if not "\ud800" <= c <= "\udfff")
    ids = trained.encode_array(text)
    assert trained.decode(ids) == text
    assert text_size(trained, ids) == (len(text), len(text.encode()))


@given(st.lists(st.integers(0, 399)))
def test_a_stream_never_emits_half_a_character(trained, ids):
    stream = trained.stream()
    pieces = [stream.add(i) for i in ids]
    assert "".join(pieces) + stream.end() == trained.decode(ids)


def test_a_character_of_four_bytes_waits_for_its_last_byte(trained):
    stream = trained.stream()
    ids = trained.encode("😀")
    assert [stream.add(i) for i in ids] == ["", "", "", "😀"]
    stream.add(ids[0])
    assert stream.end() == "\ufffd"


WORDS = st.sampled_from(
    ["a", "Bell", "it's", " ", "  ", "\n", "\n\n", ".", ", ", "!?", "12", "é", "中文", "。", "😀", "\t", "-"]
)


@pytest.fixture(scope="module")
def of_spaces(text) -> BPETokenizer:
    """It has tokens of several spaces, line breaks and so on, so that a cut among them would show."""
    return BPETokenizer.train([text[:5000] + "a  b   c    d\n\ne\n\n\nf\t\tg  .\n  h" * 300], 400)


@given(st.lists(WORDS, max_size=60), st.integers(1, 9), st.integers(1, 5))
def test_pieces_change_nothing(of_spaces, words, size, at_once):
    text, trained = "".join(words), of_spaces
    whole = trained._encoder.encode(text, add_special_tokens=False).ids  # one call of the library
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_module, "CHARACTERS_IN_PIECE", 4)
        patch.setattr(bpe_module, "PIECES_AT_ONCE", at_once)
        assert "".join(_cut(pieces)) == text
        assert np.concatenate([np.empty(0, int), *trained.encode_pieces(pieces)]).tolist() == whole


def test_long_texts_are_cut_into_pieces(text):
    pieces = list(_cut([text * 3]))
    assert len(pieces) >= 3
    assert all(len(piece) < 1.1 * bpe_module.CHARACTERS_IN_PIECE for piece in pieces)
    assert list(_cut(["中" * 200_000])) == ["中" * 200_000]  # there is no place for a cut


def test_a_text_is_split_before_it_is_encoded(tmp_path):
    """No token reaches from the training part into the held-out part, and a new BPE has not seen the held-out part."""
    path = tmp_path / "a.txt"
    path.write_text("ab" * 450 + "zy" * 50, encoding="utf-8")

    def train_on(n):
        return n - n // 10 - 1  # cuts a pair

    tokenizer, (text,) = read_texts([Sources(path)], NewBPE(300), train_on=train_on)
    assert tokenizer.decode(text.ids[: text.n_train]) == "ab" * 449 + "a"
    assert tokenizer.decode(text.ids) == path.read_text(encoding="utf-8")
    assert not any(b"zy" in tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    _, (first,) = read_texts([Sources(path)], tokenizer, limit=7)
    assert tokenizer.decode(first.ids) == "abababa"


def test_special_tokens_are_text(description):
    added = {"id": 400, "content": "<|endoftext|>", "special": True, "single_word": False}
    added |= dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
    tokenizer = BPETokenizer(json.dumps(description | {"added_tokens": [added]}))
    assert (tokenizer.end_id, tokenizer.start_ids, tokenizer.vocab_size) == (400, [400], 401)
    assert 400 not in tokenizer.encode("The end.<|endoftext|>")
    assert tokenizer.decode([400]) == "<|endoftext|>"


def test_a_byte_without_a_token(description):
    vocab = dict(description["model"]["vocab"])
    last = max(vocab, key=vocab.get)
    missing = next(c for c, byte in BYTE_OF.items() if byte == ord("Q"))
    vocab[last] = vocab.pop(missing)
    merges = [pair for pair in description["model"]["merges"] if last not in ("".join(pair), *pair) and missing not in pair]
    if last != missing:
        vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.get))}
    tokenizer = BPETokenizer(json.dumps(changed(description, vocab=vocab, merges=merges)))
    assert tokenizer.unknown("aQbQ") == {"Q": 1}
    assert tokenizer.without_unknown("aQbQ", replace=True) == "ab"
    with pytest.raises(RequestError, match="'Q', and the tokenizer has no token for it"):
        tokenizer.encode("aQ")


def test_a_lone_surrogate_is_unknown(trained):
    """A command line that is not UTF-8 has them."""
    assert trained.unknown("a\udcffb") == {"\udcff": 1}
    assert trained.without_unknown("a\udcffb", replace=True) == "ab"
    with pytest.raises(RequestError, match="no token for it"):
        trained.encode("a\udcff")


def test_text_without_spaces():
    """Learning from a very long word would take time in proportion to its square."""
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 300_000))
    tokenizer = BPETokenizer.train([text], 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(behavior, pattern=GPT4):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    "words",
    [
        LEVEL,  # the whole text is one word
        sequence(split("Isolated"), LEVEL),
        sequence(split("Isolated", r"[a-z]+ [a-z]+"), LEVEL),  # words with a space in them
        sequence({"type": "Digits", "individual_digits": True}, LEVEL | {"use_regex": True}),
    ],
)
def test_other_ways_to_split_a_text(description, words, text, monkeypatch):
    tokenizer = BPETokenizer(json.dumps(description | {"pre_tokenizer": words}))
    whole = tokenizer._encoder.encode(text[:3000], add_special_tokens=False).ids
    monkeypatch.setattr(bpe_module, "CHARACTERS_IN_PIECE", 50)
    assert tokenizer.encode(text[:3000]) == whole
    assert not tokenizer.splits_as_gpt2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "expected a byte-level BPE, got a tokenizer of type WordPiece"),
        ({"model": None}, "describes no tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not ByteLevel"),
        ({"pre_tokenizer": None}, "not ByteLevel"),
        ({"decoder": None}, "not ByteLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer changes texts"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "'ByteLevel', with its settings, changes texts"),
        ({"pre_tokenizer": sequence({"type": "WhitespaceSplit"}, LEVEL)}, "'WhitespaceSplit', with its settings, changes"),
        ({"pre_tokenizer": sequence(split("Removed"), LEVEL)}, "'Split', with its settings, changes texts"),
        ({"pre_tokenizer": sequence(LEVEL, split("Isolated"))}, "not ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}, "not ByteLevel"),
        ({"added_tokens": [{"id": 400}]}, "added_tokens cannot be used"),
        ({"added_tokens": [{"id": 400, "content": "two words", "special": False}]}, "spaces between words"),
        ({"added_tokens": [{"id": 500, "content": "x", "special": False}]}, "ids must be 0, 1, 2"),
        ({"added_tokens": [{"id": 0, "content": "<x>", "special": True}]}, "ids must be 0, 1, 2"),
        ({"added_tokens": [{"id": 400, "content": "\ud800", "special": True}]}, "it has a lone surrogate"),
    ],
)
def test_tokenizers_that_cannot_be_used(description, change, words):
    with pytest.raises(RequestError, match=words):
        BPETokenizer(json.dumps(description | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dropout": 0.1}, "its dropout changes texts"),
        ({"byte_fallback": True}, "its byte_fallback changes"),
        ({"merges": [["a", "b", "c"]]}, "is not a pair"),
        ({"merges": ["a b c"]}, "is not a pair"),
        ({"merges": [["☃", "a"]]}, "not in the vocabulary"),
        ({"vocab": {"a": 0, "☃": 1}, "merges": []}, "'☃' is not byte-level"),
        ({"vocab": {"a": True}, "merges": []}, "ids must be"),
        ({"vocab": {"a": 10**12}, "merges": []}, "ids must be"),
        ({"vocab": [], "merges": []}, "expected a byte-level BPE"),
    ],
)
def test_bpe_models_that_cannot_be_used(description, change, words):
    with pytest.raises(RequestError, match=words):
        BPETokenizer(json.dumps(changed(description, **change)))


def test_what_cuts_off_or_fills_up_texts_is_removed(description, trained):
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = BPETokenizer(json.dumps(description))
    assert tokenizer == trained
    assert len(tokenizer.encode("The bell rang over the water.")) > 2


def test_unknown_ids(trained):
    for wrong in (-1, 400):
        with pytest.raises(RequestError, match=rf"id {wrong} is not in the vocabulary, whose ids are 0\.\.399"):
            trained.decode([wrong])


# ---------------------------------------------------------------- files


def write_pair(folder, description, names=("vocab.json", "merges.txt")):
    model = description["model"]
    (folder / names[0]).write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (folder / names[1]).write_text("#version: 0.2\n" + merges, encoding="utf-8")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_a_vocabulary_and_its_merges(tmp_path, text, trained, description, names):
    write_pair(tmp_path, description, names)
    for path in (tmp_path, tmp_path / names[0]):
        tokenizer = read_tokenizer(path)
        assert tokenizer.encode(text) == trained.encode(text)


def test_a_vocabulary_may_have_the_word_model(tmp_path):
    """GPT-2's has. So this word does not tell a vocabulary from a tokenizer.json."""
    write_pair(tmp_path, json.loads(BPETokenizer.train(["model " * 50], 300).json))
    assert "model" in json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert read_tokenizer(tmp_path).decode(read_tokenizer(tmp_path).encode("a model")) == "a model"


def test_merges_that_are_not_complete(tmp_path, description):
    write_pair(tmp_path, changed(description, merges=description["model"]["merges"][:50]))
    with pytest.raises(RequestError, match="its merges make only 50 of its 400 tokens, so they are not complete"):
        read_tokenizer(tmp_path)


def test_the_end_of_text_in_a_vocabulary_is_special(tmp_path, description):
    description["model"]["vocab"]["<|endoftext|>"] = 400
    write_pair(tmp_path, description)
    assert read_tokenizer(tmp_path).end_id == 400


def test_tokenizer_json_comes_first(tmp_path, trained, description):
    write_pair(tmp_path, description)
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(trained.json, encoding="utf-8")
    assert read_tokenizer(tmp_path) == trained


def test_files_that_cannot_be_used(tmp_path, description, monkeypatch):
    def refused(words, path=tmp_path):
        with pytest.raises(RequestError, match=words):
            read_tokenizer(path)

    refused("has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    refused("there is no none.json", tmp_path / "none.json")
    write_pair(tmp_path, description)
    (tmp_path / "merges.txt").unlink()
    refused("vocab.json: there is no merges.txt")
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    refused("vocab.json is not JSON")
    (tmp_path / "vocab.json").write_bytes(b"\xff")
    refused("vocab.json is not UTF-8")
    (tmp_path / "vocab.json").write_text("[" * 100_000, encoding="utf-8")
    refused("vocab.json is not JSON")
    monkeypatch.setattr("npgpt.text.tokenizer_files.MAX_BYTES", 10)
    refused("has more than 10 bytes")


def test_what_the_flags_ask_for(tmp_path, trained):
    assert tokenizer_named(None, None) is tokenizer_named("char", None) is None
    assert tokenizer_named("bpe", 300) == NewBPE(300)
    (tmp_path / "tokenizer.json").write_text(trained.json, encoding="utf-8")
    assert tokenizer_named(str(tmp_path), None) == trained
    for choice in (None, "char", str(tmp_path)):
        with pytest.raises(RequestError, match="--vocab-size is for --tokenizer bpe"):
            tokenizer_named(choice, 300)
    with pytest.raises(RequestError, match="must be char, bpe, or the file or folder of a tokenizer; there is no words"):
        tokenizer_named("words", None)


def test_without_the_library(monkeypatch, trained):
    """Decoding needs no library. Encoding names the command that installs it."""
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = BPETokenizer(trained.json)
    assert tokenizer.decode([tokenizer.start_ids[0]]) == "\n"
    for use in (lambda: tokenizer.encode("a"), lambda: BPETokenizer.train(["a"], 300)):
        with pytest.raises(RequestError, match=r"python -m pip install 'npgpt\[bpe\]'"):
            use()


def test_the_sizes_of_characters():
    tokenizer = CharTokenizer("\naé中😀")
    assert tokenizer.byte_lengths.tolist() == [1, 1, 2, 3, 4]
    assert text_size(tokenizer, tokenizer.encode_array("é中\n")) == (3, 6)
    assert CharTokenizer("ab").start_ids == [0]
