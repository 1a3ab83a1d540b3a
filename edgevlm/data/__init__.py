"""Data: one reader per dataset, all yielding `Sample`; one place for images, one for text.

To add a dataset, write a module with a class that offers `Reader` (see `sample.py`) and add one line to `READERS`.
"""

from collections.abc import Callable
from pathlib import Path

from edgevlm.data.sample import Reader, Sample, Text
from edgevlm.errors import DataError, RecipeError, nearest
from edgevlm.recipe import DataSection

__all__ = ["READERS", "Reader", "Sample", "Text", "open_reader"]


def _scenes(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.scenes import Scenes

    return Scenes(task, seed, section.texts_per_image, section.captions_per_image)


def _nlvr(section: DataSection, task: str, seed: int) -> Reader:
    from edgevlm.data.nlvr import NLVR

    if section.path is None:
        raise DataError(
            "Dataset nlvr needs a folder", "Pass --data, or set data.path (docs/data.md says how to make one)"
        )
    return NLVR(Path(section.path), task, seed)


READERS: dict[str, Callable[[DataSection, str, int], Reader]] = {"scenes": _scenes, "nlvr": _nlvr}
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
