"""Stage `trim`: teach the pruned student to drop region tokens that the text does not ask for, at several budgets.

Our reconstruction of SmartTrim in its static form: after one layer a small trimmer ranks the regions, and a rung keeps
a fixed number. All rungs share all weights. Each step trains the full path and one random smaller rung, which also
imitates the full path of the same model (self-distillation).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, Rung
from edgevlm.compress.cost import fusion_macs
from edgevlm.compress.distil import logit_loss
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import TrimSection
from edgevlm.tasks import answers as task
from edgevlm.train.answering import batch_of, evaluate, freeze_extractor, report
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import fit
from edgevlm.train.regions import RegionSplit

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.3


class TrimObjective(nn.Module):
    """task(full) + task(rung) + w KL(full || rung) + ranking of the referred regions where the data name them."""

    def __init__(self, model: VLM, section: TrimSection, budgets: list[int], referred_weight: float) -> None:
        super().__init__()
        self.model, self.section, self.budgets = model, section, budgets
        self.referred_weight = referred_weight
        self.step = 0
        freeze_extractor(model)

    def forward(
        self,
        features: Tensor,
        boxes: Tensor,
        scores: Tensor,
        input_ids: Tensor,
        answers: Tensor,
        referred: Tensor,
        has_referred: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        regions = Regions(features, boxes, scores)
        progress = self.step / self.section.steps
        temperature = FIRST_TEMPERATURE + (LAST_TEMPERATURE - FIRST_TEMPERATURE) * progress
        budget = self.budgets[self.step % len(self.budgets)]
        full = self.model.answer(regions, input_ids)
        trimmed = self.model.answer(regions, input_ids, num_keep=budget, trim_temperature=temperature)
        imitation = logit_loss(trimmed.logits_BA, full.logits_BA.detach())
        loss = task.loss(full.logits_BA, answers) + task.loss(trimmed.logits_BA, answers)
        loss = loss + self.section.self_distil_weight * imitation
        ranking = trimmed.fusion.trim_scores_BN
        if self.referred_weight and ranking is not None:
            counted = (scores >= self.model.config.tee.score_threshold).float() * has_referred.unsqueeze(1)
            errors = F.binary_cross_entropy_with_logits(ranking, referred.to(ranking.dtype), reduction="none")
            loss = loss + self.referred_weight * (errors * counted).sum() / counted.sum().clamp(min=1)
        accuracies = [(a.logits_BA.argmax(1) == answers).float().mean() for a in (full, trimmed)]
        return loss, {"full": accuracies[0], "trimmed": accuracies[1], "kd": imitation.detach()}


def check_rungs(section: TrimSection, num_layers: int, num_regions: int) -> None:
    """Raise RecipeError for a ladder that the model cannot have."""
    if section.after_layer >= num_layers - 1:
        raise RecipeError(
            f"trim.after_layer {section.after_layer} leaves no layer behind it (the fusion has {num_layers})",
            f"Choose 0 to {num_layers - 2}",
        )
    largest = max(section.rungs.values())
    if largest != num_regions:
        raise RecipeError(
            f"The largest rung keeps {largest} regions, but the extractor hands over {num_regions}",
            f"Let the first rung keep {num_regions}",
        )


def trim(job: Job) -> Checkpoint:
    """Add a trimmer to the pruned student and train all rungs together."""
    recipe, section = job.recipe, job.recipe.trim
    pruned, manifest = vlm.load(job.inputs["prune"])
    fusion, tee = manifest.model.fusion, manifest.model.tee
    check_rungs(section, len(fusion.layer_heads), tee.num_regions)
    torch.manual_seed(recipe.seed + 4)
    config = manifest.model.model_copy(update={"fusion": fusion.model_copy(update={"trim_after": section.after_layer})})
    model = VLM(config, manifest.preprocess, manifest.tokenizer, manifest.labels)
    model.load_state_dict(pruned.state_dict(), strict=False)  # all but the new trimmer
    split = RegionSplit.load(job.inputs["regions"], "train")
    budgets = [keep for keep in section.rungs.values() if keep < tee.num_regions]
    objective = TrimObjective(model, section, budgets, recipe.referred_weight)

    def before_step(step: int) -> None:
        objective.step = step

    fit(
        objective,
        len(split.answers),
        lambda rows: batch_of(split, rows),
        section,
        what="trim",
        work_dir=job.out_dir,
        key=job.provenance.key,
        seed=recipe.seed + 4,
        reporter=job.reporter,
        before_step=before_step,
    )
    rungs, metrics = [], {}
    for name, keep in section.rungs.items():
        rung_metrics = evaluate(model, job, keep)
        report(job, f"rung {name}", rung_metrics)
        macs = fusion_macs(config.fusion, manifest.tokenizer.max_tokens, tee.num_regions, keep, tee.roi_hidden)
        rungs.append(
            Rung(name=name, num_regions=keep, gmacs=macs / 1e9, expected_accuracy=rung_metrics["accuracy_val"])
        )
        metrics |= rung_metrics if keep == tee.num_regions else {}
        metrics |= {f"accuracy_test@{name}": rung_metrics["accuracy_test"]}
    manifest = manifest.model_copy(
        update={"provenance": job.provenance, "model": config, "metrics": metrics, "rungs": tuple(rungs)}
    )
    return save_checkpoint(job.out_dir, model.cpu(), job.inputs["prepare"] / VOCABULARY, manifest)
