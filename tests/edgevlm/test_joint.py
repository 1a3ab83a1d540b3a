"""Pruning of extractor and fusion together: what the teacher sees, budgets, resuming, and the stages behind it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgevlm.artifacts import STRUCTURE, WEIGHTS, Checkpoint, Structure
from edgevlm.compress.cost import cost_model
from edgevlm.compress.joint import anchor_imitation, box_imitation, look
from edgevlm.compress.prune import prune
from edgevlm.compress.structure import METHODS, TRAINED
from edgevlm.errors import RecipeError, TrainingError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.groups import groups_of
from edgevlm.models.tee import Regions
from edgevlm.pipeline import run
from edgevlm.recipes import load_recipe
from edgevlm.report.structure import draw_structures, kept_by_part, shares_by_kind
from edgevlm.stages import stages_of
from edgevlm.train import loop
from edgevlm.train.answering import evaluate
from edgevlm.train.images import ImageBatch, image_questions, questions_about
from tests.edgevlm.runs import SMALL, job_for
from tests.edgevlm.test_prune import FEW, distilled, pruned  # noqa: F401  (a fixture)
from tests.edgevlm.tiny import tiny_vlm

BOTH = {"parts": ("vision", "fusion"), "images_per_step": 4, "round_to": 2}


def pixels(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator).float()


def test_a_teacher_that_is_the_student_sees_the_same() -> None:
    tee = tiny_vlm().tee
    regions, looks, loss = look(tee, tee, pixels())
    torch.testing.assert_close(looks, regions.features_BND, atol=0, rtol=0)
    for mine, whole in zip(regions, tee(pixels()), strict=True):
        torch.testing.assert_close(mine, whole, atol=0, rtol=0)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_another_teacher_describes_the_students_boxes() -> None:
    """Feature i of the teacher is what its box head says of the proposal behind the student's region i."""
    student, teacher = tiny_vlm(0).tee, tiny_vlm(1).tee
    regions, looks, loss = look(student, teacher, pixels())
    assert loss.item() > 0.01
    with torch.no_grad():
        proposals = student.propose(student.dense(pixels()))
        own = student.box_features(student.dense(pixels()).maps, proposals).features_BRD
        theirs = teacher.box_features(teacher.dense(pixels()).maps, proposals).features_BRD
    for image in range(2):
        for mine, seen in zip(regions.features_BND[image], looks[image], strict=True):
            proposal = (own[image] - mine).abs().sum(-1).argmin()
            torch.testing.assert_close(theirs[image, proposal], seen, atol=0, rtol=0)


def test_imitation_pulls_the_student_to_the_teacher() -> None:
    """Descending on the loss of the extractor alone brings it down, and the RPN's logits to the teacher's."""
    student, teacher = tiny_vlm(0).tee, tiny_vlm(1).tee
    optimiser = torch.optim.Adam(student.parameters(), 3e-3)
    losses, gaps = [], []
    for _ in range(30):
        with torch.no_grad():
            objectness = student.dense(pixels()).objectness_BM - teacher.dense(pixels()).objectness_BM
        *_, loss = look(student, teacher, pixels())
        gaps.append(objectness.abs().mean().item())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    assert gaps[-1] < gaps[0]


def test_imitation_is_zero_only_for_equals() -> None:
    tee = tiny_vlm().tee
    with torch.no_grad():
        dense = tee.dense(pixels())
        boxes = tee.box_features(dense.maps, tee.propose(dense))
        assert anchor_imitation(dense, dense).item() == pytest.approx(0, abs=1e-6)
        assert box_imitation(boxes, boxes).item() == pytest.approx(0, abs=1e-6)
        for name in ("objectness_BM", "deltas_BM4"):
            other = dense._replace(**{name: getattr(dense, name) + 0.5})
            assert anchor_imitation(other, dense).item() > 1e-3, name
        generator = torch.Generator().manual_seed(0)
        for name in ("class_logits_BRC", "deltas_BR4", "attribute_logits_BRA"):
            value = getattr(boxes, name)
            other = boxes._replace(**{name: value + torch.randn(value.shape, generator=generator)})
            assert box_imitation(other, boxes).item() > 1e-3, name


