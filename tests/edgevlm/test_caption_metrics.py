"""Caption metrics against published values, the library's own pipeline, and what a machine may lack."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pycocoevalcap
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.errors import DataError
from edgevlm.tasks import caption_metrics
from edgevlm.tasks.caption_metrics import plain_tokens, score_captions
from edgevlm.tasks.cider import CiderD

LIBRARY = Path(pycocoevalcap.__path__[0])
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")

REFERENCES = {
    "a": ["A man rides a horse.", "someone is on a brown horse", "the man's horse walks"],
    "b": ["Two cats sleep on a sofa!", "cats lie on the couch"],
    "c": ["a red bus (double-decker) drives down the street"],
}
CAPTIONS = {"a": "a man is riding a horse", "b": "two cats sleep on a bed", "c": "a red bus on the street"}


def fixtures() -> Path:
    if "EDGEVLM_DATA" not in os.environ:
        pytest.skip("EDGEVLM_DATA is not set")
    return Path(os.environ["EDGEVLM_DATA"]) / "eval_fixtures" / "caption"


@pytest.mark.data
@pytest.mark.slow
@needs_java
def test_the_published_values_of_nlg_eval() -> None:
    folder = fixtures() / "nlg_eval"
    lines = {name: (folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")}
    images = [str(i) for i in range(len(lines["hyp"]))]
    references = {image: [lines["ref1"][i], lines["ref2"][i]] for i, image in enumerate(images)}
    scores = score_captions(references, dict(zip(images, lines["hyp"], strict=True)))
    expected = json.loads((folder / "expected.json").read_text())
    names = {"Bleu_1": "bleu1", "Bleu_2": "bleu2", "Bleu_3": "bleu3", "Bleu_4": "bleu4"}
    names |= {"METEOR": "meteor", "ROUGE_L": "rouge_l", "CIDEr": "cider"}
    for theirs, ours in names.items():
        assert scores.values[ours] == pytest.approx(expected[theirs], abs=1e-6), ours  # published with six decimals


@pytest.mark.data
@pytest.mark.slow
@needs_java
@pytest.mark.parametrize("which", ["good", "bad"])
def test_the_published_values_of_clipscore(which: str) -> None:
    folder = fixtures() / "clipscore"
    references = json.loads((folder / "refs.json").read_text())
    captions = json.loads((folder / f"{which}_captions.json").read_text())
    scores = score_captions(references, captions)
    expected = json.loads((folder / "expected.json").read_text())[which]
    names = {"BLEU-1": "bleu1", "BLEU-2": "bleu2", "BLEU-3": "bleu3", "BLEU-4": "bleu4"}
    names |= {"METEOR": "meteor", "ROUGE": "rouge_l", "CIDER": "cider"}
    for theirs, ours in names.items():
        assert scores.values[ours] == pytest.approx(expected[theirs], abs=5.1e-5), ours  # published with four decimals
    if "spice" not in scores.values:
        assert "models" in scores.not_measured["spice"]


@pytest.mark.data
def test_own_cider_equals_the_librarys_on_human_captions() -> None:
    from pycocoevalcap.cider.cider import Cider

    folder = fixtures() / "cider_abstract"
    references: dict[str, list[str]] = {}
    for row in json.loads((folder / "abstract48S.json").read_text()):
        references.setdefault(row["image_id"], []).append(plain_tokens(row["caption"]))
    said = {
        row["image_id"]: plain_tokens(row["caption"])
        for row in json.loads((folder / "abstract_candsB.json").read_text())
    }
    images = sorted(references.keys() & said.keys())
    assert len(images) > 100
    truth = {image: references[image] for image in images}
    _, expected = Cider().compute_score(truth, {image: [said[image]] for image in images})
    ours = CiderD([[line.split() for line in truth[image]] for image in images])
    np.testing.assert_allclose(ours.scores([said[image].split() for image in images]), expected, atol=1e-6)


sentences = st.lists(st.sampled_from(["a", "red", "dog", "on", "the", "mat", "sees", "two"]), max_size=9)
images = st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3))


@settings(deadline=None)
@given(st.lists(images, min_size=1, max_size=6))
def test_own_cider_equals_the_librarys(rows: list[tuple[list[str], list[list[str]]]]) -> None:
    from pycocoevalcap.cider.cider import Cider

    if not any(words for _, references in rows for words in references):
        return  # the library refuses references without any word
    truth = {i: [" ".join(words) for words in references] for i, (_, references) in enumerate(rows)}
    said = {i: [" ".join(words)] for i, (words, _) in enumerate(rows)}
    _, expected = Cider().compute_score(truth, said)
    ours = CiderD([references for _, references in rows]).scores([words for words, _ in rows])
    np.testing.assert_allclose(ours, expected, atol=1e-6)  # sums of floats in another order


def _children() -> set[psutil.Process]:
    """Processes of this one; others than ours may have been started by earlier tests."""
    return set(psutil.Process().children(recursive=True))


@pytest.mark.slow  # METEOR reads its paraphrases for 10 to 20 s
@needs_java
def test_leaves_nothing_behind() -> None:
    before, children = _listing(LIBRARY), _children()
    scores = score_captions(REFERENCES, CAPTIONS)
    assert scores.tokenizer == "ptb" and 0 < scores.values["meteor"] < 1
    assert _listing(LIBRARY) == before
    assert _children() == children, "no JVM, not even a dead one, is left"


@needs_java
def test_tokens_equal_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's wrapper writes into the folder it lies in; ours writes nowhere."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    (tmp_path / jar).symlink_to(LIBRARY / "tokenizer" / jar)
    # The wrapper writes beside its own file: let it think that it lies elsewhere.
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "ptbtokenizer.py"))
    texts = [text for references in REFERENCES.values() for text in references] + ["A café -- (open); isn't it?  'yes'"]
    theirs = ptbtokenizer.PTBTokenizer().tokenize({0: [{"caption": text} for text in texts]})[0]
    assert caption_metrics._ptb_tokens(texts, str(shutil.which("java"))) == theirs


@needs_java
def test_line_breaks_and_empty_captions_keep_their_rows() -> None:
    texts = ["one\u2028two", "", "three\x0bfour\nfive", " ", "six"]
    tokens = caption_metrics._ptb_tokens(texts, str(shutil.which("java")))
    assert tokens == ["one two", "", "three four five", "", "six"]


def test_says_what_it_cannot_measure_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)
    scores = score_captions(REFERENCES, CAPTIONS)
    assert scores.tokenizer == "plain"
    assert "meteor" not in scores.values and "Java" in scores.not_measured["meteor"]
    assert 0 < scores.values["cider"] <= 10


@needs_java
def test_a_dying_meteor_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `java` that works for the tokeniser and fails for METEOR: the rest is measured, and nothing hangs."""
    real = shutil.which("java")
    fake = tmp_path / "java"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *meteor*) echo out of memory >&2; exit 1;; esac\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    children = _children()
    scores = score_captions(REFERENCES, CAPTIONS)
    assert "out of memory" in scores.not_measured["meteor"] and "rouge_l" in scores.values
    assert _children() == children


