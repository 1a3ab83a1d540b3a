"""A run up to the region cache in seconds: the smallest recipe, an untrained extractor, and any reader."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgevlm.artifacts import VOCABULARY, Checkpoint, Labels, ModelConfig, Provenance, Vocabulary
from edgevlm.data.sample import Sample, Text
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models.registry import FUSIONS, resolve_tee
from edgevlm.models.vlm import VLM
from edgevlm.recipe import Recipe
from edgevlm.recipes import load_recipe
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.prepare import prepare
from edgevlm.train.regions import cache_regions

SMALL = ("data.num_train=16", "data.num_val=4", "data.num_test=8", "data.texts_per_image=2")


class Made:
    """A reader of samples that a test makes: split -> samples."""

    name = "made"

    def __init__(self, labels: Labels, samples: dict[str, list[Sample]]) -> None:
        self.labels, self._samples = labels, samples
        self.splits = tuple(samples)

    def samples(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        yield from self._samples[split][:limit]


def made_sample(index: int, *texts: Text, **rest: Any) -> Sample:
    """An image of noise with texts."""
    return Sample(f"sample-{index}", noise(index), texts=texts, **rest)


def noise(seed: int) -> Image.Image:
    """64 x 64 pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def job_for(stage: str, folder: Path, recipe: Recipe, inputs: dict[str, Path]) -> Job:
    """A work order in `folder/<stage>`."""
    out = folder / stage
    out.mkdir(parents=True, exist_ok=True)
    return Job(recipe, inputs, out, Provenance(stage=stage, key=f"{stage}-{folder.name}"))


def detector_job(folder: Path, *overrides: str, stage: str = "fine-tune") -> Job:
    """A job of a later stage: `prepare` is done, and the extractor is untrained."""
    recipe = load_recipe("test-scenes", [*SMALL, *overrides])
    prepared = job_for("prepare", folder, recipe, {})
    prepare(prepared)
    vocabulary = read_manifest(prepared.out_dir, Vocabulary)
    torch.manual_seed(0)
    manifest = Checkpoint(
        provenance=Provenance(stage="detector", key="detector"),
        model=ModelConfig(tee=resolve_tee(recipe.tee), fusion=FUSIONS["none"]),
        task="detection",
        preprocess=vocabulary.preprocess,
        tokenizer=vocabulary.tokenizer,
        labels=vocabulary.labels,
    )
    model = VLM(manifest.model, manifest.preprocess, manifest.tokenizer, manifest.labels)
    detector = job_for("detector", folder, recipe, {})
    save_checkpoint(detector.out_dir, model, prepared.out_dir / VOCABULARY, manifest)
    return job_for(stage, folder, recipe, {"prepare": prepared.out_dir, "detector": detector.out_dir})


def cached_job(folder: Path, *overrides: str, stage: str = "fine-tune") -> Job:
    """A job of a stage behind `regions`."""
    job = detector_job(folder, *overrides, stage=stage)
    regions = job_for("regions", folder, job.recipe, {"detector": job.inputs["detector"]})
    cache_regions(regions)
    return replace(job, inputs={**job.inputs, "regions": regions.out_dir})
