"""Stage `prune`: each way to choose the structure, from a distilled student to a smaller checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from edgevlm.artifacts import WEIGHTS, Checkpoint
from edgevlm.compare.prune import compare_prune
from edgevlm.compress.cost import cost_model, prunable_parameters
from edgevlm.compress.distil import distil
from edgevlm.compress.prune import prune
from edgevlm.compress.structure import (
    METHODS,
    GradientObjective,
    Pruning,
    by_fisher,
    magnitudes,
    saved_by_one,
    standardised,
)
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.gates import gated
from edgevlm.models.groups import groups_of
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.pipeline import run
from edgevlm.recipe import PruneSection, Recipe
from edgevlm.recipes import load_recipe
from edgevlm.stages import stages_of
from edgevlm.train.answering import train_teacher
from tests.edgevlm.runs import SMALL, cached_job, job_for
from tests.edgevlm.tiny import tiny_ids, tiny_regions, tiny_vlm

FEW = ("teacher.steps=3", "distil.steps=3", "prune.steps=6", "prune.recover_steps=2", "prune.save_every=2")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of the stage `prune`."""
    folder = tmp_path_factory.mktemp("prune")
    job = cached_job(folder, *FEW, stage="teacher")
    train_teacher(job)
    inputs = {**job.inputs, "teacher": job.out_dir}
    student = job_for("distil", folder, job.recipe, inputs)
    distil(student)
    return job_for("prune", folder, job.recipe, {**inputs, "distil": student.out_dir})


def pruned(job: Job, out: Path, **changes: object) -> Checkpoint:
    """Run the stage with other settings into another folder."""
    out.mkdir(parents=True)
    section = job.recipe.prune.model_copy(update=changes)
    recipe: Recipe = job.recipe.model_copy(update={"prune": section})
    return prune(replace(job, recipe=recipe, out_dir=out))


@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_and_the_model_smaller(distilled: Job, tmp_path: Path, method: str, measure: str) -> None:
    manifest = pruned(distilled, tmp_path / "out", method=method, measure=measure, sparsity=0.4, round_to=2)
    before, _ = vlm.load(distilled.inputs["distil"])
    after, _ = vlm.load(tmp_path / "out")
    assert 0.4 - 1e-6 <= manifest.metrics["sparsity"] < 0.5
    groups = groups_of(before, ("fusion",))
    whole, left = (
        cost_model(model, found, measure, manifest.tokenizer.max_tokens).only(g.name for g in found).whole  # pyright: ignore
        for model, found in ((before, groups), (after, groups_of(after, ("fusion",))))
    )
    assert 1 - left / whole == pytest.approx(manifest.metrics["sparsity"], abs=1e-9)
    if measure == "parameters":
        assert left == prunable_parameters(manifest.model.fusion)


