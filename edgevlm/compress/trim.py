"""Stage `trim`: teach the pruned student to drop the tokens and heads that a question does not need.

Our reconstruction of SmartTrim. The model imitates its own full path, as it was when trimming began (self-distillation;
a full path that goes on moving cost the full rung three points on `scenes`). Steps take turns: thresholds with a budget on
the multiply-adds that the batch really took; fixed numbers, drawn anew each time, so that one model serves every rung of
the ladder (`ladder.py`); and the full path.
"""

import copy
import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint, FusionConfig, Rung, TrimConfig
from edgevlm.compress.cost import fusion_macs, macs_of
from edgevlm.compress.distil import logit_loss
from edgevlm.compress.ladder import choose_ladder, named_rungs, score_rungs
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.trimmer import FULL, Trim, trim_of
from edgevlm.models.vlm import VLM, Answer
from edgevlm.recipe import TrimSection
from edgevlm.tasks import answers as task
from edgevlm.train.answering import evaluate, fit_answers, freeze_extractor, referred_loss, report, save_answering
from edgevlm.train.regions import AnswerBatch

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.3


class TrimObjective(nn.Module):
    """Task loss + w KL(full path of the start || this path) + budget + early exits + ranking of the regions asked for."""

    def __init__(self, model: VLM, section: TrimSection, referred_weight: float, seed: int) -> None:
        super().__init__()
        self.model, self.section, self.referred_weight, self.seed = model, section, referred_weight, seed
        self._full = [copy.deepcopy(model).eval().requires_grad_(False)]  # a list: not part of the module
        config = model.config.fusion
        self.exits = nn.ModuleList(copy.deepcopy(model.head) for _ in section.layers)
        self.poolers = nn.ModuleList(nn.Linear(config.hidden, config.hidden) for _ in section.layers)
        self.step = 0
        self.rungs: list[Trim] | None = None
        """Only these, in turns; None = thresholds and numbers drawn anew."""
        freeze_extractor(model)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        section, truth = self.section, (batch.answers, batch.targets)
        progress = min(1.0, (self.step + 1) / max(1.0, section.ramp * section.steps))
        with torch.no_grad():
            full = self._full[0].to(batch.input_ids.device).answer(batch.regions, batch.input_ids)
        trim = self._draw(progress, batch)
        trimmed = self.model.answer(batch.regions, batch.input_ids, trim)
        imitation = logit_loss(trimmed.logits_BA, full.logits_BA)
        loss = task.loss(trimmed.logits_BA, *truth) + section.self_distil_weight * imitation
        share = self._share(trimmed, batch)
        if trim.threshold is not None:
            budget = 1 + (section.budget - 1) * progress
            loss = loss + section.budget_weight * (share - budget).square()
        for exit, pooler, trimming in zip(self.exits, self.poolers, trimmed.fusion.trimmings, strict=False):
            early = exit(torch.tanh(pooler(trimming.cls_BD)))
            loss = loss + section.exit_weight * task.loss(early, *truth) / len(self.exits)
        first = trimmed.fusion.trimmings[0].scores_BN if trimmed.fusion.trimmings else None
        if self.referred_weight and section.policy == "learned" and first is not None:
            loss = loss + self.referred_weight * referred_loss(self.model, first, batch)
        accuracy = task.batch_accuracy(trimmed.logits_BA, *truth)
        return loss, {"accuracy": accuracy, "kd": imitation.detach(), "share": share.detach()}

    def _draw(self, progress: float, batch: AnswerBatch) -> Trim:
        """What this step trims: a function of the step, so that a resumed run draws the same."""
        section, learned = self.section, self.section.policy == "learned"
        turn = self.step % 3
        temperature = FIRST_TEMPERATURE + (LAST_TEMPERATURE - FIRST_TEMPERATURE) * self.step / section.steps
        if self.rungs is not None:
            return self.rungs[self.step % len(self.rungs)]
        if turn == 2:
            return FULL
        if learned and turn == 0:
            heads = 0.0 if section.head_layers else None
            return Trim(threshold=0.0, head_threshold=heads, temperature=temperature, noise=True)
        draw = random.Random(f"{self.seed} {self.step}")
        num_regions, num_words = batch.regions.scores_BN.shape[1], batch.input_ids.shape[1]
        return Trim(
            regions=self._numbers(draw, num_regions, section.context + 1, progress),
            words=self._numbers(draw, num_words, 2, progress) if section.words else (),
            temperature=temperature if learned else None,
        )

    def _numbers(self, draw: random.Random, number: int, at_least: int, progress: float) -> tuple[int, ...]:
        """Falling numbers of tokens behind the trimming layers; the last is a share between `least` and all, log-uniform."""
        floor = 1 + (self.section.least - 1) * progress
        shares = sorted((math.exp(draw.uniform(math.log(floor), 0.0)) for _ in self.section.layers), reverse=True)
        return tuple(min(number, max(at_least, math.ceil(share * number))) for share in shares)

    def _share(self, trimmed: Answer, batch: AnswerBatch) -> Tensor:
        """Multiply-adds that the trimmed path took, as a share of the full one's, mean over the batch; with gradients."""
        config, model = self.model.config.fusion, self.model
        words = (batch.input_ids != model.fusion.pad_id).sum(1).float()
        regions = model.valid(batch.regions).sum(1)
        return cost_share(config, model.tee.region_dim, trimmed, words, regions).mean()


