"""Stage `captioner`: train the fusion to caption images from cached regions and tags, and score what it says."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig, TokenizerSpec
from edgevlm.data import open_reader
from edgevlm.data.text import Tokenizer
from edgevlm.errors import DataError, RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.decoding import beam_search, greedy, read_context
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.tee import TEE, Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import CaptionSection, TrainSection
from edgevlm.tasks.caption_metrics import score_captions
from edgevlm.tasks.captioning import CaptionBatch, CaptionObjective, SelfCritical, nearest_by_tags, reward_words
from edgevlm.tasks.cider import CiderD
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import fit
from edgevlm.train.regions import RegionSplit, cached_splits

RESULTS = "captions_{split}.json"
"""What the model says of the images of a split, in the format of COCO's results."""
SEEN_AS = 0.5
"""An attribute of at least this probability belongs to the description of a region."""


@dataclass(frozen=True)
class CaptionSplit:
    """One split: regions and tags of I images, and Q captions."""

    regions: Regions
    """(I, N, ...)."""
    tag_ids: Tensor
    """(I, G) int32: tags, [SEP] and padding."""
    image_index: Tensor
    """(Q,) image of each caption."""
    caption_ids: Tensor
    """(Q, num_caption) int32: [CLS] caption [SEP] and padding."""

    def batch(self, rows: Tensor, score_threshold: float, pad_id: int) -> CaptionBatch:
        """Captions `rows` with the context of their images."""
        images = self.image_index[rows]
        regions, tag_ids = self.context(images, score_threshold, pad_id)
        return CaptionBatch(regions, torch.cat([self.caption_ids[rows], tag_ids], dim=1), images)

    def context(self, images: Tensor, score_threshold: float, pad_id: int) -> tuple[Regions, Tensor]:
        """Regions and tags of images, without what is padding in all of them (it comes last)."""
        num_regions = max(1, int((self.regions.scores_BN[images] >= score_threshold).sum(1).amax()))
        num_tags = int((self.tag_ids[images] != pad_id).any(0).sum())
        regions = Regions(*(part[images, :num_regions] for part in self.regions))
        return regions, self.tag_ids[images, :num_tags]


def train_captioner(job: Job) -> Checkpoint:
    """Cross-entropy on masked words, then CIDEr itself if the recipe says so; metrics on every evaluation split."""
    section = caption_section(job)
    detector, manifest = vlm.load(job.inputs["detector"])
    tokenizer = Tokenizer(job.inputs["prepare"] / VOCABULARY, manifest.tokenizer)
    torch.manual_seed(job.recipe.seed + 1)
    model = start_model(detector, manifest, section)
    train = load_split(job, detector.tee, manifest, section, "train")
    objective = CaptionObjective(
        model,
        manifest.tokenizer,
        section.num_caption,
        section.mask_share,
        section.max_masked,
        section.label_smoothing,
        section.every_word,
    )
    _fit(job, objective, model, section, train, "captioner", torch.arange(len(train.caption_ids)))
    if section.self_critical is not None:
        criticise(job, model, section, train, tokenizer)
    metrics = evaluate(job, model, detector.tee, manifest, section, train, tokenizer)
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


def start_model(detector: VLM, manifest: Checkpoint, section: CaptionSection) -> VLM:
    """The detector's extractor under an untrained fusion with a head of words."""
    config = ModelConfig(tee=manifest.model.tee, fusion=resolve_fusion(section.fusion), heads=("words",))
    model = VLM(config, manifest.preprocess, manifest.tokenizer, manifest.labels)
    model.tee.load_state_dict(detector.tee.state_dict())
    return model


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
    _fit(job, objective, model, section.self_critical, train, "captioner-cider", rows)


def first_rows(image_index: Tensor) -> Tensor:
    """Row of the first caption of every image that has one; `image_index` rises."""
    return torch.cat([torch.ones(1, dtype=torch.bool), image_index[1:] != image_index[:-1]]).nonzero().flatten()


