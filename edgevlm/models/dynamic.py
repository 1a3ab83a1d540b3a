"""Answers that cost each input what it needs: tokens below a threshold are removed, heads that nobody needs are skipped.

Rows of a batch need different numbers of tokens. Behind every trimming layer a batch therefore falls apart into groups of
similar size, which go on by themselves, so that no row pays for a much longer one. For PyTorch: a runtime with fixed shapes
has rungs instead. Ours, after SmartTrim.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from edgevlm.models.stream import Stream
from edgevlm.models.tee import Regions
from edgevlm.models.tokens import Tokens
from edgevlm.models.trimmer import Trim
from edgevlm.models.vlm import VLM

WIDTH = 4
"""Rows whose numbers of tokens round up to the same multiple of this stay together."""


class DynamicAnswer(NamedTuple):
    """What a batch was answered, and what it took."""

    logits_BA: Tensor
    looked_at_BN: Tensor
    words_BL: Tensor
    """Words that each layer read: (B, layers)."""
    regions_BL: Tensor
    """Regions that each layer read."""


@torch.no_grad()
def answer_dynamic(
    model: VLM, regions: Regions, input_ids_BL: Tensor, threshold: float = 0.0, head_threshold: float | None = None
) -> DynamicAnswer:
    """Answer questions about already encoded images, each with the tokens and heads that it needs.

    Args:
        model: with trained trimmers.
        regions, input_ids_BL: as for `VLM.answer`.
        threshold: the dial: higher keeps fewer tokens, 0 is what training aimed at.
        head_threshold: the same for heads; None = all work.
    """
    trim = Trim(threshold=threshold, head_threshold=head_threshold)
    valid_BN = model.valid(regions)
    stream = model.fusion.begin(regions.features_BND, regions.boxes_norm_BN4, valid_BN, input_ids_BL, trim)
    cls_BD, looked_at_BN, words_BL, regions_BL = _go_on(model, stream, 0, trim)
    return DynamicAnswer(model.head(torch.tanh(model.fusion.pooler(cls_BD))), looked_at_BN, words_BL, regions_BL)


def _go_on(model: VLM, stream: Stream, first: int, trim: Trim) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layers from `first` on; [CLS], attention to the original regions, words and regions that each layer read."""
    words, regions = [], []
    for i in range(first, len(model.fusion.layers)):
        words.append(stream.words.present_BN.sum(1))
        regions.append(stream.regions.present_BN.sum(1))
        passed = len(stream.trimmings)
        model.fusion.step(stream, i, trim)
        groups = _groups(stream) if len(stream.trimmings) > passed and i + 1 < len(model.fusion.layers) else []
        if len(groups) > 1:
            parts = [_go_on(model, _rows(model, stream, rows), i + 1, trim) for rows in groups]
            back = torch.argsort(torch.cat(groups))
            cls_BD, looked_at_BN, later_words, later_regions = (
                torch.cat(part)[back] for part in zip(*parts, strict=True)
            )
            words_BL = torch.cat([torch.stack(words, 1), later_words], dim=1)
            return cls_BD, looked_at_BN, words_BL, torch.cat([torch.stack(regions, 1), later_regions], dim=1)
    output = model.fusion.end(stream)
    return stream.x_BTD[:, 0], output.looked_at_BN, torch.stack(words, 1), torch.stack(regions, 1)


def _groups(stream: Stream) -> list[Tensor]:
    """Rows of the batch by their number of tokens."""
    counts_B = stream.words.present_BN.sum(1) + stream.regions.present_BN.sum(1)
    widths_B = torch.ceil(counts_B / WIDTH)
    return [(widths_B == width).nonzero()[:, 0] for width in widths_B.unique()]


def _rows(model: VLM, stream: Stream, rows: Tensor) -> Stream:
    """Some rows of a batch, without the columns that are padding in all of them."""
    words, regions = _some(stream.words, rows), _some(stream.regions, rows)
    parts = None if stream.parts_BPD is None else stream.parts_BPD[rows]
    some = replace(stream, words=words, regions=regions, parts_BPD=parts, stacks={}, trimmings=[], heads={})
    some.stacks = {name: type(states)([]) for name, states in stream.stacks.items()}
    model.fusion.resume(some)
    return some


def _some(tokens: Tokens, rows: Tensor) -> Tokens:
    most = max(1, int(tokens.present_BN[rows].sum(1).max()))
    return Tokens(*(None if value is None else value[rows, :most] for value in tokens))  # pyright: ignore
