"""Recipes: shipped ones load, typos are refused with the nearest key, overrides and bases work."""

from pathlib import Path

import pytest

from edgevlm.errors import RecipeError
from edgevlm.recipes import load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("teecher.steps=5", "teacher"),
        ("teacher.stepps=5", "steps"),
        ("data.num_trian=5", "num_train"),
        ("trim.rung.full=16", "rungs"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=f"Did you mean '{named}'"):
        load_recipe("scenes-tiny", [override])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'scenes-tiny'"):
        load_recipe("scene-tiny")


def test_wrong_value_names_the_key() -> None:
    with pytest.raises(RecipeError, match=r"teacher\.steps"):
        load_recipe("scenes-tiny", ["teacher.steps=-3"])


def test_rungs_must_fall() -> None:
    with pytest.raises(RecipeError, match="largest budget to the smallest"):
        load_recipe("scenes-tiny", ["trim.rungs={full: 6, b10: 10}"])


def test_override_reaches_the_value() -> None:
    recipe = load_recipe("scenes-tiny", ["teacher.steps=7", "gates.min_student_retention=null"])
    assert recipe.teacher.steps == 7
    assert recipe.gates.min_student_retention is None
    assert recipe.distil.steps == load_recipe("scenes-tiny").distil.steps


def test_base_states_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: scenes-tiny\nname: mine\nteacher: {steps: 9}\n")
    mine, base = load_recipe(str(path)), load_recipe("scenes-tiny")
    assert (mine.name, mine.teacher.steps) == ("mine", 9)
    assert mine.teacher.batch_size == base.teacher.batch_size
    assert mine.tee == base.tee


def test_base_of_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(RecipeError, match="its own base"):
        load_recipe(str(path))


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)
