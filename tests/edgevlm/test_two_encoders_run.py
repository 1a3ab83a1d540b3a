"""A run with two encoders: teacher, student, pruning with the extractor, trimming, ONNX and its parity; pre-training."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgevlm.artifacts import STRUCTURE, WEIGHTS, Checkpoint, ParityReport, Structure
from edgevlm.cli import app
from edgevlm.compress.cost import cost_model
from edgevlm.compress.distil import distil
from edgevlm.compress.structure import METHODS
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.groups import groups_of
from edgevlm.pipeline import run
from edgevlm.recipes import load_recipe
from edgevlm.report.structure import kept_by_part, shares_by_kind
from edgevlm.stages import check, stages_of
from edgevlm.train.reasoning import check_synthetic
from tests.edgevlm.runs import SMALL, job_for
from tests.edgevlm.test_prune import FEW, pruned

TEACHER = (
    "teacher.fusion={name: test-dual, vision_heads: [2, 2, 2, 2], vision_ffn: [64, 64, 64, 64], text_heads: [2, 2],"
    " text_ffn: [64, 64], layer_heads: [2, 2, 2, 2], layer_ffn: [64, 64, 64, 64], cross_heads: [2, 2, 2, 2]}"
)
DUAL = (*FEW, *SMALL, TEACHER, "distil.fusion={name: test-dual}", "trim.steps=2")
PARTS = {"vision", "vision encoder", "text encoder", "cross encoder"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage -> folder: 4 + 2 + 4 layers teach 2 + 1 + 2, which lose a part together with the extractor."""
    joint = ("prune.parts=[vision, fusion]", "prune.round_to=2", "prune.measure=macs", "prune.sparsity=0.3")
    exported = ("export.targets=[onnx]", "export.precisions=[fp32]", "calibration.min_samples=4")
    recipe = load_recipe("test-scenes", [*DUAL, *joint, *exported, "calibration.num_samples=8", "bench.runs=1"])
    check(recipe, None)
    return run(stages_of(recipe), recipe, tmp_path_factory.mktemp("dual") / "run", until="verify")


def test_the_pruned_model_is_smaller_in_all_four_parts_together(finished: dict[str, Path]) -> None:
    before, _ = vlm.load(finished["distil"])
    after, manifest = vlm.load(finished["prune"])
    whole, left = (
        cost_model(model, found, "macs", manifest.tokenizer.max_tokens).only(g.name for g in found).whole
        for model, found in ((before, groups_of(before)), (after, groups_of(after)))
    )
    assert 1 - left / whole == pytest.approx(manifest.metrics["sparsity"], abs=1e-9)
    assert 0.3 - 1e-6 <= manifest.metrics["sparsity"] < 0.36
    structure = Structure.model_validate_json((finished["prune"] / STRUCTURE).read_bytes())
    assert {name: group.kept for name, group in structure.groups.items()} == {g.name: g.size for g in groups_of(after)}
    assert set(kept_by_part(structure)) == PARTS
    kinds = shares_by_kind(structure)
    assert {"vision encoder: heads", "text encoder: FFN neurons", "cross encoder: heads to the image"} <= set(kinds)
    assert all(kinds[kind] for kind in kinds), "gates are recorded over time"
    assert (finished["prune"] / "structure.png").stat().st_size > 10_000


def test_trimming_and_the_exported_file(finished: dict[str, Path]) -> None:
    """The rungs count cross-modal layers; ONNX gives PyTorch's logits at each of them."""
    model, manifest = vlm.load(finished["trim"])
    assert manifest.model.fusion.trim is not None and [rung.regions for rung in manifest.rungs] == [(8,), (5,), (3,)]
    assert manifest.rungs[0].gmacs > manifest.rungs[2].gmacs
    assert model.fusion.trimmers is not None
    report = read_manifest(finished["verify"], ParityReport)
    assert [(row.rung, row.verdict) for row in report.rows] == [(name, "passed") for name in ("full", "b5", "b3")]
    assert all(row.max_abs_logits is not None and row.max_abs_logits <= 1e-4 for row in report.rows)


