"""Stage `pairs`: answers to sentences about two images (NLVR2), on the cached regions of both."""

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from edgevlm.artifacts import Checkpoint
from edgevlm.errors import DataError, RecipeError
from edgevlm.job import Job
from edgevlm.models.vlm import VLM
from edgevlm.tasks import answers, pairs
from edgevlm.train.answering import batch_of, fit_answers, freeze_extractor, save_answering
from edgevlm.train.regions import AnswerBatch, RegionSplit, cached_splits
from edgevlm.train.start import fine_tuning_model


class PairObjective(nn.Module):
    """Cross-entropy of the pair head; the extractor stays as it is."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model
        freeze_extractor(model)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits_BA = pair_logits(self.model, batch)
        logs = {"accuracy": answers.batch_accuracy(logits_BA, batch.answers)}
        return answers.loss(logits_BA, batch.answers), logs


def pair_logits(model: VLM, batch: AnswerBatch) -> Tensor:
    """Answer logits (B, A) for texts about two images.

    Raises:
        DataError: the batch holds single images.
    """
    if batch.second is None:
        raise DataError("The region cache holds single images, not pairs", "Choose a dataset of pairs, like nlvr2")
    return model.answer_pair(batch.regions, batch.second, batch.input_ids)


@torch.no_grad()
def predict_pairs(model: VLM, split: RegionSplit, batch_size: int = 256) -> np.ndarray:
    """Index of the answer to every sentence of the split, (Q,)."""
    model.eval()
    device = next(model.fusion.parameters()).device
    predicted = []
    for rows in torch.arange(len(split.answers)).split(batch_size):
        batch = send_to_device(batch_of(model, split, rows), device)
        predicted.append(pair_logits(model, batch).argmax(1).cpu())  # pyright: ignore[reportArgumentType]
    return torch.cat(predicted).numpy()


def evaluate_pairs(model: VLM, job: Job) -> dict[str, float]:
    """Accuracy, the majority answer's, and consistency on each evaluation split in the region cache, and per subset."""
    metrics: dict[str, float] = {}
    for name in cached_splits(job.inputs["regions"]):
        if name == "train":
            continue
        split = RegionSplit.load(job.inputs["regions"], name)
        truth = split.answers.numpy()
        right_Q = predict_pairs(model, split) == truth
        metrics[f"accuracy_{name}"] = float(right_Q.mean())
        metrics[f"majority_{name}"] = answers.majority(truth)
        if split.group_index is not None:  # always, where there are pairs
            groups_Q = split.group_index.numpy()
            metrics[f"consistency_{name}"] = pairs.consistency(right_Q, groups_Q)
            for kind in sorted(set(split.kinds) - {""}):
                rows = np.array(split.kinds) == kind
                metrics[f"accuracy_{name}.{kind}"] = float(right_Q[rows].mean())
                metrics[f"consistency_{name}.{kind}"] = pairs.consistency(right_Q[rows], groups_Q[rows])
    return metrics


def train_pairs(job: Job) -> Checkpoint:
    """Fine-tune the fusion and a three-layer pair head.

    Raises:
        RecipeError: the recipe has no section `pairs`.
        DataError: the data are no pairs.
    """
    recipe, section = job.recipe, job.recipe.pairs
    if section is None:
        raise RecipeError(f"Recipe {recipe.name} has no section 'pairs'", "Add one, or start from minivlm-nlvr2")
    torch.manual_seed(recipe.seed + 6)
    model, manifest = fine_tuning_model(job, section, ("pair",), answer_dropout=section.dropout)
    fit_answers(PairObjective(model), model, job, section, what="pairs", seed=recipe.seed + 6)
    metrics = evaluate_pairs(model, job)
    splits = [name.removeprefix("accuracy_") for name in metrics if name.startswith("accuracy_") and "." not in name]
    shown = [f"{split} {metrics[f'accuracy_{split}']:.3f} / {metrics[f'consistency_{split}']:.3f}" for split in splits]
    job.reporter.say(f"  pairs: accuracy / consistency {', '.join(shown)}")
    return save_answering(job, model, manifest, metrics)