def test_another_seed_draws_other_gates(distilled: Job, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pruned(distilled, tmp_path / name, method="gates", seed=seed)
        weights.append(load_file(tmp_path / name / WEIGHTS))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(weights[0][key].shape != v.shape or not torch.equal(weights[0][key], v) for key, v in weights[2].items())


def test_a_budget_out_of_reach_names_the_least(distilled: Job, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"below the least.*Remove at most [0-9]+ %"):
        pruned(distilled, tmp_path / "out", method="magnitude", sparsity=0.99)


def test_magnitudes_see_a_member_that_is_zero() -> None:
    model = tiny_vlm()
    groups = tuple(groups_of(model))
    for group in groups:
        with torch.no_grad():
            for part in group.slices:
                weight: torch.Tensor = model.get_submodule(part.module).weight  # pyright: ignore
                rows = weight.transpose(0, 1) if part.axis == "in" else weight
                rows[part.repeat : 2 * part.repeat] = 0.0  # the second member
        assert magnitudes(model, (group,))[group.name].argmin() == 1, group.name
        assert magnitudes(model, (group,))[group.name][1] == 0


class Loss(nn.Module):
    """Of the answers alone, on fixed questions, in double precision."""

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        regions = Regions(*(part.double() for part in tiny_regions(4)))
        return self.model.answer(regions, tiny_ids(4)).logits_BA.square().sum(), {}


def pruning_of(model: VLM, **changes: Any) -> Pruning:
    """The fusion of a model on its way to 60 % of its parameters."""
    groups = tuple(groups_of(model, ("fusion",)))
    cost = cost_model(model, groups, "parameters", 12).only(group.name for group in groups)
    section = PruneSection(steps=2, round_to=2, ramp=1.0)  # pyright: ignore
    made = Pruning(section, model, Loss(model.double()), groups, cost, fit=lambda *rest, **more: None, sparsity=0.4)
    return replace(made, **changes)


def test_fisher_sums_squares_of_what_the_loss_loses_per_gate() -> None:
    """Against central differences of gates at 1 ± 1e-3 in double precision; the sums are float32, of gradients up to ~10."""
    model = tiny_vlm()
    objective = GradientObjective(pruning_of(model), 2, dict)
    objective()[0].backward()
    objective.accumulate(0)

    def loss(name: str, member: int, value: float) -> float:
        values = {group.name: torch.ones(group.size, dtype=torch.double) for group in groups_of(model, ("fusion",))}
        values[name][member] = value
        with torch.no_grad(), gated(model, groups_of(model, ("fusion",)), values):
            return Loss(model)()[0].item()

    for name, member in (("heads.0", 1), ("heads.1", 0), ("neurons.0", 3), ("neurons.1", 17)):
        slope = (loss(name, member, 1.001) - loss(name, member, 0.999)) / 0.002
        found = objective.get_buffer(f"sum_{name.replace('.', '_')}")[member].item()
        assert found == pytest.approx(slope**2, rel=1e-3), name


def test_fisher_closes_what_loses_least_per_unit_of_cost() -> None:
    """Where all members matter equally more of the dear ones, heads, go than where they matter as much as they cost."""
    kept: dict[str, dict[str, int]] = {}
    for what in ("equal", "by cost"):
        objectives: list[GradientObjective] = []
        pruning = pruning_of(
            tiny_vlm(layer_heads=(4, 4)), fit=lambda objective, *rest, into=objectives, **more: into.append(objective)
        )
        choice, costs = by_fisher(pruning), saved_by_one(pruning)
        generator = torch.Generator().manual_seed(0)
        for group in pruning.groups:
            matters = (costs[group.name] if what == "by cost" else 1.0) * (
                1 + 0.1 * torch.rand(group.size, generator=generator)
            )
            objectives[0].get_buffer(f"sum_{group.name.replace('.', '_')}").copy_(matters)
        kept[what] = {name: len(members) for name, members in choice.at(pruning.budget).items()}
        assert 0.95 * pruning.budget <= pruning.cost.of(kept[what]) <= pruning.budget
    heads, neurons = (
        {what: sum(n for name, n in counts.items() if name.startswith(kind)) for what, counts in kept.items()}
        for kind in ("heads", "neurons")
    )
    assert heads["equal"] < heads["by cost"]
    assert neurons["equal"] > neurons["by cost"]


def test_standardised_by_kind() -> None:
    scores = {"heads.0": torch.tensor([1.0, 2.0]), "heads.1": torch.tensor([3.0]), "neurons.0": torch.rand(9) * 100}
    found = standardised(scores)
    heads = torch.cat([found["heads.0"], found["heads.1"]])
    torch.testing.assert_close(heads.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert heads.argsort().tolist() == [0, 1, 2]
    assert abs(found["neurons.0"].std(unbiased=False).item() - 1) < 1e-5


def test_compare_side_by_side_and_again(distilled: Job, tmp_path: Path) -> None:
    """A comparison on a whole run: rows for every way, files to look at, nothing done twice, and what it refuses."""
    run_folder = tmp_path / "run"
    recipe = load_recipe("test-scenes", [*FEW, *SMALL, "prune.round_to=2"])
    run(stages_of(recipe), recipe, run_folder, until="distil")
    settings = {"ways": ("gates", "magnitude"), "keeps": (0.6,), "seeds": 2, "targets": ("onnx",)}
    found = compare_prune(run_folder, **settings)  # pyright: ignore
    assert [(row.way, row.keep) for row in found.rows] == [("gates", 0.6), ("magnitude", 0.6)]
    for row in found.rows:
        assert row.keep - 0.1 < row.kept <= row.keep + 1e-6
        assert len(row.accuracies) == 2
        assert row.ms["onnx fp32"] > 0
        assert row.parameters < found.student.parameters
        assert row.mmacs < found.student.mmacs
    for row, stage in ((found.teacher, "teacher"), (found.student, "distil")):
        assert row.accuracies == (read_manifest(run_folder / stage, Checkpoint).metrics["accuracy_test"],)
        assert row.ms["onnx fp32"] > 0
    text = (run_folder / "compare/prune.md").read_text()
    assert text.count("\n| ") == 1 + 2 + 2
    with Image.open(run_folder / "compare/prune.png") as picture:
        assert picture.width > 500
    stamps = {path: path.stat().st_mtime_ns for path in run_folder.rglob("model.safetensors")}
    assert compare_prune(run_folder, **settings) == found  # pyright: ignore
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("model.safetensors")} == stamps
    for wrong, message in (
        ({"ways": ("gate",)}, "gates"),
        ({"keeps": (50.0,)}, "between 0 and 1"),
        ({"overrides": ("teacher.steps=9",)}, "section prune only"),
        ({"overrides": ("prune.step=9",)}, "prune.step"),
    ):
        with pytest.raises(RecipeError, match=message):
            compare_prune(run_folder, **{**settings, **wrong})  # pyright: ignore
    with pytest.raises(CheckpointError, match="no calibration set"):
        compare_prune(run_folder, **settings, precisions=("int8",))  # pyright: ignore
    shutil.rmtree(run_folder / "teacher")
    with pytest.raises(CheckpointError, match="--until distil"):
        compare_prune(run_folder, **settings)  # pyright: ignore
