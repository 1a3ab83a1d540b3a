"""Stage `pretrain`: the fusion learns from captions and tags on cached regions, before any task (MiniVLM, section 3)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, RegionCache, TokenizerSpec
from edgevlm.data.text import Tokenizer
from edgevlm.errors import CheckpointError, DataError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import PretrainSection
from edgevlm.tasks import pretraining as task
from edgevlm.tasks.distillation import logit_loss
from edgevlm.tasks.pretraining import PretrainBatch
from edgevlm.train.answering import freeze_extractor, with_fusion
from edgevlm.train.batches import generator_of
from edgevlm.train.captions import fit_captions, load_captions
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import fit
from edgevlm.train.regions import RegionSplit, image_ids
from edgevlm.train.tags import own_tags, stronger_tags
from edgevlm.train.teachers import open_live
from edgevlm.train.warm_start import warm_start

HEADS = ("words", "match")
EVALUATED = 4096
"""Captions of an evaluation split at most: the metrics are for watching, and their error is below one point."""


@dataclass(frozen=True)
class Pairs:
    """Captions of a split with the regions and tags of their images; C captions."""

    split: RegionSplit
    image_index: Tensor
    """(C,) rising."""
    captions: Tensor
    """(C, Lc)."""
    tags: Tensor
    """(I, Lt)."""
    tokenizer: TokenizerSpec

    def batch(self, rows: Tensor, section: PretrainSection, score_threshold: float, seed: int) -> PretrainBatch:
        """The captions `rows`, masked and mixed; a function of the rows and the seed alone."""
        generator = generator_of(rows, seed)
        images = self.image_index[rows]
        own = self.captions[rows], self.tags[images]
        masked, targets = task.mask_words(
            torch.cat(own, dim=1), self.tokenizer, generator, share=section.mask_share, most=section.max_masked
        )
        others = task.other_captions(self.image_index, rows, generator)
        mixed, fits = task.mix_texts(
            own,
            (self.captions[others], self.tags[self.image_index[others]]),
            generator,
            replaced_tags=section.replaced_tags,
            replaced_captions=section.replaced_captions,
        )
        regions = self.split.regions_of(images, score_threshold)
        best = Regions(*(part[:, : section.num_regions] for part in regions))
        return PretrainBatch(best, masked, targets, mixed, fits)


class PretrainObjective(nn.Module):
    """Masked words plus matching; only what the two pass through has gradients.

    With a teacher, the student also imitates its guesses of the words and of whether the text fits (EfficientVLM's
    general distillation, logits alone).
    """

    def __init__(self, model: VLM, section: PretrainSection, teacher: VLM | None = None) -> None:
        super().__init__()
        self.model, self.section = model, section
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]  # a list: not in snapshots
        freeze_extractor(model)
        for unused in (model.head, model.referred):
            unused.requires_grad_(False)

    def forward(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits_MV, targets_M = task.word_logits(self.model, batch, self.section.caption_tokens, self.section.seq2seq)
        words = task.word_loss(logits_MV, targets_M)
        logits_B2 = task.match_logits(self.model, batch, self.section.caption_tokens)
        match = task.match_loss(logits_B2, batch.fits)
        accuracy = (logits_B2.argmax(1) == batch.fits).float().mean()
        logs = {"words": words.detach(), "match": match.detach(), "match_accuracy": accuracy}
        if not self._teacher:
            return words + match, logs
        teacher = self._teacher[0].to(logits_B2.device)
        with torch.no_grad():
            words_MV, _ = task.word_logits(teacher, batch, self.section.caption_tokens, self.section.seq2seq)
            match_B2 = task.match_logits(teacher, batch, self.section.caption_tokens)
        imitation = logit_loss(logits_MV, words_MV) + logit_loss(logits_B2, match_B2)
        weight = self.section.kd_weight
        return (1 - weight) * (words + match) + weight * imitation, {**logs, "kd": imitation.detach()}


def load_pairs(job: Job, model: VLM, manifest: Checkpoint, split_name: str) -> Pairs:
    """Captions, tags and regions of a split.

    Raises:
        DataError: no captions, or captions of one image only: there is nothing to tell apart.
    """
    section = _section(job)
    tokenizer = Tokenizer(job.inputs["detector"] / VOCABULARY, manifest.tokenizer)
    split = RegionSplit.load(job.inputs["regions"], split_name)
    captions = load_captions(job.inputs["regions"], split_name)
    if len(captions.image_index.unique()) < 2:
        raise DataError(f"Split '{split_name}' has captions of one image only", "Raise data.num_train and data.num_val")
    settings = {"length": section.tag_tokens, "min_score": section.tag_confidence}
    if section.tagger is not None:
        tags = stronger_tags(Path(section.tagger), job, split_name, len(split.scores), tokenizer, **settings)
    else:
        tags = own_tags(model.tee, split, manifest.labels.classes, tokenizer, **settings)
    fitted = fit_captions(captions.input_ids, section.caption_tokens, manifest.tokenizer.sep_id)
    return Pairs(split, captions.image_index, fitted, tags, manifest.tokenizer)


@torch.no_grad()
def evaluate_pretraining(model: VLM, pairs: Pairs, section: PretrainSection, batch_size: int = 512) -> dict[str, float]:
    """What a held-out split says: loss (nats) and accuracy on masked words, accuracy of matching and of its majority.

    The masked words are the same at every call.
    """
    model.eval()
    device = next(model.fusion.parameters()).device
    loss = right = masked = matched = fitting = 0.0
    number = min(EVALUATED, len(pairs.captions))
    for rows in torch.linspace(0, len(pairs.captions) - 1, number).long().split(batch_size):
        batch = pairs.batch(rows, section, model.config.tee.score_threshold, seed=0)
        batch = PretrainBatch(*send_to_device(batch, device))  # pyright: ignore[reportArgumentType]
        logits_MV, targets_M = task.word_logits(model, batch, section.caption_tokens, section.seq2seq)
        loss += float(task.word_loss(logits_MV, targets_M)) * len(targets_M)
        right += float((logits_MV.argmax(1) == targets_M).sum())
        masked += len(targets_M)
        matched += float((task.match_logits(model, batch, section.caption_tokens).argmax(1) == batch.fits).sum())
        fitting += float(batch.fits.sum())
    masked = max(1.0, masked)
    return {
        "word_loss": loss / masked,
        "word_accuracy": right / masked,
        "match_accuracy": matched / number,
        "match_majority": max(fitting, number - fitting) / number,
    }


def load_teacher(section: PretrainSection, detector: VLM, manifest: Checkpoint) -> VLM | None:
    """The pre-trained teacher that the section names.

    Raises:
        CheckpointError: no checkpoint, one that does not fit the run, or one without the heads of pre-training.
    """
    if section.teacher is None:
        return None
    teacher, theirs = open_live(Path(section.teacher), detector, manifest)
    if missing := [head for head in HEADS if head not in theirs.model.heads]:
        raise CheckpointError(
            f"The teacher in {section.teacher} has no head '{missing[0]}'", "Give a checkpoint of the stage `pretrain`"
        )
    return teacher


def check_pretraining(section: PretrainSection, max_tokens: int) -> None:
    """Raise RecipeError where the text does not fit the model's positions."""
    needed = section.caption_tokens + section.tag_tokens
    if needed > max_tokens:
        raise RecipeError(
            f"Pre-training needs {needed} text tokens (caption {section.caption_tokens}, tags {section.tag_tokens}), "
            f"the model takes {max_tokens}",
            f"Set text.max_tokens to {needed} or more, or lower pretrain.caption_tokens",
        )


