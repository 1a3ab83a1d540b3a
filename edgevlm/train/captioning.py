"""Stage `captioning`: train the fusion to caption images from cached regions and tags, and score what it says."""

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from edgevlm import processes
from edgevlm.artifacts import VOCABULARY, Checkpoint, TokenizerSpec
from edgevlm.data import open_reader
from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError, RecipeError
from edgevlm.job import Job
from edgevlm.models.decoding import beam_search, greedy, read_context
from edgevlm.models.tee import TEE, Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import CaptionSection, TrainSection
from edgevlm.tasks.caption_metrics import score_captions
from edgevlm.tasks.captioning import (
    CaptionBatch,
    CaptionObjective,
    SelfCritical,
    choose_masked,
    nearest_by_tags,
    reward_words,
)
from edgevlm.tasks.cider import CiderD
from edgevlm.train.batches import generator_of
from edgevlm.train.captions import fit_captions, load_captions
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import fit
from edgevlm.train.regions import RegionSplit, cached_splits, image_ids
from edgevlm.train.start import fine_tuning_model
from edgevlm.train.tags import own_tags, region_classes

RESULTS = "captions_{split}.json"
"""What the model says of the images of a split, in the format of COCO's results."""
CHUNK = 4096
"""Images whose features are looked at together."""
SEEN_AS = 0.5
"""An attribute of at least this probability belongs to the description of a region."""


@dataclass(frozen=True)
class CaptionSplit:
    """One split: regions and tags of I images, and Q captions."""

    cache: RegionSplit
    tag_ids: Tensor
    """(I, G) int32: tags, [SEP] and padding."""
    image_index: Tensor
    """(Q,) image of each caption."""
    caption_ids: Tensor
    """(Q, num_caption) int32: [CLS] caption [SEP] and padding."""

    def batch(self, rows: Tensor, score_threshold: float, spec: TokenizerSpec, share: float, most: int) -> CaptionBatch:
        """Captions `rows` with the context of their images; which words are masked depends on the rows alone."""
        images, captions = self.image_index[rows], self.caption_ids[rows]
        masked = choose_masked(captions, spec, share, most, generator_of(rows))
        regions, tag_ids = self.context(images, score_threshold, spec.pad_id)
        return CaptionBatch(regions, torch.cat([captions, tag_ids], dim=1), masked, images)

    def context(self, images: Tensor, score_threshold: float, pad_id: int) -> tuple[Regions, Tensor]:
        """Regions and tags of images, without what is padding in all of them (it comes last)."""
        num_tags = int((self.tag_ids[images] != pad_id).any(0).sum())
        return self.cache.regions_of(images, score_threshold), self.tag_ids[images, :num_tags]


def train_captioner(job: Job) -> Checkpoint:
    """Cross-entropy on masked words, then CIDEr itself if the recipe says so; metrics on every evaluation split."""
    section = caption_section(job)
    torch.manual_seed(job.recipe.seed + 1)
    model, manifest = fine_tuning_model(job, section, ("words",))
    tee = copy.deepcopy(model.tee)  # names tags on the CPU, wherever the model goes
    tokenizer = Tokenizer(job.inputs["prepare"] / VOCABULARY, manifest.tokenizer)
    train = load_split(job, tee, manifest, section, tokenizer, "train")
    objective = CaptionObjective(
        model, manifest.tokenizer, section.num_caption, section.label_smoothing, section.every_word
    )
    _fit(job, objective, section, train, "captioner", torch.arange(len(train.caption_ids)))
    if section.self_critical is not None:
        criticise(job, model, section, train, tokenizer)
    # Only the main process writes the checkpoint: the others need no metrics.
    metrics = evaluate(job, model, tee, manifest, section, train, tokenizer) if processes.is_main() else {}
    changes = {"provenance": job.provenance, "model": model.config, "task": "captioning", "metrics": metrics}
    vocabulary = job.inputs["prepare"] / VOCABULARY
    return save_checkpoint(job.out_dir, model.cpu(), vocabulary, manifest.model_copy(update=changes))


