"""The captions of a split beside its cached regions: encoded once, in `captions/<split>.safetensors`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError

FOLDER = "captions"


@dataclass(frozen=True)
class CaptionSplit:
    """The captions of a split, C in all."""

    image_index: Tensor
    """(C,) int64 into the images of the region cache, rising."""
    input_ids: Tensor
    """(C, L) int32: [CLS] caption [SEP] and padding."""


def save_captions(folder: Path, split: str, captions: Sequence[Sequence[str]], tokenizer: Tokenizer) -> None:
    """Encode the captions of each image and write them; what is too long is cut. Without captions nothing is written.

    Args:
        folder: of the region cache.
        split: name of the split.
        captions: per image, in the cache's order.
        tokenizer: of the checkpoint that the regions come from.
    """
    flat = [(image, caption) for image, several in enumerate(captions) for caption in several]
    if not flat:
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    tensors = {
        "image_index": torch.tensor([image for image, _ in flat]),
        "input_ids": torch.from_numpy(tokenizer.encode_batch([caption for _, caption in flat], truncate=True)),
    }
    save_file(tensors, folder / FOLDER / f"{split}.safetensors")


def load_captions(folder: Path, split: str) -> CaptionSplit:
    """The captions of a split.

    Raises:
        DataError: the dataset has none for it.
    """
    path = folder / FOLDER / f"{split}.safetensors"
    if not path.is_file():
        raise DataError(f"Split '{split}' has no captions ({path} is missing)", "Choose a dataset with captions")
    return CaptionSplit(**load_file(path))


def fit_captions(input_ids_CL: Tensor, length: int, sep_id: int) -> Tensor:
    """Captions in exactly `length` places, (C, length); the last token of what is cut becomes [SEP]."""
    cut_CL = input_ids_CL[:, :length].clone()
    if input_ids_CL.shape[1] > length:
        ends_inside_C = (cut_CL == sep_id).any(1)
        cut_CL[~ends_inside_C, -1] = sep_id
    return cut_CL