def pretrain(job: Job) -> Checkpoint:
    """Train fusion and heads on captions and tags; the tasks' fusions start from it (`train/warm_start.py`).

    Raises:
        RecipeError: the recipe has no section `pretrain`, or texts do not fit.
        DataError: the dataset has no captions.
        CheckpointError: the teacher does not fit.
    """
    recipe, section = job.recipe, _section(job)
    detector, manifest = vlm.load(job.inputs["detector"])
    check_pretraining(section, manifest.tokenizer.max_tokens)
    torch.manual_seed(recipe.seed + 5)
    model = with_fusion(detector, manifest, resolve_fusion(section.fusion), heads=HEADS)
    if section.start is not None:
        vocabulary = job.inputs["detector"] / VOCABULARY
        warm_start(model, section.start, vocabulary, manifest.tokenizer, job.reporter)
    teacher = load_teacher(section, detector, manifest)
    pairs = load_pairs(job, model, manifest, "train")
    fit(
        PretrainObjective(model, section, teacher),
        len(pairs.captions),
        lambda rows: {"batch": pairs.batch(rows, section, model.config.tee.score_threshold, recipe.seed)},
        section,
        what="pretrain",
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-pretrain",
        seed=recipe.seed + 5,
        reporter=job.reporter,
        names=lambda rows: image_ids(job.inputs["regions"], "train", pairs.image_index[rows]),
    )
    metrics: dict[str, float] = {}
    cache = read_manifest(job.inputs["regions"], RegionCache, check_files=False)
    for name in (name for name in cache.num_images if name != "train"):
        found = evaluate_pretraining(model, load_pairs(job, model, manifest, name), section)
        metrics |= {f"{metric}_{name}": value for metric, value in found.items()}
        job.reporter.say(
            f"  pretrain, {name}: masked words {found['word_accuracy']:.3f} right ({found['word_loss']:.2f} nats), "
            f"matching {found['match_accuracy']:.3f} right (majority {found['match_majority']:.3f})"
        )
    changes = {"provenance": job.provenance, "model": model.config, "task": "pretraining", "metrics": metrics}
    return save_checkpoint(
        job.out_dir, model.cpu(), job.inputs["detector"] / VOCABULARY, manifest.model_copy(update=changes)
    )


def _section(job: Job) -> PretrainSection:
    if job.recipe.pretrain is None:
        raise RecipeError(f"Recipe {job.recipe.name} has no section 'pretrain'", "Add one (docs/pretraining.md)")
    return job.recipe.pretrain
