"""Box geometry, part tokens and tags: what they say, and that an exported program says the same."""

import math

import numpy as np
import onnxruntime
import pytest
import torch

from edgevlm.artifacts import FusionConfig, ModelConfig
from edgevlm.compress.cost import fusion_macs
from edgevlm.models.geometry import BoxGeometry, box_numbers
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import Trim
from edgevlm.models.vlm import VLM
from targets.program import AnswerQuestion, EncodeImage
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_ids, tiny_regions

PARTS = ((0.0, 0.0, 0.25, 1.0), (0.375, 0.0, 0.625, 1.0), (0.75, 0.0, 1.0, 1.0))
CONFIG = FUSIONS["test-fusion"].model_copy(update={"box_encoding": "geometry", "parts": PARTS})


def _model(seed: int = 0, **fusion: object) -> VLM:
    torch.manual_seed(seed)
    tee = TEES["test-tee"].model_copy(update={"region_feature": "tags"})
    model = VLM(ModelConfig(tee=tee, fusion=CONFIG.model_copy(update=fusion)), SPEC, TOKENIZER, LABELS)
    return model.eval()


def _regions(batch: int) -> Regions:
    regions = tiny_regions(batch)
    return regions._replace(features_BND=regions.features_BND[..., :6])  # three classes, background, two attributes


def test_geometry_says_which_part_and_how_far_from_its_edges() -> None:
    """Against arithmetic by hand: NLVR's second box spans x 150 to 250 of 400 px, y 0 to 100."""
    left, top, right, bottom = 160.0, 70.0, 190.0, 100.0
    box = torch.tensor([[[left / 400, top / 100, right / 400, bottom / 100]]])
    values = BoxGeometry(CONFIG)(box)[0, 0].tolist()
    assert len(values) == box_numbers(CONFIG)
    assert values[:3] == [0, 1, 0]
    gaps = [0.1, 0.7, 0.6, 0.0]  # left, top, right, bottom
    assert values[3:7] == pytest.approx(gaps, abs=1e-6)
    assert values[7:11] == pytest.approx([math.exp(-gap / CONFIG.edge_scale) for gap in gaps], abs=1e-5)
    assert values[11:13] == pytest.approx([0.3, 0.3], abs=1e-6)


def test_a_pixel_from_the_wall_shows() -> None:
    def touch(gap_px: float) -> float:
        box = torch.tensor([[[(60 - gap_px) / 400, 0.2, (90 - gap_px) / 400, 0.5], [0.0, 0.0, 0.1, 0.1]]])
        return float(BoxGeometry(CONFIG)(box)[0, 0, 9])

    assert touch(-10.0) > 0.99 and 0.4 < touch(-9.0) < 0.6 and touch(-6.0) < 0.1


def test_boxes_outside_all_parts_are_zero() -> None:
    box = torch.tensor([[[0.28, 0.2, 0.34, 0.5]]])
    assert not BoxGeometry(CONFIG)(box).any()


def test_defaults_are_as_before() -> None:
    """Six numbers per box, no part tokens, hidden features: old weights load, and cost is what it was."""
    plain = FUSIONS["test-fusion"]
    assert box_numbers(plain) == 6
    names = VLM(ModelConfig(tee=TEES["test-tee"], fusion=plain), SPEC, TOKENIZER, LABELS).state_dict()
    assert not [name for name in names if "part" in name or "geometry" in name]
    assert names["fusion.region.weight"].shape == (32, TEES["test-tee"].roi_hidden + 6)
    assert fusion_macs(plain, 10, 8, 32) < fusion_macs(CONFIG, 10, 8, 32)


def test_tags_are_probabilities() -> None:
    model = _model()
    with torch.no_grad():
        regions = model.encode(torch.rand(2, 3, SPEC.height, SPEC.width) * 255)
    classes, attributes = regions.features_BND[..., :4], regions.features_BND[..., 4:]
    assert attributes.shape[-1] == len(LABELS.attributes)
    torch.testing.assert_close(classes.sum(-1), torch.ones(2, 8), atol=1e-5, rtol=0)  # float32 softmax
    assert ((attributes >= 0) & (attributes <= 1)).all()


def test_parts_do_not_break_padding_order_or_trimming() -> None:
    model, regions, ids = _model(trim_after=0), _regions(4), tiny_ids(4, length=6)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = Regions(*(part[:, order] for part in regions))
    with torch.no_grad():
        whole = model.answer(regions, ids)
        assert whole.fusion.hidden_BTD[-1].shape == (4, ids.shape[1] + 3 + 8, 32)
        assert whole.fusion.regions_BND.shape == (4, 8, 32)
        tolerance = {"atol": 1e-5, "rtol": 0}  # float32 sums in another order
        torch.testing.assert_close(model.answer(shuffled, ids).logits_BA, whole.logits_BA, **tolerance)
        torch.testing.assert_close(model.answer(regions, ids[:, :7]).logits_BA, whole.logits_BA, **tolerance)
        gathered = model.answer(regions, ids, trim=Trim(regions=(3,))).logits_BA
        masked = model.answer(regions, ids, trim=Trim(regions=(3,), temperature=0.5)).logits_BA
        torch.testing.assert_close(gathered, masked, **tolerance)


def test_onnx_answers_the_same() -> None:
    """ONNX Runtime against PyTorch, logits within 1e-4 (float32 on both sides); a trimmed program."""
    model, regions, ids = _model(trim_after=0), _regions(3), tiny_ids(3)
    module = AnswerQuestion(model, trim=Trim(regions=(3,))).eval()
    inputs = (*(part[:1] for part in regions), ids[:1])
    names = ["features", "boxes", "scores", "input_ids"]
    program = torch.onnx.export(
        module,
        inputs,
        input_names=names,
        output_names=["logits", "looked_at"],
        opset_version=18,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for row in range(3):
        one = tuple(part[row : row + 1] for part in (*regions, ids))
        with torch.no_grad():
            expected = module(*one)
        got = session.run(None, {name: value.numpy() for name, value in zip(names, one, strict=True)})
        for theirs, ours in zip(got, expected, strict=True):
            np.testing.assert_allclose(np.asarray(theirs), ours.numpy(), atol=1e-4, rtol=0)


def test_tags_export() -> None:
    """The encode program with tags traces to a static graph."""
    exported = torch.export.export(EncodeImage(_model()).eval(), (torch.zeros(1, 64, 64, 3, dtype=torch.uint8),))
    features, boxes, scores = exported.module()(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert features.shape == (1, 8, 6) and boxes.shape == (1, 8, 4) and scores.shape == (1, 8)
    assert isinstance(CONFIG, FusionConfig)
