"""Learning to reason from drawn sentences: stage `synthetic`, and the teacher that goes on from it.

A fusion of 0.4 M parameters learns NLVR from 10^6 drawn pairs of a sentence and a scene, and not at all from the
12,000 real ones alone. The trace of each sentence (which items it speaks of, in which box its claim holds, how many it
counts there) is learnt beside its truth: without it, training does not leave chance in the same time. Ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm import processes
from edgevlm.artifacts import Checkpoint
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion, resolve_tee
from edgevlm.models.vlm import VLM
from edgevlm.recipe import Recipe
from edgevlm.train.answering import (
    answering_model,
    evaluate,
    fit_answers,
    freeze_extractor,
    referred_loss,
    report,
    save_answering,
    with_fusion,
)
from edgevlm.train.drawn import MOST_COUNTED, Trace, open_drawn, synthetic_section
from edgevlm.train.loop import Batch, fit
from edgevlm.train.regions import AnswerBatch


class ReasoningObjective(nn.Module):
    """Task loss + which regions are referred to + the trace per part.

    The trace is asked for on the way as well: referred regions from the middle layer on, claims per part from the last
    but one on, so that [CLS] finds them when its turn comes. The heads for it live here: they are not deployed.
    """

    def __init__(self, model: VLM, referred_weight: float, trace_weight: float, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.referred_weight, self.trace_weight, self.smoothing = referred_weight, trace_weight, smoothing
        hidden, depth = model.config.fusion.hidden, len(model.config.fusion.layer_heads)
        self.middle, self.late = depth // 2, max(1, depth - 1)
        self.referred = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(self.middle, depth))
        self.holds = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(self.late, depth + 1))
        self.counts = nn.ModuleList(nn.Linear(hidden, MOST_COUNTED + 1) for _ in range(self.late, depth + 1))
        for heads in (self.referred, self.holds, self.counts):
            for parameter in heads.parameters():  # zeros: a fresh head must not disturb a trained fusion
                nn.init.zeros_(parameter)
        freeze_extractor(model)

    def forward(self, batch: AnswerBatch, trace: Trace) -> tuple[Tensor, dict[str, Tensor]]:
        answer = self.model.answer(batch.regions, batch.input_ids)
        loss = F.cross_entropy(answer.logits_BA, batch.answers, label_smoothing=self.smoothing)
        right = (answer.logits_BA.argmax(1) == batch.answers).float()
        logs = {"drawn": (right * trace.known_B).sum() / trace.known_B.sum().clamp(min=1)}
        if (trace.known_B == 0).any():
            logs["real"] = (right * (1 - trace.known_B)).sum() / (1 - trace.known_B).sum()
        num_regions, num_parts = batch.regions.scores_BN.shape[1], trace.holds_BP.shape[1]
        states = answer.fusion.hidden_BTD
        referred = referred_loss(self.model, self.model.refer(answer), batch)
        for head, state in zip(self.referred, states[self.middle :], strict=False):
            referred = referred + referred_loss(self.model, head(state[:, -num_regions:]).squeeze(-1), batch)
        referred = referred / (1 + len(self.referred))
        known = trace.known_B[:, None] / (trace.known_B.sum().clamp(min=1) * num_parts * len(self.holds))
        holds, counts = torch.zeros_like(loss), torch.zeros_like(loss)
        for says, counted, state in zip(self.holds, self.counts, states[self.late :], strict=True):
            parts_BPD = state[:, -num_regions - num_parts : -num_regions]
            errors = F.binary_cross_entropy_with_logits(says(parts_BPD).squeeze(-1), trace.holds_BP, reduction="none")
            holds = holds + (errors * known).sum()
            errors = F.cross_entropy(counted(parts_BPD).transpose(1, 2), trace.counts_BP, reduction="none")
            counts = counts + (errors * known).sum()
        loss = loss + self.referred_weight * referred + self.trace_weight * (holds + 0.5 * counts)
        logs |= {"referred": referred.detach(), "holds": holds.detach(), "counts": counts.detach()}
        return loss, logs


def check_synthetic(recipe: Recipe) -> None:
    """Raise RecipeError for drawn sentences that the rest of the recipe cannot use."""
    if recipe.synthetic is None:
        return
    drawn, teacher = (resolve_fusion(section.fusion) for section in (recipe.synthetic, recipe.teacher))
    if drawn.model_copy(update={"dropout": teacher.dropout}) != teacher or recipe.teacher.answer_head != "hidden":
        raise RecipeError(
            "The teacher goes on from stage `synthetic`, but is of another shape",
            "Give teacher.fusion what synthetic.fusion has (dropout may differ), and the answer head `hidden`",
        )
    if drawn.has_encoders:
        raise RecipeError(
            "Drawn sentences teach where a claim holds through layers that read words and regions together",
            "Give synthetic and teacher a single-stream fusion, or drop `synthetic`",
        )
    if len(drawn.parts) != 3:
        raise RecipeError("Drawn scenes have three boxes", "Name them in synthetic.fusion.parts, as recipe nlvr does")
    if resolve_tee(recipe.tee).region_feature != "tags":
        raise RecipeError("Drawn scenes have no pixels", "Set tee.region_feature: tags")
    if recipe.pretrain is not None:
        raise RecipeError("A recipe has `pretrain` or `synthetic`", "Remove one of them")


def pretrain_reasoning(job: Job) -> Checkpoint:
    """Train a fusion on drawn sentences and scenes alone: no image, no label of the dataset."""
    recipe, section = job.recipe, synthetic_section(job)
    detector, manifest = vlm.load(job.inputs["detector"])
    torch.manual_seed(recipe.seed + 5)
    model = with_fusion(detector, manifest, resolve_fusion(section.fusion))
    drawn = open_drawn(job, recipe.seed + 5)
    objective = ReasoningObjective(model, recipe.referred_weight, section.trace_weight)
    sentences = max(1, section.batch_size // section.scenes_per_sentence)
    world = processes.world_size()

    def make_batch(rows: Tensor) -> Batch:
        batch, trace = drawn.batch(int(rows[0]), sentences)
        return {"batch": batch, "trace": trace}

    fit(
        objective,
        section.steps * world,
        make_batch,
        section.model_copy(update={"batch_size": world}),  # a row is a batch of its own
        what="synthetic",
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-synthetic",
        seed=recipe.seed + 5,
        reporter=job.reporter,
    )
    drawn.tie(model)
    metrics = evaluate(model, job)
    report(job, "synthetic", metrics)
    return save_answering(job, model, manifest, metrics)


def finetune_reasoning(job: Job) -> Checkpoint:
    """Stage `teacher` after `synthetic`: real sentences about detected regions, mixed with drawn ones."""
    recipe, section, synthetic = job.recipe, job.recipe.teacher, synthetic_section(job)
    detector, _ = vlm.load(job.inputs["detector"])
    pretrained, manifest = vlm.load(job.inputs["synthetic"])
    torch.manual_seed(recipe.seed + 1)
    model = answering_model(detector, manifest, section)
    model.load_state_dict(pretrained.state_dict())
    objective = ReasoningObjective(model, recipe.referred_weight, synthetic.trace_weight, synthetic.label_smoothing)
    fit_answers(objective, model, job, section, what="teacher", seed=recipe.seed + 1, with_trace=True)
    metrics = evaluate(model, job)
    report(job, "teacher", metrics)
    return save_answering(job, model, manifest, metrics)
