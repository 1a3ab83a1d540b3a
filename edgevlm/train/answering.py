"""Training and evaluating answers on cached regions; stage `teacher`."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.artifacts import VOCABULARY, Checkpoint, ModelConfig
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.fusion import FusionOutput
from edgevlm.models.registry import resolve_fusion
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.tasks import answers as task
from edgevlm.train.checkpoints import save_checkpoint
from edgevlm.train.loop import Batch, fit
from edgevlm.train.regions import RegionSplit


class AnswerObjective(nn.Module):
    """Task loss plus the auxiliary 'which regions does the text refer to' loss; the extractor stays as it is."""

    def __init__(self, model: VLM, referred_weight: float) -> None:
        super().__init__()
        self.model, self.referred_weight = model, referred_weight
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
        answer = self.model.answer(Regions(features, boxes, scores), input_ids)
        loss = task.loss(answer.logits_BA, answers)
        logs = {"accuracy": (answer.logits_BA.argmax(1) == answers).float().mean()}
        if self.referred_weight:
            aux = referred_loss(self.model, answer.fusion, scores, referred, has_referred)
            loss = loss + self.referred_weight * aux
            logs["referred"] = aux.detach()
        return loss, logs


def referred_loss(model: VLM, output: FusionOutput, scores: Tensor, referred: Tensor, has_referred: Tensor) -> Tensor:
    """Binary cross-entropy over the valid regions of the rows whose data say what the text refers to."""
    logits = model.referred(output.regions_BND).squeeze(-1)
    counted = (scores >= model.config.tee.score_threshold).float() * has_referred.unsqueeze(1)
    losses = F.binary_cross_entropy_with_logits(logits, referred.to(logits.dtype), reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def freeze_extractor(model: VLM) -> None:
    """The fusion is trained on cached regions: gradients for the extractor would only waste memory."""
    model.tee.requires_grad_(False)


def batch_of(split: RegionSplit, rows: Tensor) -> Batch:
    """The objective's arguments for questions `rows`."""
    regions = split.regions(rows)
    return {
        "features": regions.features_BND,
        "boxes": regions.boxes_norm_BN4,
        "scores": regions.scores_BN,
        "input_ids": split.input_ids[rows],
        "answers": split.answers[rows],
        "referred": split.referred[rows],
        "has_referred": split.has_referred[rows],
    }


@torch.no_grad()
def predict(model: VLM, split: RegionSplit, num_keep: int | None = None, batch_size: int = 512) -> np.ndarray:
    """Index of the answer to every question of the split, (Q,)."""
    model.eval()
    device = next(model.head.parameters()).device
    predicted = []
    for rows in torch.arange(len(split.answers)).split(batch_size):
        regions = Regions(*(part.to(device) for part in split.regions(rows)))
        logits = model.answer(regions, split.input_ids[rows].to(device), num_keep=num_keep).logits_BA
        predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted).numpy()


def evaluate(model: VLM, job: Job, num_keep: int | None = None) -> dict[str, float]:
    """Accuracy on each evaluation split in the region cache, the majority answer's, and per kind on the test split."""
    metrics: dict[str, float] = {}
    for path in sorted(job.inputs["regions"].glob("*.safetensors")):
        if path.stem == "train":
            continue
        split = RegionSplit.load(job.inputs["regions"], path.stem)
        predicted, truth = predict(model, split, num_keep), split.answers.numpy()
        metrics[f"accuracy_{path.stem}"] = task.accuracy(predicted, truth)
        metrics[f"majority_{path.stem}"] = task.majority(truth)
        if path.stem == "test":
            kinds = task.accuracy_by_kind(predicted, truth, split.kinds)
            metrics |= {f"accuracy_test.{kind}": value for kind, value in kinds.items() if kind}
    return metrics


def report(job: Job, what: str, metrics: dict[str, float]) -> None:
    """One line with the accuracies."""
    shares = [
        f"{name[9:]} {value:.3f}" for name, value in metrics.items() if name.startswith("accuracy_") and "." not in name
    ]
    job.reporter.say(f"  {what}: accuracy {', '.join(shares)} (majority {metrics['majority_test']:.3f})")


def train_teacher(job: Job) -> Checkpoint:
    """Train the large fusion transformer on cached regions."""
    recipe, section = job.recipe, job.recipe.teacher
    detector, manifest = vlm.load(job.inputs["detector"])
    torch.manual_seed(recipe.seed + 1)
    config = ModelConfig(tee=manifest.model.tee, fusion=resolve_fusion(section.fusion))
    model = VLM(config, manifest.preprocess, manifest.tokenizer, manifest.labels)
    model.tee.load_state_dict(detector.tee.state_dict())
    split = RegionSplit.load(job.inputs["regions"], "train")
    fit(
        AnswerObjective(model, recipe.referred_weight),
        len(split.answers),
        lambda rows: batch_of(split, rows),
        section,
        what="teacher",
        work_dir=job.out_dir,
        key=job.provenance.key,
        seed=recipe.seed + 1,
        reporter=job.reporter,
    )
    metrics = evaluate(model, job)
    report(job, "teacher", metrics)
    manifest = manifest.model_copy(
        update={"provenance": job.provenance, "model": config, "task": recipe.task, "metrics": metrics}
    )
    return save_checkpoint(job.out_dir, model.cpu(), job.inputs["prepare"] / VOCABULARY, manifest)