def caption_section(job: Job) -> CaptionSection:
    """The recipe's section.

    Raises:
        RecipeError: there is none, or caption and tags do not fit into `text.max_tokens`.
    """
    section = job.recipe.captioning
    if section is None:
        raise RecipeError(f"Recipe {job.recipe.name} has no section 'captioning'", "Add it (docs/recipes.md)")
    if section.num_caption + section.num_tags > job.recipe.text.max_tokens:
        raise RecipeError(
            f"captioning.num_caption + num_tags is {section.num_caption + section.num_tags}, "
            f"but text.max_tokens is {job.recipe.text.max_tokens}",
            "Raise text.max_tokens, or lower one of the two",
        )
    return section


def criticise(job: Job, model: VLM, section: CaptionSection, train: CaptionSplit, tokenizer: Tokenizer) -> None:
    """Self-critical training on the images of the training split."""
    assert section.self_critical is not None
    references: list[list[list[str]]] = [[] for _ in range(len(train.tag_ids))]
    for image, ids in zip(train.image_index.tolist(), train.caption_ids.tolist(), strict=True):
        references[image].append(reward_words(tokenizer, ids))
    objective = SelfCritical(
        model,
        tokenizer,
        CiderD(references),
        section.num_caption,
        section.self_critical.num_samples,
        section.max_words,
    )
    # One row per image: all captions of an image are the references of whatever is drawn for it.
    rows = first_rows(train.image_index)
    _fit(job, objective, section.self_critical, train, "captioner-cider", rows)


def first_rows(image_index: Tensor) -> Tensor:
    """Row of the first caption of every image that has one; `image_index` rises."""
    return torch.cat([torch.ones(1, dtype=torch.bool), image_index[1:] != image_index[:-1]]).nonzero().flatten()


def _fit(
    job: Job,
    objective: CaptionObjective | SelfCritical,
    how: TrainSection,
    train: CaptionSplit,
    what: str,
    rows: Tensor,
) -> None:
    section, model, spec = caption_section(job), objective.model, objective.spec
    masking = (section.mask_share, section.max_masked)
    fit(
        objective,
        len(rows),
        lambda chosen: {"batch": train.batch(rows[chosen], model.config.tee.score_threshold, spec, *masking)},
        how,
        what=what,
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-{what}",
        seed=job.recipe.seed + 1,
        reporter=job.reporter,
        names=lambda chosen: image_ids(job.inputs["regions"], "train", train.image_index[rows[chosen]]),
    )


# --- evaluation --------------------------------------------------------------------------------------------------


