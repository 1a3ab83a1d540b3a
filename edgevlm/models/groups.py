"""What can be cut out of a model: groups of channels, units and heads, and every weight that goes with a member.

Where a group's gate is 0 at all its `points`, that member contributes exactly nothing, so cutting it out of all its
`slices` leaves the outputs as they are. Groups are found on the built modules; any timm trunk of EfficientNet blocks fits.

| group | members | where the gate stands |
|---|---|---|
| `trunk.<stage>.<block>` | expanded channels of an MBConv or fused MBConv; output channels of a plain convolution | behind the (depthwise) convolution's norm and activation, before squeeze-excite: a gate further up would not be exact, for the norm's bias revives the channel |
| `fpn` | channels of all BiFPN maps together | behind every norm that writes a map |
| `box.1`, `box.2` | units of the box head; those of `box.2` are the region feature | before the ReLU |
| `heads.<layer>`, `neurons.<layer>` | attention heads and FFN neurons of the fusion | before the output projection, behind the activation |
| `heads.<stack>.<layer>`, `neurons.<stack>.<layer>`, `heads.cross_image.<layer>` | the same of two encoders, whose stacks are `vision`, `text` and `cross`; the last are the cross-modal layers' attention to the image | as above |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from edgevlm.models._torchvision import ensure_importable
from edgevlm.models.stacks import Part, Stack, stacks_of

ensure_importable()

from effdet.efficientdet import Fnode, ResampleFeatureMap  # noqa: E402
from timm.models._efficientnet_blocks import ConvBnAct, EdgeResidual, InvertedResidual  # noqa: E402


class Point(NamedTuple):
    """Where a gate multiplies: channels of maps (B, C, H, W), else the last axis."""

    module: str
    side: Literal["input", "output"] = "output"
    repeat: int = 1
    """Neighbouring values per member (an attention head has `head_dim`)."""


class Slice(NamedTuple):
    """An axis of a module's weights that loses a member's rows or columns; `both`: norms and depthwise convolutions."""

    module: str
    axis: Literal["out", "in", "both"]
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """Members that are gated, and removed, one by one."""

    name: str
    part: Part
    size: int
    points: tuple[Point, ...]
    slices: tuple[Slice, ...]
    place: tuple[str, int] | None = None
    """Where a `FusionConfig` says how many members there are: field and layer."""


def groups_of(model: nn.Module, parts: Sequence[Literal["vision", "fusion"]] = ("vision", "fusion")) -> list[Group]:
    """The groups of a `VLM`, from the pixels to the answer: of its extractor (`vision`) and of all behind it (`fusion`)."""
    found: list[Group] = []
    if "vision" in parts:
        found += [*_trunk_and_fpn(model.tee), *_box_head(model)]  # pyright: ignore
    if "fusion" in parts:
        for stack in stacks_of(model.fusion.config):  # pyright: ignore
            found += _stack(model.fusion, stack)
    return found


# --- the extractor -----------------------------------------------------------------------------------------------


def _trunk_and_fpn(tee: Any) -> Iterator[Group]:
    blocks = [
        (f"{i}.{j}", f"tee.trunk.blocks.{i}.{j}", block)
        for i, stage in enumerate(tee.trunk.blocks)
        for j, block in enumerate(stage)
    ]
    fpn_points, fpn_slices = _fpn(tee)
    fpn_is_free = True
    size: Any
    for at, (place, name, block) in enumerate(blocks):
        squeeze = []
        if getattr(block, "se", None) is not None and not isinstance(block.se, nn.Identity):
            squeeze = [Slice(f"{name}.se.conv_reduce", "in"), Slice(f"{name}.se.conv_expand", "out")]
        readers = _readers(tee, blocks, at)
        if _is_fpn_map(tee, blocks, at):  # its channels are the BiFPN's
            conv, norm = LAST.get(type(block), ("", ""))
            fpn_is_free = fpn_is_free and readers is not None and conv != ""
            fpn_points.append(Point(name))
            fpn_slices += [Slice(f"{name}.{conv}", "out"), Slice(f"{name}.{norm}", "both"), *(readers or ())]
        if isinstance(block, InvertedResidual):
            slices = [Slice(f"{name}.conv_pw", "out"), Slice(f"{name}.bn1", "both"), Slice(f"{name}.conv_dw", "both")]
            slices += [Slice(f"{name}.bn2", "both"), *squeeze, Slice(f"{name}.conv_pwl", "in")]
            points = [Point(f"{name}.bn2")]
            size = block.conv_dw.out_channels
        elif isinstance(block, EdgeResidual):
            slices = [Slice(f"{name}.conv_exp", "out"), Slice(f"{name}.bn1", "both"), *squeeze]
            slices += [Slice(f"{name}.conv_pwl", "in")]
            points = [Point(f"{name}.bn1")]
            size = block.conv_exp.out_channels
        elif isinstance(block, ConvBnAct) and readers is not None and not _is_fpn_map(tee, blocks, at):
            points = [Point(name)]
            slices = [Slice(f"{name}.conv", "out"), Slice(f"{name}.bn1", "both"), *readers]
            size = block.conv.out_channels
        else:
            continue
        yield Group(f"trunk.{place}", "vision", size, tuple(points), tuple(slices))
    if fpn_is_free:
        width: int = tee.rpn.objectness.in_channels
        yield Group("fpn", "vision", width, tuple(fpn_points), tuple(fpn_slices))


LAST = {ConvBnAct: ("conv", "bn1"), EdgeResidual: ("conv_pwl", "bn2"), InvertedResidual: ("conv_pwl", "bn3")}
"""The convolution that writes a block's output, and its norm."""


