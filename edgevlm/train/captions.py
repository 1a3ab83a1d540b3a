"""The captions of a split beside its cached regions: encoded once, in `<split>/captions-00000.safetensors` and so on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError


@dataclass(frozen=True)
class CaptionSplit:
    """The captions of a split, C in all."""

    image_index: Tensor
    """(C,) int64 into the images of the region cache, rising."""
    input_ids: Tensor
    """(C, L) int32: [CLS] caption [SEP] and padding."""


def save_captions(
    folder: Path, split: str, shard: int, captions: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> None:
    """Encode the captions of a shard's images and write them; what is too long is cut.

    Args:
        folder: of the region cache.
        split: name of the split.
        shard: of the region cache, which has the same images.
        captions: per image, in the cache's order.
        tokenizer: of the checkpoint that the regions come from.
    """
    flat = [(image, caption) for image, several in enumerate(captions) for caption in several]
    (folder / split).mkdir(parents=True, exist_ok=True)
    tensors = {
        "image_index": torch.tensor([image for image, _ in flat], dtype=torch.int64),
        "input_ids": torch.from_numpy(tokenizer.encode_batch([caption for _, caption in flat], truncate=True)),
    }
    save_file(tensors, folder / split / f"captions-{shard:05}.safetensors", {"num_images": str(len(captions))})


def load_captions(folder: Path, split: str) -> CaptionSplit:
    """The captions of a split.

    Raises:
        DataError: the dataset has none for it.
    """
    parts: list[CaptionSplit] = []
    first = 0
    for path in sorted((folder / split).glob("captions-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts.append(CaptionSplit(file.get_tensor("image_index") + first, file.get_tensor("input_ids")))
            first += int(file.metadata()["num_images"])
    if not any(len(part.image_index) for part in parts):
        raise DataError(f"Split '{split}' has no captions in {folder}", "Choose a dataset with captions")
    return CaptionSplit(torch.cat([part.image_index for part in parts]), torch.cat([part.input_ids for part in parts]))


def fit_captions(input_ids_CL: Tensor, length: int, sep_id: int) -> Tensor:
    """Captions in exactly `length` places, (C, length); the last token of what is cut becomes [SEP]."""
    cut_CL = input_ids_CL[:, :length].clone()
    if input_ids_CL.shape[1] > length:
        ends_inside_C = (cut_CL == sep_id).any(1)
        cut_CL[~ends_inside_C, -1] = sep_id
    return cut_CL
