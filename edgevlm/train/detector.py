"""Stage `detector`: train TEE on boxes, classes and attributes."""

import numpy as np
import torch
from torch import Tensor

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig, Vocabulary
from edgevlm.data import open_reader
from edgevlm.data.frames import Frames, materialise
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models.registry import FUSIONS, resolve_tee
from edgevlm.models.tee import TEE
from edgevlm.models.vlm import VLM
from edgevlm.tasks.detection import DetectionObjective, detect, mean_average_precision
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import Batch, fit

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
    most = max(1, max(len(boxes) for boxes in frames.boxes))
    boxes = torch.zeros(len(frames.ids), most, 4)
    classes = torch.full((len(frames.ids), most), -1, dtype=torch.long)
    attributes = torch.zeros(len(frames.ids), most, num_attributes)
    for i, (b, c, a) in enumerate(zip(frames.boxes, frames.classes, frames.attributes, strict=True)):
        boxes[i, : len(b)], classes[i, : len(c)] = torch.from_numpy(b), torch.from_numpy(c)
        attributes[i, : len(a)] = torch.from_numpy(a)
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


def train_detector(job: Job) -> Checkpoint:
    """Train the extractor from scratch; the fusion half of the checkpoint is untrained."""
    recipe = job.recipe
    vocabulary = read_manifest(job.inputs["prepare"], Vocabulary)
    train = load_frames(job, "train", recipe.data.num_train, texts=False)
    truth = make_truth(train, len(vocabulary.labels.attributes))
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
    pixels = torch.from_numpy(train.pixels)

    def make_batch(rows: Tensor) -> Batch:
        return {
            "pixels_BHWC": pixels[rows],
            "boxes_BG4": truth[0][rows],
            "classes_BG": truth[1][rows],
            "attributes_BGA": truth[2][rows],
        }

    model.tee.to(memory_format=torch.channels_last)  # pyright: ignore  (a quarter faster on CPUs)
    objective = DetectionObjective(model.tee)
    fit(
        objective,
        len(pixels),
        make_batch,
        recipe.detector,
        what="detector",
        work_dir=job.out_dir,
        key=job.provenance.key,
        seed=recipe.seed,
        reporter=job.reporter,
    )
    val = load_frames(job, "val", min(recipe.data.num_val or NUM_EVALUATED, NUM_EVALUATED), texts=False)
    metrics = evaluate_detector(model.tee.eval(), val)
    job.reporter.say(
        f"  detector: mAP {metrics['map']:.3f}, AP50 {metrics['ap50']:.3f} on {len(val.ids)} validation images"
    )
    manifest = manifest.model_copy(update={"metrics": metrics})
    return save_checkpoint(job.out_dir, model.cpu(), job.inputs["prepare"] / VOCABULARY, manifest)
