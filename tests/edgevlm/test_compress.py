"""Gates, ramp, cost and shrinking, each against a formula, a simulation or the masked model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgevlm.artifacts import ModelConfig
from edgevlm.compress.cost import CostModel, cost_model, fusion_macs, prunable_parameters
from edgevlm.compress.shrink import Kept, fill_budget, masks, shrink
from edgevlm.compress.structure import choose_by_gates, target_sparsity
from edgevlm.errors import RecipeError
from edgevlm.models.gates import Gates, HardConcrete, gated
from edgevlm.models.groups import Group, groups_of
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.trimmer import Trim
from edgevlm.models.vlm import VLM
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_ids, tiny_regions, tiny_vlm

TRUNKS = ("test_edgevlm", "edgevlm_nano", "edgevlm_fused", "efficientnet_lite0", "efficientnet_b0")


def model_with(trunk: str, first_level: int = 3, seed: int = 0, fpn: int = 32) -> VLM:
    """A model whose norms have statistics and biases of their own, as after training."""
    torch.manual_seed(seed)
    tee = TEES["test-tee"].model_copy(update={"trunk": trunk, "first_level": first_level, "fpn_channels": fpn})
    model = VLM(ModelConfig(tee=tee, fusion=FUSIONS["test-fusion"]), SPEC, TOKENIZER, LABELS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # pyright: ignore
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # pyright: ignore
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


def some_of(groups: list[Group], seed: int, share: float = 0.6) -> Kept:
    """A random choice of members, at least one in each group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        count = max(1, round(share * group.size))
        kept[group.name] = tuple(sorted(torch.randperm(group.size, generator=generator)[:count].tolist()))
    return kept


def outputs(model: VLM) -> list[torch.Tensor]:
    """Everything before the first top-k, the box head on fixed boxes, and an answer about their features."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=generator).float()
    corners = torch.rand(2, 8, 2, 2, generator=generator).sort(2).values * 64
    boxes = corners.flatten(2)
    with torch.no_grad():
        dense = model.tee.dense(pixels)
        box = model.tee.box_features(dense.maps, boxes)
        regions = tiny_regions(2)._replace(features_BND=box.features_BRD)
        answer = model.answer(regions, tiny_ids(2))
    return [dense.objectness_BM, dense.deltas_BM4, box.class_logits_BRC, box.deltas_BR4, answer.logits_BA]


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 2.0])
def test_keep_probability_matches_a_simulation(log_alpha: float) -> None:
    torch.manual_seed(0)
    gate = HardConcrete(200_000, log_alpha)
    share = (gate.sample() > 0).float().mean().item()
    expected = gate.keep_probability()[0].item()
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 200_000)  # four standard errors


def test_published_initial_probabilities() -> None:
    """EfficientVLM's initial values: heads .998 after the clamp, neurons .832."""
    gates = Gates(groups_of(tiny_vlm(), ("fusion",)))
    assert gates["heads.0"].keep_probability()[0].item() == pytest.approx(0.998, abs=5e-4)
    assert gates["neurons.1"].keep_probability()[0].item() == pytest.approx(0.832, abs=5e-4)


