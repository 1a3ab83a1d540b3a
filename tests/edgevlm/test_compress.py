"""Gates, ramp, size count and shrinking, each against a formula, a simulation or the masked model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.artifacts import FusionConfig
from edgevlm.compress.cost import fusion_macs, head_parameters, neuron_parameters, prunable_parameters
from edgevlm.compress.distil import Distiller, layer_map
from edgevlm.compress.prune import target_sparsity
from edgevlm.compress.shrink import Kept, choose_kept, expected_sparsity, fusion_parameters, shrink, shrunken_config
from edgevlm.models.gates import FusionGates, HardConcrete
from tests.edgevlm.tiny import tiny_ids, tiny_regions, tiny_vlm


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 2.0])
def test_keep_probability_matches_a_simulation(log_alpha: float) -> None:
    torch.manual_seed(0)
    gate = HardConcrete(200_000, log_alpha)
    share = (gate.sample() > 0).float().mean().item()
    expected = gate.keep_probability()[0].item()
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 200_000)  # four standard errors


def test_published_initial_probabilities() -> None:
    """EfficientVLM's initial values: heads .998 after the clamp, neurons .832."""
    gates = FusionGates((2,), (3,))
    assert gates.heads[0].keep_probability()[0].item() == pytest.approx(0.998, abs=5e-4)  # pyright: ignore
    assert gates.neurons[0].keep_probability()[0].item() == pytest.approx(0.832, abs=5e-4)  # pyright: ignore


@given(steps=st.integers(1, 500), ramp=st.floats(0.05, 1.0), final=st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_target_rises_once_and_stays(steps: int, ramp: float, final: float) -> None:
    values = [target_sparsity(step, steps, ramp, final) for step in range(steps)]
    assert all(a <= b for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == pytest.approx(final)
    assert 0 < values[0] <= final


def test_expected_sparsity_is_zero_when_all_is_kept_and_counts_modules() -> None:
    model = tiny_vlm()
    config = model.config.fusion
    assert prunable_parameters(config) == fusion_parameters(model.fusion)
    gates = FusionGates(config.layer_heads, config.layer_ffn)
    for gate in (*gates.heads, *gates.neurons):
        gate.log_alpha.data.fill_(50.0)  # pyright: ignore
    assert expected_sparsity(gates, config).item() == pytest.approx(0.0, abs=1e-6)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_shrunken_equals_masked(data: st.DataObject) -> None:
    """Any choice of heads and neurons: removing the weights gives what multiplying by 0 and 1 gives."""
    model = tiny_vlm(seed=data.draw(st.integers(0, 100)), layer_heads=(2, 2), layer_ffn=(24, 24))
    config = model.config.fusion

    def choice(size: int) -> tuple[int, ...]:
        return tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))

    kept = Kept(tuple(choice(h) for h in config.layer_heads), tuple(choice(f) for f in config.layer_ffn))
    regions, ids = tiny_regions(3), tiny_ids(3)
    with torch.no_grad():
        masked = model.answer(regions, ids, gates=kept.masks(config)).logits_BA
        shrink(model, kept)
        shrunken = model.answer(regions, ids).logits_BA
    torch.testing.assert_close(shrunken, masked, atol=1e-5, rtol=0)  # sums in another order
    assert fusion_parameters(model.fusion) == prunable_parameters(model.config.fusion)


def test_choice_follows_the_gates() -> None:
    config = FusionConfig.uniform(hidden=32, layers=1, heads=4, ffn=32)
    gates = FusionGates((4,), (32,))
    gates.heads[0].log_alpha.data = torch.tensor([-4.6, 4.6, 4.6, -4.6])  # pyright: ignore
    gates.neurons[0].log_alpha.data = torch.cat([torch.full((16,), -4.6), torch.full((16,), 4.6)])  # pyright: ignore
    kept = choose_kept(gates, config, 0.5, round_to=8)
    assert kept.heads == ((1, 2),)
    assert kept.neurons == (tuple(range(16, 32)),)


@given(sparsity=st.floats(0.1, 0.7), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_asked_sparsity_is_met_wherever_the_gates_ended(sparsity: float, seed: int) -> None:
    """Within what whole heads and rounded widths allow: half a head and half a rounding step per layer.

    Up to 70 %: beyond, the one head that every layer keeps stands in the way.
    """
    config = FusionConfig.uniform(hidden=64, layers=3, heads=4, ffn=256)
    gates = FusionGates(config.layer_heads, config.layer_ffn)
    generator = torch.Generator().manual_seed(seed)
    for gate in (*gates.heads, *gates.neurons):
        gate.log_alpha.data = torch.randn(gate.log_alpha.shape, generator=generator) * 2 + 1  # pyright: ignore
    kept = choose_kept(gates, config, sparsity, round_to=8)
    total = prunable_parameters(config)
    achieved = 1 - prunable_parameters(shrunken_config(config, kept)) / total
    step = 3 * (0.5 * head_parameters(64, 16) + 4 * neuron_parameters(64)) / total
    assert abs(achieved - sparsity) <= step + 1e-6


def test_a_layer_never_vanishes() -> None:
    config = FusionConfig.uniform(hidden=32, layers=2, heads=4, ffn=32)
    gates = FusionGates((4, 4), (32, 32))
    kept = choose_kept(gates, config, 0.999, round_to=8)
    assert [len(heads) for heads in kept.heads] == [1, 1]
    assert [len(neurons) for neurons in kept.neurons] == [8, 8]


def test_macs_match_torch_count() -> None:
    """The formula against torch's flop counter on the real module (2 flops = 1 MAC), all matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_vlm(trim_after=0)
    regions, ids = tiny_regions(1), tiny_ids(1)
    config, length = model.config.fusion, ids.shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.fusion(regions.features_BND, regions.boxes_norm_BN4, torch.ones(1, 8), ids, num_keep=3)
    hidden, bottleneck = config.hidden, max(8, config.hidden // 4)
    extras = 8 * (hidden * bottleneck + bottleneck) + hidden * bottleneck + hidden * hidden  # trimmer and pooler
    extras += 3 * 8  # looked_at: (1, 3) x (3, 8)
    assert counter.get_total_flops() / 2 == fusion_macs(config, length, 8, 3, 32) + extras


def test_layer_map_two_to_one_is_the_published_one() -> None:
    """EfficientVLM: attention map of student i comes from teacher 2i + 1."""
    assert layer_map(3, 6) == [1, 3, 5]
    assert layer_map(3, 4) == [0, 2, 3]
    assert layer_map(4, 4) == [0, 1, 2, 3]


def test_distilling_from_oneself_costs_nothing() -> None:
    model = tiny_vlm()
    distiller = Distiller(model, model, 1.0, 1.0)
    for projection in distiller.projections:
        torch.nn.init.eye_(projection.weight)  # pyright: ignore
        torch.nn.init.zeros_(projection.bias)  # pyright: ignore
    with torch.no_grad():
        a = model.answer(tiny_regions(3), tiny_ids(3))
        b = model.answer(tiny_regions(3, seed=5), tiny_ids(3))
        assert distiller(a.logits_BA, a.fusion, a.logits_BA, a.fusion).item() == pytest.approx(0.0, abs=1e-6)
        assert distiller(a.logits_BA, a.fusion, b.logits_BA, b.fusion).item() > 1e-3
