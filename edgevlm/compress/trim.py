"""Stage `trim`: teach the pruned student to drop region tokens that the text does not ask for, at several budgets.

Our reconstruction of SmartTrim in its static form: after one layer a small trimmer ranks the regions, and a rung keeps
a fixed number. All rungs share all weights. Each step trains the full path and one random smaller rung, which also
imitates the full path of the same model (self-distillation).
"""

import torch
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint, Rung
from edgevlm.compress.cost import fusion_macs
from edgevlm.compress.distil import logit_loss
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.vlm import VLM
from edgevlm.recipe import TrimSection
from edgevlm.tasks import answers as task
from edgevlm.train.answering import evaluate, fit_answers, freeze_extractor, referred_loss, report, save_answering
from edgevlm.train.regions import AnswerBatch

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.3


class TrimObjective(nn.Module):
    """task(full) + task(rung) + w KL(full || rung) + ranking of the referred regions where the data name them."""

    def __init__(self, model: VLM, section: TrimSection, budgets: list[int], referred_weight: float) -> None:
        super().__init__()
        self.model, self.section, self.budgets = model, section, budgets
        self.referred_weight = referred_weight
        self.step = 0
        freeze_extractor(model)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        progress = self.step / self.section.steps
        temperature = FIRST_TEMPERATURE + (LAST_TEMPERATURE - FIRST_TEMPERATURE) * progress
        budget = self.budgets[self.step % len(self.budgets)]
        full = self.model.answer(batch.regions, batch.input_ids)
        trimmed = self.model.answer(batch.regions, batch.input_ids, num_keep=budget, trim_temperature=temperature)
        imitation = logit_loss(trimmed.logits_BA, full.logits_BA.detach())
        truth = batch.answers, batch.targets
        loss = task.loss(full.logits_BA, *truth) + task.loss(trimmed.logits_BA, *truth)
        loss = loss + self.section.self_distil_weight * imitation
        ranking = trimmed.fusion.trim_scores_BN
        if self.referred_weight and ranking is not None:
            loss = loss + self.referred_weight * referred_loss(self.model, ranking, batch)
        accuracies = [task.batch_accuracy(answer.logits_BA, *truth) for answer in (full, trimmed)]
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
    budgets = [keep for keep in section.rungs.values() if keep < tee.num_regions]
    objective = TrimObjective(model, section, budgets, recipe.referred_weight)

    def before_step(step: int) -> None:
        objective.step = step

    fit_answers(
        objective,
        model,
        job,
        section,
        what="trim",
        seed=recipe.seed + 4,
        min_regions=max(budgets, default=0) + 1,  # more than are kept, or there is nothing to rank
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
    return save_answering(job, model, manifest, metrics, rungs=tuple(rungs))