def _fit(
    job: Job, objective: nn.Module, model: VLM, section: TrainSection, train: CaptionSplit, what: str, rows: Tensor
) -> None:
    pad_id, threshold = model.fusion.pad_id, model.config.tee.score_threshold
    fit(
        objective,
        len(rows),
        lambda chosen: {"batch": train.batch(rows[chosen], threshold, pad_id)},
        section,
        what=what,
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-{what}",
        seed=job.recipe.seed + 1,
        reporter=job.reporter,
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
    found = describe(tee, train.regions, classes, attributes, section.tag_confidence)
    known = [found[image] for image in train.image_index[rows].tolist()]
    known_captions = [tokenizer.decode(train.caption_ids[row].tolist()) for row in rows.tolist()]
    for name in cached_splits(job.inputs["regions"]):
        if name == "train":
            continue
        split = load_split(job, tee, manifest, section, name)
        samples = read_captions(job, name, len(split.tag_ids))
        found = describe(tee, split.regions, classes, attributes, section.tag_confidence)
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
        for what, reason in scores.not_measured.items():
            job.reporter.say(f"  {what} is not measured: {reason}")
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


def load_split(job: Job, tee: TEE, manifest: Checkpoint, section: CaptionSection, split: str) -> CaptionSplit:
    """Cached regions of a split with its tags and captions."""
    cache = RegionSplit.load(job.inputs["regions"], split)
    regions = Regions(cache.features, cache.boxes, cache.scores)
    vocabulary = job.inputs["prepare"] / VOCABULARY
    spec = manifest.tokenizer
    image_index, caption_ids = encoded_captions(
        job,
        split,
        len(cache.features),
        Tokenizer(vocabulary, spec.model_copy(update={"max_tokens": section.num_caption})),
    )
    tag_tokenizer = Tokenizer(vocabulary, spec.model_copy(update={"max_tokens": section.num_tags + 1}))
    tags = class_tags(tee, regions, manifest.labels.classes, section.tag_confidence)
    return CaptionSplit(regions, encode_tags(tags, tag_tokenizer), image_index, caption_ids)


def encoded_captions(job: Job, split: str, num_images: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Image of each caption of a split (Q,), rising, and the captions (Q, max_tokens); what is too long is cut."""
    pairs = [
        (image, caption)
        for image, (_, captions) in enumerate(read_captions(job, split, num_images))
        for caption in captions
    ]
    if not pairs:
        raise DataError(f"No image of split '{split}' has a caption", "Choose a dataset with captions")
    ids = tokenizer.encode_batch([caption for _, caption in pairs], truncate=True)
    return torch.tensor([image for image, _ in pairs]), torch.from_numpy(ids)


def read_captions(job: Job, split: str, num_images: int) -> list[tuple[str, tuple[str, ...]]]:
    """Id and captions of each image, in the order of the region cache.

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
def class_tags(tee: TEE, regions: Regions, classes: Sequence[str], confidence: float) -> list[list[str]]:
    """Per image the classes of its regions of at least this score, best first, each once (MiniVLM's tags)."""
    best_IN = tee.box_head.classes(regions.features_BND)[..., :-1].argmax(-1)
    sure_IN = regions.scores_BN >= confidence
    return [list(dict.fromkeys(classes[int(i)] for i in row[sure])) for row, sure in zip(best_IN, sure_IN, strict=True)]


@torch.no_grad()
def describe(
    tee: TEE, regions: Regions, classes: Sequence[str], attributes: Sequence[str], confidence: float
) -> list[Counter[str]]:
    """Per image how often each description of a region ('red large striped star') and each word of one was detected."""
    best_IN = tee.box_head.classes(regions.features_BND)[..., :-1].argmax(-1)
    seen_INA = tee.box_head.attributes(regions.features_BND).sigmoid() >= SEEN_AS
    found: list[Counter[str]] = []
    for best, seen, scores in zip(best_IN.tolist(), seen_INA.tolist(), regions.scores_BN.tolist(), strict=True):
        counts: Counter[str] = Counter()
        for index, has, score in zip(best, seen, scores, strict=True):
            if score >= confidence:
                words = [*(name for name, given in zip(attributes, has, strict=True) if given), classes[index]]
                counts.update({*words, " ".join(words)})
        found.append(counts)
    return found


def encode_tags(tags: Sequence[Sequence[str]], tokenizer: Tokenizer) -> Tensor:
    """Tags, [SEP] and padding: (I, max_tokens - 1) int32. An image without tags has [SEP] alone."""
    spec: TokenizerSpec = tokenizer.spec
    ids = torch.full((len(tags), spec.max_tokens - 1), spec.pad_id, dtype=torch.int32)
    rows = [i for i, words in enumerate(tags) if words]
    if ids.shape[1]:
        ids[:, 0] = spec.sep_id
    if rows:
        texts = [" ".join(tags[i]) for i in rows]
        ids[rows] = torch.from_numpy(tokenizer.encode_batch(texts, truncate=True)[:, 1:])  # without [CLS]
    return ids
