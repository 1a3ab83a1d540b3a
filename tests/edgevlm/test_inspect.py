"""Sizes and multiply-adds: the real modules agree with the table calculated from MiniVLM's published architecture."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edgevlm.cli import app
from edgevlm.compress.shrink import shrink
from edgevlm.errors import RecipeError
from edgevlm.models.groups import groups_of
from edgevlm.models.inspect import Part, build_tee, count, inspect_fusion, inspect_tee, total
from edgevlm.models.registry import TEES
from edgevlm.models.vlm import VLM
from edgevlm.report.inspection import PAPER_ATTRIBUTES, PAPER_CLASSES, PAPER_EMBEDDED, parse_size
from tests.edgevlm.tiny import TOKENIZER, dual_vlm, tiny_vlm

TOLERANCE = 0.02
"""The table is rounded to three digits, and its BiFPN counts biases that the norms behind them make superfluous."""

# Name, input, boxes -> parameters in millions: trunk, BiFPN, RPN, box head, sum, attribute head; GMACs without and with it.
PUBLISHED = [
    ("tee-d0", (512, 512), 300, (3.60, 0.196, 975e-6, 2.10 + 1.64, 7.53, 3.11), (3.17, 4.07)),
    ("tee-d0", (384, 512), 300, (3.60, 0.196, 975e-6, 2.10 + 1.64, 7.53, 3.11), (2.66, 3.56)),
    ("tee-d0-p2", (512, 512), 300, (3.60, 0.198, 975e-6, 2.10 + 1.64, 7.53, 3.11), (3.50, 4.40)),
    ("tee-d1", (640, 640), 300, (6.10, 0.393, 1335e-6, 2.49 + 1.64, 10.63, 3.50), (7.36, 8.38)),
    ("tee-d0", (512, 512), 100, (3.60, 0.196, 975e-6, 2.10 + 1.64, 7.53, 3.11), (2.42, 2.72)),
    ("tee-d0", (512, 512), 50, (3.60, 0.196, 975e-6, 2.10 + 1.64, 7.53, 3.11), (2.23, 2.39)),
]


def parts_of(name: str, size: tuple[int, int], num_proposals: int) -> list[Part]:
    changes = {"num_proposals": num_proposals, "attribute_classes": PAPER_EMBEDDED}
    return inspect_tee(build_tee(TEES[name].model_copy(update=changes), *size, PAPER_CLASSES, PAPER_ATTRIBUTES))


@pytest.mark.parametrize(("name", "size", "boxes", "millions", "gmacs"), PUBLISHED)
def test_the_published_table(
    name: str, size: tuple[int, int], boxes: int, millions: tuple[float, ...], gmacs: tuple[float, float]
) -> None:
    parts = parts_of(name, size, boxes)
    trunk, bifpn, rpn, head, attributes, static = (part.counted for part in parts)
    without = total(parts[:4])
    counted = (trunk, bifpn, rpn, head, without, attributes)
    assert [cost.parameters / 1e6 for cost in counted] == pytest.approx(millions, rel=TOLERANCE)
    assert without.macs / 1e9 == pytest.approx(gmacs[0], rel=TOLERANCE)
    assert (without + attributes).macs / 1e9 == pytest.approx(gmacs[1], rel=TOLERANCE)
    assert static.parameters == 0


@pytest.mark.parametrize(
    ("name", "size"), [("tee-lite0", (256, 320)), ("tee-lite0-edge", (320, 320)), ("edge-nano", (128, 128))]
)
def test_formulas_agree_part_by_part(name: str, size: tuple[int, int]) -> None:
    parts = parts_of(name, size, TEES[name].num_proposals)
    assert [part.name for part in parts if part.formula is None][-1] == "RoIAlign and NMS as matrices"
    for part in parts:
        if part.formula is not None:
            assert part.counted.parameters == pytest.approx(part.formula.parameters, rel=TOLERANCE), part.name
            assert part.counted.macs == pytest.approx(part.formula.macs, rel=TOLERANCE), part.name


def test_lite_trunk_has_no_squeeze_excite_and_only_relu6() -> None:
    tee = build_tee(TEES["tee-lite0"], 64, 64, 3, 2)
    kinds = {type(module).__name__ for module in tee.modules()}
    assert not {kind for kind in kinds if "Squeeze" in kind or "SiLU" in kind or "Sigmoid" in kind}
    assert "ReLU6" in kinds
    assert any("Squeeze" in type(module).__name__ for module in build_tee(TEES["tee-d0"], 64, 64, 3, 2).modules())


def test_counting_is_the_definition() -> None:
    """A 3x3 convolution of 4 to 6 channels on 5 x 7 cells; a depthwise one; a matrix of 8 x 3 on 10 rows."""
    assert count(nn.Conv2d(4, 6, 3, padding=1), torch.zeros(1, 4, 5, 7)).macs == 9 * 4 * 6 * 35
    assert count(nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.zeros(1, 4, 5, 7)).macs == 9 * 4 * 35
    assert count(nn.Linear(8, 3), torch.zeros(10, 8)) == (27, 240)


def test_fusion_agrees_with_its_formula() -> None:
    part = inspect_fusion(tiny_vlm().fusion, TOKENIZER.max_tokens, 8)
    assert part.formula is not None
    assert part.counted == part.formula


@pytest.mark.parametrize("parts", [(), ((0.0, 0.0, 0.4, 1.0), (0.5, 0.0, 1.0, 1.0))])
@pytest.mark.parametrize("model", [tiny_vlm, dual_vlm])
def test_so_does_one_with_geometry_and_parts(model: Callable[..., VLM], parts: tuple[tuple[float, ...], ...]) -> None:
    part = inspect_fusion(model(box_encoding="geometry", parts=parts).fusion, TOKENIZER.max_tokens, 8)
    assert part.counted == part.formula


def test_a_pruned_extractor_is_counted() -> None:
    """Its parts have fewer weights than those of the whole one, all of them are there, and no formula is shown."""
    whole = tiny_vlm()
    smaller, groups = tiny_vlm(), groups_of(tiny_vlm())
    shrink(smaller, groups, {group.name: tuple(range(max(1, group.size // 2))) for group in groups})
    before, after = inspect_tee(whole.tee), inspect_tee(smaller.tee, pruned=True)
    assert total(after).parameters == sum(p.numel() for p in smaller.tee.parameters()) < total(before).parameters
    assert total(after).macs < total(before).macs
    assert all(part.formula is None for part in after)


def test_inspecting_changes_nothing() -> None:
    tee = tiny_vlm().tee.train()
    inspect_tee(tee)
    assert tee.training


def test_command_line() -> None:
    result = CliRunner().invoke(app, ["inspect", "test-tee", "--size", "64x96", "--classes", "3", "--json"])
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert value["parameters"] == sum(part["parameters"] for part in value["parts"])
    table = CliRunner().invoke(app, ["inspect", "test-fusion"]).stdout
    assert "fusion, 35 words and 50 regions" in table


@pytest.mark.parametrize("text", ["", "x", "512x", "5x5x5", "0", "-3", "big"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        parse_size(text)
    assert (parse_size("512"), parse_size("384X512")) == ((512, 512), (384, 512))