def test_referred_regions_are_those_on_the_objects_meant() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [32.0, 32.0, 64.0, 64.0], [0.0, 0.0, 0.0, 0.0]]])
    regions = Regions(
        torch.zeros(1, 3, 4),
        torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.02, 0.0, 0.5, 0.5], [0.4, 0.0, 0.9, 0.3]]]),
        torch.ones(1, 3),
    )
    batch = ImageBatch(
        torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
        boxes,
        torch.tensor([0, 0, 0]),
        torch.ones(3, 4, dtype=torch.int32),
        torch.tensor([0, 1, 2]),
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        None,
    )
    answered = questions_about(regions, batch, torch.tensor([64.0, 64.0, 64.0, 64.0]))
    assert answered.referred.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert answered.has_referred.tolist() == [1, 1, 0]
    assert answered.regions.boxes_norm_BN4.shape == (3, 3, 4)


def test_batches_hold_the_questions_of_their_images(distilled: Job) -> None:  # noqa: F811
    section = distilled.recipe.prune.model_copy(update={"batch_size": 8, "images_per_step": 4})
    _, manifest = vlm.load(distilled.inputs["distil"])
    source = image_questions(distilled, section, manifest)
    rows = torch.tensor([3, 0, 5, 1])
    batch, again = source.batch(rows), source.batch(rows)
    assert all(torch.equal(a, b) for a, b in zip(batch[:-1], again[:-1], strict=True))
    assert torch.bincount(batch.image_Q).tolist() == [2, 2, 2, 2]
    for place, image in enumerate(source.rows[rows].tolist()):
        own = {tuple(source.input_ids[q].tolist()) for q in source.of_image[image]}
        width = source.input_ids.shape[1] - batch.input_ids_QL.shape[1]
        for ids in batch.input_ids_QL[batch.image_Q == place].tolist():
            assert tuple(ids + [source.pad_id] * width) in own


@pytest.mark.parametrize("method", METHODS)
def test_extractor_and_fusion_share_a_budget(distilled: Job, tmp_path: Path, method: str) -> None:  # noqa: F811
    manifest = pruned(distilled, tmp_path / "out", method=method, measure="macs", sparsity=0.4, **BOTH)
    before, _ = vlm.load(distilled.inputs["distil"])
    after, _ = vlm.load(tmp_path / "out")
    whole, left = (
        cost_model(model, found, "macs", manifest.tokenizer.max_tokens).only(g.name for g in found).whole
        for model, found in ((before, groups_of(before)), (after, groups_of(after)))
    )
    assert 1 - left / whole == pytest.approx(manifest.metrics["sparsity"], abs=1e-9)
    # Two channels of this stem are a sixth of all multiply-adds: the baseline that cuts nothing else overshoots by as much.
    assert 0.4 - 1e-6 <= manifest.metrics["sparsity"] < (0.5 if method == "modality" else 0.45)
    structure = Structure.model_validate_json((tmp_path / "out" / STRUCTURE).read_bytes())
    assert {name: group.kept for name, group in structure.groups.items()} == {g.name: g.size for g in groups_of(after)}
    assert set(kept_by_part(structure)) == {"vision", "fusion"}
    assert bool(structure.history) == (method in TRAINED)
    assert not (tmp_path / "out/.evaluation").exists()