@given(steps=st.integers(1, 500), ramp=st.floats(0.05, 1.0), final=st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_target_rises_once_and_stays(steps: int, ramp: float, final: float) -> None:
    values = [target_sparsity(step, steps, ramp, final) for step in range(steps)]
    assert all(a <= b for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == pytest.approx(final)
    assert 0 < values[0] <= final


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("trunk", "first_level", "fpn"),
    [*((trunk, 3, 32) for trunk in TRUNKS), ("edgevlm_nano", 2, 32), ("test_edgevlm", 3, 16)],
)
def test_shrunken_equals_masked(trunk: str, first_level: int, fpn: int, seed: int) -> None:
    """Any choice in every group: removing the weights gives what multiplying by 0 and 1 gives.

    The last two have a map that is as wide as the BiFPN and enters it without a projection.
    """
    model = model_with(trunk, first_level, seed, fpn)
    groups = groups_of(model)
    assert "fpn" in [group.name for group in groups]
    kept = some_of(groups, seed)
    whole = outputs(model)
    with gated(model, groups, masks(groups, kept)):
        masked = outputs(model)
    shrink(model, groups, kept)
    for full, gate, small in zip(whole, masked, outputs(model), strict=True):
        assert (full - gate).abs().max() > 1e-4, "the gates changed nothing"
        # Sums in another order: 1e-5 of the largest value.
        torch.testing.assert_close(small, gate, atol=1e-5 * max(1.0, gate.abs().max().item()), rtol=0)
    assert {group.name: group.size for group in groups_of(model)} == {name: len(kept[name]) for name in kept}


@pytest.mark.parametrize("name", [group.name for group in groups_of(model_with("efficientnet_b0"))])
def test_every_group_alone(name: str) -> None:
    """Down to one member, as far as a group can go."""
    model = model_with("efficientnet_b0")
    groups = [group for group in groups_of(model) if group.name == name]
    kept = {name: (groups[0].size // 2,)}
    with gated(model, groups, masks(groups, kept)):
        masked = outputs(model)
    shrink(model, groups, kept)
    for gate, small in zip(masked, outputs(model), strict=True):
        torch.testing.assert_close(small, gate, atol=1e-5 * max(1.0, gate.abs().max().item()), rtol=0)


def test_a_map_with_a_skip_fixes_the_width_of_the_bifpn() -> None:
    """EfficientNet-B0's P3 has 40 channels, which a skip carries on: with a BiFPN of 40 none of them can go."""
    assert "fpn" not in [group.name for group in groups_of(model_with("efficientnet_b0", fpn=40))]


def test_no_hook_stays() -> None:
    model = tiny_vlm()
    groups = groups_of(model)
    with gated(model, groups, {group.name: torch.zeros(group.size) for group in groups}):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_shrunken_model_is_built_from_its_config(trunk: str) -> None:
    model = model_with(trunk)
    groups = groups_of(model)
    shrink(model, groups, some_of(groups, 3))
    config = ModelConfig.model_validate_json(model.config.model_dump_json())
    again = VLM(config, SPEC, TOKENIZER, LABELS).eval()
    again.load_state_dict(model.state_dict())
    assert config.region_dim(LABELS) == again.tee.region_dim == model.fusion.region.in_features - 6
    for a, b in zip(outputs(model), outputs(again), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_cost_is_what_the_shrunken_model_has(trunk: str) -> None:
    """Parameters: all of them, counted. Multiply-adds: torch's counter on the modules, without RoIAlign and NMS."""
    model = model_with(trunk)
    groups = groups_of(model)
    costs = {measure: cost_model(model, groups, measure, 12) for measure in ("parameters", "macs")}
    kept = some_of(groups, 5)
    for members in ({}, {name: len(chosen) for name, chosen in kept.items()}):
        if members:
            shrink(model, groups, kept)
        assert costs["parameters"].of(members) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-9)
        assert costs["macs"].of(members) == pytest.approx(counted_macs(model), rel=1e-9)


def counted_macs(model: VLM) -> int:
    """Of one image and one question, by torch's flop counter (2 flops = 1 MAC)."""
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        num_boxes = model.tee.propose(model.tee.dense(pixels)).shape[1]
        pooled = torch.zeros(1, num_boxes, model.tee.box_head.fc1.in_features)
        regions = model.encode(pixels)
        with FlopCounterMode(display=False) as counter:
            model.tee.dense(pixels)
            model.tee.box_head(pooled)
            model.answer(regions, tiny_ids(1))
    return counter.get_total_flops() // 2


def test_heads_and_neurons_by_formula() -> None:
    model = tiny_vlm()
    groups = groups_of(model, ("fusion",))
    cost = cost_model(model, groups, "parameters", 12).only(group.name for group in groups)
    assert cost.whole == prunable_parameters(model.config.fusion)
    gates = Gates(groups)
    for gate in gates.by_group.values():
        gate.log_alpha.data.fill_(50.0)  # pyright: ignore
    assert (cost.of(gates.expected()) / cost.whole).item() == pytest.approx(1.0, abs=1e-6)


def fusion_of(layers: int, heads: int, ffn: int) -> tuple[VLM, Gates, CostModel]:
    """Gates on a fusion, and the cost of what they can remove."""
    model = tiny_vlm(layer_heads=(heads,) * layers, layer_ffn=(ffn,) * layers)
    groups = groups_of(model, ("fusion",))
    return model, Gates(groups), cost_model(model, groups, "parameters", 12).only(group.name for group in groups)


def choose_kept(gates: Gates, cost: CostModel, budget: float, round_to: int) -> Kept:
    """The gates' structure within a budget."""
    return choose_by_gates(
        gates, lambda wanted, scores, budget: fill_budget(gates.groups, cost, budget, round_to, wanted, scores), budget
    )


def test_choice_follows_the_gates() -> None:
    _, gates, cost = fusion_of(1, 4, 32)
    gates["heads.0"].log_alpha.data = torch.tensor([-4.6, 4.6, 4.6, -4.6])
    gates["neurons.0"].log_alpha.data = torch.cat([torch.full((16,), -4.6), torch.full((16,), 4.6)])
    kept = choose_kept(gates, cost, 0.5 * cost.whole, round_to=8)
    assert kept == {"heads.0": (1, 2), "neurons.0": tuple(range(16, 32))}


@given(sparsity=st.floats(0.1, 0.7), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_asked_sparsity_is_met_wherever_the_gates_ended(sparsity: float, seed: int) -> None:
    """Never above the budget, and below it by less than the cheapest step that is left."""
    _, gates, cost = fusion_of(3, 4, 256)
    generator = torch.Generator().manual_seed(seed)
    for gate in gates.by_group.values():
        gate.log_alpha.data = torch.randn(gate.log_alpha.shape, generator=generator) * 2 + 1  # pyright: ignore
    kept = choose_kept(gates, cost, (1 - sparsity) * cost.whole, round_to=8)
    achieved = 1 - cost.of({name: len(members) for name, members in kept.items()}) / cost.whole
    assert sparsity - 1e-6 <= achieved <= sparsity + 8 * 65 / cost.whole
    assert all(len(members) % 8 == 0 for name, members in kept.items() if name.startswith("neurons"))


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.35, 0.25])
@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_budgets_are_met_within_one_percent(measure: str, keep: float) -> None:
    """On a fusion of a real size, wherever the gates ended: never above the budget, and at most 1 % of it unused."""
    model = tiny_vlm(hidden=96, head_dim=24, layer_heads=(4,) * 4, layer_ffn=(256,) * 4)
    groups = groups_of(model, ("fusion",))
    gates, cost = Gates(groups), cost_model(model, groups, measure, 12).only(group.name for group in groups)  # pyright: ignore
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        for gate in gates.by_group.values():
            gate.log_alpha.data = torch.randn(gate.log_alpha.shape, generator=generator) * 2 + 1  # pyright: ignore
        kept = choose_kept(gates, cost, keep * cost.whole, round_to=16)
        left = cost.of({name: len(members) for name, members in kept.items()}) / cost.whole
        assert keep * 0.99 <= left <= keep + 1e-9


def test_a_layer_never_vanishes_and_the_least_is_named() -> None:
    _, gates, cost = fusion_of(2, 4, 32)
    least = 2 * (4 * 32 * 16 + 3 * 16 + 8 * 65)
    kept = choose_kept(gates, cost, least, round_to=8)
    assert {name: len(members) for name, members in kept.items()} == {
        "heads.0": 1,
        "heads.1": 1,
        "neurons.0": 8,
        "neurons.1": 8,
    }
    with pytest.raises(RecipeError, match=f"{least:,}"):
        choose_kept(gates, cost, least - 10, round_to=8)


def test_macs_match_torch_count() -> None:
    """The formula against torch's flop counter on the real module (2 flops = 1 MAC), all matrix products."""
    model = tiny_vlm(trim_after=0)
    regions, ids = tiny_regions(1), tiny_ids(1)
    config, length = model.config.fusion, ids.shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.fusion(regions.features_BND, regions.boxes_norm_BN4, torch.ones(1, 8), ids, trim=Trim(regions=(3,)))
    hidden, bottleneck = config.hidden, max(8, config.hidden // 4)
    extras = 8 * (hidden * bottleneck + bottleneck) + 3 * hidden * bottleneck  # trimmer: tokens; [CLS], image and mean
    extras += 8 * hidden + 8 * hidden + hidden * hidden  # means of the regions and of the image; pooler
    extras += 3 * 8  # looked_at: (1, 3) x (3, 8)
    assert counter.get_total_flops() / 2 == fusion_macs(config, length, 8, 32, Trim(regions=(3,))) + extras
