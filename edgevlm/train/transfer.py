"""Stage `detector` for data without boxes: take the extractor of a detector that was trained on other data."""

from pathlib import Path

import torch

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig, Vocabulary
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.registry import FUSIONS, resolve_tee
from edgevlm.models.vlm import VLM
from edgevlm.train.checkpoints import save_checkpoint


def adopt_extractor(job: Job) -> Checkpoint:
    """The extractor in the folder `recipe.extractor`, with its classes and attributes, for this run's answers.

    Its shape is the recipe's `tee`; what changes no weight (proposals, regions, grid, the input's size) may differ from
    how it was trained.

    Raises:
        RecipeError: the recipe names no extractor.
        CheckpointError: no checkpoint there, or weights of another shape.
    """
    recipe = job.recipe
    if recipe.extractor is None:
        raise RecipeError(f"Recipe {recipe.name} names no extractor", "Set extractor to a checkpoint of `detector`")
    source, theirs = vlm.load(Path(recipe.extractor))
    vocabulary = read_manifest(job.inputs["prepare"], Vocabulary)
    labels = theirs.labels.model_copy(update={"answers": vocabulary.labels.answers})
    manifest = Checkpoint(
        provenance=job.provenance,
        model=ModelConfig(tee=resolve_tee(recipe.tee), fusion=FUSIONS["none"]),
        task="detection",
        preprocess=vocabulary.preprocess,
        tokenizer=vocabulary.tokenizer,
        labels=labels,
        metrics=theirs.metrics if theirs.task == "detection" else {},
    )
    torch.manual_seed(recipe.seed)
    model = VLM(manifest.model, manifest.preprocess, manifest.tokenizer, labels)
    try:
        model.tee.load_state_dict(source.tee.state_dict())
    except RuntimeError as problem:
        reason = str(problem).splitlines()[1].strip()
        raise CheckpointError(
            f"The extractor in {recipe.extractor} does not fit the recipe's tee ({reason})",
            "Give tee the name and the widths that it was trained with",
        ) from problem
    job.reporter.say(f"  detector: taken from {recipe.extractor}, with its {len(labels.classes)} classes")
    return save_checkpoint(job.out_dir, model, job.inputs["prepare"] / VOCABULARY, manifest)
