"""What fine-tuning on a task begins with: the run's extractor, a fusion, and the heads that the task needs."""

from collections.abc import Sequence
from typing import Any

from edgevlm.artifacts import Checkpoint
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.vlm import VLM
from edgevlm.recipe import FineTuneSection
from edgevlm.train.answering import warm, with_fusion


def fine_tuning_model(
    job: Job, section: FineTuneSection, heads: Sequence[str], **settings: Any
) -> tuple[VLM, Checkpoint]:
    """The extractor of the stage `detector` under the section's fusion, and the detector's manifest.

    Args:
        job: with the checkpoint `detector`, and where the run pre-trains, `pretrain`.
        section: names the fusion and what it starts from.
        heads: heads beside the answers'; those that the start lacks are untrained.
        settings: further fields of the `ModelConfig`.

    Raises:
        CheckpointError: the start does not fit.
    """
    detector, manifest = vlm.load(job.inputs["detector"])
    model = with_fusion(detector, manifest, resolve_fusion(section.fusion), heads=tuple(heads), **settings)
    warm(model, job, section, manifest)
    return model, manifest
