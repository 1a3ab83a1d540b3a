"""Two encoders cut, counted and distilled: against masked models, torch's flop counter, and EfficientVLM's published sums."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgevlm.artifacts import ModelConfig
from edgevlm.compress.cost import cost_model, fusion_macs, prunable_parameters
from edgevlm.compress.distil import PUBLISHED_TWO, Distiller, check_distil, published, stack_maps, start_from_teacher
from edgevlm.compress.shrink import Kept, masks, shrink
from edgevlm.compress.structure import Pruning, by_modality
from edgevlm.errors import RecipeError
from edgevlm.models.fusion import Fusion
from edgevlm.models.gates import Gates, gated
from edgevlm.models.groups import Group, groups_of
from edgevlm.models.inspect import inspect_fusion
from edgevlm.models.registry import FUSIONS
from edgevlm.models.trimmer import Trim
from edgevlm.models.vlm import VLM
from edgevlm.recipe import PruneSection
from edgevlm.recipes import load_recipe
from tests.edgevlm.test_compress import counted_macs
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, dual_vlm, tiny_ids, tiny_regions, tiny_vlm

TOLERANCE = 1e-5  # float32 sums in another order
PARTS = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
DUAL = ("teacher.fusion={name: test-dual}", "distil.fusion={name: test-dual}")
ENCODERS = ("vision encoder", "text encoder", "cross encoder")


def test_efficientvlms_student_and_teacher() -> None:
    """92.10M prunable by the published constants, which give every attention and FFN the d numbers of its output bias."""
    d, blocks, cross = 768, 7.085e6, 9.447e6
    student, teacher = FUSIONS["efficientvlm"], FUSIONS["efficientvlm-teacher"]
    assert prunable_parameters(student) == pytest.approx(9 * blocks + 3 * cross, rel=3e-4)
    assert prunable_parameters(student) / 1e6 == pytest.approx(92.10, rel=3e-4)
    exact = 15 * (4 * d * d + 4 * d) + 12 * (2 * d * 3072 + 5 * d)
    assert exact - prunable_parameters(student) == (15 + 12) * d
    assert prunable_parameters(teacher) == 2 * prunable_parameters(student)
    with torch.device("meta"):
        fusion: Any = Fusion(student, TOKENIZER, 1024)
    layers = [*fusion.vision, *fusion.text, *fusion.layers]
    norms = sum(p.numel() for layer in layers for n, p in layer.named_parameters() if "norm" in n)
    assert sum(p.numel() for layer in layers for p in layer.parameters()) - norms == exact


# --- cutting and costs -------------------------------------------------------------------------------------------


def some_of(groups: list[Group], seed: int) -> Kept:
    """A random choice of members, at least one in each group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        count = int(torch.randint(1, group.size + 1, (), generator=generator))
        kept[group.name] = tuple(sorted(torch.randperm(group.size, generator=generator)[:count].tolist()))
    return kept


def outputs(model: VLM) -> list[Tensor]:
    with torch.no_grad():
        answer = model.answer(tiny_regions(3), tiny_ids(3), trim=Trim(regions=(3,)))
        return [answer.logits_BA, answer.fusion.regions_BND, answer.fusion.pooled_BD]


def deep(seed: int = 0) -> VLM:
    """Heads and widths that differ from stack to stack, so that none can be taken for another."""
    return dual_vlm(
        seed, head_dim=8, trim_after=0, vision_heads=(4, 3), vision_ffn=(24, 40), text_heads=(5, 2), text_ffn=(16, 56),
        layer_heads=(6, 2), layer_ffn=(48, 32), cross_heads=(3, 4),
    )  # fmt: skip