def test_a_checkpoint_is_inspected(finished: dict[str, Path]) -> None:
    said = CliRunner().invoke(app, ["inspect", str(finished["distil"]), "--json"])
    assert said.exit_code == 0
    fusion = json.loads(said.stdout)["parts"][-1]
    assert fusion["part"].startswith("fusion of 2 vision, 1 text, 2 cross layers")
    assert (fusion["parameters"], fusion["macs"]) == (fusion["formula_parameters"], fusion["formula_macs"])


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_choose(finished: dict[str, Path], tmp_path: Path, method: str) -> None:
    """On cached regions, with EfficientVLM's own weights (null)."""
    open_weights = ("prune.kd_weight=null", "prune.attention_weight=null", "prune.hidden_weight=null")
    recipe = load_recipe("test-scenes", [*DUAL, *open_weights])
    inputs = {name: finished[name] for name in ("prepare", "regions", "teacher", "distil")}
    job: Job = job_for("prune", tmp_path, recipe, inputs)
    manifest = pruned(job, tmp_path / "out", method=method, sparsity=0.4, round_to=2)
    assert 0.4 - 1e-6 <= manifest.metrics["sparsity"] < 0.5
    structure = Structure.model_validate_json((tmp_path / "out" / STRUCTURE).read_bytes())
    assert set(kept_by_part(structure)) == PARTS - {"vision"}
    if method == "modality":  # of each encoder's own cost the same share is gone, up to a head
        model, _ = vlm.load(finished["distil"])
        groups = groups_of(model, ("fusion",))
        cost, kept = cost_model(model, groups, "parameters", 12), {n: g.kept for n, g in structure.groups.items()}
        for part in PARTS - {"vision"}:
            own = cost.only(group.name for group in groups if group.part == part)
            assert 0.6 - (4 * 32 * 16 + 3 * 16) / own.whole < own.of(kept) / own.whole <= 0.6 + 1e-9, part


def test_a_student_may_begin_as_its_teacher(finished: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe("test-scenes", [*DUAL, "distil.start=teacher", "distil.lr=1e-12", "distil.steps=1"])
    job = job_for("again", tmp_path, recipe, {n: finished[n] for n in ("prepare", "detector", "regions", "teacher")})
    distil(job)
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (job.out_dir, finished["teacher"]))
    for mine, other in (("vision.0", "vision.1"), ("text.0", "text.1"), ("layers.1", "layers.3")):
        names = [name for name in ours if name.startswith(f"fusion.{mine}.")]
        assert names
        for name in names:
            torch.testing.assert_close(ours[name], theirs[name.replace(mine, other)], atol=1e-6, rtol=0)


def test_what_two_encoders_cannot_do_is_one_line() -> None:
    recipe = load_recipe("nlvr", ["synthetic.fusion={name: test-dual}", "teacher.fusion={name: test-dual}"])
    with pytest.raises(RecipeError, match="Drawn sentences teach"):
        check_synthetic(recipe)
    one_layer = "distil.fusion={name: test-dual, layer_heads: [2], layer_ffn: [64], cross_heads: [2]}"
    with pytest.raises(RecipeError, match="nothing would follow"):
        check(load_recipe("test-scenes", [TEACHER, one_layer]), None)


def test_checkpoints_name_the_form(finished: dict[str, Path]) -> None:
    manifest = read_manifest(finished["distil"], Checkpoint)
    assert manifest.model.fusion.has_encoders
    written = {stage: json.loads((finished[stage] / "manifest.json").read_text()) for stage in ("distil", "detector")}
    assert written["distil"]["model"]["fusion"]["vision_heads"] == [2, 2]
    assert "vision_heads" not in written["detector"]["model"]["fusion"]
