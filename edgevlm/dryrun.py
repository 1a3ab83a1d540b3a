"""What a training would do, before it does anything: checks the recipe and the first records, counts steps and memory.

Sizes and steps are exact. Memory is the sum of weights, gradients, optimiser and average (4 bytes per number, by count)
and of activations, which are measured: the bytes that autograd keeps in one forward pass of two rows in float32, per row,
times the rows of a piece. For a fusion these rows have all regions and the longest text, and its heads are left out. What
the allocator and the libraries take on top is not in it.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint, FusionConfig, Labels, ModelConfig, TokenizerSpec
from edgevlm.data import open_reader
from edgevlm.data.frames import Frames, RandomAccess, materialise
from edgevlm.data.sample import Reader
from edgevlm.errors import DataError
from edgevlm.manifests import read_manifest
from edgevlm.models.registry import FUSIONS, resolve_fusion, resolve_tee
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import Recipe, TrainSection
from edgevlm.tasks.detection import DetectionObjective
from edgevlm.train.answering import freeze_extractor
from edgevlm.train.detector import make_truth
from edgevlm.train.loop import check_pieces

ANSWERING = ("vqa", "reasoning", "entailment")
"""Tasks whose texts have answers from a closed list."""
CHECKED = 8
"""Samples of each split that are read, decoded and checked."""
ROWS = 2
"""Rows of the measured pass; batch norms need two."""


@dataclass(frozen=True)
class SplitPlan:
    """One split of the dataset."""

    name: str
    num_images: int | None
    """None: the reader does not know before it has read them all."""
    texts_per_image: float
    """Mean over the checked samples."""
    captions_per_image: float
    known_answers: float | None
    """Share of the checked texts with an answer from the list of answers, 0..1; None where there are no texts."""
    cache_mb: float | None
    """Region features on disk."""


@dataclass(frozen=True)
class StagePlan:
    """One training."""

    name: str
    num_parameters: int
    num_trained: int
    num_rows: int | None
    """Rows of an epoch: images, or texts or captions (as many as the checked samples suggest)."""
    steps: int
    batch: int
    per_process: int
    per_piece: int
    memory_mb: dict[str, float]
    """Per process."""

    @property
    def epochs(self) -> float | None:
        return None if not self.num_rows else self.steps * self.batch / self.num_rows


@dataclass(frozen=True)
class Plan:
    """Everything `--dry-run` says."""

    recipe: str
    task: str
    dataset: str
    processes: int
    parameters: dict[str, int]
    """Of the extractor, the fusion and the heads."""
    splits: tuple[SplitPlan, ...]
    stages: tuple[StagePlan, ...]
    frames_mb: float | None
    """Training images that stage `detector` holds in memory, in every process."""


def examine(recipe: Recipe, data_path: str | None, processes: int = 1) -> Plan:
    """Check the folders and the first records of every split, and work out what training would take.

    Raises:
        DataError: a folder, file or record is missing or malformed, or no text has a known answer.
        TrainingError: a batch has fewer rows than there are processes and pieces to share it.
        RecipeError: an unknown network.
        CheckpointError: no checkpoint where the recipe says that the extractor or a fusion comes from.
    """
    reader = open_reader(recipe.data, recipe.task, recipe.seed, data_path)
    labels = reader.labels if recipe.extractor is None else _labels_of(recipe.extractor, reader.labels)
    checked = {split: materialise(reader, split, CHECKED, recipe.preprocess) for split in reader.splits}
    trainings = list(_trainings(recipe))
    models = [_model(recipe, labels, training) for training in trainings]
    splits = tuple(_split(recipe, reader, models[-1], split, frames) for split, frames in checked.items())
    train = next(split for split in splits if split.name == "train")
    stages = []
    for training, model in zip(trainings, models, strict=True):
        if training.fusion is None:
            objective, batch = DetectionObjective(model.tee), _detector_batch(checked["train"], len(labels.attributes))
        else:
            objective, batch = FusionPass(model), _fusion_batch(model, training)
        each = {"images": 1.0, "texts": train.texts_per_image, "captions": train.captions_per_image}.get(training.rows)
        num_rows = None if train.num_images is None or each is None else round(train.num_images * each)
        stages.append(_stage(training, objective, batch, num_rows, processes))
    pixels = recipe.preprocess.height * recipe.preprocess.width * 3
    in_memory = trainings[0].fusion is None and train.num_images is not None
    last = models[-1]
    return Plan(
        recipe=recipe.name,
        task=recipe.task,
        dataset=recipe.data.dataset,
        processes=processes,
        parameters={
            "extractor": _count(last.tee),
            "fusion": _count(last.fusion),
            "heads": _count(last) - _count(last.tee) - _count(last.fusion),
        },
        splits=splits,
        stages=tuple(stages),
        frames_mb=(train.num_images or 0) * pixels / 1e6 if in_memory else None,
    )


class FusionPass(nn.Module):
    """One pass of the fusion under a loss that every layer feeds; the extractor is frozen, as in all such trainings."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model
        freeze_extractor(model)

    def forward(self, regions: Regions, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.model.fuse(regions, input_ids)
        return output.pooled_BD.sum() + output.regions_BND.sum(), {}


@dataclass(frozen=True)
class _Training:
    """A section of the recipe that trains something."""

    stage: str
    section: TrainSection
    rows: Literal["images", "texts", "captions", "drawn"]
    """What a row of its batches is; of what is drawn there is no end, and so no epoch."""
    fusion: FusionConfig | None = None
    """None: the extractor is trained."""
    heads: tuple[Any, ...] = ()
    num_words: int = 0
    """Text tokens of a row."""
    passes: int = 1
    """Passes of the fusion per row."""


def _trainings(recipe: Recipe) -> Iterator[_Training]:
    """What `edgevlm train` trains, in order."""
    words = recipe.text.max_tokens
    if recipe.extractor is None:
        yield _Training("detector", recipe.detector, "images")
    if recipe.task == "detection":
        return
    if (section := recipe.pretrain) is not None:
        fusion, length = resolve_fusion(section.fusion), section.caption_tokens + section.tag_tokens
        # Masked words see part of the text and matching all of it: two passes.
        yield _Training("pretrain", section, "captions", fusion, ("words", "match"), length, 2)
    if (section := recipe.synthetic) is not None:
        yield _Training("synthetic", section, "drawn", resolve_fusion(section.fusion), (), words)
    if (section := recipe.retrieval) is not None:
        yield _Training("retrieval", section, "captions", resolve_fusion(section.fusion), ("match",), words, 2)
    if (section := recipe.pairs) is not None:
        yield _Training("pairs", section, "texts", resolve_fusion(section.fusion), ("pair",), words, 2)
    if (section := recipe.captioning) is not None:
        length = section.num_caption + section.num_tags
        yield _Training("captioning", section, "captions", resolve_fusion(section.fusion), ("words",), length)
    elif recipe.retrieval is None and recipe.pairs is None and recipe.task != "pretraining":
        yield _Training("teacher", recipe.teacher, "texts", resolve_fusion(recipe.teacher.fusion), (), words)


def _labels_of(extractor: str, labels: Labels) -> Labels:
    """The extractor's classes and attributes with the data's answers."""
    theirs = read_manifest(Path(extractor), Checkpoint, check_files=False).labels
    return Labels(classes=theirs.classes, attributes=theirs.attributes, answers=labels.answers)


def activation_bytes(objective: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass, weights not counted, shared ones once."""
    weights = {p.untyped_storage().data_ptr() for p in (*objective.parameters(), *objective.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    objective.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = objective(**batch)  # held until the sum is taken: a freed address would be used twice
    total = sum(kept.values())
    del loss
    return total


def _model(recipe: Recipe, labels: Labels, training: _Training) -> VLM:
    tokenizer = TokenizerSpec(
        vocab_sha256="", vocab_size=recipe.text.vocab_size, max_tokens=max(recipe.text.max_tokens, training.num_words)
    )  # `prepare` may find fewer word pieces
    config = ModelConfig(tee=resolve_tee(recipe.tee), fusion=training.fusion or FUSIONS["none"], heads=training.heads)
    return VLM(config, recipe.preprocess, tokenizer, labels)


def _split(recipe: Recipe, reader: Reader, model: VLM, name: str, frames: Frames) -> SplitPlan:
    limit = {"train": recipe.data.num_train, "val": recipe.data.num_val}.get(name, recipe.data.num_test)
    num_images = reader.num_samples(name, limit) if isinstance(reader, RandomAccess) else limit
    known = set(reader.labels.answers)
    answers = [bool(known & {text.answer, *text.answers}) for texts in frames.texts for text in texts]
    if recipe.task in ANSWERING and not any(answers):
        raise DataError(
            f"None of the first {len(answers)} texts of split '{name}' has an answer from the list of answers",
            "Check the dataset's answers, or its list of them",
        )
    config = model.tee.config
    width = {"float32": 4, "float16": 2}[recipe.regions.dtype] * model.tee.region_dim
    image_bytes = 0 if recipe.task == "detection" else config.num_regions * (width + 5 * 4)
    return SplitPlan(
        name=name,
        num_images=num_images,
        texts_per_image=len(answers) / len(frames),
        captions_per_image=sum(map(len, frames.captions)) / len(frames),
        known_answers=sum(answers) / len(answers) if answers else None,
        cache_mb=None if num_images is None else num_images * image_bytes / 1e6,
    )


def _stage(
    training: _Training, objective: nn.Module, batch: dict[str, Any], num_rows: int | None, processes: int
) -> StagePlan:
    section = training.section
    size = min(section.batch_size, num_rows or section.batch_size)
    check_pieces(size, processes, section.accumulate, training.stage)
    per_process = math.ceil(size / processes)
    per_piece = math.ceil(per_process / section.accumulate)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    states = 2 if section.optimiser == "adamw" else 1
    numbers = {
        "weights": _count(objective),
        "gradients": trained,
        "optimiser": states * trained,
        "average": trained if section.ema is not None else 0,
    }
    memory = {what: 4 * count / 1e6 for what, count in numbers.items()}
    memory["activations"] = activation_bytes(objective, batch) / ROWS * training.passes * per_piece / 1e6
    shape = (_count(objective), trained, num_rows, section.steps, size, per_process, per_piece)
    return StagePlan(training.stage, *shape, memory)


def _detector_batch(frames: Frames, num_attributes: int) -> dict[str, Tensor]:
    rows = torch.arange(ROWS) % len(frames)
    boxes, classes, attributes = (part[rows] for part in make_truth(frames, num_attributes))
    pixels = torch.from_numpy(frames.pixels)[rows]
    return {"pixels_BHWC": pixels, "boxes_BG4": boxes, "classes_BG": classes, "attributes_BGA": attributes}


def _fusion_batch(model: VLM, training: _Training) -> dict[str, Any]:
    """The largest rows there can be: all regions count, and every text is as long as may be."""
    num_regions = model.tee.config.num_regions
    regions = Regions(
        torch.rand(ROWS, num_regions, model.tee.region_dim),
        torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(ROWS, num_regions, 1),
        torch.ones(ROWS, num_regions),
    )
    return {"regions": regions, "input_ids": torch.full((ROWS, training.num_words), 5, dtype=torch.int32)}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for `--json`."""
    return asdict(plan)


def render(plan: Plan, console: Console) -> None:
    """The plan as tables for people."""
    total = sum(plan.parameters.values())
    parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in plan.parameters.items())
    many = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    console.print(f"[bold]{plan.recipe}[/]  {plan.task} on {plan.dataset}, {many}")
    console.print(f"parameters  {total / 1e6:.2f} million ({parts})")

    splits = _table("split", "images", "texts each", "captions each", "known answers", "cache MB")
    for split in plan.splits:
        known = "" if split.known_answers is None else f"{split.known_answers:.0%}"
        cells = (f"{split.texts_per_image:.1f}", f"{split.captions_per_image:.1f}", known)
        splits.add_row(split.name, _number(split.num_images), *cells, _number(split.cache_mb))
    console.print(splits)

    titles = ("trained M", "rows", "steps", "epochs", "batch", "per process", "per piece", "memory MB")
    stages = _table("stage", *titles)
    for stage in plan.stages:
        epochs = "?" if stage.epochs is None else f"{stage.epochs:.1f}"
        sizes = (str(stage.batch), str(stage.per_process), str(stage.per_piece))
        memory = _number(sum(stage.memory_mb.values()))
        trained = f"{stage.num_trained / 1e6:.2f}"
        stages.add_row(stage.name, trained, _number(stage.num_rows), str(stage.steps), epochs, *sizes, memory)
    console.print(stages)
    for stage in plan.stages:
        parts = ", ".join(f"{name} {mb:,.0f}" for name, mb in stage.memory_mb.items() if mb)
        console.print(f"[dim]{stage.name}, MB per process: {parts}[/]")
    if plan.frames_mb is not None:
        console.print(f"[dim]detector, training images in memory: {plan.frames_mb:,.0f} MB in every process[/]")
    sizes_mb = [split.cache_mb for split in plan.splits]
    counted = [mb for mb in sizes_mb if mb is not None]
    if sum(counted) > 0:
        more = " and the splits marked ?" if len(counted) < len(sizes_mb) else ""
        console.print(f"[dim]region cache on disk: {sum(counted):,.0f} MB{more}[/]")


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for title in numbers:
        table.add_column(title, justify="right")
    return table


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"
