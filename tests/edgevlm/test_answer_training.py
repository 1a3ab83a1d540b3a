"""The stage `teacher` on data with ten annotators, with one answer, and with three classes of entailment."""

from pathlib import Path

import numpy as np
import pytest
import torch

import edgevlm.data
from edgevlm.artifacts import Labels
from edgevlm.data.entailment import ANSWERS
from edgevlm.data.sample import Sample, Text
from edgevlm.models import vlm
from edgevlm.tasks import vqa
from edgevlm.tasks.entailment import per_class_accuracy
from edgevlm.train.answering import batch_of, predict, train_teacher
from edgevlm.train.regions import RegionSplit
from tests.edgevlm.runs import Made, cached_job, made_sample

SAID = (
    ("red",) * 10,
    ("red",) * 5 + ("a red",) * 2 + ("blue",) * 3,
    ("two",) * 4 + ("2",) * 4 + ("red", "blue"),
    ("mauve",) * 10,
)
KINDS = ("other", "other", "number", "other")


def _annotated(count: int) -> list[Sample]:
    texts = [Text(f"question {i}", said[0], kind=KINDS[i], answers=said) for i, said in enumerate(SAID)]
    return [made_sample(i, *texts) for i in range(count)]


def test_annotators_train_soft_and_are_scored_officially(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = Labels(classes=("a",), attributes=("b",), answers=("red", "blue", "2"))
    reader = Made(labels, {"train": _annotated(4), "val": _annotated(2), "test": _annotated(2)})
    monkeypatch.setitem(edgevlm.data.READERS, "scenes", lambda *_: reader)
    job = cached_job(
        tmp_path, "teacher.answer_head=linear", "teacher.answer_dropout=0.3", "teacher.steps=4", stage="teacher"
    )
    train = RegionSplit.load(job.inputs["regions"], "train")
    # Nobody's answer to the fourth question is in the list: it cannot be trained on, and counts as wrong.
    assert train.answerable().tolist() == [q for q in range(16) if q % 4 != 3]
    metrics = train_teacher(job).metrics
    model, manifest = vlm.load(job.out_dir)
    assert manifest.model.answer_head == "linear"
    targets = batch_of(model, train, torch.arange(4)).targets
    assert targets is not None
    expected = [[1.0, 0.0, 0.0], [1.0, 0.9, 0.0], [0.3, 0.3, 1.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(targets, torch.tensor(expected))

    predicted = predict(model, RegionSplit.load(job.inputs["regions"], "test"))
    scores = [vqa.official_accuracy(labels.answers[p], SAID[q % 4]) for q, p in enumerate(predicted)]
    assert metrics["accuracy_test"] == pytest.approx(np.mean(scores))
    assert metrics["accuracy_test.number"] == pytest.approx(np.mean([scores[2], scores[6]]))
    assert metrics["majority_test"] == pytest.approx((1.0 + 1.0 + 0.3 + 0.0) / 4)


def test_one_answer_trains_as_before(tmp_path: Path) -> None:
    job = cached_job(tmp_path, "teacher.steps=2", stage="teacher")
    split = RegionSplit.load(job.inputs["regions"], "train")
    assert split.answer_ids is None and len(split.answerable()) == len(split.answers)
    metrics = train_teacher(job).metrics
    model, manifest = vlm.load(job.out_dir)
    assert manifest.model.answer_head == "hidden"
    test = RegionSplit.load(job.inputs["regions"], "test")
    assert batch_of(model, test, torch.arange(2)).targets is None
    assert metrics["accuracy_test"] == pytest.approx((predict(model, test) == test.answers.numpy()).mean())


def test_entailment_reports_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(count: int) -> list[Sample]:
        return [made_sample(i, *(Text(f"sentence {name}", name) for name in ANSWERS)) for i in range(count)]

    labels = Labels(classes=("a",), attributes=("b",), answers=ANSWERS)
    reader = Made(labels, {"train": samples(6), "val": samples(2), "test": samples(3)})
    monkeypatch.setitem(edgevlm.data.READERS, "scenes", lambda *_: reader)
    metrics = train_teacher(cached_job(tmp_path, "task=entailment", "teacher.steps=2", stage="teacher")).metrics
    by_class = [metrics[f"accuracy_test.{name}"] for name in ANSWERS]
    assert metrics["accuracy_test"] == pytest.approx(np.mean(by_class))
    assert metrics["majority_test"] == pytest.approx(1 / 3)


def test_per_class_accuracy_is_by_the_right_answer() -> None:
    predicted, truth = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0])
    assert per_class_accuracy(predicted, truth, ("e", "n", "c")) == {"c": 1.0, "e": 0.5, "n": 0.5}
