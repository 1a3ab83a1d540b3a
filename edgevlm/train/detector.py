"""Stage `detector`: train TEE on boxes, classes and attributes."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig, PreprocessSpec, Vocabulary
from edgevlm.data import Reader, open_reader
from edgevlm.data.frames import Frames, RandomAccess, materialise
from edgevlm.data.pictures import Pictures, training_specs
from edgevlm.data.preprocess import preprocess, unscale_boxes
from edgevlm.data.problems import Reporting
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models.backbone import load_trunk
from edgevlm.models.registry import FUSIONS, resolve_tee
from edgevlm.models.tee import TEE
from edgevlm.models.vlm import VLM
from edgevlm.recipe import DetectorSection
from edgevlm.tasks.average_precision import Annotated, Detected, coco_figures, mean_average_precision
from edgevlm.tasks.detection import DetectionObjective, detect, detect_per_class
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import Batch, fit, generator_of

TRUTH = ("boxes_BG4", "classes_BG", "attributes_BGA")
"""What the objective is given beside the pixels."""
NUM_EVALUATED = 256
"""Validation images for mAP."""


def load_frames(job: Job, split: str, limit: int | None, *, texts: bool = True) -> Frames:
    """Preprocessed images of a split, with a progress bar; without `texts` a dataset that draws them draws just one."""
    recipe = job.recipe
    data = recipe.data if texts else recipe.data.model_copy(update={"texts_per_image": 1})
    reader = open_reader(data, recipe.task, recipe.seed, job.data_path)
    with job.reporter.bar(f"reading {split} images", limit) as bar:
        return materialise(reader, split, limit, recipe.preprocess, progress=lambda done, _: bar.update(done))


def make_truth(frames: Frames, num_attributes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth padded to the largest number of objects: boxes (I, G, 4), classes (I, G), attributes (I, G, A)."""
    tags = [[np.flatnonzero(row) for row in rows] for rows in frames.attributes]
    return pad_truth(list(zip(frames.boxes, frames.classes, tags, strict=True)), num_attributes)


