"""Batches of cached regions: cutting what is padding in all rows must not change an answer."""

import torch

from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import Trim
from edgevlm.train.answering import batch_of
from edgevlm.train.regions import RegionSplit
from tests.edgevlm.tiny import tiny_ids, tiny_regions, tiny_vlm


def _split(valid: list[int], lengths: list[int]) -> RegionSplit:
    """Image i has `valid[i]` regions that count, and one question of `lengths[i]` tokens."""
    count = len(valid)
    regions, ids = tiny_regions(count), tiny_ids(count)
    scores = torch.linspace(0.9, 0.5, regions.scores_BN.shape[1]).repeat(count, 1)
    for row, (num, length) in enumerate(zip(valid, lengths, strict=True)):
        scores[row, num:] = 0.0
        ids[row, length:] = 0
        ids[row, :length].clamp_(min=5)
    num_regions = scores.shape[1]
    return RegionSplit(
        regions.features_BND,
        regions.boxes_norm_BN4,
        scores,
        torch.arange(count),
        ids,
        torch.zeros(count, dtype=torch.long),
        torch.ones(count, num_regions, dtype=torch.uint8),
        torch.ones(count, dtype=torch.uint8),
        [""] * count,
    )


def test_a_cut_batch_gives_the_same_answers() -> None:
    model, split = tiny_vlm(), _split([2, 5, 0], [4, 6, 3])
    whole = Regions(split.features, split.boxes, split.scores)
    batch = batch_of(model, split, torch.arange(3))
    assert batch.regions.scores_BN.shape == (3, 5)
    assert batch.input_ids.shape == (3, 6)
    with torch.no_grad():
        expected = model.answer(whole, split.input_ids).logits_BA
        torch.testing.assert_close(
            model.answer(batch.regions, batch.input_ids).logits_BA, expected, atol=1e-5, rtol=0
        )  # sums over another number of zeros


def test_a_cut_batch_gives_the_same_trimmed_answers() -> None:
    """Where fewer regions count than the rung keeps, nothing is left to trim; the answers are the same."""
    model, split = tiny_vlm(trim_after=0), _split([2, 3, 1], [4, 6, 3])
    whole = Regions(split.features, split.boxes, split.scores)
    batch = batch_of(model, split, torch.arange(3))
    with torch.no_grad():
        for num_keep in (2, 4):
            expected = model.answer(whole, split.input_ids, trim=Trim(regions=(num_keep,))).logits_BA
            answer = model.answer(batch.regions, batch.input_ids, trim=Trim(regions=(num_keep,)))
            torch.testing.assert_close(answer.logits_BA, expected, atol=1e-5, rtol=0)


def test_enough_regions_stay_to_be_ranked() -> None:
    model, split = tiny_vlm(trim_after=0), _split([2, 1], [4, 3])
    assert batch_of(model, split, torch.arange(2), min_regions=5).regions.scores_BN.shape == (2, 5)
