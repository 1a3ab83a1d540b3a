"""Physical shrinking: a smaller fusion whose output equals the gated one's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgevlm.artifacts import FusionConfig
from edgevlm.compress.cost import head_parameters, neuron_parameters, prunable_parameters
from edgevlm.models.fusion import Fusion, Layer
from edgevlm.models.gates import FusionGates, LayerGates
from edgevlm.models.vlm import VLM


@dataclass(frozen=True)
class Kept:
    """Sorted indices of the heads and neurons that stay, per layer."""

    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]

    def masks(self, config: FusionConfig) -> list[LayerGates]:
        """The same choice as gates of exactly 0 and 1."""

        def mask(kept: tuple[int, ...], size: int) -> Tensor:
            return torch.zeros(size).index_fill_(0, torch.tensor(kept), 1.0)

        sizes = zip(self.heads, config.layer_heads, self.neurons, config.layer_ffn, strict=True)
        return [LayerGates(mask(heads, nh), mask(neurons, nf)) for heads, nh, neurons, nf in sizes]


def choose_kept(gates: FusionGates, config: FusionConfig, sparsity: float, round_to: int) -> Kept:
    """The structure that the gates have learned: per layer, the expected number of the likeliest gates.

    A short run may end before the Lagrangian has met its target. All gates are therefore shifted together until the
    expected sparsity is the one asked for; what they have learned, their order and the split between layers, stays.
    At least one head and `round_to` neurons stay in every layer (a vanished layer breaks training, and converters
    refuse empty matrices); neuron counts are rounded to a multiple of `round_to`, what vector units like.
    """

    def best(log_alpha: Tensor, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.topk(log_alpha, count).indices.tolist()))

    shift = _shift_to(gates, config, sparsity)
    heads, neurons = [], []
    for head_gate, neuron_gate in zip(gates.heads, gates.neurons, strict=True):
        num_heads = max(1, round(head_gate.keep_probability(shift).sum().item()))  # pyright: ignore
        expected = neuron_gate.keep_probability(shift).sum().item()  # pyright: ignore
        size = neuron_gate.log_alpha.numel()  # pyright: ignore
        num_neurons = min(size, max(round_to, round(expected / round_to) * round_to))
        heads.append(best(head_gate.log_alpha, num_heads))  # pyright: ignore
        neurons.append(best(neuron_gate.log_alpha, num_neurons))  # pyright: ignore
    return Kept(tuple(heads), tuple(neurons))


def expected_sparsity(gates: FusionGates, config: FusionConfig, shift: float = 0.0) -> Tensor:
    """1 - E[kept prunable parameters] / prunable parameters; differentiable in the gates."""
    head, neuron = head_parameters(config.hidden, config.head_dim), neuron_parameters(config.hidden)
    counts = [(gate, head) for gate in gates.heads] + [(gate, neuron) for gate in gates.neurons]
    kept = torch.stack([gate.keep_probability(shift).sum() * size for gate, size in counts]).sum()  # pyright: ignore
    return 1.0 - kept / prunable_parameters(config)


@torch.no_grad()
def _shift_to(gates: FusionGates, config: FusionConfig, sparsity: float) -> float:
    """What to add to every log_alpha so that the expected sparsity is `sparsity` (it falls as the shift grows)."""
    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_sparsity(gates, config, middle) > sparsity else (low, middle)
    return (low + high) / 2


def shrunken_config(config: FusionConfig, kept: Kept) -> FusionConfig:
    """The config of the smaller fusion."""
    sizes = {"layer_heads": tuple(map(len, kept.heads)), "layer_ffn": tuple(map(len, kept.neurons))}
    return config.model_copy(update=sizes)


@torch.no_grad()
def shrink(model: VLM, kept: Kept) -> None:
    """Replace the fusion's layers by smaller ones, in place; all other weights stay."""
    config = shrunken_config(model.config.fusion, kept)
    for i, layer in enumerate(model.fusion.layers):
        model.fusion.layers[i] = _smaller(layer, config, i, kept.heads[i], kept.neurons[i])  # pyright: ignore
    model.config = model.config.model_copy(update={"fusion": config})
    model.fusion.config = config


def _smaller(layer: Layer, config: FusionConfig, index: int, heads: tuple[int, ...], neurons: tuple[int, ...]) -> Layer:
    new = Layer(config, index).to(layer.ffn_in.weight.device)
    rows = torch.tensor([head * config.head_dim + i for head in heads for i in range(config.head_dim)])
    for name in ("query", "key", "value"):
        _copy(getattr(new.attention, name), getattr(layer.attention, name), rows=rows)
    _copy(new.attention.output, layer.attention.output, columns=rows)
    _copy(new.ffn_in, layer.ffn_in, rows=torch.tensor(neurons))
    _copy(new.ffn_out, layer.ffn_out, columns=torch.tensor(neurons))
    new.attention_norm.load_state_dict(layer.attention_norm.state_dict())
    new.ffn_norm.load_state_dict(layer.ffn_norm.state_dict())
    return new


def _copy(new: nn.Linear, old: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight, bias = old.weight, old.bias
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new.weight.copy_(weight)
    new.bias.copy_(bias)


def fusion_parameters(fusion: Fusion) -> int:
    """Parameters of heads and neurons, counted on the module itself."""
    total = 0
    for layer in fusion.layers:
        assert isinstance(layer, Layer)
        for linear in (layer.attention.query, layer.attention.key, layer.attention.value, layer.ffn_in):
            total += linear.weight.numel() + linear.bias.numel()
        total += layer.attention.output.weight.numel() + layer.ffn_out.weight.numel()
    return total