def pad_truth(objects: Sequence[tuple[Any, Any, Any]], num_attributes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from boxes (n, 4), classes (n,) and a list of attribute ids per object, for each image."""
    most = max(1, max(len(boxes) for boxes, _, _ in objects))
    boxes = torch.zeros(len(objects), most, 4)
    classes = torch.full((len(objects), most), -1, dtype=torch.long)
    attributes = torch.zeros(len(objects), most, num_attributes)
    for i, (b, c, tags) in enumerate(objects):
        boxes[i, : len(b)], classes[i, : len(c)] = torch.from_numpy(b), torch.from_numpy(c)
        for row, ids in enumerate(tags):
            attributes[i, row, torch.as_tensor(ids, dtype=torch.long)] = 1
    return boxes, classes, attributes


def evaluate_detector(tee: TEE, frames: Frames, batch_size: int = 64) -> dict[str, float]:
    """mAP and AP50 (0..1) over all boxes that survive NMS."""
    detections: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    device = tee.anchors.device
    for start in range(0, len(frames.ids), batch_size):
        pixels = torch.from_numpy(frames.pixels[start : start + batch_size]).to(device)
        boxes, scores, keep = detect(tee, pixels.permute(0, 3, 1, 2).float())
        for b, s, k in zip(boxes.cpu().numpy(), scores.cpu().numpy(), keep.cpu().numpy() > 0, strict=True):
            detections.append((b[k], s[k].argmax(-1), s[k].max(-1)))
    return mean_average_precision(list(zip(frames.boxes, frames.classes, strict=True)), detections)


def evaluate_pictures(
    tee: TEE, reader: Reader, split: str, limit: int | None, spec: PreprocessSpec, batch_size: int = 32
) -> dict[str, float]:
    """COCO's twelve figures on a split, in pixels of the original images; `edgevlm.tasks.average_precision` names them."""
    device = tee.anchors.device
    truths: list[Annotated] = []
    detections: list[Detected] = []
    samples = reader.samples(split, limit)
    while batch := list(islice(samples, batch_size)):
        pixels = torch.from_numpy(np.stack([preprocess(sample.image, spec) for sample in batch])).to(device)
        for sample, found in zip(batch, detect_per_class(tee, pixels.permute(0, 3, 1, 2).float()), strict=True):
            truths.append(Annotated(sample.boxes, sample.classes, sample.crowd, sample.areas))
            detections.append(found._replace(boxes=unscale_boxes(found.boxes, sample.image.size, spec)))
    return coco_figures(truths, detections)


def frames_source(frames: Frames, num_attributes: int) -> tuple[int, Callable[[Tensor], Batch]]:
    """Number of images, and batches of a split that is held in memory at the model's size."""
    truth, pixels = make_truth(frames, num_attributes), torch.from_numpy(frames.pixels)

    def make_batch(rows: Tensor) -> Batch:
        return {"pixels_BHWC": pixels[rows], **dict(zip(TRUTH, (part[rows] for part in truth), strict=True))}

    return len(pixels), make_batch


def pictures_source(
    pictures: Pictures, spec: PreprocessSpec, section: DetectorSection, num_attributes: int
) -> tuple[int, Callable[[Tensor], Batch]]:
    """Number of images, and batches that are drawn anew: changed at random, each at one of the sizes of the recipe."""
    specs = training_specs(spec, section.short_sides_px)

    def make_batch(rows: Tensor) -> Batch:
        generator = generator_of(rows)  # so a resumed run sees the same pictures
        size, seed = (int(torch.randint(high, (), generator=generator)) for high in (len(specs), 2**31))
        drawn = pictures.draw(rows.tolist(), specs[size], seed)
        truth = pad_truth([(p.boxes, p.classes, p.attributes) for p in drawn], num_attributes)
        pixels = torch.from_numpy(np.stack([picture.pixels_HWC for picture in drawn]))
        return {"pixels_BHWC": pixels, **dict(zip(TRUTH, truth, strict=True))}

    return len(pictures), make_batch


def train_detector(job: Job) -> Checkpoint:
    """Train the extractor; the fusion half of the checkpoint is untrained."""
    recipe, section = job.recipe, job.recipe.detector
    vocabulary = read_manifest(job.inputs["prepare"], Vocabulary)
    num_attributes = len(vocabulary.labels.attributes)
    drawn_anew = recipe.task == "detection" or section.augment is not None or bool(section.short_sides_px)
    reader = open_reader(recipe.data, recipe.task, recipe.seed, job.data_path)
    if drawn_anew:
        if isinstance(reader, RandomAccess):  # a mistake in the validation split shows now, not after the training
            reader.num_samples("val", recipe.data.num_val)
        pictures = Pictures(reader, "train", recipe.data.num_train, section.augment)
        num_rows, make_batch = pictures_source(pictures, vocabulary.preprocess, section, num_attributes)
        ids_of = pictures.ids
    else:
        limits = [limit for limit in (recipe.data.num_train, section.num_images) if limit is not None]
        frames = load_frames(job, "train", min(limits, default=None), texts=False)
        num_rows, make_batch = frames_source(frames, num_attributes)
        ids_of = frames.ids_of
    if isinstance(reader, Reporting) and (counts := reader.problems.counts):
        left_out = ", ".join(f"{number} x {kind}" for kind, number in counts.most_common())
        job.reporter.say(f"  malformed records left out: {left_out}")
    torch.manual_seed(recipe.seed)
    manifest = Checkpoint(
        provenance=job.provenance,
        model=ModelConfig(tee=resolve_tee(recipe.tee), fusion=FUSIONS["none"]),
        task="detection",
        preprocess=vocabulary.preprocess,
        tokenizer=vocabulary.tokenizer,
        labels=vocabulary.labels,
    )
    model = VLM(manifest.model, manifest.preprocess, manifest.tokenizer, manifest.labels)
    if section.trunk_weights is not None:
        load_trunk(model.tee.trunk, manifest.model.tee.trunk, section.trunk_weights)
    if section.sync_batchnorm:
        model.tee = nn.SyncBatchNorm.convert_sync_batchnorm(model.tee)  # pyright: ignore
    model.tee.to(memory_format=torch.channels_last)  # pyright: ignore  (a quarter faster on CPUs)
    fit(
        DetectionObjective(model.tee, section.sampling, section.box_beta),
        num_rows,
        make_batch,
        section,
        what="detector",
        work_dir=job.out_dir,
        key=job.provenance.key,
        seed=recipe.seed,
        reporter=job.reporter,
        names=lambda rows: ids_of(rows.tolist()),
    )
    tee = model.tee.eval()
    tee.resize((vocabulary.preprocess.height, vocabulary.preprocess.width))
    if drawn_anew:
        metrics = evaluate_pictures(tee, reader, "val", recipe.data.num_val, vocabulary.preprocess)
    else:
        val = load_frames(job, "val", min(recipe.data.num_val or NUM_EVALUATED, NUM_EVALUATED), texts=False)
        metrics = evaluate_detector(tee, val)
    job.reporter.say(f"  detector: mAP {metrics['map']:.3f}, AP50 {metrics['ap50']:.3f} on the validation images")
    manifest = manifest.model_copy(update={"metrics": metrics})
    return save_checkpoint(job.out_dir, model.cpu(), job.inputs["prepare"] / VOCABULARY, manifest)
