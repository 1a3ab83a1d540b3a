"""Stage `distil`: a smaller fusion learns from a teacher's logits, attention maps and hidden states.

The teacher looks at the student's boxes (feature alignment, DistillVLM); the loss terms and their form follow
EfficientVLM: (1 - w) task + w (KL(logits) + a * keys * MSE(attention) + h * MSE(hidden)), and optionally DistillVLM's
contrast. A teacher whose outputs were written down (`train/teacher_outputs.py`) gives logits alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint, FusionConfig, TeacherOutputs
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.stacks import StackName, stacks_of
from edgevlm.models.stream import FusionOutput
from edgevlm.models.teachers import check_foreign, is_foreign
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import DistilSection, LayerMap, Layers, PruneSection, Recipe, Weight
from edgevlm.tasks import answers as task
from edgevlm.tasks.distillation import StateContrast, attention_loss, logit_loss, projection
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
from edgevlm.train.loop import Batch
from edgevlm.train.regions import AnswerBatch
from edgevlm.train.teacher_outputs import OutputBatch, Outputs, are_wanted
from edgevlm.train.teachers import check_language

__all__ = ["DistilObjective", "Distiller", "distil", "layer_map", "load_teacher", "logit_loss", "published"]

PUBLISHED = {
    "vqa": {"kd_weight": 0.4, "attention_weight": 1.5, "hidden_weight": 1.5},
    "reasoning": {"kd_weight": 0.2, "attention_weight": 0.99, "hidden_weight": 0.99},
    "entailment": {"kd_weight": 0.2, "attention_weight": 0.99, "hidden_weight": 0.99},
}
"""EfficientVLM's weights of its cross-modal encoder (for us: the fusion), by task. The code sums over layers and the weights
here are of means: VQA 0.5 x 3 layers, NLVR2 0.33 x 0.5 x 6. It has no entailment: ours is NLVR2's."""
_TWO_VQA: dict[str, Weight] = {
    "kd_weight": 0.4,
    "attention_weight": {"vision": 1.0 * 6, "text": 1.0 * 3, "cross": 0.5 * 3},
    "hidden_weight": {"vision": 0.2 * 6, "text": 1.0 * 3, "cross": 0.5 * 3},
}
_TWO_NLVR2: dict[str, Weight] = {
    "kd_weight": 0.2,
    "attention_weight": {"vision": 0.33 * 6, "text": 1.0 * 3, "cross": 0.33 * 0.5 * 6},
    "hidden_weight": {"vision": 0.33 * 0.1 * 6, "text": 1.0 * 3, "cross": 0.33 * 0.5 * 6},
}
PUBLISHED_TWO = {"vqa": _TWO_VQA, "reasoning": _TWO_NLVR2, "entailment": _TWO_NLVR2}
"""The same with two encoders: weight per layer x layers of EfficientVLM's student (6 vision, 3 text, 3 cross; NLVR2: 6 cross).
The attention weight of `cross` is that of both its attentions."""


Weighed = TypeVar("Weighed", DistilSection, PruneSection)


def published(section: Weighed, recipe: Recipe) -> Weighed:
    """The section with every weight that it leaves open; where the teacher's logits are read, nothing else is imitated."""
    tables = PUBLISHED_TWO if resolve_fusion(recipe.distil.fusion).has_encoders else PUBLISHED
    weights: dict[str, Weight] = dict(tables.get(recipe.task, tables["vqa"]))
    if isinstance(section, DistilSection) and are_wanted(recipe):
        weights |= {"attention_weight": 0.0, "hidden_weight": 0.0}
    return section.model_copy(update={k: v for k, v in weights.items() if getattr(section, k) is None})


