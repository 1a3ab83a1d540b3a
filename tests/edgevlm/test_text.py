"""The tokenizer against a second WordPiece in plain Python, and the properties that apps rely on."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.data.text import SPECIAL_TOKENS, Tokenizer, make_spec, train_vocabulary, write_vocabulary
from edgevlm.errors import DataError, TextError

TEXTS = [f"is the {a} {b} left of the {c} {d}?" for a in ("red", "large", "dotted") for b in ("circle", "star")
         for c in ("blue", "small", "striped") for d in ("square", "triangles")] + ["it's café no. 42"]  # fmt: skip
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    write_vocabulary(path, train_vocabulary(TEXTS, 130))
    return Tokenizer(path, make_spec(path, MAX_TOKENS))


# --- a second implementation (BERT's rules) ----------------------------------------------------------------------


def second_opinion(text: str, vocabulary: list[str]) -> list[int]:
    ids = {token: i for i, token in enumerate(vocabulary)}
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    words = "".join(f" {c} " if not c.isalnum() and not c.isspace() else c for c in text).split()
    out = []
    for word in words:
        pieces, start = [], 0
        while start < len(word):
            ends = (end for end in range(len(word), start, -1) if ("##" if start else "") + word[start:end] in ids)
            end = next(ends, None)
            if end is None or len(word) > 100:
                pieces = [ids["[UNK]"]]
                break
            pieces.append(ids[("##" if start else "") + word[start:end]])
            start = end
        out += pieces
    return out


WORDS = st.sampled_from(
    [
        "red",
        "circle",
        "circles",
        "stars",
        "trisquare",
        "left",
        "42",
        "café",
        "ÉTÉ",
        "?!",
        "it's",
        "x-ray",
        "ленин",
        "zz",
    ]
)


@given(st.lists(WORDS, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_second_implementation_agrees(tokenizer: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    expected = second_opinion(text, tokenizer.tokens)
    if len(expected) + 2 <= MAX_TOKENS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.shape == (MAX_TOKENS,)
        assert ids.tolist() == [2, *expected, 3] + [0] * (MAX_TOKENS - 2 - len(expected))
    else:
        with pytest.raises(TextError, match=f"has {len(expected) + 2} tokens .* takes {MAX_TOKENS}"):
            tokenizer.encode(text)


# --- vocabulary --------------------------------------------------------------------------------------------------


def test_vocabulary_begins_with_the_special_tokens_and_keeps_its_size() -> None:
    vocabulary = train_vocabulary(TEXTS, 130)
    assert tuple(vocabulary[:5]) == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") == SPECIAL_TOKENS
    assert len(vocabulary) == len(set(vocabulary)) == 130
    assert {"left", "of", "the"} <= set(train_vocabulary(TEXTS, 400))


def test_vocabulary_is_the_same_in_any_order_and_process(tmp_path: Path) -> None:
    here = train_vocabulary(TEXTS, 130)
    assert train_vocabulary(TEXTS[::-1], 130) == here
    script = (
        "import sys; from edgevlm.data.text import train_vocabulary, write_vocabulary; from pathlib import Path;"
        "write_vocabulary(Path(sys.argv[1]), train_vocabulary(sys.stdin.read().split('\\n'), 130))"
    )
    root = Path(__file__).parents[2]
    for seed in ("1", "2"):
        path = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", script, path], input="\n".join(TEXTS), text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert path.read_text(encoding="utf-8").split("\n")[:-1] == here


def test_too_small_vocabulary_names_the_number_needed() -> None:
    with pytest.raises(TextError, match=r"Set text\.vocab_size to \d+") as problem:
        train_vocabulary(TEXTS, 40)
    needed = int(problem.value.fix.split()[3])
    assert len(train_vocabulary(TEXTS, needed)) == needed


def test_unseen_words_are_spelled_not_lost(tokenizer: Tokenizer) -> None:
    assert 1 not in tokenizer.encode("quick fjord")
    assert tokenizer.decode(tokenizer.encode("quick fjord")) == "quick fjord"


# --- encoding ----------------------------------------------------------------------------------------------------


def test_special_tokens_cannot_be_typed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("[SEP] [CLS]").tolist()
    assert ids.count(3) == 1
    assert ids.count(2) == 1


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u200b"])
def test_empty_text_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(TextError, match="has no words"):
        tokenizer.encode(text)
    with pytest.raises(TextError, match="has no words"):
        tokenizer.encode_batch(["red", text], truncate=True)


def test_limit_is_exact_and_truncation_keeps_sep(tokenizer: Tokenizer) -> None:
    fits = " ".join(["the"] * (MAX_TOKENS - 2))
    ids = tokenizer.encode(fits)
    assert (ids != 0).all()
    with pytest.raises(TextError, match=f"has {MAX_TOKENS + 1} tokens with .* takes {MAX_TOKENS}"):
        tokenizer.encode(fits + " the")
    assert np.array_equal(tokenizer.encode_batch([fits + " the of"], truncate=True)[0], ids)


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(TEXTS)
    assert batch.shape == (len(TEXTS), MAX_TOKENS)
    for row, text in zip(batch, TEXTS, strict=True):
        assert np.array_equal(row, tokenizer.encode(text))
    assert tokenizer.encode_batch([]).shape == (0, MAX_TOKENS)


def test_casing_follows_the_spec(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert np.array_equal(tokenizer.encode("RED Circle"), tokenizer.encode("red circle"))
    path = tmp_path / "vocab.txt"
    write_vocabulary(path, tokenizer.tokens)
    cased = Tokenizer(path, make_spec(path, MAX_TOKENS, lowercase=False))
    assert 1 in cased.encode("RED")


def test_altered_or_foreign_vocabulary_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "vocab.txt"
    write_vocabulary(path, [*tokenizer.tokens[:-1], "sabotage"])
    with pytest.raises(DataError, match="not the vocabulary"):
        Tokenizer(path, tokenizer.spec)
    path.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"lacks \[PAD\] \[UNK\] \[CLS\] \[SEP\] \[MASK\]"):
        make_spec(path, 8)
    with pytest.raises(DataError, match="is missing"):
        Tokenizer(tmp_path / "none.txt", tokenizer.spec)
