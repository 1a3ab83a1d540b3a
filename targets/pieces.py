"""The pieces of a model whose cost pruning can change, each as a program of its own: what latency tables are measured on.

A piece keeps the module paths of the whole model, because the quantisers know by them what becomes int8.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from edgevlm.models.groups import Group, cut
from edgevlm.models.tee import TEE
from edgevlm.models.vlm import VLM
from targets.program import Program
from targets.runtime import Arrays
from targets.source import Source


@dataclass(frozen=True)
class Piece:
    """A part of the model that runs as a whole."""

    name: str
    dense: bool
    """Part of the extractor: its convolutions become static int8."""
    modules: tuple[str, ...]
    """Paths of what it runs; the groups that cut into these decide its size."""
    build: Callable[[VLM, "Capture"], tuple[nn.Module, list[Tensor]]]
    """Model and what its modules were given -> the piece, and its inputs."""


class Capture:
    """Positional arguments of each module's last call."""

    def __init__(self) -> None:
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.proposals_BP4 = torch.empty(0)

    def hook(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.arguments[path] = inputs

        return note


def pieces_of(model: VLM) -> list[Piece]:
    """The pieces of a model: each block of the trunk, the pyramid with its RPN, the box head, each layer of the fusion."""
    blocks = [
        f"tee.trunk.blocks.{i}.{j}"
        for i, stage in enumerate(model.tee.trunk.blocks)  # pyright: ignore
        for j in range(len(stage))  # pyright: ignore
    ]
    layers = [
        f"fusion.{name}.{i}"
        for name, children in model.fusion.named_children()
        if isinstance(children, nn.ModuleList)
        for i in range(len(children))
    ]
    return [
        *(Piece(path, True, (path,), _module(path)) for path in blocks),
        Piece("pyramid", True, ("tee.bifpn", "tee.rpn"), lambda m, seen: _pyramid(m.tee, seen)),
        Piece("boxes", True, ("tee.box_head",), lambda m, seen: _boxes(m.tee, seen)),
        *(Piece(path, False, (path,), _module(path)) for path in layers),
    ]


def groups_in(piece: Piece, groups: Sequence[Group]) -> list[Group]:
    """The groups that cut into a piece."""
    inside = tuple(f"{path}." for path in piece.modules)
    return [group for group in groups if any(f"{part.module}.".startswith(inside) for part in group.slices)]


@torch.no_grad()
def program_of(
    model: VLM, piece: Piece, groups: Sequence[Group], members: Mapping[str, int], name: str, example: "Example"
) -> Program:
    """The piece as it is when the groups have so many members left.

    Args:
        model: left as it is.
        piece: which.
        groups: all groups of the model.
        members: group -> members that stay (the first ones: which they are changes no time).
        name: of the program.
        example: what the whole model is run on to see the piece's inputs.
    """
    smaller = copy.deepcopy(model).eval()
    for group in groups:
        if members.get(group.name, group.size) < group.size:
            cut(smaller, group, range(members[group.name]))
    seen = Capture()
    hooks = [
        module.register_forward_pre_hook(seen.hook(path))
        for path, module in smaller.named_modules()
        if path == "tee.bifpn" or path in piece.modules
    ]
    tee = smaller.tee
    dense = tee.dense(example.pixels_BCHW)
    seen.proposals_BP4 = tee.fixed_boxes(1) if tee.config.grid else tee.propose(dense)
    smaller.answer(smaller.encode(example.pixels_BCHW), example.input_ids_BL)
    for hook in hooks:
        hook.remove()
    module, inputs = piece.build(smaller, seen)
    module.eval().requires_grad_(False)
    outputs = module(*inputs)
    return Program(
        name,
        module,
        {f"in{i}": x.clone() for i, x in enumerate(inputs)},
        tuple(f"out{i}" for i in range(len(outputs))),
    )


@dataclass(frozen=True)
class Example:
    """One image and one question."""

    pixels_BCHW: Tensor
    """(1, 3, H, W), 0..255."""
    input_ids_BL: Tensor
    """(1, L), without padding: the longest question."""


class Alone(nn.Module):
    """A module under the path that it has in the model; what it is given beside tensors stays as it was."""

    def __init__(self, path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        *parents, last = path.split(".")
        at: nn.Module = self
        for parent in parents:
            at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, module)
        leaves, self.form = tree_flatten(arguments)
        self.path, self.others = path, [None if isinstance(x, Tensor) else x for x in leaves]
        self.is_tensor = [isinstance(x, Tensor) for x in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if tensor else x for tensor, x in zip(self.is_tensor, self.others, strict=True)]
        result = self.get_submodule(self.path)(*tree_unflatten(leaves, self.form))
        return (result if isinstance(result, Tensor) else result[0],)  # a layer also tells its attention


class Pyramid(nn.Module):
    """The trunk's maps to the BiFPN's maps and the RPN's guesses."""

    def __init__(self, tee: TEE) -> None:
        super().__init__()
        self.tee = _only(tee, "bifpn", "rpn")

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        mixed = self.tee.bifpn(list(maps))
        return (*mixed, *self.tee.rpn(mixed))


class Boxes(nn.Module):
    """Maps and proposals to what the box head says of each."""

    def __init__(self, tee: TEE) -> None:
        super().__init__()
        self.tee = _only(tee, "box_head", "attribute_head")

    def forward(self, boxes: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        output = self.tee.box_features(list(maps), boxes, attributes=False)
        return output.features_BRD, output.class_logits_BRC, output.deltas_BR4


def _module(path: str) -> Callable[[VLM, Capture], tuple[nn.Module, list[Tensor]]]:
    def build(model: VLM, seen: Capture) -> tuple[nn.Module, list[Tensor]]:
        arguments = seen.arguments[path]
        inputs = [x for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)]
        return Alone(path, model.get_submodule(path), arguments), inputs

    return build


def _pyramid(tee: TEE, seen: Capture) -> tuple[nn.Module, list[Tensor]]:
    return Pyramid(tee), list(seen.arguments["tee.bifpn"][0])


def _boxes(tee: TEE, seen: Capture) -> tuple[nn.Module, list[Tensor]]:
    maps = tee.bifpn(list(seen.arguments["tee.bifpn"][0]))
    return Boxes(tee), [seen.proposals_BP4, *maps]


def _only(tee: TEE, *children: str) -> TEE:
    """The extractor with a few of its parts: an exporter would carry the weights of all."""
    slim = copy.copy(tee)
    slim._modules = {name: module for name, module in tee._modules.items() if name in children}
    return slim


@dataclass
class PieceSource(Source):
    """Pieces on their way to a target, in place of a whole model's programs; calibrated on what they were seen with."""

    pieces: list[Program] = field(default_factory=list)
    dense: tuple[str, ...] = ()

    @property
    def programs(self) -> list[Program]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.pieces

    @property
    def static(self) -> tuple[str, ...]:
        return self.dense

    @property
    def answers(self) -> list[Program]:
        return [program for program in self.pieces if program.name not in self.dense]

    def calibration_inputs(self, program: Program, target: str) -> list[Arrays]:
        return [{name: x.numpy() for name, x in program.inputs.items()}]
