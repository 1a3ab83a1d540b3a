"""Which validation questions choose, and which are held out to test what was chosen: two halves that share no image.

Whoever chooses on the validation split (rungs of a ladder, the path through a governor's thresholds) looks at one half, so
that the other still tells how good the choice is.
"""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from edgevlm.train.regions import RegionSplit, image_ids

Unit = Literal["image", "text"]
"""What is drawn independently: images with all their questions, or texts with all the images they are about (NLVR)."""


def units_of(folder: Path, name: str, split: RegionSplit, unit: Unit = "image") -> np.ndarray:
    """Name of each question's unit, (Q,) str: the sample id of its image, or its token ids.

    Args:
        folder: the region cache that `split` was loaded from.
        name: of the split.
        split: its questions.
        unit: what is a unit.
    """
    if unit == "image":
        ids = np.array(image_ids(folder, name, torch.arange(int(split.image_index.max()) + 1)))
        return ids[split.image_index.numpy()]
    return np.array([" ".join(map(str, row)) for row in split.input_ids.tolist()])


def held_out(units_Q: np.ndarray) -> np.ndarray:
    """Which questions are held out, (Q,) bool: those of about half of the units, by a hash of the unit's name alone.

    So a unit stays in its half when others are added, and in every run.
    """
    halves = {name: hashlib.sha256(f"held out {name}".encode()).digest()[0] % 2 == 1 for name in np.unique(units_Q)}
    return np.array([halves[name] for name in units_Q], bool)
