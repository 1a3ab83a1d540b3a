from pathlib import Path

import numpy as np
import pytest

from calibration.choose import choose, coverage, freeze, load
from edgevlm.artifacts import Labels, PreprocessSpec, Provenance, TokenizerSpec
from edgevlm.data.frames import Frames, Questions
from edgevlm.errors import CalibrationError
from edgevlm.recipe import CalibrationSection

LABELS = Labels(classes=("a", "b", "c", "d"), attributes=("x",), answers=tuple(f"answer{i}" for i in range(12)))
SPEC = PreprocessSpec(height=16, width=16)
TOKENIZER = TokenizerSpec(vocab_sha256="0" * 64, vocab_size=30, max_tokens=10)
PROVENANCE = Provenance(stage="calibrate", key="c")


def make_split(num: int = 300, seed: int = 0) -> tuple[Frames, Questions]:
    """A skewed split: answer 0 and class a are common, the last answers and class d are rare."""
    rng = np.random.default_rng(seed)
    answers = np.minimum(rng.geometric(0.45, num) - 1, 11)
    answers[:12] = np.arange(12)
    classes = rng.choice(4, num, p=[0.9, 0.06, 0.03, 0.01])
    classes[5] = 3
    widths = rng.choice([2, 4, 8, 14], num, p=[0.9, 0.05, 0.03, 0.02])
    ids = np.zeros((num, 10), np.int32)
    for row in ids:
        row[: rng.integers(3, 11)] = 7
    frames = Frames(
        ids=[f"i{i}" for i in range(num)],
        pixels=rng.integers(0, 256, (num, 16, 16, 3)).astype(np.uint8),
        boxes=[np.array([[0, 0, w, w]], np.float32) for w in widths],
        classes=[np.array([c]) for c in classes],
        attributes=[np.zeros((1, 1), np.float32)] * num,
        texts=[()] * num,
    )
    order = rng.permutation(num)
    texts = [f"question {i}" for i in range(num)]
    return frames, Questions(order, ids, answers[order], [()] * num, [""] * num, texts)


def test_the_rare_is_covered_where_chance_would_miss_it() -> None:
    frames, questions = make_split()
    chosen = choose(frames, questions, LABELS, num=40, seed=0)
    assert len(set(chosen.tolist())) == 40
    assert set(coverage(frames, questions, LABELS, chosen).values()) == {1.0}
    rng = np.random.default_rng(0)
    random = [coverage(frames, questions, LABELS, rng.choice(300, 40, replace=False)) for _ in range(20)]
    assert np.mean([share["answers"] for share in random]) < 0.95
    assert np.mean([share["classes"] for share in random]) < 0.95


def test_the_same_seed_chooses_the_same() -> None:
    frames, questions = make_split()
    first, again = (choose(frames, questions, LABELS, num=40, seed=3) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert choose(frames, questions, LABELS, num=40, seed=4).tolist() != first.tolist()


def test_a_small_split_gives_what_it_has() -> None:
    frames, questions = make_split(20)
    assert sorted(choose(frames, questions, LABELS, num=40, seed=0).tolist()) == list(range(20))


def frozen(folder: Path, num: int = 40, split: str = "train"):
    frames, questions = make_split()
    chosen = choose(frames, questions, LABELS, num=num, seed=0)
    section = CalibrationSection(num_samples=40, min_samples=32)
    set_ = freeze(frames, questions, chosen, LABELS, section, SPEC, TOKENIZER, "toy", folder, PROVENANCE, split=split)
    return frames, questions, chosen, set_


def test_a_frozen_set_holds_the_chosen_samples(tmp_path: Path) -> None:
    frames, questions, chosen, written = frozen(tmp_path)
    manifest, arrays = load(tmp_path, SPEC, TOKENIZER)
    assert manifest == written
    assert (manifest.dataset, manifest.split, manifest.coverage["answers"]) == ("toy", "train", 1.0)
    assert np.array_equal(arrays["image"], frames.pixels[questions.image_index[chosen]])
    assert np.array_equal(arrays["input_ids"], questions.input_ids[chosen])
    assert arrays["texts"].tolist() == [questions.texts[i] for i in chosen]
    assert manifest.sample_ids[0] == f"{frames.ids[questions.image_index[chosen[0]]]}#{chosen[0]}"


def test_too_few_or_unseen_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"20 calibration samples are too few .*is 32"):
        frozen(tmp_path, num=20)
    with pytest.raises(CalibrationError, match="come from 'val'"):
        frozen(tmp_path, split="val")
    assert not any(tmp_path.iterdir())


def test_a_set_of_another_model_is_refused(tmp_path: Path) -> None:
    frozen(tmp_path)
    with pytest.raises(CalibrationError, match="preprocessed differently"):
        load(tmp_path, SPEC.model_copy(update={"interpolation": "nearest"}), TOKENIZER)
    with pytest.raises(CalibrationError, match="another vocabulary"):
        load(tmp_path, SPEC, TOKENIZER.model_copy(update={"vocab_sha256": "1" * 64}))


def test_an_altered_or_missing_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be used"):
        load(tmp_path / "nowhere", SPEC, TOKENIZER)
    frozen(tmp_path / "set")
    path = tmp_path / "set" / "calibration.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CalibrationError, match="was altered"):
        load(tmp_path / "set", SPEC, TOKENIZER)
