"""Stage `detector` on COCO-format folders: recipe to checkpoint, at several sizes, resumable, with COCO's figures."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.artifacts import Checkpoint
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.registry import resolve_tee
from edgevlm.pipeline import run
from edgevlm.recipe import Recipe
from edgevlm.recipes import load_recipe
from edgevlm.stages import check, stages_of
from edgevlm.tasks.average_precision import FIGURES
from edgevlm.train.detector import pad_truth
from edgevlm.train.optimiser import make_optimiser
from tests.edgevlm.coco_folder import instances, make_folder

AQUARIUM = Path(os.environ.get("EDGEVLM_DATA", "")) / "aquarium"
SMALL = ["tee={name: test-tee}", "detector.steps=4", "detector.batch_size=4", "preprocess={height: 64, width: 64}"]


def small(*overrides: str) -> Recipe:
    return load_recipe("aquarium", [*SMALL, "detector.short_sides_px=[64, 96]", *overrides])


def test_a_detection_recipe_ends_with_the_detector() -> None:
    assert [stage.name for stage in stages_of(load_recipe("aquarium"))] == ["prepare", "detector"]
    assert stages_of(load_recipe("scenes-tiny"))[-1].name == "scorecard"


def test_the_coco_recipe_is_the_papers(tmp_path: Path) -> None:
    """It passes the check on a folder named like COCO's; extractor and optimiser are MiniVLM's published ones."""
    for split in ("train2017", "val2017"):
        value = instances(tmp_path, split, 2)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(value))
    recipe = load_recipe("coco-tee-d0")
    check(recipe, str(tmp_path))
    tee, section = resolve_tee(recipe.tee), recipe.detector
    assert (tee.trunk, tee.fpn_channels, tee.fpn_repeats, tee.first_level) == ("efficientnet_b0", 64, 3, 3)
    assert (tee.num_proposals, tee.candidates_per_level, tee.roi_size, tee.roi_hidden) == (300, 1000, 4, 1024)
    assert (section.optimiser, section.lr, section.batch_size, section.weight_decay) == ("sgd", 0.075, 16, 1e-5)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_from_folder_to_checkpoint(tmp_path: Path, optimiser: str) -> None:
    data = str(make_folder(tmp_path / "data"))
    recipe = small(f"detector.optimiser={optimiser}")
    check(recipe, data)
    folders = run(stages_of(recipe), recipe, tmp_path / "run", data_path=data)
    manifest = read_manifest(folders["detector"], Checkpoint)
    assert set(manifest.metrics) == set(FIGURES)
    assert manifest.labels.classes == ("red", "green", "blue")
    model, _ = vlm.load(folders["detector"])
    assert model.tee.image_size == (64, 64)
    assert not list(folders["detector"].glob(".snapshot*"))


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    """The same pictures, sizes and steps after a stop in the middle: equal weights."""
    data = str(make_folder(tmp_path / "data"))
    recipe = small("detector.save_every=2")
    whole = run(stages_of(recipe), recipe, tmp_path / "whole", data_path=data)["detector"]
    from edgevlm.train import loop

    saved = loop.save_snapshot

    def stop(*arguments: Any) -> None:
        saved(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_snapshot", stop)
        with pytest.raises(KeyboardInterrupt):
            run(stages_of(recipe), recipe, tmp_path / "broken", data_path=data)
    resumed = run(stages_of(recipe), recipe, tmp_path / "broken", data_path=data)["detector"]
    expected, got = (vlm.load(folder)[0].state_dict() for folder in (whole, resumed))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-5)  # batch norm adds up in any order


def test_truth_is_padded() -> None:
    rows = [([[0.0, 0, 1, 1]], [2], [[0, 1]]), ([], [], [])]
    objects = [(np.array(b, np.float32).reshape(-1, 4), np.array(c, np.int64), a) for b, c, a in rows]
    boxes, classes, attributes = pad_truth(objects, 3)
    assert boxes.tolist() == [[[0, 0, 1, 1]], [[0, 0, 0, 0]]]
    assert classes.tolist() == [[2], [-1]]
    assert attributes.tolist() == [[[1, 1, 0]], [[0, 0, 0]]]


def test_sgd_is_the_papers() -> None:
    """Momentum 0.9 without Nesterov: two steps on a constant gradient g move by lr (g + 1.9 g)."""
    weight = torch.nn.Parameter(torch.zeros(1))
    section = small("detector.optimiser=sgd").detector
    optimiser = make_optimiser(section, [{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], torch.device("cpu"))
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimiser.step()
    assert weight.item() == pytest.approx(-0.1 * 2.9)


@pytest.mark.data
@pytest.mark.skipif(not AQUARIUM.is_dir(), reason="EDGEVLM_DATA does not name a folder that holds aquarium/")
def test_the_recipe_starts_on_real_photos(tmp_path: Path) -> None:
    recipe = small("data.num_train=8", "data.num_val=4", "detector.steps=2")
    folders = run(stages_of(recipe), recipe, tmp_path / "run", data_path=str(AQUARIUM))
    assert read_manifest(folders["detector"], Checkpoint).labels.classes[0] == "fish"