def _stage_map(tee: Any, blocks: list[tuple[str, str, nn.Module]], at: int) -> int | None:
    """Which map of the trunk the block writes; None if the BiFPN does not see its output."""
    stage = int(blocks[at][0].partition(".")[0])
    last_of_stage = at + 1 == len(blocks) or not blocks[at + 1][0].startswith(f"{stage}.")
    stages = sorted(tee.trunk._stage_out_idx)
    return stages.index(stage + 1) if last_of_stage and stage + 1 in stages else None


def _laterals(tee: Any, number: int) -> list[tuple[str, Any]]:
    """What brings map `number` of the trunk into the BiFPN: name and module of each resampling."""
    found = [
        (f"tee.bifpn.cell.0.fnode.{i}.combine.resample.{number}", node.combine.resample[str(number)])
        for i, node in enumerate(tee.bifpn.cell[0].fnode)
        if str(number) in node.combine.resample
    ]
    if number + 1 == len(tee.trunk._stage_out_idx):  # a coarser level is made from the last map
        found += [(f"tee.bifpn.resample.{key}", m) for key, m in list(tee.bifpn.resample.items())[:1]]
    return found


def _is_fpn_map(tee: Any, blocks: list[tuple[str, str, nn.Module]], at: int) -> bool:
    """Whether the block's output enters the BiFPN somewhere as it is, for it has the BiFPN's width."""
    number = _stage_map(tee, blocks, at)
    return number is not None and not all("conv" in m._modules for _, m in _laterals(tee, number))


def _readers(tee: Any, blocks: list[tuple[str, str, nn.Module]], at: int) -> list[Slice] | None:
    """Who reads a block's output; None if no channel can be taken away: a skip carries it on, or a depthwise one begins."""
    if blocks[at][2].has_skip:
        return None
    slices: list[Slice] = []
    if at + 1 < len(blocks):
        _, name, block = blocks[at + 1]
        first = {ConvBnAct: "conv", EdgeResidual: "conv_exp", InvertedResidual: "conv_pw"}.get(type(block))  # pyright: ignore
        if first is None or block.has_skip:
            return None
        slices.append(Slice(f"{name}.{first}", "in"))
    number = _stage_map(tee, blocks, at)
    laterals = _laterals(tee, number) if number is not None else []
    return slices + [Slice(f"{name}.conv.conv", "in") for name, m in laterals if "conv" in m._modules]


def _fpn(tee: Any) -> tuple[list[Point], list[Slice]]:
    points, slices = [], []
    for path, module in tee.bifpn.named_modules():
        name = f"tee.bifpn.{path}"
        if isinstance(module, ResampleFeatureMap) and "conv" in module._modules:
            points.append(Point(f"{name}.conv"))
            slices += [Slice(f"{name}.conv.conv", "out"), Slice(f"{name}.conv.bn", "both")]
        elif isinstance(module, Fnode):
            points.append(Point(f"{name}.after_combine"))
            conv = f"{name}.after_combine.conv"
            slices += [
                Slice(f"{conv}.conv_dw", "both"),
                Slice(f"{conv}.conv_pw", "out"),
                Slice(f"{conv}.conv_pw", "in"),
            ]
            slices.append(Slice(f"{conv}.bn", "both"))
    cells = tee.config.roi_size**2
    slices += [Slice("tee.rpn.objectness", "in"), Slice("tee.rpn.deltas", "in"), Slice("tee.box_head.fc1", "in", cells)]
    if tee.attribute_head is not None:
        slices.append(Slice("tee.attribute_head.fc1", "in", cells))
    return points, slices


