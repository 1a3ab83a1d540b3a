"""Where fine-tuning on a task starts: the fusion of an earlier checkpoint of the run, or a new one on the detector."""

from collections.abc import Sequence
from typing import Any

from edgevlm.artifacts import Checkpoint
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.vlm import VLM
from edgevlm.recipe import Choice

EARLIER = ("pretrain", "teacher")
"""Stages whose fusion fine-tuning may go on from, the best first."""


def starting_model(job: Job, fusion: Choice | None, heads: Sequence[str], **settings: Any) -> tuple[VLM, Checkpoint]:
    """A model with the wanted heads.

    Args:
        job: with the checkpoint `detector`, and where there is one, of a stage in `EARLIER`.
        fusion: a new fusion; None = the earlier checkpoint's, with its weights.
        heads: heads that the task needs beside the answers'; new ones start untrained.
        settings: further fields of the `ModelConfig`.

    Raises:
        RecipeError: neither a fusion nor an earlier checkpoint.
    """
    earlier = next((job.inputs[name] for name in EARLIER if name in job.inputs), None)
    if fusion is None and earlier is None:
        raise RecipeError(
            "Fine-tuning has no fusion to start from", "Name one (`fusion: {name: ...}`), or pre-train before it"
        )
    source = job.inputs["detector"] if fusion is not None or earlier is None else earlier
    model, manifest = vlm.load(source)
    config = manifest.model
    changes = {"heads": tuple(dict.fromkeys((*config.heads, *heads))), **settings}
    if fusion is not None:
        changes |= {"fusion": resolve_fusion(fusion), "heads": tuple(heads)}
    changed = VLM(config.model_copy(update=changes), manifest.preprocess, manifest.tokenizer, manifest.labels)
    if fusion is not None:
        changed.tee.load_state_dict(model.tee.state_dict())
    else:
        changed.load_state_dict(model.state_dict(), strict=False)  # all but the new heads
    return changed, manifest