def layer_map(num_student: int, num_teacher: int, asked: Literal["even"] | Layers = "even") -> list[int]:
    """Teacher layer that each student layer imitates: evenly spread, last to last (2:1 gives 1, 3, 5 ...), or as asked.

    Raises:
        RecipeError: the map does not fit the two depths.
    """
    layers = [round((i + 1) * num_teacher / num_student) - 1 for i in range(num_student)]
    if asked == "even":
        if num_student > num_teacher:
            raise RecipeError(
                f"A student of {num_student} layers cannot spread over the {num_teacher} of its teacher",
                "Give distil.layer_map one teacher layer for each student layer, or the student fewer layers",
            )
        return layers
    if len(asked) != num_student or list(asked) != sorted(asked) or asked[-1] >= num_teacher:
        raise RecipeError(
            f"layer_map {list(asked)} does not fit: it needs {num_student} teacher layers (one for each of the student's), "
            f"each from 0 to {num_teacher - 1}, none before its predecessor",
            f"Write for example {layers}" if num_student <= num_teacher else "Repeat some layers",
        )
    return list(asked)


def stack_maps(student: FusionConfig, teacher: FusionConfig, asked: LayerMap = "even") -> dict[StackName, list[int]]:
    """`layer_map` of every stack of the two fusions.

    Raises:
        RecipeError: they are of different forms, or the map does not fit.
    """
    if student.has_encoders != teacher.has_encoders:
        raise RecipeError(
            "One of teacher and student has two encoders, the other a single stream: their layers cannot be compared",
            "Give both the same form, or set attention_weight and hidden_weight to 0 in distil and prune",
        )
    if isinstance(asked, tuple if student.has_encoders else Mapping):
        form = "lists by encoder, {vision: [...], text: [...], cross: [...]}" if student.has_encoders else "one list"
        raise RecipeError(f"layer_map {asked} does not fit: this fusion takes {form}", "Write that, or even")
    maps: dict[str, Literal["even"] | Layers] = {stack.name: "even" for stack in stacks_of(student)}
    maps |= dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(maps, asked)
    return {s.name: layer_map(s.depth(student), s.depth(teacher), maps[s.name]) for s in stacks_of(student)}


class StackTerm(NamedTuple):
    """What is imitated of one stack of layers."""

    stack: StackName
    layers: list[int]
    """Teacher layer of each student layer."""
    hidden_weight: float
    attention_weight: float

    @property
    def states(self) -> list[tuple[int, int]]:
        """Hidden states that are compared: the input of both stacks, then layer by layer."""
        return [(0, 0), *((i + 1, j + 1) for i, j in enumerate(self.layers))]


def stack_terms(
    student: FusionConfig,
    teacher: FusionConfig,
    hidden_weight: Weight | None,
    attention_weight: Weight | None,
    asked: LayerMap = "even",
) -> list[StackTerm]:
    """The terms of every stack; none for fusions of two forms of which logits alone are compared.

    Raises:
        RecipeError: weights or a layer map that do not fit the two fusions.
    """
    weights = hidden_weight, attention_weight
    if student.has_encoders != teacher.has_encoders and not any(weights):
        return []
    maps = stack_maps(student, teacher, asked)
    for weight in weights:
        if isinstance(weight, Mapping) and not student.has_encoders:
            raise RecipeError(
                f"The weights {dict(weight)} are of encoders, and the student has none", "Give one number"
            )
    return [
        StackTerm(name, layers, *((w.get(name, 0.0) if isinstance(w, Mapping) else w) or 0.0 for w in weights))  # pyright: ignore
        for name, layers in maps.items()
    ]