def test_groups_name_their_encoder() -> None:
    groups = groups_of(deep(), ("fusion",))
    assert {g.name: (g.part, g.size, g.place) for g in groups if g.name.endswith(".1")} == {
        "heads.vision.1": ("vision encoder", 3, ("vision_heads", 1)),
        "neurons.vision.1": ("vision encoder", 40, ("vision_ffn", 1)),
        "heads.text.1": ("text encoder", 2, ("text_heads", 1)),
        "neurons.text.1": ("text encoder", 56, ("text_ffn", 1)),
        "heads.cross.1": ("cross encoder", 2, ("layer_heads", 1)),
        "heads.cross_image.1": ("cross encoder", 4, ("cross_heads", 1)),
        "neurons.cross.1": ("cross encoder", 32, ("layer_ffn", 1)),
    }
    assert {group.part for group in groups_of(deep())} == {"vision", *ENCODERS}
    gates = Gates(groups)
    assert gates["heads.cross_image.0"].keep_probability()[0].item() == pytest.approx(0.998, abs=5e-4)
    assert gates["neurons.vision.0"].keep_probability()[0].item() == pytest.approx(0.832, abs=5e-4)


FAMILIES = (
    "heads.vision",
    "heads.text",
    "heads.cross.",
    "heads.cross_image",
    "neurons.vision",
    "neurons.text",
    "neurons.cross",
)


@given(seed=st.integers(0, 10_000), family=st.sampled_from(["", "heads.", "neurons.", *FAMILIES]))
@settings(max_examples=40, deadline=None)
def test_shrunken_equals_masked_and_costs_what_it_should(seed: int, family: str) -> None:
    """Any kept sets in any family: outputs, parameters, multiply-adds, config, and the model built from that.

    The extractor's groups are tested in test_compress.py.
    """
    model = deep(seed % 3)
    groups = [group for group in groups_of(model, ("fusion",)) if group.name.startswith(family)]
    assert groups
    costs = {measure: cost_model(model, groups, measure, 12) for measure in ("parameters", "macs")}
    kept = some_of(groups, seed)
    with gated(model, groups, masks(groups, kept)):
        masked = outputs(model)
    shrink(model, groups, kept)
    for gate, small in zip(masked, outputs(model), strict=True):
        torch.testing.assert_close(small, gate, atol=TOLERANCE * max(1.0, gate.abs().max().item()), rtol=0)
    members = {name: len(indices) for name, indices in kept.items()}
    assert costs["parameters"].of(members) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-9)
    assert costs["macs"].of(members) == pytest.approx(counted_macs(model), rel=1e-9)
    again = VLM(ModelConfig.model_validate_json(model.config.model_dump_json()), SPEC, TOKENIZER, LABELS).eval()
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(again), strict=True))
    assert {g.name: g.size for g in groups_of(again, ("fusion",)) if g.name in members} == members


