"""What can be said about the Core ML packages on a machine that cannot run them."""

import pytest
import torch

from edgevlm.artifacts import Rung
from edgevlm.models.vlm import load
from targets.coreml_structure import check_structure
from targets.source import Source

pytest.importorskip("coremltools")


def package(world, precision: str):
    return world.bundle_dir / "coreml" / precision / "model.mlpackage"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_sound_package_has_no_problems(world, source, precision: str) -> None:
    assert check_structure(package(world, precision), source) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_weights_are_noticed(world, precision: str) -> None:
    model, manifest = load(world.checkpoint)
    with torch.no_grad():
        model.fusion.layers[1].ffn_in.weight[3, 4] += 1.0
        model.tee.trunk.blocks[1][0].conv_exp.weight[0, 0] *= -1
        model.tee.mean += 1.0
    problems = check_structure(package(world, precision), Source(model, manifest))
    assert "answer_b3: no constant equals the weights fusion.layers.1.ffn_in.weight" in problems
    assert any("conv_exp" in problem for problem in problems)
    assert "encode_image: no constant equals the mean of the preprocessing" in problems
    assert len(problems) == 5  # the ffn in each of three rungs, the convolution, the mean


def test_another_ladder_is_noticed(world) -> None:
    model, manifest = load(world.checkpoint)
    rungs = tuple(Rung(name=r.name, regions=({"b5": 4}.get(r.name, r.regions[0]),)) for r in manifest.rungs)
    changed = Source(model, manifest.model_copy(update={"rungs": rungs}))
    assert check_structure(package(world, "fp32"), changed) == ["answer_b5 keeps [5] tokens, its rung [4]"]
    fewer = Source(model, manifest.model_copy(update={"rungs": manifest.rungs[:2]}))
    assert "functions" in check_structure(package(world, "fp32"), fewer)[0]


def test_the_image_is_an_image_and_the_functions_are_named(world) -> None:
    import coremltools as ct

    for precision in ("fp32", "int8"):
        spec = ct.utils.load_spec(str(package(world, precision)))
        functions = {f.name: f for f in spec.description.functions}
        assert list(functions) == ["encode_image", "answer_b8", "answer_b5", "answer_b3"]
        image = functions["encode_image"].input[0].type.imageType
        assert (image.width, image.height, image.colorSpace) == (64, 64, image.RGB)
        assert spec.description.defaultFunctionName == "encode_image"
        assert precision in spec.description.metadata.shortDescription
