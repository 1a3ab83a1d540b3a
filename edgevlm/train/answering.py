"""Training and evaluating answers on cached regions; stage `teacher`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, FusionConfig, ModelConfig, Vocabulary
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.trimmer import FULL, Trim
from edgevlm.models.vlm import VLM
from edgevlm.recipe import FineTuneSection, TeacherSection, TrainSection
from edgevlm.tasks import answers as task
from edgevlm.tasks import vqa
from edgevlm.tasks.entailment import per_class_accuracy
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.drawn import open_drawn
from edgevlm.train.loop import Batch, fit
from edgevlm.train.regions import AnswerBatch, RegionSplit, cached_splits, image_ids
from edgevlm.train.warm_start import warm_start


class AnswerObjective(nn.Module):
    """Task loss plus the auxiliary 'which regions does the text refer to' loss; the extractor stays as it is."""

    def __init__(self, model: VLM, referred_weight: float) -> None:
        super().__init__()
        self.model, self.referred_weight = model, referred_weight
        freeze_extractor(model)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        answer = self.model.answer(batch.regions, batch.input_ids)
        truth = batch.answers, batch.targets
        loss = task.loss(answer.logits_BA, *truth)
        logs = {"accuracy": task.batch_accuracy(answer.logits_BA, *truth)}
        if self.referred_weight:
            aux = referred_loss(self.model, self.model.refer(answer), batch)
            loss = loss + self.referred_weight * aux
            logs["referred"] = aux.detach()
        return loss, logs


def referred_loss(model: VLM, logits_BN: Tensor, batch: AnswerBatch) -> Tensor:
    """Binary cross-entropy over the valid regions of the rows whose data say what the text refers to."""
    counted = model.valid(batch.regions) * batch.has_referred.unsqueeze(1)
    losses = F.binary_cross_entropy_with_logits(logits_BN, batch.referred.to(logits_BN.dtype), reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def freeze_extractor(model: VLM) -> None:
    """The fusion is trained on cached regions: gradients for the extractor would only waste memory."""
    model.tee.requires_grad_(False)


def with_fusion(detector: VLM, manifest: Checkpoint, fusion: FusionConfig, **settings: Any) -> VLM:
    """The detector's extractor under a new, untrained fusion; `settings` are further fields of the `ModelConfig`."""
    config = ModelConfig(tee=manifest.model.tee, fusion=fusion, **settings)
    model = VLM(config, manifest.preprocess, manifest.tokenizer, manifest.labels)
    model.tee.load_state_dict(detector.tee.state_dict())
    return model


def answering_model(detector: VLM, manifest: Checkpoint, section: TeacherSection) -> VLM:
    """The detector's extractor under the section's untrained fusion and answer head."""
    settings = {"answer_head": section.answer_head, "answer_dropout": section.answer_dropout}
    model = with_fusion(detector, manifest, resolve_fusion(section.fusion), **settings)
    if section.answer_head == "linear":
        vqa.start_at_prior(model.head.outer)
    return model


def warm(model: VLM, job: Job, section: FineTuneSection, manifest: Checkpoint) -> None:
    """Start the fusion from what the run has pre-trained, else from what the section names, else leave it as it is."""
    start = str(job.inputs["pretrain"]) if "pretrain" in job.inputs else section.start
    if start is not None:
        warm_start(model, start, job.inputs["detector"] / VOCABULARY, manifest.tokenizer, job.reporter)


def batch_of(model: VLM, split: RegionSplit, rows: Tensor, min_regions: int = 1) -> AnswerBatch:
    """Questions `rows` as `model` sees them."""
    batch = split.batch(rows, model.config.tee.score_threshold, model.fusion.pad_id, min_regions)
    if split.answer_ids is None or split.soft is None:
        return batch
    num_answers = model.head.outer.out_features
    return batch._replace(targets=vqa.dense_targets(split.answer_ids[rows], split.soft[rows], num_answers))


def fit_answers(
    objective: nn.Module,
    model: VLM,
    job: Job,
    section: TrainSection,
    *,
    what: str,
    seed: int,
    min_regions: int = 1,
    with_trace: bool = False,
    beside: Callable[[Tensor], Batch] | None = None,
    **settings: Any,
) -> None:
    """Train on the cached regions of the training split, on the questions with a known answer.

    Where the recipe has `synthetic`, drawn sentences join every batch; `with_trace` hands the objective their trace as
    well. `beside` gives further keyword arguments of the objective for given questions. `settings` go on to `fit`.
    """
    split = RegionSplit.load(job.inputs["regions"], "train")
    usable = split.answerable()
    synthetic = job.recipe.synthetic
    drawn = open_drawn(job, seed) if synthetic else None

    def make_batch(rows: Tensor) -> Batch:
        real = batch_of(model, split, usable[rows], min_regions)
        if drawn is None or synthetic is None:
            return {"batch": real} | (beside(usable[rows]) if beside else {})
        mixed, trace = drawn.beside(real, rows, synthetic.mix, model.config.fusion.parts)
        return {"batch": mixed, "trace": trace} if with_trace else {"batch": mixed}

    fit(
        objective,
        len(usable),
        make_batch,
        section,
        what=what,
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-{what}",
        seed=seed,
        reporter=job.reporter,
        names=lambda rows: image_ids(job.inputs["regions"], "train", split.image_index[usable[rows]]),
        **settings,
    )
    if drawn is not None:
        drawn.tie(model)


