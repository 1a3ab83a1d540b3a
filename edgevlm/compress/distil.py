"""Stage `distil`: a smaller fusion learns from the teacher's logits, attention maps and hidden states.

The teacher looks at the student's boxes (feature alignment, DistillVLM); the loss terms and their form follow
EfficientVLM's stage 1 and 2: (1 - w) task + w (KL(logits) + a * keys * MSE(attention) + h * MSE(hidden)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.fusion import FusionOutput
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import DistilSection, PruneSection
from edgevlm.tasks import answers as task
from edgevlm.train.answering import (
    answering_model,
    evaluate,
    fit_answers,
    freeze_extractor,
    referred_loss,
    report,
    save_answering,
    warm,
)
from edgevlm.train.regions import AnswerBatch


def layer_map(num_student: int, num_teacher: int) -> list[int]:
    """Teacher layer that each student layer imitates: evenly spread, last to last (2:1 gives 1, 3, 5 ...)."""
    return [round((i + 1) * num_teacher / num_student) - 1 for i in range(num_student)]


class Distiller(nn.Module):
    """Loss of a student against a frozen teacher; holds the projections between different widths."""

    def __init__(self, student: VLM, teacher: VLM, hidden_weight: float, attention_weight: float) -> None:
        super().__init__()
        depths = len(student.config.fusion.layer_heads), len(teacher.config.fusion.layer_heads)
        self.pairs = list(enumerate(layer_map(*depths)))
        self.hidden_weight, self.attention_weight = hidden_weight, attention_weight
        widths = student.config.fusion.hidden, teacher.config.fusion.hidden
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in self.pairs)

    def forward(
        self, student_logits: Tensor, student: FusionOutput, teacher_logits: Tensor, teacher: FusionOutput
    ) -> Tensor:
        loss = logit_loss(student_logits, teacher_logits)
        num_keys = student.attention_BHTT[0].shape[-1]
        for (i, j), projection in zip(self.pairs, self.projections, strict=True):
            hidden = F.mse_loss(projection(student.hidden_BTD[i + 1]), teacher.hidden_BTD[j + 1])
            # Head counts differ, so the maps are compared as means over heads.
            maps = student.attention_BHTT[i].mean(1), teacher.attention_BHTT[j].mean(1)
            loss = loss + (self.hidden_weight * hidden + self.attention_weight * num_keys * F.mse_loss(*maps)) / len(
                self.pairs
            )
        return loss


def logit_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) per sample, temperature 1."""
    return F.kl_div(
        student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True
    )


class DistilObjective(nn.Module):
    """Task loss + distillation (+ referred regions)."""

    def __init__(
        self, student: VLM, teacher: VLM, section: DistilSection | PruneSection, referred_weight: float
    ) -> None:
        super().__init__()
        self.student = student
        self.distiller = Distiller(student, teacher, section.hidden_weight, section.attention_weight)
        self.kd_weight, self.referred_weight = section.kd_weight, referred_weight
        self._teacher = [teacher.eval().requires_grad_(False)]  # a list: not a submodule, so not in snapshots
        freeze_extractor(student)

    def forward(self, batch: AnswerBatch, teacher_regions: Regions | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch; `teacher_regions` are the teacher's own view of the same boxes, if it has one."""
        teacher = self._teacher[0].to(batch.input_ids.device)
        with torch.no_grad():
            target = teacher.answer(teacher_regions or batch.regions, batch.input_ids)
        answer = self.student.answer(batch.regions, batch.input_ids)
        imitation = self.distiller(answer.logits_BA, answer.fusion, target.logits_BA, target.fusion)
        truth = batch.answers, batch.targets
        task_loss = task.loss(answer.logits_BA, *truth)
        loss = (1 - self.kd_weight) * task_loss + self.kd_weight * imitation
        if self.referred_weight:
            loss = loss + self.referred_weight * referred_loss(self.student, self.student.refer(answer), batch)
        accuracy = task.batch_accuracy(answer.logits_BA, *truth)
        return loss, {"accuracy": accuracy, "kd": imitation.detach()}


def load_teacher(job: Job, student: Checkpoint) -> VLM:
    """The teacher, checked to speak the student's language.

    Raises:
        CheckpointError: other labels, vocabulary or preprocessing.
    """
    teacher, manifest = vlm.load(job.inputs["teacher"])
    for what in ("labels", "tokenizer", "preprocess"):
        if getattr(manifest, what) != getattr(student, what):
            raise CheckpointError(
                f"The teacher in {job.inputs['teacher']} has other {what} than the student",
                "Train both from the same `prepare` stage",
            )
    return teacher


def start_from_teacher(student: VLM, teacher: VLM) -> None:
    """Copy the teacher's weights into the student: everything outside the layers, and the layers that it imitates.

    Raises:
        RecipeError: the widths differ.
    """
    theirs = teacher.state_dict()
    depths = len(student.config.fusion.layer_heads), len(teacher.config.fusion.layer_heads)
    layers = {f"fusion.layers.{i}.": f"fusion.layers.{j}." for i, j in enumerate(layer_map(*depths))}
    state: dict[str, Tensor] = {}
    for name, value in student.state_dict().items():
        source = next((name.replace(mine, other, 1) for mine, other in layers.items() if name.startswith(mine)), name)
        if source not in theirs or theirs[source].shape != value.shape:
            raise RecipeError(
                f"distil.start: the teacher has no {source} of the student's shape",
                "Give the student the teacher's widths (fewer layers are fine), or set distil.start: random",
            )
        state[name] = theirs[source]
    student.load_state_dict(state)


def distil(job: Job) -> Checkpoint:
    """Train the student's fusion under the teacher; the extractor is the detector's."""
    recipe, section = job.recipe, job.recipe.distil
    detector, manifest = vlm.load(job.inputs["detector"])
    teacher = load_teacher(job, manifest)
    torch.manual_seed(recipe.seed + 2)
    student = answering_model(detector, manifest, section)
    if section.start == "teacher":
        start_from_teacher(student, teacher)
    else:
        warm(student, job, section, manifest)
    objective = DistilObjective(student, teacher, section, recipe.referred_weight)
    fit_answers(objective, student, job, section, what="distil", seed=recipe.seed + 2)
    metrics = evaluate(student, job)
    report(job, "student", metrics)
    return save_answering(job, student, manifest, metrics)