def _box_head(model: Any) -> Iterator[Group]:
    tee, head = model.tee, "tee.box_head"
    slices = (Slice(f"{head}.fc1", "out"), Slice(f"{head}.fc2", "in"))
    yield Group("box.1", "vision", tee.box_head.fc1.out_features, (Point(f"{head}.fc1"),), slices)
    slices = (Slice(f"{head}.fc2", "out"), Slice(f"{head}.classes", "in"), Slice(f"{head}.deltas", "in"))
    if tee.box_head.attributes is not None:
        slices = (*slices, Slice(f"{head}.attributes", "in"))
    if tee.config.region_feature == "hidden":
        slices = (*slices, Slice("fusion.region", "in"))
    yield Group("box.2", "vision", tee.box_head.fc2.out_features, (Point(f"{head}.fc2"),), slices)


# --- the fusion --------------------------------------------------------------------------------------------------


def _stack(fusion: Any, stack: Stack) -> Iterator[Group]:
    layers, own = getattr(fusion, stack.module), "" if stack.name == "fusion" else f"{stack.name}."
    attentions = [("attention", own, stack.heads)]
    if stack.cross_heads is not None:
        attentions.append(("cross_attention", f"{stack.name}_image.", stack.cross_heads))
    for attention, prefix, field in attentions:
        for i, layer in enumerate(layers):
            name, module = f"fusion.{stack.module}.{i}.{attention}", getattr(layer, attention)
            width = module.head_dim
            slices = [Slice(f"{name}.{part}", "out", width) for part in ("query", "key", "value")]
            slices.append(Slice(f"{name}.output", "in", width))
            point = Point(f"{name}.output", "input", width)
            group = f"heads.{prefix}{i}"
            yield Group(group, stack.part, module.num_heads, (point,), tuple(slices), (field, i))
    for i, layer in enumerate(layers):
        name = f"fusion.{stack.module}.{i}"
        slices = (Slice(f"{name}.ffn_in", "out"), Slice(f"{name}.ffn_out", "in"))
        point = Point(f"{name}.ffn_out", "input")
        size = layer.ffn_in.out_features
        yield Group(f"neurons.{own}{i}", stack.part, size, (point,), slices, (stack.ffn, i))


# --- cutting -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def cut(model: nn.Module, group: Group, kept: Sequence[int]) -> None:
    """Remove all members but `kept` (sorted) from every weight of the group, in place.

    Columns behind the group's own stay: the region feature is followed by the numbers of its box.
    """
    for part in group.slices:
        module: Any = model.get_submodule(part.module)
        index = torch.tensor(kept).repeat_interleave(part.repeat) * part.repeat
        index = index + torch.arange(part.repeat).repeat(len(kept))
        if part.axis in ("out", "both"):
            _keep_rows(module, index)
        if part.axis == "in":
            rest = torch.arange(group.size * part.repeat, module.weight.shape[1])
            _keep_columns(module, torch.cat([index, rest]))
    if group.name.startswith("heads."):
        attention: Any = model.get_submodule(group.slices[-1].module.rpartition(".")[0])
        attention.num_heads = len(kept)
    if group.name == "box.2" and model.tee.config.region_feature == "hidden":  # pyright: ignore
        model.tee.region_dim = len(kept)  # pyright: ignore


def _keep_rows(module: Any, index: Tensor) -> None:
    index = index.to(module.weight.device)
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None:
            setattr(module, name, nn.Parameter(value[index].clone(), requires_grad=value.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features = len(index)
    elif isinstance(module, nn.Conv2d):
        if module.groups > 1:  # depthwise: the inputs are the outputs
            module.groups = module.in_channels = len(index)
        module.out_channels = len(index)
    else:  # a norm
        module.running_mean, module.running_var = module.running_mean[index].clone(), module.running_var[index].clone()
        module.num_features = len(index)


def _keep_columns(module: Any, index: Tensor) -> None:
    value = module.weight
    weight = value[:, index.to(value.device)].clone()
    module.weight = nn.Parameter(weight, requires_grad=value.requires_grad)
    if isinstance(module, nn.Linear):
        module.in_features = len(index)
    else:
        module.in_channels = len(index)
