"""Data: one reader per dataset, all yielding `Sample`; one place for images, one for text.

To add a dataset, write a module with a class that offers `Reader` (see `sample.py`) and add one line to `READERS`.
"""

from collections.abc import Callable
from pathlib import Path

from edgevlm.data.problems import Problems
from edgevlm.data.sample import Reader, Sample, Text
from edgevlm.errors import DataError, RecipeError, nearest
from edgevlm.recipe import DataSection

__all__ = ["READERS", "Reader", "Sample", "Text", "open_reader"]


def _folder(section: DataSection) -> str:
    if section.path is None:
        raise DataError(
            f"Dataset {section.dataset} needs a folder",
            "Pass --data, or set data.path (docs/data.md says how to make one)",
        )
    return section.path


def _scenes(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.scenes import Scenes

    return Scenes(task, seed, section.texts_per_image, section.captions_per_image)


def _coco(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.coco import Coco

    return Coco(Path(_folder(section)), task, section.annotations, section.images, section.on_bad)


def _nlvr(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.nlvr import NLVR

    return NLVR(Path(_folder(section)), task, seed, problems=Problems(section.on_bad))


def _nlvr2(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.nlvr2 import NLVR2

    return NLVR2(_folder(section), task, Problems(section.on_bad))


def _vsr(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.vsr import VSR

    return VSR(_folder(section), task, Problems(section.on_bad))


def _questions(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.vqa import VisualQuestions
    from edgevlm.data.vqa_files import LAYOUTS

    layout = LAYOUTS[section.dataset]
    return VisualQuestions(_folder(section), task, layout, section.answers, Problems(section.on_bad))


def _snli_ve(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.entailment import SNLIVE

    return SNLIVE(_folder(section), task, Problems(section.on_bad))


def _flickr30k(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.flickr30k import Flickr30k

    return Flickr30k(_folder(section), task, Problems(section.on_bad))


def _visual_genome(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.visual_genome import VisualGenome

    return VisualGenome(_folder(section), task, Problems(section.on_bad))


def _conceptual(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.conceptual import ConceptualCaptions

    return ConceptualCaptions(_folder(section), task, Problems(section.on_bad))


def _jsonl(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.jsonl import JsonLines

    return JsonLines(_folder(section), task, Problems(section.on_bad))


READERS: dict[str, Callable[[DataSection, str, int], Reader]] = {
    "scenes": _scenes,
    "jsonl": _jsonl,
    "coco": _coco,
    "nlvr": _nlvr,
    "nlvr2": _nlvr2,
    "vsr": _vsr,
    "vqav2": _questions,
    "vqa-rad": _questions,
    "gqa": _questions,
    "visual-genome-qa": _questions,
    "visual-genome": _visual_genome,
    "snli-ve": _snli_ve,
    "flickr30k": _flickr30k,
    "conceptual-captions": _conceptual,
}
"""Dataset name of the recipe -> function that opens it for a task and a seed."""


def open_reader(section: DataSection, task: str, seed: int, path: str | None = None) -> Reader:
    """The reader that a recipe names; `path` (from the command line) wins over the recipe's.

    Raises:
        RecipeError: no such dataset, or the dataset does not offer the task.
        DataError: the folder is not given, or incomplete.
    """
    if section.dataset not in READERS:
        hint = nearest(section.dataset, READERS)
        raise RecipeError(f"No dataset '{section.dataset}'", f"{hint} Known datasets: {', '.join(READERS)}".strip())
    if path is not None:
        section = section.model_copy(update={"path": path})
    return READERS[section.dataset](section, task, seed)