def test_the_extractor_learns_its_gates(distilled: Job, tmp_path: Path) -> None:  # noqa: F811
    """One Lagrangian: with a budget in multiply-adds the expected share falls in the vision part as well."""
    pruned(
        distilled,
        tmp_path / "out",
        measure="macs",
        method="gates",
        sparsity=0.5,
        steps=40,
        ramp=0.1,
        gate_lr=0.5,
        **BOTH,
    )
    structure = Structure.model_validate_json((tmp_path / "out" / STRUCTURE).read_bytes())
    shares = shares_by_kind(structure)
    for kind in ("trunk channels", "BiFPN channels", "FFN neurons"):
        first, last = shares[kind][min(shares[kind])], shares[kind][max(shares[kind])]
        assert last < first - 0.05, kind


def test_killed_and_resumed(distilled: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A run killed in the middle goes on to the very same weights, norms' statistics and history included."""
    pruned(distilled, tmp_path / "whole", **BOTH)
    (tmp_path / "killed").mkdir()
    recipe = distilled.recipe.model_copy(update={"prune": distilled.recipe.prune.model_copy(update=BOTH)})
    job = replace(distilled, recipe=recipe, out_dir=tmp_path / "killed")
    saved, count = loop.save_snapshot, 0

    def save_twice(*args: object, **kwargs: object) -> None:
        nonlocal count
        saved(*args, **kwargs)  # pyright: ignore
        count += 1
        if count == 2:
            raise TrainingError("killed", "")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_snapshot", save_twice)
        with pytest.raises(TrainingError, match="killed"):
            prune(job)
    prune(job)
    whole, resumed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (tmp_path / "whole" / STRUCTURE).read_bytes() == (tmp_path / "killed" / STRUCTURE).read_bytes()


def test_trimming_stands_on_the_pruned_extractor(tmp_path: Path) -> None:
    """The regions are cached anew; what `trim` starts from answers as `prune` reported."""
    recipe = load_recipe(
        "test-scenes", [*FEW, *SMALL, "prune.parts=[vision, fusion]", "prune.round_to=2", "trim.steps=2"]
    )
    folders = run(stages_of(recipe), recipe, tmp_path / "run", until="trim")
    pruned_model, manifest = vlm.load(folders["prune"])
    assert pruned_model.config.widths
    assert read_manifest(folders["trim"], Checkpoint).model.widths == manifest.model.widths
    job = job_for("again", tmp_path, recipe, {"prepare": folders["prepare"], "regions": folders["pruned_regions"]})
    again = evaluate(pruned_model, job)
    assert {name: again[name] for name in ("accuracy_val", "accuracy_test")} == {
        name: manifest.metrics[name] for name in ("accuracy_val", "accuracy_test")
    }
    with Image.open(folders["prune"] / "structure.png") as picture:
        assert picture.width > 500


def test_parts_are_named_once() -> None:
    for parts in ("[]", "[fusion, fusion]", "[text]"):
        with pytest.raises(RecipeError, match=r"prune\.parts"):
            load_recipe("test-scenes", [f"prune.parts={parts}"])


def test_pictures_of_several_runs(tmp_path: Path) -> None:
    groups = {
        "trunk.0.0": {"part": "vision", "size": 8, "kept": 2},
        "heads.0": {"part": "fusion", "size": 4, "kept": 3},
        "heads.1": {"part": "fusion", "size": 12, "kept": 1},
    }
    structure = Structure.model_validate(
        {
            "measure": "macs",
            "cost": 100.0,
            "asked": 0.5,
            "kept": 0.5,
            "groups": groups,
            "history": {1: {"trunk.0.0": 1.0, "heads.0": 1.0, "heads.1": 0.5}},
        }
    )
    assert kept_by_part(structure) == {"vision": 0.25, "fusion": 0.25}
    assert shares_by_kind(structure) == {"trunk channels": {1: 1.0}, "attention heads": {1: (4 + 6) / 16}}
    for count in (1, 2):
        draw_structures({f"run {i}": structure for i in range(count)}, tmp_path / f"{count}.png")
    sizes = [Image.open(tmp_path / f"{count}.png").size for count in (1, 2)]
    assert sizes[1][0] > 1.8 * sizes[0][0]
