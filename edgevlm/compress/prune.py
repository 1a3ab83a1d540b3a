"""Stage `prune`: learned gates on fusion heads and neurons under one Lagrangian, then physical shrinking.

After EfficientVLM's stage 2, without the defects of its public code: one global, monotone target ramp; gates frozen
once the structure is chosen; weights removed, not masked. Gates on the extractor come with the full method.
"""

import torch
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint, FusionConfig
from edgevlm.compress.distil import DistilObjective, load_teacher
from edgevlm.compress.shrink import choose_kept, expected_sparsity, fusion_parameters, shrink
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.gates import FusionGates
from edgevlm.train.answering import evaluate, fit_answers, report, save_answering
from edgevlm.train.loop import parameter_groups
from edgevlm.train.regions import AnswerBatch


def target_sparsity(step: int, steps: int, ramp: float, final: float) -> float:
    """Linear rise from 0 to `final` over the first `ramp` of the steps, then constant: one counter, never restarted."""
    return final * min(1.0, (step + 1) / max(1.0, ramp * steps))


class PruneObjective(nn.Module):
    """Distillation loss of the gated student + l1 (s - t) + l2 (s - t)^2, with s the expected and t the target sparsity.

    The multipliers l1, l2 ascend while everything else descends.
    """

    def __init__(self, inner: DistilObjective, config: FusionConfig) -> None:
        super().__init__()
        self.inner, self.config = inner, config
        self.gates = FusionGates(config.layer_heads, config.layer_ffn)
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.target = 0.0

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = self.inner(batch, gates=self.gates.sample())
        sparsity = expected_sparsity(self.gates, self.config)
        gap = sparsity - self.target
        loss = loss + self.multipliers[0] * gap + self.multipliers[1] * gap * gap
        return loss, {**logs, "sparsity": sparsity.detach(), "target": torch.tensor(self.target)}


def prune(job: Job) -> Checkpoint:
    """Learn the gates, remove what they closed, and fine-tune what is left under the teacher."""
    recipe, section = job.recipe, job.recipe.prune
    student, manifest = vlm.load(job.inputs["distil"])
    teacher = load_teacher(job, manifest)
    config = manifest.model.fusion
    torch.manual_seed(recipe.seed + 3)
    inner = DistilObjective(student.train(), teacher, section, recipe.referred_weight)
    objective = PruneObjective(inner, config)

    def before_step(step: int) -> None:
        objective.target = target_sparsity(step, section.steps, section.ramp, section.sparsity)

    groups = [
        *parameter_groups(inner, section.lr, section.weight_decay),
        {"params": list(objective.gates.parameters()), "lr": section.gate_lr, "weight_decay": 0.0},
        {"params": [objective.multipliers], "lr": section.gate_lr, "weight_decay": 0.0, "maximize": True},
    ]
    fit_answers(
        objective,
        student,
        job,
        section,
        what="prune",
        seed=recipe.seed + 3,
        groups=groups,
        before_step=before_step,
        after_step=lambda _: objective.gates.clamp_(),
    )
    kept = choose_kept(objective.gates, config, section.sparsity, section.round_to)
    before = fusion_parameters(student.fusion)
    shrink(student, kept)
    achieved = 1 - fusion_parameters(student.fusion) / before
    job.reporter.say(
        f"  prune: {achieved:.1%} of the fusion's {before:,} prunable parameters removed (asked {section.sparsity:.0%}); "
        f"heads {student.config.fusion.layer_heads}, neurons {student.config.fusion.layer_ffn}"
    )
    if section.recover_steps:
        recover = section.model_copy(update={"steps": section.recover_steps})
        recovery = DistilObjective(student, teacher, section, recipe.referred_weight)
        fit_answers(recovery, student, job, recover, what="recover", seed=recipe.seed + 3)
    metrics = evaluate(student, job) | {"sparsity": achieved}
    report(job, "pruned", metrics)
    return save_answering(job, student, manifest, metrics)
