"""Draw which regions and words a trimmed model keeps, on test questions: the regions on the image, the words in the text.

python benchmarks/kept_tokens.py runs/scenes-tiny/trim --rung m37 --out kept.png [--data FOLDER] [--num 10]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from edgevlm.artifacts import VOCABULARY, Checkpoint, Rung
from edgevlm.data import open_reader
from edgevlm.data.frames import Questions, make_questions, materialise
from edgevlm.data.text import Tokenizer
from edgevlm.errors import TargetError, nearest
from edgevlm.models import vlm
from edgevlm.models.trimmer import Trim
from edgevlm.recipes import parse_recipe

KEPT, GONE = "#d6006c", "#8a8a8a"
IMAGES = 60
"""Test images that the questions are spread over."""


def main() -> None:
    """Read the command line, ask, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the stage trim")
    parser.add_argument("--rung", help="default: the smallest")
    parser.add_argument("--num", type=int, default=10)
    parser.add_argument("--data", help="folder of the dataset, if it has one")
    parser.add_argument("--out", type=Path, required=True, help="picture, .png or .svg")
    arguments = parser.parse_args()
    model, manifest = vlm.load(arguments.checkpoint)
    rung = chosen(manifest, arguments.rung)
    pixels, questions, words = asked(arguments.checkpoint, manifest, arguments.data, arguments.num)
    images = torch.from_numpy(pixels[questions.image_index]).permute(0, 3, 1, 2).float()
    ids = torch.from_numpy(questions.input_ids)
    with torch.no_grad():
        regions = model.encode(images)
        masked = Trim(rung.num_words, rung.num_regions, rung.words, rung.regions, temperature=1.0)
        answer = model.answer(regions, ids, masked)
    last = answer.fusion.trimmings[-1]
    kept_words, kept_regions = (x.round().bool().numpy() for x in (last.words_BL, last.regions_BN))
    referred = share_of_words(kept_words, ids.numpy(), manifest)
    print(
        f"rung {rung.name}: {kept_regions.sum(1).mean():.1f} regions and {referred:.0%} of the words kept, "
        f"{np.mean(answer.logits_BA.argmax(1).numpy() == questions.answers):.0%} of {len(questions)} answered rightly"
    )
    boxes = regions.boxes_norm_BN4.numpy() * np.array([images.shape[3], images.shape[2]] * 2)
    valid = model.valid(regions).bool().numpy()[:, : kept_regions.shape[1]]
    answers = [manifest.labels.answers[i] for i in answer.logits_BA.argmax(1)]
    draw(pixels[questions.image_index], boxes, valid, kept_regions, words, kept_words, answers, arguments.out)
    print(arguments.out)


def chosen(manifest: Checkpoint, name: str | None) -> Rung:
    """A rung by name, or the smallest."""
    rungs = {rung.name: rung for rung in manifest.rungs}
    if not rungs:
        raise TargetError("This checkpoint was never trimmed", "Give the folder of the stage trim")
    if name is not None and name not in rungs:
        raise TargetError(f"No rung '{name}'", f"{nearest(name, rungs)} It has: {', '.join(rungs)}")
    return rungs[name or list(rungs)[-1]]


def asked(
    checkpoint: Path, manifest: Checkpoint, data: str | None, num: int
) -> tuple[np.ndarray, Questions, list[list[str]]]:
    """Images, questions spread over them, and the pieces of every text."""
    recipe = parse_recipe(manifest.provenance.recipe, str(checkpoint))
    reader = open_reader(recipe.data, recipe.task, recipe.seed, data)
    frames = materialise(reader, "test", IMAGES, recipe.preprocess)
    tokenizer = Tokenizer(checkpoint / VOCABULARY, manifest.tokenizer)
    questions = make_questions(frames, tokenizer, manifest.labels).known().spread(num)
    words = [[tokenizer.tokens[i] for i in ids] for ids in questions.input_ids]
    return frames.pixels, questions, words


def share_of_words(kept_BL: np.ndarray, ids_BL: np.ndarray, manifest: Checkpoint) -> float:
    """Of the words that a text has."""
    there = (ids_BL != manifest.tokenizer.pad_id)[:, : kept_BL.shape[1]]
    return float((kept_BL & there).sum() / there.sum())


def draw(
    images: np.ndarray,
    boxes: np.ndarray,
    valid: np.ndarray,
    kept_regions: np.ndarray,
    words: list[list[str]],
    kept_words: np.ndarray,
    answers: list[str],
    out: Path,
) -> None:
    """One panel per question, two in a row."""
    figure = Figure(figsize=(12, 2.9 * ((len(images) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(images) + 1) // 2, 2, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for i, axes in enumerate(panels[: len(images)]):
        axes.imshow(images[i])
        for box, there, stays in zip(boxes[i], valid[i], kept_regions[i], strict=False):
            if there:
                colour, width = (KEPT, 2.0) if stays else (GONE, 0.8)
                size = box[2] - box[0], box[3] - box[1]
                axes.add_patch(Rectangle(box[:2], *size, fill=False, edgecolor=colour, linewidth=width))
        shown = [w if stays else f"({w})" for w, stays in zip(words[i], kept_words[i], strict=False) if w != "[PAD]"]
        text = " ".join(w for w in shown if "[CLS]" not in w and "[SEP]" not in w)
        axes.set_title(f"{text}\n→ {answers[i]}", fontsize=8, wrap=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
