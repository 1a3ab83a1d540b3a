"""Extractors from elsewhere: the grid's boxes, features that belong to them, and a run on data without boxes."""

from pathlib import Path

import pytest
import torch

import edgevlm.data
from edgevlm.artifacts import Labels
from edgevlm.data.sample import Text
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.models import vlm
from edgevlm.models.registry import TEES
from edgevlm.models.tee import TEE
from edgevlm.recipes import load_recipe
from edgevlm.stages import STAGES, detector, stages_of
from edgevlm.train.prepare import prepare
from tests.edgevlm.runs import SMALL, Made, detector_job, job_for, made_sample
from tests.edgevlm.tiny import SPEC


def _grid_tee(grid: tuple[int, ...], num_regions: int) -> TEE:
    torch.manual_seed(0)
    return TEE(TEES["test-tee"].model_copy(update={"grid": grid, "num_regions": num_regions}), SPEC, 3, 2).eval()


def test_grid_boxes_tile_the_image() -> None:
    pixels = torch.rand(2, 3, 64, 64) * 255
    regions = _grid_tee((1, 2), 5)(pixels)
    whole, quarters = [0, 0, 1, 1], [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    torch.testing.assert_close(regions.boxes_norm_BN4, torch.tensor([whole, *quarters]).float().expand(2, -1, -1))
    assert regions.scores_BN.tolist() == [[1.0] * 5] * 2


def test_grid_features_are_those_of_their_boxes() -> None:
    """Each feature is what the box head gives for that box alone; and a change in one corner moves its cell most."""
    tee, pixels = _grid_tee((1, 2), 5), torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        regions = tee(pixels)
        maps = tee.dense(pixels).maps
        for index in range(5):
            box = regions.boxes_norm_BN4[:, index : index + 1] * 64
            alone = tee.box_features(maps, box).features_BRD[:, 0]
            torch.testing.assert_close(regions.features_BND[:, index], alone, atol=1e-5, rtol=0)  # other batch
        changed = pixels.clone()
        changed[..., 48:, 48:] = 255 - changed[..., 48:, 48:]
        moved = (tee(changed).features_BND - regions.features_BND).abs().mean(-1)[0]
    assert moved[4] > 2 * moved[1]  # bottom right against top left


def test_grid_must_fill_the_regions() -> None:
    with pytest.raises(RecipeError, match=r"has 5 boxes.*Set tee\.num_regions to 5"):
        _grid_tee((1, 2), 8)


def test_an_extractor_serves_data_without_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = detector_job(tmp_path / "source").inputs["detector"]
    labels = Labels(classes=(), attributes=(), answers=("yes", "no"))
    samples = [made_sample(i, Text("is it", "yes")) for i in range(4)]
    reader = Made(labels, {"train": samples, "val": samples, "test": samples})
    monkeypatch.setitem(edgevlm.data.READERS, "scenes", lambda *_: reader)
    tee = "tee={name: test-tee, grid: [1, 2], num_regions: 5}"
    recipe = load_recipe("test-scenes", [*SMALL, tee, f"extractor={theirs}"])
    prepared = job_for("prepare", tmp_path, recipe, {})
    prepare(prepared)
    job = job_for("detector", tmp_path, recipe, {"prepare": prepared.out_dir})
    manifest = detector(job)
    source, source_manifest = vlm.load(theirs)
    assert manifest.labels.classes == source_manifest.labels.classes and manifest.labels.answers == ("yes", "no")
    model, _ = vlm.load(job.out_dir)
    for name, value in source.tee.state_dict().items():
        assert torch.equal(model.tee.state_dict()[name], value)
    assert model.encode(torch.rand(1, 3, 64, 64)).features_BND.shape[1] == 5


def test_an_extractor_of_another_shape_is_refused(tmp_path: Path) -> None:
    theirs = detector_job(tmp_path / "source").inputs["detector"]
    recipe = load_recipe("test-scenes", [*SMALL, "tee.roi_hidden=16", f"extractor={theirs}"])
    prepared = job_for("prepare", tmp_path, recipe, {})
    prepare(prepared)
    with pytest.raises(CheckpointError, match="does not fit the recipe's tee"):
        detector(job_for("detector", tmp_path, recipe, {"prepare": prepared.out_dir}))


def test_fine_tuning_ends_the_flow() -> None:
    names = [stage.name for stage in stages_of(load_recipe("minivlm-nlvr2"))]
    assert names == ["prepare", "detector", "regions", "pairs"]
    assert [stage.name for stage in stages_of(load_recipe("minivlm-retrieval"))][-1] == "retrieval"
    assert stages_of(load_recipe("minivlm-vqav2")) == STAGES
