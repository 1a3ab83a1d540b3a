"""Answers as words: VQA's official normalisation, the answer most people gave, and closed lists of answers.

The normalisation follows the rules of the public VQA evaluator (Antol et al., ICCV 2015, and its script for VQA v2),
oddities included: a score is comparable with published ones only if "two", "a bus" and "dont" become the same words.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from edgevlm.errors import DataError

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(NUMBER_WORDS)}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
"""The evaluator means to keep the point of "3.5" by looking both ways, but its pattern only looks ahead: "3." loses it."""

APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> Iterable[str]:
    return (word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'")


CONTRACTIONS = {slip: word for word in APOSTROPHES.split() for slip in _without_one_apostrophe(word)}
"""A contraction with one apostrophe left out -> as it is written."""
CONTRACTIONS["somebody'd"] = "somebodyd"  # the evaluator has this one the wrong way round


def strip_punctuation(text: str) -> str:
    """VQA's rule for punctuation: a mark beside a space goes, one inside a word becomes a space.

    If a comma stands between two digits anywhere in the text, every mark simply goes ("1,000" -> "1000").
    """
    everywhere = COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if everywhere or beside_space else " ")
    return FULL_STOP.sub("", result)


@lru_cache(maxsize=1 << 16)
def normalise_answer(text: str) -> str:
    """An answer in the form in which the official VQA accuracy compares: lower case, no punctuation and articles,
    number words to ten as digits, apostrophes restored.

    The evaluator brings predictions to this form. Of the ground truth it only strips the punctuation, and only where
    the annotators of a question differ.
    """
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def spellings(answers: Iterable[str]) -> dict[str, str]:
    """Normalised answer -> as the closed list spells it: others' lists have "t-shirt", which normalises to "t shirt"."""
    found: dict[str, str] = {}
    for answer in answers:
        found.setdefault(normalise_answer(answer), answer)
    return found


def agreed_answer(said: Sequence[str], known: Mapping[str, str] | None = None) -> str:
    """What most annotators said, normalised; the first to be said wins a tie.

    Args:
        said: what each annotator said, as written.
        known: the `spellings` of a closed list. An answer in it wins over more frequent ones that are not, and is
            given as the list spells it.
    """
    ordered = [answer for answer, _ in Counter(map(normalise_answer, said)).most_common()]
    return next((known[answer] for answer in ordered if answer in known), ordered[0]) if known else ordered[0]


def build_answers(answers: Iterable[str], min_count: int) -> tuple[str, ...]:
    """The closed list: every answer that occurs `min_count` times, most frequent first, then by the alphabet."""
    counts = Counter(answers)
    kept = [answer for answer, count in counts.items() if count >= min_count]
    return tuple(sorted(kept, key=lambda answer: (-counts[answer], answer)))


def parse_answers(content: str, place: str) -> tuple[str, ...]:
    """A closed list from a file: a JSON list, or one answer per line.

    Args:
        content: what the file holds.
        place: names the file in errors.

    Raises:
        DataError: neither of both, no answer, or an answer twice.
    """
    if content.lstrip().startswith("["):
        try:
            answers = json.loads(content)
        except ValueError as problem:
            raise DataError(
                f"{place} is not valid JSON ({problem})", "Give a JSON list, or one answer per line"
            ) from problem
    else:
        answers = content.splitlines()
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{place} is not a list of answers", "Give a JSON list of strings, or one answer per line")
    if twice := [answer for answer, count in Counter(answers).items() if count > 1]:
        raise DataError(f"{place} has the answer {twice[0]!r} twice", "Remove one: the position of an answer is its id")
    return tuple(answers)