class Distiller(nn.Module):
    """Loss of a student against a frozen teacher; holds the projections between different widths.

    Each stack of layers is compared with the teacher's of that name: hidden states layer by layer, and the input of the
    first layer with that of the first; maps of attention, and of the attention to the image where there is one.
    """

    def __init__(
        self,
        student: VLM,
        teacher: VLM,
        hidden_weight: Weight | None,
        attention_weight: Weight | None,
        layers: LayerMap = "even",
    ) -> None:
        super().__init__()
        ours, theirs = student.config.fusion, teacher.config.fusion
        self.terms = stack_terms(ours, theirs, hidden_weight, attention_weight, layers)
        compared = [state for term in self.terms if term.hidden_weight for state in term.states]
        self.projections = nn.ModuleList(projection(ours.hidden, theirs.hidden) for _ in compared)

    def forward(
        self, student_logits: Tensor, student: FusionOutput, teacher_logits: Tensor, teacher: FusionOutput
    ) -> Tensor:
        loss, projections = logit_loss(student_logits, teacher_logits), iter(self.projections)
        for term in self.terms:
            ours, theirs = student.stacks[term.stack], teacher.stacks[term.stack]
            maps = [(ours.attention_BHTT, theirs.attention_BHTT), (ours.cross_BHTS, theirs.cross_BHTS)]
            for mine, others in maps if term.attention_weight else ():
                losses = [attention_loss(mine[i], others[j]) for i, j in enumerate(term.layers) if mine]
                if losses:
                    loss = loss + term.attention_weight / len(losses) * torch.stack(losses).sum()
            if term.hidden_weight:
                losses = [
                    F.mse_loss(project(ours.hidden_BTD[i]), theirs.hidden_BTD[j])
                    for (i, j), project in zip(term.states, projections, strict=False)
                ]
                loss = loss + term.hidden_weight / len(losses) * torch.stack(losses).sum()
        return loss


