"""The recipes other than `minivlm-*`, as they ship, with few images and two steps per stage: on the real data they name."""

import os
from pathlib import Path

import pytest

from edgevlm.artifacts import Checkpoint
from edgevlm.manifests import read_manifest
from edgevlm.models.registry import resolve_tee
from edgevlm.pipeline import run
from edgevlm.recipes import load_recipe, shipped_recipes
from edgevlm.stages import check, stages_of

DATA = Path(os.environ.get("EDGEVLM_DATA", "nowhere"))
FEW = ("data.num_train=24", "data.num_val=8", "data.num_test=8")
TWO_STEPS = ("steps=2", "batch_size=2", "save_every=1")
SECTIONS = ("teacher", "distil", "prune", "trim")

RECIPES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "scenes-tiny": ("", "trim", ()),
    "test-scenes": ("", "trim", ()),
    "scenes-captions": ("", "captioning", ("captioning",)),
    "scenes-retrieval": ("", "retrieval", ("retrieval",)),
    "nlvr-tiny": ("nlvr1", "trim", ()),
    "nlvr": ("nlvr1", "trim", ("synthetic",)),
    "vqa-rad": ("vqa_rad", "trim", ()),
    "aquarium": ("aquarium", "detector", ()),
    "coco-tee-d0": ("aquarium", "detector", ()),
}
"""Recipe -> folder of its data (any in COCO's format for coco-tee-d0), its last stage before export, further sections."""
CHANGED = {
    "coco-tee-d0": ("detector.trunk_weights=null", "detector.short_sides_px=[256]"),  # no hub, one size
}


def test_no_recipe_is_forgotten() -> None:
    assert {*RECIPES} == {name for name in shipped_recipes() if not name.startswith("minivlm-")}


def start(name: str, out: Path, *overrides: str) -> Checkpoint:
    """The recipe up to the last stage that trains."""
    folder, last, sections = RECIPES[name]
    if folder and not (DATA / folder).is_dir():
        pytest.skip(f"EDGEVLM_DATA does not name a folder that holds {folder}/")
    data = str(DATA / folder) if folder else None
    steps = [f"{section}.{setting}" for section in ("detector", *SECTIONS, *sections) for setting in TWO_STEPS]
    recipe = load_recipe(name, [*FEW, *steps, "prune.recover_steps=1", *CHANGED.get(name, ()), *overrides])
    check(recipe, data)
    return read_manifest(run(stages_of(recipe), recipe, out, data_path=data, until=last)[last], Checkpoint)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `scenes-tiny`, which others start from."""
    folder = tmp_path_factory.mktemp("scenes") / "run"
    start("scenes-tiny", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "scenes-tiny"])
def test_the_recipe_starts_on_its_data(name: str, scenes: Path, tmp_path: Path) -> None:
    overrides = []
    if load_recipe(name).extractor is not None:
        overrides.append(f"extractor={scenes / 'detector'}")
    if name == "scenes-retrieval":
        overrides += [f"retrieval.start={scenes / 'teacher'}", f"text.vocab={scenes / 'teacher/vocab.txt'}"]
    found = start(name, tmp_path / "run", *overrides)
    assert found.metrics, "nothing was evaluated"
    recipe = load_recipe(name)
    assert found.model.tee == resolve_tee(recipe.tee)
    assert (found.preprocess.height, found.preprocess.width) == (recipe.preprocess.height, recipe.preprocess.width)