def cost_share(config: FusionConfig, region_dim: int, answer: Answer, words_B: Tensor, regions_B: Tensor) -> Tensor:
    """What each row of a trimmed (masked) pass took of what it takes with all its words and regions, (B,)."""
    depth = len(config.layer_heads)
    words, regions = [words_B], [regions_B]
    behind = {trimming.layer: trimming for trimming in answer.fusion.trimmings}
    for layer in range(depth - 1):
        trimming = behind.get(layer)
        words.append(words[-1] if trimming is None else trimming.words_BL.sum(1))
        regions.append(regions[-1] if trimming is None else trimming.regions_BN.sum(1))
    heads = {i: keep.own_BH.float().sum(1) for i, keep in answer.fusion.heads.items() if keep.own_BH is not None}
    image = {i: keep.image_BH.float().sum(1) for i, keep in answer.fusion.heads.items() if keep.image_BH is not None}
    took = macs_of(config, region_dim, words, regions, heads, image)
    return took / macs_of(config, region_dim, [words_B] * depth, [regions_B] * depth)


def check_trim(section: TrimSection, num_layers: int, num_regions: int) -> None:
    """Raise RecipeError for trimming that the model cannot have."""
    if num_layers < 2:
        raise RecipeError("The fusion has one layer: nothing would follow its trimming", "Give it more layers")
    for name in ("layers", "head_layers"):
        layers = getattr(section, name)
        last = num_layers - (2 if name == "layers" else 1)
        if list(layers) != sorted(set(layers)) or any(not 0 <= layer <= last for layer in layers):
            raise RecipeError(
                f"trim.{name} {list(layers)} cannot be: the fusion has {num_layers} layers, "
                + ("and something must follow the last trimming" if name == "layers" else "counted from 0"),
                f"Choose rising numbers from 0 to {last}",
            )
    if section.context >= num_regions:
        raise RecipeError(
            f"trim.context {section.context} leaves no region of {num_regions} by itself", "Choose fewer context tokens"
        )
    if isinstance(section.rungs, dict):
        first = next(iter(section.rungs.values()))
        if max(first.regions) != num_regions or first.num_words or first.num_regions:
            raise RecipeError(
                f"The first rung keeps {max(first.regions)} regions, but the extractor hands over {num_regions}",
                f"Let the first rung keep all {num_regions} regions and read all words",
            )
        config = trim_config(section)
        for name, rung in section.rungs.items():
            if rung.words and not config.words:
                raise RecipeError(
                    f"Rung {name} keeps a number of words, but words are not trimmed",
                    "Drop its `words`, or set trim.words: true with another policy than similarity",
                )
            if rung.regions[-1] <= (context := config.context):
                raise RecipeError(
                    f"Rung {name} keeps {rung.regions[-1]} regions, {context} of them context tokens",
                    f"Keep at least {context + 1}",
                )


def trim_config(section: TrimSection) -> TrimConfig:
    """What the section says about the model."""
    alike = section.policy == "similarity"
    return TrimConfig(
        layers=section.layers,
        policy=section.policy,
        words=section.words and not alike,
        head_layers=() if alike else section.head_layers,
        context=0 if alike else section.context,
    )


def trim(job: Job) -> Checkpoint:
    """Add trimmers to the pruned student, train all budgets together, and choose the ladder."""
    recipe, section = job.recipe, job.recipe.trim
    pruned, manifest = vlm.load(job.inputs["prune"])
    fusion, tee = manifest.model.fusion, manifest.model.tee
    check_trim(section, len(fusion.layer_heads), tee.num_regions)
    seed = recipe.seed + 4 + 1000 * section.seed
    torch.manual_seed(seed)
    config = manifest.model.model_copy(update={"fusion": fusion.model_copy(update={"trim": trim_config(section)})})
    model = VLM(config, manifest.preprocess, manifest.tokenizer, manifest.labels)
    model.load_state_dict(pruned.state_dict(), strict=False)  # all but the new trimmers
    objective = TrimObjective(model, section, recipe.referred_weight, seed)

    def before_step(step: int) -> None:
        objective.step = step

    settings: dict[str, Any] = {"seed": seed, "before_step": before_step}
    fit_answers(objective, model, job, section, what="trim", **settings)
    if isinstance(section.rungs, dict):
        rungs = named_rungs(section.rungs, section.layers)
    else:
        rungs = choose_ladder(model, manifest, job, section)
    if section.tune_steps:
        before, kept = score_rungs(model, job, rungs), copy.deepcopy(model.state_dict())
        objective.rungs = [trim_of(rung) for rung in rungs]
        tune = section.model_copy(update={"steps": section.tune_steps, "lr": section.lr / 2})
        fit_answers(objective, model, job, tune, what="tune", **settings)
        after = score_rungs(model, job, rungs)
        pays = sum(after) > sum(before)
        job.reporter.say(f"  rungs tuned together: {sum(before) / len(rungs):.3f} -> {sum(after) / len(rungs):.3f}")
        if not pays:
            model.load_state_dict(kept)
    return _save(job, model, manifest, rungs)


def _save(job: Job, model: VLM, manifest: Checkpoint, rungs: tuple[Rung, ...]) -> Checkpoint:
    """Every rung on every split, and the checkpoint with the ladder."""
    config, tee = model.config.fusion, manifest.model.tee
    scored, metrics = [], {}
    for rung in rungs:
        trim = trim_of(rung)
        rung_metrics = evaluate(model, job, trim)
        report(job, f"rung {rung.name}", rung_metrics)
        macs = fusion_macs(config, manifest.tokenizer.max_tokens, tee.num_regions, model.tee.region_dim, trim)
        scored.append(rung.model_copy(update={"gmacs": macs / 1e9, "expected_accuracy": rung_metrics["accuracy_val"]}))
        metrics |= rung_metrics if rung is rungs[0] else {}
        metrics |= {f"accuracy_test@{rung.name}": rung_metrics["accuracy_test"]}
    return save_answering(job, model, manifest, metrics, rungs=tuple(scored))
