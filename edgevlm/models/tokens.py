"""The tokens of one modality on their way through the layers: dropped, merged, and followed back to where they came from.

Two forms that give the same answers. Masked (training): every token stays in its place, dropped ones are not read and do not
change. Gathered (inference): dropped tokens are gone. Merging folds what is dropped into the next best tokens, the
context tokens, by similarity; all of it is expressed as matrix products of one-hot rows, which every runtime has.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from edgevlm.models.regions import take
from edgevlm.models.trimmer import at_rest, keep_by_number, keep_by_threshold


class Tokens(NamedTuple):
    """N tokens of one modality."""

    x_BND: Tensor
    present_BN: Tensor
    """1 for tokens that count, 0 for padding and, unless they are masked, for dropped ones."""
    always_BN: Tensor | None = None
    """Added to the scores: tokens that must stay."""
    keep_BN: Tensor | None = None
    """Masked form: 1 for those not dropped yet, with gradients."""
    sizes_BN: Tensor | None = None
    """How many original tokens each one stands for; None = 1 each."""
    origin_BNM: Tensor | None = None
    """Which of the M original tokens each one stands for; None = itself."""

    @property
    def weights_BN(self) -> Tensor:  # noqa: N802  (named as the fields are)
        """1 for the tokens that are read."""
        return self.present_BN if self.keep_BN is None else self.present_BN * self.keep_BN

    def back(self, values_BN: Tensor) -> Tensor:
        """What each token has, for the original tokens (B, M), shared among those that it stands for; 0 for the dropped."""
        if self.sizes_BN is not None:
            values_BN = values_BN / self.sizes_BN
        if self.origin_BNM is None:
            return values_BN
        return torch.matmul(values_BN.unsqueeze(1), self.origin_BNM).squeeze(1)


def keep_number(tokens: Tokens, scores_BN: Tensor, num_keep: int, num_context: int) -> Tokens:
    """The `num_keep` best, the last `num_context` of them merged with what is dropped; gathered."""
    index = torch.topk(at_rest(scores_BN, tokens.present_BN), num_keep, dim=1).indices
    if num_context:
        return _merged_and_gathered(tokens, index, num_context)
    return _gathered(tokens, index)


def mask_number(tokens: Tokens, scores_BN: Tensor, num_keep: int, num_context: int, temperature: float) -> Tokens:
    """`keep_number` in masked form."""
    scores_BN = at_rest(scores_BN, tokens.weights_BN.detach())
    return _masked(tokens, scores_BN, keep_by_number(scores_BN, num_keep - num_context, temperature), num_context)


def mask_above(
    tokens: Tokens, scores_BN: Tensor, threshold: float, num_context: int, temperature: float | None, noise: bool
) -> Tokens:
    """Masked: tokens above the threshold stay; with `num_context`, so many of the others take up the rest."""
    keep_BN = keep_by_threshold(scores_BN, threshold, temperature, noise)
    return _masked(tokens, at_rest(scores_BN, tokens.weights_BN.detach()), keep_BN, num_context)


def compact(tokens: Tokens) -> Tokens:
    """The gathered form of masked tokens: as many as the row with the most has, at least one, the others padded."""
    weights_BN = tokens.weights_BN
    most = max(1, int(weights_BN.sum(1).max()))
    # A stable order: what is kept, as it stood.
    places = torch.arange(weights_BN.shape[1], device=weights_BN.device, dtype=weights_BN.dtype)
    index = torch.topk(weights_BN * (2 * len(places)) - places, most, dim=1).indices
    return _gathered(tokens._replace(present_BN=weights_BN, keep_BN=None), index)


def pair_up(tokens: Tokens, num_keep: int) -> Tokens:
    """ToMe: tokens in turns on two sides, each of the one looks for its likest of the other, the likest pairs become one.

    At most half of the tokens go in a round; several rounds may be needed. Padding goes first and weighs nothing.
    (Bolya and others, 2022; keys are replaced by states, weights and sizes as in the paper.)
    """
    while (length := tokens.x_BND.shape[1]) > num_keep:
        x_BND, num_merged, num_right = tokens.x_BND, min(length - num_keep, length // 2), length // 2
        unit_BND = torch.nn.functional.normalize(x_BND, dim=-1)
        missing_BN = 1.0 - tokens.present_BN
        alike_BLR = torch.matmul(unit_BND[:, 0::2], unit_BND[:, 1::2].transpose(1, 2))
        alike_BLR = alike_BLR - 4 * missing_BN[:, 1::2].unsqueeze(1) + 8 * missing_BN[:, 0::2].unsqueeze(2)
        best_BL, partner_BL = (x.squeeze(2) for x in torch.topk(alike_BLR, 1, dim=2))
        order_BL = torch.topk(best_BL, length - num_right, dim=1).indices
        one_BLL = _one_hot(order_BL, length - num_right, x_BND)
        joins_BGR = _one_hot(take(partner_BL, order_BL[:, :num_merged]), num_right, x_BND)
        into_BRL = torch.matmul(joins_BGR.transpose(1, 2), one_BLL[:, :num_merged])
        itself_BRR = _itself(num_right, x_BND)
        stays_BSL = one_BLL[:, num_merged:]
        stays_BSN = _in_turns(stays_BSL, x_BND.new_zeros(*stays_BSL.shape[:2], num_right))
        sources_BKN = torch.cat([stays_BSN, _in_turns(into_BRL, itself_BRR)], dim=1)
        tokens = _combined(tokens, sources_BKN, _sizes(tokens) * tokens.present_BN)
    return tokens


def _in_turns(left_BKL: Tensor, right_BKR: Tensor) -> Tensor:
    """Columns of both sides in turns, beginning with the left, which may have one more: (B, K, L + R)."""
    if left_BKL.shape[2] == right_BKR.shape[2]:  # no empty padding or cut: Core ML's converter has no name for it
        return torch.stack([left_BKL, right_BKR], dim=3).flatten(2)
    right_BKR = torch.nn.functional.pad(right_BKR, (0, 1))
    return torch.stack([left_BKL, right_BKR], dim=3).flatten(2)[..., :-1]


def _sizes(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.present_BN) if tokens.sizes_BN is None else tokens.sizes_BN


def _itself(length: int, like_BND: Tensor) -> Tensor:
    """(B, N, N): each token alone."""
    # Written out, for LiteRT has no operation for torch.eye.
    rows = [[float(i == j) for j in range(length)] for i in range(length)]
    return torch.tensor(rows, dtype=like_BND.dtype, device=like_BND.device).expand(len(like_BND), -1, -1)


def _one_hot(index_BK: Tensor, length: int, like: Tensor) -> Tensor:
    """(B, K, N)."""
    return (index_BK.unsqueeze(-1) == torch.arange(length, device=index_BK.device)).to(like.dtype)


def _gathered(tokens: Tokens, index_BK: Tensor) -> Tokens:
    one_BKN = _one_hot(index_BK, tokens.x_BND.shape[1], tokens.x_BND)
    return Tokens(
        take(tokens.x_BND, index_BK),
        take(tokens.present_BN, index_BK),
        None if tokens.always_BN is None else take(tokens.always_BN, index_BK),
        None,
        None if tokens.sizes_BN is None else take(tokens.sizes_BN, index_BK),
        one_BKN if tokens.origin_BNM is None else torch.matmul(one_BKN, tokens.origin_BNM),
    )


def _combined(tokens: Tokens, sources_BKN: Tensor, sizes_BN: Tensor) -> Tokens:
    """New tokens as means of old ones, weighted by their sizes."""
    shares_BKN = sources_BKN * sizes_BN.unsqueeze(1)
    total_BK = shares_BKN.sum(2)
    origin = sources_BKN * (sizes_BN > 0).to(sources_BKN.dtype).unsqueeze(1)
    return Tokens(
        torch.matmul(shares_BKN, tokens.x_BND) / total_BK.clamp(min=1.0).unsqueeze(2),
        (total_BK > 0).to(tokens.x_BND.dtype),
        None,
        None,
        total_BK.clamp(min=1.0),
        origin if tokens.origin_BNM is None else torch.matmul(origin, tokens.origin_BNM),
    )


def _joins(tokens: Tokens, seeds_BCN: Tensor, dropped_BN: Tensor) -> Tensor:
    """(B, C, N): 1 where a dropped token joins a seed, the one that it resembles most."""
    if seeds_BCN.shape[1] == 1:
        return dropped_BN.unsqueeze(1)
    unit_BND = torch.nn.functional.normalize(tokens.x_BND, dim=-1)
    alike_BNC = torch.matmul(unit_BND, torch.matmul(seeds_BCN, unit_BND).transpose(1, 2))
    best_BN1 = torch.topk(alike_BNC, 1, dim=2).indices  # not argmax, which LiteRT's converter does not know
    joins_BNC = (best_BN1 == torch.arange(seeds_BCN.shape[1], device=best_BN1.device)).to(unit_BND.dtype)
    return joins_BNC.transpose(1, 2) * dropped_BN.unsqueeze(1)


def _merged_and_gathered(tokens: Tokens, index_BK: Tensor, num_context: int) -> Tokens:
    one_BKN = _one_hot(index_BK, tokens.x_BND.shape[1], tokens.x_BND)
    dropped_BN = (1.0 - one_BKN.sum(1)) * tokens.present_BN
    stays_BKN, seeds_BCN = one_BKN[:, :-num_context], one_BKN[:, -num_context:]
    sources = torch.cat([stays_BKN, seeds_BCN + _joins(tokens, seeds_BCN, dropped_BN)], dim=1)
    combined = _combined(tokens, sources, _sizes(tokens) * tokens.present_BN)
    always = None if tokens.always_BN is None else take(tokens.always_BN, index_BK)
    return combined._replace(always_BN=always)


def _masked(tokens: Tokens, scores_BN: Tensor, keep_BN: Tensor, num_context: int) -> Tokens:
    before_BN = tokens.weights_BN
    keep_BN = keep_BN if tokens.keep_BN is None else keep_BN * tokens.keep_BN
    if not num_context:
        return tokens._replace(keep_BN=keep_BN)
    num_context = min(num_context, scores_BN.shape[1])
    there_BN, kept_BN = before_BN.detach(), (keep_BN * tokens.present_BN).detach()
    left_BN = there_BN * (1.0 - kept_BN)
    index = torch.topk(at_rest(scores_BN, left_BN), num_context, dim=1).indices
    seeds_BCN = _one_hot(index, scores_BN.shape[1], tokens.x_BND) * take(left_BN, index).unsqueeze(2)
    seed_BN = seeds_BCN.sum(1)
    sources_BCN = seeds_BCN + _joins(tokens, seeds_BCN, left_BN * (1.0 - seed_BN))
    shares_BCN = sources_BCN * (_sizes(tokens) * there_BN).unsqueeze(1)
    total_BC = shares_BCN.sum(2)
    means_BCD = torch.matmul(shares_BCN, tokens.x_BND) / total_BC.clamp(min=1.0).unsqueeze(2)

    def put(values_BCE: Tensor, into_BNE: Tensor) -> Tensor:
        """`into`, with `values` where the seeds are."""
        return into_BNE * (1.0 - seed_BN).unsqueeze(2) + torch.matmul(seeds_BCN.transpose(1, 2), values_BCE)

    own = _itself(scores_BN.shape[1], tokens.x_BND)
    origin_BNM = own if tokens.origin_BNM is None else tokens.origin_BNM
    return Tokens(
        put(means_BCD, tokens.x_BND),
        tokens.present_BN,
        tokens.always_BN,
        keep_BN * (1.0 - seed_BN) + seed_BN,
        put(total_BC.unsqueeze(2), _sizes(tokens).unsqueeze(2)).squeeze(2),
        put(torch.matmul(sources_BCN, origin_BNM), origin_BNM),
    )
