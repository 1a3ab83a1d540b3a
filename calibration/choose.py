"""Choose training samples that cover what the model will meet, and freeze them for the quantisers.

A frozen set is an artifact: ids, pixels and token ids with the hashes of the preprocessing and the vocabulary that
made them, so that a quantiser is never fed samples of another model, and a later export uses the same ones.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from edgevlm.artifacts import CalibrationSet, Labels, PreprocessSpec, Provenance, TokenizerSpec
from edgevlm.data.frames import Frames, Questions
from edgevlm.errors import CalibrationError, CheckpointError
from edgevlm.manifests import read_manifest, write_manifest
from edgevlm.recipe import CalibrationSection

FILE = "calibration.npz"
TEXT_BUCKET = 3
"""Tokens per bucket of text length."""
BOX_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Edges of the buckets of box size: share of the image's area."""
TURNS = 8
"""A trait that has appeared this often counts as much as one that was never asked for."""


def traits(frames: Frames, questions: Questions, labels: Labels) -> list[frozenset[str]]:
    """What each question-and-image contributes: its answer, classes, length of text and sizes of boxes."""
    height, width = frames.pixels.shape[1:3]
    of_image = []
    for boxes, classes in zip(frames.boxes, frames.classes, strict=True):
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width)
        sizes = np.digitize(areas, BOX_BUCKETS)
        of_image.append({f"class {labels.classes[int(c)]}" for c in classes} | {f"size {int(s)}" for s in sizes})
    num_tokens = (questions.input_ids != 0).sum(1)
    return [
        frozenset(of_image[int(image)] | {f"answer {labels.answers[int(answer)]}", f"length {int(n) // TEXT_BUCKET}"})
        for image, answer, n in zip(questions.image_index, questions.answers, num_tokens, strict=True)
    ]


def choose(frames: Frames, questions: Questions, labels: Labels, *, num: int, seed: int) -> np.ndarray:
    """Indices of `num` questions, greedily: each adds most of what is rare or missing so far; one per image first.

    Args:
        frames, questions: of the training split.
        labels: names of answers and classes.
        num: at most so many (fewer if there are not enough questions).
        seed: order among equals.
    """
    features = traits(frames, questions, labels)
    order = np.random.default_rng(seed).permutation(len(features))
    chosen: list[int] = []
    counts: Counter[str] = Counter()
    images: Counter[int] = Counter()
    remaining = [int(i) for i in order]
    while remaining and len(chosen) < num:

        def gain(index: int) -> float:
            new = sum(1.0 / (1 + min(counts[t], TURNS)) ** 2 for t in features[index])
            return new - 0.5 * images[int(questions.image_index[index])]

        best = max(remaining, key=gain)  # the first of equals, in seeded order
        remaining.remove(best)
        chosen.append(best)
        counts.update(features[best])
        images[int(questions.image_index[best])] += 1
    return np.array(chosen, np.int64)


def coverage(frames: Frames, questions: Questions, labels: Labels, indices: np.ndarray) -> dict[str, float]:
    """Share of the answers, classes, text lengths and box sizes of the split that the chosen questions contain."""
    features = traits(frames, questions, labels)
    everything, chosen = frozenset().union(*features), frozenset().union(*(features[int(i)] for i in indices))
    shares = {}
    for name, kind in (
        ("answers", "answer "),
        ("classes", "class "),
        ("text_lengths", "length "),
        ("box_sizes", "size "),
    ):
        wanted = {trait for trait in everything if trait.startswith(kind)}
        shares[name] = round(len(wanted & chosen) / len(wanted), 4) if wanted else 1.0
    return shares


def freeze(
    frames: Frames,
    questions: Questions,
    indices: np.ndarray,
    labels: Labels,
    section: CalibrationSection,
    spec: PreprocessSpec,
    tokenizer: TokenizerSpec,
    dataset: str,
    out_dir: Path,
    provenance: Provenance,
    split: str = "train",
) -> CalibrationSet:
    """Write `calibration.npz` and its manifest.

    Raises:
        CalibrationError: too few samples, or not from the training split.
    """
    if split != "train":
        raise CalibrationError(
            f"Calibration samples come from '{split}'", "Take them from train: val and test must stay unseen"
        )
    if len(indices) < section.min_samples:
        raise CalibrationError(
            f"{len(indices)} calibration samples are too few (calibration.min_samples is {section.min_samples})",
            "Give more training data, or raise calibration.num_samples",
        )
    images = questions.image_index[indices]
    out_dir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out_dir / FILE,
        image=frames.pixels[images],
        input_ids=questions.input_ids[indices].astype(np.int32),
        texts=np.array([questions.texts[int(i)] for i in indices]),
    )
    manifest = CalibrationSet(
        provenance=provenance,
        dataset=dataset,
        split=split,
        sample_ids=tuple(f"{frames.ids[int(image)]}#{int(i)}" for image, i in zip(images, indices, strict=True)),
        preprocess_hash=spec.hash,
        tokenizer_hash=tokenizer.hash,
        coverage=coverage(frames, questions, labels, indices),
    )
    written = write_manifest(out_dir, manifest)
    assert isinstance(written, CalibrationSet)
    return written


def load(folder: Path, spec: PreprocessSpec, tokenizer: TokenizerSpec) -> tuple[CalibrationSet, dict[str, np.ndarray]]:
    """Open a frozen set for a model.

    Returns:
        The manifest, and `image` (K, H, W, 3) uint8, `input_ids` (K, L) int32, `texts` (K,).

    Raises:
        CalibrationError: missing, altered, or made with another preprocessing or vocabulary.
    """
    try:
        manifest = read_manifest(folder, CalibrationSet)
        with np.load(folder / FILE, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("image", "input_ids", "texts")}
    except (CheckpointError, OSError, KeyError, ValueError) as problem:
        what = problem.what if isinstance(problem, CheckpointError) else str(problem)
        raise CalibrationError(f"The calibration set {folder} cannot be used ({what})", "Make it again") from problem
    if manifest.preprocess_hash != spec.hash:
        raise CalibrationError(
            f"{folder} was preprocessed differently from the model", "Choose calibration samples again"
        )
    if manifest.tokenizer_hash != tokenizer.hash:
        raise CalibrationError(
            f"{folder} was encoded with another vocabulary than the model's", "Choose calibration samples again"
        )
    return manifest, arrays