def evaluate(
    job: Job,
    model: VLM,
    tee: TEE,
    manifest: Checkpoint,
    section: CaptionSection,
    train: CaptionSplit,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Caption every evaluation split; metrics per split, beside those of the training caption nearest by tags."""
    metrics: dict[str, float] = {}
    classes, attributes = manifest.labels.classes, manifest.labels.attributes
    rows = first_rows(train.image_index)
    found = describe(tee, train.cache, classes, attributes, section.tag_confidence)
    known = [found[image] for image in train.image_index[rows].tolist()]
    known_captions = [tokenizer.decode(train.caption_ids[row].tolist()) for row in rows.tolist()]
    for name in cached_splits(job.inputs["regions"]):
        if name == "train":
            continue
        split = load_split(job, tee, manifest, section, tokenizer, name)
        samples = read_captions(job, name, len(split.tag_ids))
        found = describe(tee, split.cache, classes, attributes, section.tag_confidence)
        nearest = nearest_by_tags(found, known)
        references: dict[str, tuple[str, ...]] = {}
        said: dict[str, str] = {}
        borrowed: dict[str, str] = {}
        for (sample_id, captions), caption, index in zip(
            samples, say(model, split, section, tokenizer), nearest, strict=True
        ):
            if captions:
                references[sample_id], said[sample_id] = captions, caption
                borrowed[sample_id] = known_captions[index]
        results = [{"image_id": sample_id, "caption": caption} for sample_id, caption in said.items()]
        (job.out_dir / RESULTS.format(split=name)).write_text(json.dumps(results, indent=1) + "\n")
        scores = score_captions(references, said, slow=name == "test")
        baseline = score_captions(references, borrowed, slow=False).values
        metrics |= {f"{metric}_{name}": value for metric, value in scores.values.items()}
        metrics |= {f"{metric}_by_tags_{name}": value for metric, value in baseline.items()}
        job.reporter.say(
            f"  captioner, {name}: CIDEr {scores.values['cider']:.3f}, BLEU-4 {scores.values['bleu4']:.3f} "
            f"(the training caption nearest by tags: {baseline['cider']:.3f}, {baseline['bleu4']:.3f})"
        )
        for metric, reason in scores.not_measured.items():
            job.reporter.say(f"  {metric} is not measured: {reason}")
    return metrics


@torch.no_grad()
def say(
    model: VLM, split: CaptionSplit, section: CaptionSection, tokenizer: Tokenizer, batch_size: int = 256
) -> list[str]:
    """A caption for every image of the split, in words."""
    model.eval()
    spec, device = tokenizer.spec, model.fusion.words.weight.device
    captions: list[str] = []
    for images in torch.arange(len(split.tag_ids)).split(batch_size):
        regions, tag_ids = send_to_device(split.context(images, model.config.tee.score_threshold, spec.pad_id), device)  # pyright: ignore
        draft = read_context(model, regions, tag_ids, section.num_caption)
        if section.num_beams == 1:
            ids = greedy(model, draft, spec, section.max_words, section.no_repeat).ids_BKT
        else:
            ids = beam_search(
                model, draft, spec, section.max_words, section.num_beams, section.length_penalty, section.no_repeat
            ).ids_BKT
        captions += [tokenizer.decode(row) for row in ids[:, 0].tolist()]
    return captions


# --- captions and tags -------------------------------------------------------------------------------------------


def load_split(
    job: Job, tee: TEE, manifest: Checkpoint, section: CaptionSection, tokenizer: Tokenizer, split: str
) -> CaptionSplit:
    """Cached regions of a split with its tags and captions."""
    cache = RegionSplit.load(job.inputs["regions"], split)
    captions = load_captions(job.inputs["regions"], split)
    tag_ids = own_tags(
        tee, cache, manifest.labels.classes, tokenizer, length=section.num_tags, min_score=section.tag_confidence
    )
    caption_ids = fit_captions(captions.input_ids, section.num_caption, tokenizer.spec.sep_id)
    return CaptionSplit(cache, tag_ids, captions.image_index, caption_ids)


def read_captions(job: Job, split: str, num_images: int) -> list[tuple[str, tuple[str, ...]]]:
    """Id and captions of each image as they were written, in the order of the region cache.

    Raises:
        DataError: the dataset has fewer images now than were cached.
    """
    recipe = job.recipe
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    samples = [(sample.id, sample.captions) for sample in reader.samples(split, num_images)]
    if len(samples) != num_images:
        raise DataError(
            f"Split '{split}' has {len(samples)} images, but the regions of {num_images} are cached",
            "Remove the folder of stage `regions` and run it again",
        )
    return samples


@torch.no_grad()
def describe(
    tee: TEE, cache: RegionSplit, classes: Sequence[str], attributes: Sequence[str], confidence: float
) -> list[Counter[str]]:
    """Per image, in how many regions each description ('red large striped star') and each word of one was detected."""
    found: list[Counter[str]] = []
    for images in torch.arange(len(cache.scores)).split(CHUNK):
        features = cache.features[images]
        best = region_classes(tee, features).tolist()
        # An attribute head of its own reads more than the cached features: then the classes are all there is.
        head = tee.box_head.attributes
        seen = (head(features).sigmoid() >= SEEN_AS).tolist() if head is not None else None
        sure = (cache.scores[images] >= confidence).tolist()
        for row in range(len(images)):
            counts: Counter[str] = Counter()
            for i in range(len(sure[row])):
                if sure[row][i]:
                    has = seen[row][i] if seen is not None else [False] * len(attributes)
                    words = [
                        *(name for name, given in zip(attributes, has, strict=True) if given),
                        classes[best[row][i]],
                    ]
                    counts.update({*words, " ".join(words)})
            found.append(counts)
    return found
