"""Tags: the class names of the regions a detector is sure of, as word pieces behind a caption (OSCAR, MiniVLM).

Pre-training may take them from a stronger detector than the model's own (MiniVLM's tagger); nothing else ever needs
that detector.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgevlm.artifacts import TokenizerSpec
from edgevlm.data import open_reader
from edgevlm.data.frames import materialise
from edgevlm.data.text import Tokenizer, split_pieces
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.tee import TEE
from edgevlm.train.regions import RegionSplit

CHUNK = 4096
"""Images whose features are looked at together."""


def tag_ids(
    classes_IN: Tensor,
    scores_IN: Tensor,
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    min_score: float,
) -> Tensor:
    """Each image's tags, best first and each once, then [SEP] and padding; (I, length) int32.

    Args:
        classes_IN, scores_IN: of each image's regions, best score first.
        names: of the classes.
        tokenizer: cuts the names.
        length: places; a name that does not fit whole is left out, and so are the ones behind it.
        min_score: regions below are not tagged.
    """
    spec: TokenizerSpec = tokenizer.spec
    pieces = split_pieces(tokenizer.tokens, names, lowercase=spec.lowercase)
    ids_IT = torch.full((len(classes_IN), length), spec.pad_id, dtype=torch.int32)
    sure_IN = (scores_IN >= min_score).tolist()
    for row, classes, sure in zip(ids_IT, classes_IN.tolist(), sure_IN, strict=True):
        tags: list[int] = []
        for index in dict.fromkeys(c for c, s in zip(classes, sure, strict=True) if s):
            if len(tags) + len(pieces[index]) + 1 > length:
                break
            tags += pieces[index]
        row[: len(tags) + 1] = torch.tensor([*tags, spec.sep_id], dtype=torch.int32)
    return ids_IT


@torch.no_grad()
def region_classes(tee: TEE, features_IND: Tensor) -> Tensor:
    """Best class of each region, (I, N) int64 on the CPU: a region's feature is what the box head's classifier reads."""
    return tee.box_head.classes(features_IND.to(tee.anchors.device))[..., :-1].argmax(-1).cpu()


def own_tags(tee: TEE, split: RegionSplit, names: Sequence[str], tokenizer: Tokenizer, **settings: float) -> Tensor:
    """Tags (I, T) from the cached regions of a split; `settings` as in `tag_ids`."""
    chunks = torch.arange(len(split.scores)).split(CHUNK)
    classes = torch.cat([region_classes(tee, split.features[rows]) for rows in chunks])
    return tag_ids(classes, split.scores, names, tokenizer, **settings)  # pyright: ignore[reportArgumentType]


def stronger_tags(
    folder: Path, job: Job, split: str, num_images: int, tokenizer: Tokenizer, **settings: float
) -> Tensor:
    """Tags (I, T) of the first images of a split by the detector in `folder`, which has its own size and classes.

    Raises:
        CheckpointError: no checkpoint in `folder`.
    """
    tagger, manifest = vlm.load(folder)
    tee = tagger.tee.to("cuda" if torch.cuda.is_available() else "cpu")
    recipe = job.recipe
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    with job.reporter.bar(f"tagging {split} images", num_images) as bar:
        frames = materialise(reader, split, num_images, manifest.preprocess, progress=lambda done, _: bar.update(done))
    classes, scores = [], []
    for pixels in torch.from_numpy(frames.pixels).split(64):
        with torch.no_grad():
            regions = tee(pixels.to(tee.anchors.device).permute(0, 3, 1, 2).float())
        classes.append(region_classes(tee, regions.features_BND))
        scores.append(regions.scores_BN.cpu())
    names = manifest.labels.classes
    return tag_ids(torch.cat(classes), torch.cat(scores), names, tokenizer, **settings)  # pyright: ignore[reportArgumentType]