@needs_java
def test_spice_runs_where_its_models_are_and_writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for SPICE's jar, which cannot run without 400 MB of models: what is asked of it, and where it writes."""
    from pycocoevalcap.spice import spice

    fake = tmp_path / "java"
    result = [{"image_id": image, "scores": {"All": {"f": 0.25}}} for image in REFERENCES]
    fake.write_text(
        f"#!/bin/sh\nwhile [ $# -gt 0 ]; do [ $1 = -out ] && echo '{json.dumps(result)}' > $2; shift; done\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(caption_metrics, "SPICE_MODELS", ())
    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    before = _listing(LIBRARY)
    truth = {image: [plain_tokens(text) for text in texts] for image, texts in REFERENCES.items()}
    assert caption_metrics._spice(truth, {image: [text] for image, text in CAPTIONS.items()}) == 0.25
    assert _listing(LIBRARY) == before
    fake.write_text("#!/bin/sh\nexit 3\n")
    assert "SPICE stopped" in str(caption_metrics._spice(truth, {image: [text] for image, text in CAPTIONS.items()}))


def test_refuses_captions_and_references_of_different_images() -> None:
    with pytest.raises(DataError, match="'c' lacks a caption"):
        score_captions(REFERENCES, {"a": "x", "b": "y"})
    with pytest.raises(DataError, match="no captions"):
        score_captions({}, {})
    with pytest.raises(DataError, match="no reference"):
        score_captions({"a": []}, {"a": "x"})


def _listing(folder: Path) -> set[str]:
    command = ["find", str(folder), "-not", "-name", "*.pyc", "-not", "-name", "__pycache__"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