class DistilObjective(nn.Module):
    """Task loss + distillation (+ referred regions).

    Args:
        student: trained.
        teacher: run in every step, unless the steps bring its outputs.
        section: the weights, none of them open.
        referred_weight: of the auxiliary loss.
        known: answers that a batch's teacher outputs stand for; None = all.
    """

    known: Tensor

    def __init__(
        self,
        student: VLM,
        teacher: VLM,
        section: DistilSection | PruneSection,
        referred_weight: float,
        known: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.distiller = Distiller(student, teacher, section.hidden_weight, section.attention_weight, section.layer_map)
        self.kd_weight, self.referred_weight = section.kd_weight or 0.0, referred_weight
        self.nce_weight = section.nce_weight if isinstance(section, DistilSection) else 0.0
        self.contrast = None
        if isinstance(section, DistilSection) and section.nce_weight:
            widths = student.config.fusion.hidden, teacher.config.fusion.hidden
            self.contrast = StateContrast(*widths, section.nce_queue)
        known = range(student.head.outer.out_features) if known is None else known
        self.register_buffer("known", torch.tensor(list(known)), persistent=False)
        self._teacher = [teacher.eval().requires_grad_(False)]  # a list: not a submodule, so not in snapshots
        freeze_extractor(student)

    def forward(
        self, batch: AnswerBatch, outputs: OutputBatch | None = None, teacher_regions: Regions | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch.

        Args:
            batch: the student's regions, and questions about them.
            outputs: what the teacher said of them, where it is not run.
            teacher_regions: its own view of the same boxes, if it has one.
        """
        answer = self.student.answer(batch.regions, batch.input_ids)
        if outputs is None:
            teacher = self._teacher[0].to(batch.input_ids.device)
            with torch.no_grad():
                target = teacher.answer(teacher_regions or batch.regions, batch.input_ids)
            imitation = self.distiller(answer.logits_BA, answer.fusion, target.logits_BA, target.fusion)
            pooled = target.fusion.pooled_BD
        else:
            imitation = logit_loss(answer.logits_BA[:, self.known], outputs.logits_BK)
            pooled = outputs.pooled_BD
        if self.contrast is not None:
            imitation = imitation + self.nce_weight * self.contrast(answer.fusion.pooled_BD, pooled)
        truth = batch.answers, batch.targets
        task_loss = task.loss(answer.logits_BA, *truth)
        loss = (1 - self.kd_weight) * task_loss + self.kd_weight * imitation
        if self.referred_weight:
            loss = loss + self.referred_weight * referred_loss(self.student, self.student.refer(answer), batch)
        accuracy = task.batch_accuracy(answer.logits_BA, *truth)
        return loss, {"accuracy": accuracy, "kd": imitation.detach()}


def load_teacher(job: Job, student: Checkpoint) -> VLM:
    """The run's teacher, checked to speak the student's language.

    Raises:
        CheckpointError: other labels, vocabulary or preprocessing.
    """
    teacher, manifest = vlm.load(job.inputs["teacher"])
    check_language(manifest, student, job.inputs["teacher"])
    return teacher


def start_from_teacher(student: VLM, teacher: VLM, asked: LayerMap = "even") -> None:
    """Copy the teacher's weights into the student: everything outside the layers, and the layers that it imitates.

    Raises:
        RecipeError: the widths differ.
    """
    theirs = teacher.state_dict()
    maps = stack_maps(student.config.fusion, teacher.config.fusion, asked)
    layers = {
        f"fusion.{stack.module}.{i}.": f"fusion.{stack.module}.{j}."
        for stack in stacks_of(student.config.fusion)
        for i, j in enumerate(maps[stack.name])
    }
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


def check_distil(recipe: Recipe) -> None:
    """Find the mistakes of the sections `distil` and `teacher_outputs`, before anything runs.

    Raises:
        RecipeError: terms that the teacher cannot give, or a layer map that does not fit.
        CheckpointError: there is no such teacher.
    """
    section, where = recipe.distil, recipe.distil.teacher
    fusion = resolve_fusion(recipe.teacher.fusion)
    if is_foreign(where):
        asked = {
            "distil.attention_weight": section.attention_weight,
            "distil.hidden_weight": section.hidden_weight,
            "distil.nce_weight": section.nce_weight,
            "teacher_outputs.pooled": recipe.teacher_outputs.pooled,
            "synthetic": recipe.synthetic,
        }
        if wrong := [name for name, value in asked.items() if value]:
            raise RecipeError(
                f"{where} looks at images and gives logits alone; {wrong[0]} needs a teacher that runs on cached regions",
                f"Drop {wrong[0]}, or name a checkpoint of edgevlm",
            )
        check_foreign(where)
    elif where is not None:
        fusion = read_manifest(Path(where), Checkpoint, check_files=False).model.fusion
    student = resolve_fusion(section.fusion)
    for one in (published(section, recipe), published(recipe.prune, recipe)):
        stack_terms(student, fusion, one.hidden_weight, one.attention_weight, one.layer_map)
    if section.start == "teacher":
        stack_maps(student, fusion, section.layer_map)


def distil(job: Job) -> Checkpoint:
    """Train the student's fusion under the teacher; the extractor is the detector's."""
    recipe, section = job.recipe, published(job.recipe.distil, job.recipe)
    detector, manifest = vlm.load(job.inputs["detector"])
    teacher = load_teacher(job, manifest)
    torch.manual_seed(recipe.seed + 2)
    student = answering_model(detector, manifest, section)
    if section.start == "teacher":
        start_from_teacher(student, teacher, section.layer_map)
    else:
        warm(student, job, section, manifest)
    known, beside = None, None
    if are_wanted(recipe):
        known, beside = _open_outputs(job)
    objective = DistilObjective(student, teacher, section, recipe.referred_weight, known)
    fit_answers(objective, student, job, section, what="distil", seed=recipe.seed + 2, beside=beside)
    metrics = evaluate(student, job)
    report(job, "student", metrics)
    return save_answering(job, student, manifest, metrics)


def _open_outputs(job: Job) -> tuple[tuple[int, ...], Callable[[Tensor], Batch]]:
    """The answers that the teacher knows, and what it said of given questions."""
    folder = job.inputs["teacher_outputs"]
    artifact = read_manifest(folder, TeacherOutputs)
    outputs = Outputs(folder, artifact.num_questions)
    return artifact.known, lambda questions: {"outputs": outputs.batch(questions)}
