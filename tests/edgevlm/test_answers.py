"""Answers in the form of the official VQA evaluator, and closed lists."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.data.answers import (
    ARTICLES,
    CONTRACTIONS,
    PUNCTUATION,
    agreed_answer,
    build_answers,
    normalise_answer,
    parse_answers,
    spellings,
    strip_punctuation,
)
from edgevlm.errors import DataError


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("a  bus", "bus"),
        ("The  a an", ""),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the evaluator's own slip
        ("let's", "let's"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("black -white", "black white"),
        ("yes!", "yes"),
        ("1,000", "1000"),
        ("1,000/a-b", "1000ab"),  # a comma between digits makes every mark simply go
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("it's", "it's"),
        ("5:30", "5:30"),
        ("  new\tyork\n", "new york"),
        ("one", "1"),
    ],
)
def test_published_rules(written: str, compared: str) -> None:
    assert normalise_answer(written) == compared


def test_contractions_are_the_evaluators() -> None:
    # The evaluator's table has 120 entries; 6 of them cannot match (capitals after lower-casing) or change nothing.
    assert len(CONTRACTIONS) == 114
    assert all(word.replace("'", "") == slip.replace("'", "") for slip, word in CONTRACTIONS.items())


@given(st.text(alphabet="ab 1,.;/[]\"{}()=+\\_-><@`?!'", max_size=20))
def test_nothing_of_the_marks_remains(text: str) -> None:
    assert not set(strip_punctuation(text)) & set(PUNCTUATION)
    words = normalise_answer(text).split()
    assert not set(words) & ARTICLES
    assert all(not word.endswith(".") for word in words)


def test_the_majority_answers_and_a_closed_list_wins() -> None:
    said = ["Net", "net", "netting", "the net", "mesh", "mesh"]
    assert agreed_answer(said) == "net"
    assert agreed_answer(said, spellings(["mesh", "netting"])) == "mesh"
    assert agreed_answer(said, spellings(["ball"])) == "net"
    assert agreed_answer(["T-shirt"], spellings(["t-shirt", "t shirt"])) == "t-shirt", "as the list spells it"
    assert agreed_answer(["b", "c"]) == "b", "the first of a tie"


def test_closed_list_by_frequency() -> None:
    said = ["yes"] * 5 + ["no"] * 5 + ["2"] * 9 + ["rare"]
    assert build_answers(said, 2) == ("2", "no", "yes")
    assert build_answers(reversed(said), 2) == ("2", "no", "yes")


def test_closed_list_from_a_file() -> None:
    assert parse_answers('["", "yes", "2"]', "x.json") == ("", "yes", "2")
    assert parse_answers("yes\nno\n", "x.txt") == ("yes", "no")
    for content, complaint in [
        ("[1, 2]", "not a list of answers"),
        ("", "not a list of answers"),
        ('["a", "b", "a"]', "'a' twice"),
        ('["a", ', "not valid JSON"),
    ]:
        with pytest.raises(DataError, match=complaint) as problem:
            parse_answers(content, "some/file")
        assert "some/file" in problem.value.what


@pytest.mark.data
def test_the_published_list_of_vqav2_is_in_this_form() -> None:
    if "EDGEVLM_DATA" not in os.environ:
        pytest.skip("EDGEVLM_DATA is not set")
    path = Path(os.environ["EDGEVLM_DATA"]) / "vocab" / "vqa2_label2ans_3129.json"
    published = json.loads(path.read_text())
    assert parse_answers(path.read_text(), path.name) == tuple(published)
    # Others built this list with the evaluator's rules; a different rule would change hundreds of its answers.
    assert [answer for answer in published if normalise_answer(answer) != answer] == []