@pytest.mark.parametrize("parts", [(), PARTS])
def test_macs_of_a_rung_by_formula(parts: Any) -> None:
    model = deep()
    config = model.config.fusion.model_copy(update={"parts": parts})
    torch.manual_seed(0)
    fusion, regions = Fusion(config, TOKENIZER, 32), tiny_regions(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fusion(regions.features_BND, regions.boxes_norm_BN4, torch.ones(1, 8), tiny_ids(1), trim=Trim(regions=(3,)))
    hidden, bottleneck = config.hidden, max(8, config.hidden // 4)
    extras = 8 * (hidden * bottleneck + bottleneck) + 3 * hidden * bottleneck  # trimmer: tokens; [CLS], image and mean
    extras += 8 * hidden + (8 + len(parts)) * hidden + hidden * hidden  # means of the regions and of the image; pooler
    extras += 3 * 8  # looked_at: (1, 3) x (3, 8)
    assert counter.get_total_flops() / 2 == fusion_macs(config, 12, 8, 32, Trim(regions=(3,))) + extras


def test_heads_and_neurons_by_formula_and_inspected() -> None:
    model = deep()
    groups = groups_of(model, ("fusion",))
    cost = cost_model(model, groups, "parameters", 12).only(group.name for group in groups)
    assert cost.whole == prunable_parameters(model.config.fusion)
    part = inspect_fusion(dual_vlm().fusion, 12, 8)
    assert part.formula == part.counted
    assert part.name == "fusion of 2 vision, 1 text, 2 cross layers, 12 words and 8 regions"


def test_each_encoder_loses_the_same_share_by_modality() -> None:
    """EfficientVLM's pilot baseline; the shares differ by a rounding step at most."""
    model = dual_vlm(head_dim=8, vision_heads=(4,) * 2, text_heads=(4,), layer_heads=(4,) * 2, cross_heads=(4,) * 2)
    for encoder in (model.fusion.vision, model.fusion.text):  # one ranking over all would take everything from these
        for parameter in encoder.parameters():
            parameter.data.mul_(0.1)
    groups = tuple(groups_of(model, ("fusion",)))
    cost = cost_model(model, groups, "parameters", 12).only(group.name for group in groups)
    section = PruneSection(steps=1, sparsity=0.4, method="modality", round_to=1)  # pyright: ignore
    pruning = Pruning(section, model, nn.Identity(), groups, cost, lambda *_: None, section.sparsity)
    kept = by_modality(pruning).at(pruning.budget)
    for part in ENCODERS:
        own = cost.only(group.name for group in groups if group.part == part)
        share = own.of({name: len(members) for name, members in kept.items()}) / own.whole
        head = 4 * 32 * 8 + 3 * 8  # what the share may miss by
        assert 0.6 - head / own.whole < share <= 0.6 + 1e-9, part


# --- distillation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_and_teacher() -> tuple[VLM, VLM]:
    """2 + 1 + 2 layers under 4 + 2 + 4."""
    four, two = (2,) * 4, (2,) * 2
    teacher = {"vision_heads": four, "vision_ffn": (64,) * 4, "text_heads": two, "text_ffn": (64,) * 2}
    teacher |= {"layer_heads": four, "layer_ffn": (64,) * 4, "cross_heads": four}
    return dual_vlm(), dual_vlm(1, hidden=48, **teacher)


def test_layers_are_spread_within_each_encoder(student_and_teacher: tuple[VLM, VLM]) -> None:
    small, large = (model.config.fusion for model in student_and_teacher)
    assert stack_maps(small, large) == {"vision": [1, 3], "text": [1], "cross": [1, 3]}
    assert stack_maps(small, large, {"text": (0,)}) == {"vision": [1, 3], "text": [0], "cross": [1, 3]}
    published_sizes = FUSIONS["efficientvlm"], FUSIONS["efficientvlm-teacher"]
    assert stack_maps(*published_sizes) == {"vision": [1, 3, 5, 7, 9, 11], "text": [1, 3, 5], "cross": [1, 3, 5]}
    with pytest.raises(RecipeError, match="lists by encoder"):
        stack_maps(small, large, (0, 1))
    with pytest.raises(RecipeError, match="takes one list"):
        stack_maps(FUSIONS["test-fusion"], FUSIONS["test-fusion"], {"text": (0,)})
    with pytest.raises(RecipeError, match="two encoders, the other a single stream"):
        stack_maps(small, FUSIONS["test-fusion"])


@pytest.mark.parametrize("task", ["vqa", "reasoning"])
def test_the_loss_is_the_published_sum(student_and_teacher: tuple[VLM, VLM], task: str) -> None:
    """Written out from EfficientVLM's terms per layer: text att + hid, image att + .2 (.1) hid, .5 cross hid + self + cross."""
    student, teacher = student_and_teacher
    image, image_hidden, cross = {"vqa": (1.0, 0.2, 0.5), "reasoning": (0.33, 0.033, 0.165)}[task]
    depths = {"vision": 6, "text": 3, "cross": 3 if task == "vqa" else 6}  # of EfficientVLM's student
    weights = {"vision": (image, image_hidden), "text": (1.0, 1.0), "cross": (cross, cross)}
    recipe = load_recipe("test-scenes", DUAL).model_copy(update={"task": task})
    section = published(recipe.distil, recipe)
    assert section.kd_weight == {"vqa": 0.4, "reasoning": 0.2}[task]
    distiller = Distiller(student, teacher, section.hidden_weight, section.attention_weight)
    projections = iter(distiller.projections)
    with torch.no_grad():
        a, b = (model.answer(tiny_regions(3), tiny_ids(3)) for model in student_and_teacher)
        expected = F.kl_div(a.logits_BA.log_softmax(1), b.logits_BA.softmax(1), reduction="batchmean")
        for name, (attention, hidden) in weights.items():
            ours, theirs = a.fusion.stacks[name], b.fusion.stacks[name]  # pyright: ignore
            size = len(ours.attention_BHTT)
            for mine, others in ((ours.attention_BHTT, theirs.attention_BHTT), (ours.cross_BHTS, theirs.cross_BHTS)):
                for i, maps in enumerate(mine):
                    squares = (maps - others[2 * i + 1]).square().mean() * maps.shape[-1]
                    expected += attention * depths[name] / size * squares
            for i, states in enumerate(ours.hidden_BTD):  # student i from teacher 2i, 0 = what enters the encoder
                gap = next(projections)(states) - theirs.hidden_BTD[2 * i]
                expected += hidden * depths[name] / (size + 1) * gap.square().mean()
        found = distiller(a.logits_BA, a.fusion, b.logits_BA, b.fusion)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert next(projections, None) is None


def test_distilling_from_oneself_costs_nothing() -> None:
    model = dual_vlm()
    weights = PUBLISHED_TWO["vqa"]
    distiller = Distiller(model, model, weights["hidden_weight"], weights["attention_weight"])
    assert not list(distiller.parameters())
    a, b = (model.answer(tiny_regions(3, seed), tiny_ids(3)) for seed in (0, 5))
    assert distiller(a.logits_BA, a.fusion, a.logits_BA, a.fusion).item() == pytest.approx(0.0, abs=1e-6)
    distiller(a.logits_BA, a.fusion, b.logits_BA, b.fusion).backward()
    for stack in (model.fusion.vision, model.fusion.layers):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in stack.named_parameters() if "ffn_in" in n)


def test_open_and_given_weights_in_recipes() -> None:
    recipe = load_recipe("test-scenes", [*DUAL, "prune.attention_weight=null", "prune.kd_weight=null"])
    pruning = published(recipe.prune, recipe)
    assert pruning.attention_weight == PUBLISHED_TWO["vqa"]["attention_weight"]
    assert (pruning.kd_weight, pruning.hidden_weight) == (0.4, 0.1)
    check_distil(recipe)
    given = load_recipe("test-scenes", [*DUAL, "distil.attention_weight={vision: 2, cross: 1}"])
    assert published(given.distil, given).attention_weight == {"vision": 2.0, "cross": 1.0}
    with pytest.raises(RecipeError, match=r"distil\.attention_weight"):
        load_recipe("test-scenes", [*DUAL, "distil.attention_weight={image: 2}"])
    with pytest.raises(RecipeError, match=r"distil\.attention_weight"):
        load_recipe("test-scenes", [*DUAL, "distil.attention_weight=-1"])
    with pytest.raises(RecipeError, match="of encoders, and the student has none"):
        check_distil(load_recipe("test-scenes", ["distil.attention_weight={vision: 2}"]))
    mixed = [DUAL[1], "prune.attention_weight=0", "prune.hidden_weight=0"]
    with pytest.raises(RecipeError, match="two encoders, the other a single stream"):
        check_distil(load_recipe("test-scenes", mixed))
    check_distil(load_recipe("test-scenes", [*mixed, "distil.attention_weight=0", "distil.hidden_weight=0"]))


def test_forms_that_differ_compare_logits_alone() -> None:
    a, b = (model.answer(tiny_regions(3), tiny_ids(3)) for model in (dual_vlm(), tiny_vlm()))
    distiller = Distiller(dual_vlm(), tiny_vlm(), 0.0, 0.0)
    expected = F.kl_div(a.logits_BA.log_softmax(1), b.logits_BA.softmax(1), reduction="batchmean")
    torch.testing.assert_close(distiller(a.logits_BA, a.fusion, b.logits_BA, b.fusion), expected)


def test_a_student_starts_from_the_layers_that_it_imitates() -> None:
    four = dual_vlm(1, vision_heads=(2,) * 4, vision_ffn=(64,) * 4)
    student = dual_vlm()
    start_from_teacher(student, four)
    for mine, theirs in itertools.chain(
        zip(student.fusion.vision, [four.fusion.vision[1], four.fusion.vision[3]], strict=True),  # pyright: ignore
        zip(student.fusion.layers, four.fusion.layers, strict=True),
    ):
        other = theirs.state_dict()
        assert all(torch.equal(value, other[name]) for name, value in mine.state_dict().items())
    assert math.isfinite(student.answer(tiny_regions(1), tiny_ids(1)).logits_BA.sum().item())
