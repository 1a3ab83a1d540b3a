"""Training and evaluating answers on cached regions; stage `teacher`."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, FusionConfig, ModelConfig
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.vlm import VLM
from edgevlm.recipe import TrainSection
from edgevlm.tasks import answers as task
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import fit
from edgevlm.train.regions import AnswerBatch, RegionSplit, cached_splits


class AnswerObjective(nn.Module):
    """Task loss plus the auxiliary 'which regions does the text refer to' loss; the extractor stays as it is."""

    def __init__(self, model: VLM, referred_weight: float) -> None:
        super().__init__()
        self.model, self.referred_weight = model, referred_weight
        freeze_extractor(model)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        answer = self.model.answer(batch.regions, batch.input_ids)
        loss = task.loss(answer.logits_BA, batch.answers)
        logs = {"accuracy": (answer.logits_BA.argmax(1) == batch.answers).float().mean()}
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


def with_fusion(detector: VLM, manifest: Checkpoint, fusion: FusionConfig) -> VLM:
    """The detector's extractor under a new, untrained fusion."""
    config = ModelConfig(tee=manifest.model.tee, fusion=fusion)
    model = VLM(config, manifest.preprocess, manifest.tokenizer, manifest.labels)
    model.tee.load_state_dict(detector.tee.state_dict())
    return model


def batch_of(model: VLM, split: RegionSplit, rows: Tensor, min_regions: int = 1) -> AnswerBatch:
    """Questions `rows` as `model` sees them."""
    return split.batch(rows, model.config.tee.score_threshold, model.fusion.pad_id, min_regions)


def fit_answers(
    objective: nn.Module,
    model: VLM,
    job: Job,
    section: TrainSection,
    *,
    what: str,
    seed: int,
    min_regions: int = 1,
    **settings: Any,
) -> None:
    """Train on the cached regions of the training split; `settings` go on to `fit`."""
    split = RegionSplit.load(job.inputs["regions"], "train")
    fit(
        objective,
        len(split.answers),
        lambda rows: {"batch": batch_of(model, split, rows, min_regions)},
        section,
        what=what,
        work_dir=job.out_dir,
        key=f"{job.provenance.key}-{what}",
        seed=seed,
        reporter=job.reporter,
        **settings,
    )


@torch.no_grad()
def predict(model: VLM, split: RegionSplit, num_keep: int | None = None, batch_size: int = 512) -> np.ndarray:
    """Index of the answer to every question of the split, (Q,)."""
    model.eval()
    device = next(model.head.parameters()).device
    predicted = []
    for rows in torch.arange(len(split.answers)).split(batch_size):
        batch = send_to_device(batch_of(model, split, rows), device)
        logits = model.answer(batch.regions, batch.input_ids, num_keep=num_keep).logits_BA  # pyright: ignore
        predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted).numpy()


def evaluate(model: VLM, job: Job, num_keep: int | None = None) -> dict[str, float]:
    """Accuracy on each evaluation split in the region cache, the majority answer's, and per kind on the test split."""
    metrics: dict[str, float] = {}
    for name in cached_splits(job.inputs["regions"]):
        if name == "train":
            continue
        split = RegionSplit.load(job.inputs["regions"], name)
        predicted, truth = predict(model, split, num_keep), split.answers.numpy()
        metrics[f"accuracy_{name}"] = task.accuracy(predicted, truth)
        metrics[f"majority_{name}"] = task.majority(truth)
        if name == "test":
            kinds = task.accuracy_by_kind(predicted, truth, split.kinds)
            metrics |= {f"accuracy_test.{kind}": value for kind, value in kinds.items() if kind}
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
    model = with_fusion(detector, manifest, resolve_fusion(section.fusion))
    objective = AnswerObjective(model, recipe.referred_weight)
    fit_answers(objective, model, job, section, what="teacher", seed=recipe.seed + 1)
    metrics = evaluate(model, job)
    report(job, "teacher", metrics)
    return save_answering(job, model, manifest, metrics)
