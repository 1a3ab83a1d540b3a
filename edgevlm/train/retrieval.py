"""Stage `retrieval`: fine-tune the matching head on captions and their images, and rank every pair or a shortlist."""

from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, Labels
from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError, RecipeError
from edgevlm.job import Job
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import RetrievalSection
from edgevlm.tasks import retrieval as task
from edgevlm.train.answering import freeze_extractor, save_answering
from edgevlm.train.captions import CaptionSplit, load_captions
from edgevlm.train.loop import Batch, fit
from edgevlm.train.regions import RegionSplit, cached_splits, image_ids
from edgevlm.train.start import fine_tuning_model

NUM_NEAR = 32
"""Images among which a hard negative is drawn."""


class MatchBatch(NamedTuple):
    """Pairs of a caption and an image (B, L, N as in RegionSplit)."""

    regions: Regions
    input_ids: Tensor
    fits: Tensor
    """(B,) int64: 1 where the caption belongs to the image."""


class MatchObjective(nn.Module):
    """Matching loss of pairs that fit and pairs that do not; the extractor stays as it is."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model
        freeze_extractor(model)

    def forward(self, batch: MatchBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits_B2 = task.match_logits(self.model, batch.regions, batch.input_ids)
        return task.match_loss(logits_B2, batch.fits), {"accuracy": (logits_B2.argmax(1) == batch.fits).float().mean()}


def caption_words(captions: CaptionSplit, tokenizer: Tokenizer) -> list[list[str]]:
    """Words of each caption, for the comparison with tags."""
    return [tokenizer.decode(row).split() for row in captions.input_ids.numpy()]


def pairs_batch(
    model: VLM, split: RegionSplit, captions: CaptionSplit, caption_B: Tensor, image_B: Tensor, fits_B: Tensor
) -> MatchBatch:
    """Chosen pairs as `model` sees them, cut to what is not padding in all of them."""
    input_ids = captions.input_ids[caption_B]
    length = int((input_ids != model.fusion.pad_id).sum(1).amax())
    regions = split.regions_of(image_B, model.config.tee.score_threshold)
    return MatchBatch(regions, input_ids[:, :length], fits_B)


@torch.no_grad()
def score_pairs(
    model: VLM, split: RegionSplit, captions: CaptionSplit, wanted_CI: np.ndarray, batch_size: int = 1024
) -> np.ndarray:
    """How well each wanted pair fits (C, I): logit of 'fits' minus logit of 'does not'; other pairs stay `UNSCORED`."""
    model.eval()
    device = next(model.fusion.parameters()).device
    scores_CI = np.full(wanted_CI.shape, task.UNSCORED, np.float32)
    # Neighbours of one length are padded least; block by block, for a list of all pairs of COCO 5K takes gigabytes.
    order_C = np.argsort((captions.input_ids != model.fusion.pad_id).sum(1).numpy(), kind="stable")
    per_block = max(1, 64 * batch_size // wanted_CI.shape[1])
    for first in range(0, len(order_C), per_block):
        block = order_C[first : first + per_block]
        row_P, image_P = wanted_CI[block].nonzero()
        for start in range(0, len(row_P), batch_size):
            chosen, images = block[row_P[start : start + batch_size]], image_P[start : start + batch_size]
            caption_B, image_B = torch.from_numpy(chosen), torch.from_numpy(images)
            batch = pairs_batch(model, split, captions, caption_B, image_B, torch.ones_like(caption_B))
            batch = send_to_device(batch, device)
            logits_B2 = task.match_logits(model, batch.regions, batch.input_ids)  # pyright: ignore
            scores_CI[chosen, images] = (logits_B2[:, 1] - logits_B2[:, 0]).float().cpu().numpy()
    return scores_CI


def tag_index(model: VLM, split: RegionSplit, labels: Labels, chunk: int = 4096) -> task.TagIndex:
    """The images of a split by what the detector sees in them."""
    words: list[list[str]] = []
    model.cpu()
    for images in torch.arange(len(split.scores)).split(chunk):
        regions = split.regions_of(images, model.config.tee.score_threshold)
        words += task.tag_words(model, regions, labels.classes, labels.attributes)
    return task.TagIndex(words)


def evaluate_retrieval(
    model: VLM, split: RegionSplit, captions: CaptionSplit, tags_CI: np.ndarray, section: RetrievalSection
) -> dict[str, float]:
    """Recalls of the model (all pairs, or a shortlist by tags that the model ranks again) and of the tags alone.

    Args:
        model: with the head `match`.
        split: the images.
        captions: of these images.
        tags_CI: how well each caption fits the tags of each image (`tag_index`).
        section: protocol.

    Returns:
        `tr@k`, `ir@k` over all images; `fold.*` where there are at least two folds (COCO: five of 1,000 images);
        `tags.*` for the baseline; `passes_per_caption` is what they cost: pairs that went through the fusion.
    """
    image_C, num_images = captions.image_index.numpy(), len(split.scores)
    by_caption = by_image = np.ones(tags_CI.shape, bool)
    if section.shortlist is not None:
        by_caption = task.shortlist(tags_CI, section.shortlist, axis=1)
        by_image = task.shortlist(tags_CI, section.shortlist, axis=0)
    if torch.cuda.is_available():
        model = model.cuda()
    scores_CI = score_pairs(model, split, captions, by_caption | by_image)
    image_scores, text_scores = (task.outside_shortlist(scores_CI, kept) for kept in (by_caption, by_image))
    metrics = task.recalls(image_scores, image_C, text_scores)
    if num_images >= 2 * section.fold_images and section.shortlist is None:
        folded = task.fold_recalls(scores_CI, image_C, section.fold_images)
        metrics |= {f"fold.{name}": value for name, value in folded.items()}
    metrics |= {f"tags.{name}": value for name, value in task.recalls(tags_CI, image_C).items()}
    return metrics | {"passes_per_caption": float((by_caption | by_image).sum() / len(image_C))}


def train_retrieval(job: Job) -> Checkpoint:
    """Fine-tune on one random negative per positive, and report recalls on every evaluation split.

    Raises:
        RecipeError: the recipe has no section `retrieval`.
        DataError: no captions, or a single image.
    """
    recipe, section = job.recipe, job.recipe.retrieval
    if section is None:
        raise RecipeError(
            f"Recipe {recipe.name} has no section 'retrieval'", "Add one, or start from minivlm-retrieval"
        )
    torch.manual_seed(recipe.seed + 5)
    model, manifest = fine_tuning_model(job, section, ("match",))
    split = RegionSplit.load(job.inputs["regions"], "train")
    if len(split.scores) < 2:
        raise DataError("Matching needs two images or more to train on", "Raise data.num_train")
    captions, near_IK = load_captions(job.inputs["regions"], "train"), None
    if section.hard_negatives:
        near_IK = torch.from_numpy(tag_index(model, split, manifest.labels).near_images(NUM_NEAR))

    def make_batch(rows: Tensor) -> Batch:
        wrong_captions, wrong_images = task.draw_negatives(
            captions.image_index, rows, recipe.seed, near_IK, section.hard_negatives
        )
        caption_B = torch.cat([rows, wrong_captions])
        image_B = torch.cat([captions.image_index[rows], wrong_images])
        fits_B = torch.cat([torch.ones_like(rows), torch.zeros_like(rows)])
        return {"batch": pairs_batch(model, split, captions, caption_B, image_B, fits_B)}

    fit(
        MatchObjective(model),
        len(captions.image_index),
        make_batch,
        section,
        what="retrieval",
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-retrieval",
        seed=recipe.seed + 5,
        reporter=job.reporter,
        names=lambda rows: image_ids(job.inputs["regions"], "train", captions.image_index[rows]),
    )
    tokenizer = Tokenizer(job.inputs["detector"] / VOCABULARY, manifest.tokenizer)
    metrics: dict[str, float] = {}
    for name in cached_splits(job.inputs["regions"]):
        if name == "train":
            continue
        split, captions = RegionSplit.load(job.inputs["regions"], name), load_captions(job.inputs["regions"], name)
        tags_CI = tag_index(model, split, manifest.labels).scores(caption_words(captions, tokenizer))
        rows = evaluate_retrieval(model, split, captions, tags_CI, section)
        metrics |= {f"{key}_{name}": value for key, value in rows.items()}
        shown = [f"{key} {rows[key]:.3f} (tags {rows[f'tags.{key}']:.3f})" for key in ("tr@1", "ir@1", "ir@10")]
        job.reporter.say(f"  retrieval, {name} ({len(split.scores)} images): {', '.join(shown)}")
    return save_answering(job, model, manifest, metrics)