@torch.no_grad()
def predict(
    model: VLM, split: RegionSplit, trim: Trim = FULL, batch_size: int = 512, rows: Tensor | None = None
) -> np.ndarray:
    """Index of the answer to every question of the split, or to `rows` of them, (Q,)."""
    model.eval()
    merges = model.config.fusion.trim is not None and model.config.fusion.trim.policy == "similarity"
    # Which tokens pair up depends on their places, so padding must stand where the exported program has it.
    min_regions = split.scores.shape[1] if merges and trim != FULL else 1
    device = next(model.head.parameters()).device
    predicted = []
    asked = torch.arange(len(split.answers)) if rows is None else rows
    for chunk in asked.split(batch_size):
        batch = send_to_device(batch_of(model, split, chunk, min_regions), device)
        logits = model.answer(batch.regions, batch.input_ids, trim).logits_BA  # pyright: ignore
        predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted).numpy()


def question_scores(predicted: np.ndarray, split: RegionSplit) -> np.ndarray:
    """Score of every answer, (Q,) 0..1: the official accuracy where several annotators answered (`tasks/vqa.py`)."""
    if split.answer_ids is not None and split.official is not None:
        return vqa.official_scores(predicted, split.answer_ids.numpy(), split.official.numpy())
    return (predicted == split.answers.numpy()).astype(np.float64)


def evaluate(model: VLM, job: Job, trim: Trim = FULL, cache: Path | None = None) -> dict[str, float]:
    """Accuracy on each evaluation split, the majority answer's, and per kind on the test split.

    `cache` holds the regions; None = those of the stage `regions`. Where several annotators answered, it is the
    official accuracy (`tasks/vqa.py`).
    """
    metrics: dict[str, float] = {}
    cache = cache or job.inputs["regions"]
    for name in cached_splits(cache):
        if name == "train":
            continue
        split = RegionSplit.load(cache, name)
        predicted, truth = predict(model, split, trim), split.answers.numpy()
        scores = question_scores(predicted, split)
        if split.answer_ids is not None and split.official is not None:
            metrics[f"majority_{name}"] = vqa.best_constant(split.answer_ids.numpy(), split.official.numpy())
        else:
            metrics[f"majority_{name}"] = task.majority(truth)
        metrics[f"accuracy_{name}"] = float(scores.mean())
        if name == "test":
            groups = task.mean_by(scores, split.kinds)
            if job.recipe.task == "entailment":
                answers = read_manifest(job.inputs["prepare"], Vocabulary).labels.answers
                groups |= per_class_accuracy(predicted, truth, answers)
            metrics |= {f"accuracy_test.{group}": value for group, value in groups.items() if group}
    return metrics


def report(job: Job, what: str, metrics: dict[str, float]) -> None:
    """One line with the accuracies."""
    shares = [
        f"{name[9:]} {value:.3f}" for name, value in metrics.items() if name.startswith("accuracy_") and "." not in name
    ]
    job.reporter.say(f"  {what}: accuracy {', '.join(shares)} (majority {metrics['majority_test']:.3f})")


def save_answering(job: Job, model: VLM, manifest: Checkpoint, metrics: dict[str, float], **changes: Any) -> Checkpoint:
    """The trained model with its metrics; `changes` replace further fields of the manifest."""
    changes |= {"provenance": job.provenance, "model": model.config, "task": job.recipe.task, "metrics": metrics}
    vocabulary = job.inputs["prepare"] / VOCABULARY
    return save_checkpoint(job.out_dir, model.cpu(), vocabulary, manifest.model_copy(update=changes))


def train_teacher(job: Job) -> Checkpoint:
    """Train the large fusion transformer on cached regions."""
    recipe, section = job.recipe, job.recipe.teacher
    detector, manifest = vlm.load(job.inputs["detector"])
    torch.manual_seed(recipe.seed + 1)
    model = answering_model(detector, manifest, section)
    warm(model, job, section, manifest)
    objective = AnswerObjective(model, recipe.referred_weight)
    fit_answers(objective, model, job, section, what="teacher", seed=recipe.seed + 1)
    metrics = evaluate(model, job)
    report(job, "teacher", metrics)
    return save_answering(job, model, manifest, metrics)
