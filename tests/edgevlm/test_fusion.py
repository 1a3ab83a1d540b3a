"""Properties of the fusion: padding and order do not matter, trimmed tokens cannot leak, masks equal gathering."""

import pytest
import torch

from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import Trim, keep_by_number
from tests.edgevlm.tiny import tiny_ids, tiny_regions, tiny_vlm

TOLERANCE = 1e-5  # float32 sums in another order


def test_order_of_regions_does_not_matter() -> None:
    model, regions, ids = tiny_vlm(), tiny_regions(4), tiny_ids(4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = Regions(*(part[:, order] for part in regions))
    a, b = model.answer(regions, ids), model.answer(shuffled, ids)
    torch.testing.assert_close(a.logits_BA, b.logits_BA, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(a.fusion.looked_at_BN[:, order], b.fusion.looked_at_BN, atol=TOLERANCE, rtol=0)


def test_masked_regions_do_not_matter() -> None:
    model, regions, ids = tiny_vlm(), tiny_regions(4), tiny_ids(4)
    invalid = regions.scores_BN < model.config.tee.score_threshold
    assert invalid.any()
    noise = torch.where(invalid.unsqueeze(-1), torch.full_like(regions.features_BND, 9.0), regions.features_BND)
    a, b = model.answer(regions, ids), model.answer(regions._replace(features_BND=noise), ids)
    torch.testing.assert_close(a.logits_BA, b.logits_BA, atol=TOLERANCE, rtol=0)


def test_text_padding_does_not_matter() -> None:
    model, regions, ids = tiny_vlm(), tiny_regions(4), tiny_ids(4, length=6)
    longer = model.answer(regions, ids).logits_BA
    shorter = model.answer(regions, ids[:, :7]).logits_BA
    torch.testing.assert_close(longer, shorter, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_masked_trimming_equals_gathered(keep: int) -> None:
    model, regions, ids = tiny_vlm(trim_after=0), tiny_regions(6), tiny_ids(6)
    gathered = model.answer(regions, ids, trim=Trim(regions=(keep,))).logits_BA
    masked = model.answer(regions, ids, trim=Trim(regions=(keep,), temperature=0.5)).logits_BA
    torch.testing.assert_close(gathered, masked, atol=TOLERANCE, rtol=0)


def test_dropped_tokens_cannot_leak() -> None:
    """After the trimming layer, what a dropped region says must not change the answer."""
    model, regions, ids = tiny_vlm(trim_after=0), tiny_regions(6), tiny_ids(6)
    kept = model.answer(regions, ids, trim=Trim(regions=(2,))).fusion.looked_at_BN > 0
    assert kept.sum(1).max() <= 2
    full = model.answer(regions, ids).logits_BA
    assert (full - model.answer(regions, ids, trim=Trim(regions=(2,))).logits_BA).abs().max() > 1e-4, (
        "trimming must do something"
    )


def test_full_budget_is_the_untrimmed_model() -> None:
    model, regions, ids = tiny_vlm(trim_after=0), tiny_regions(6), tiny_ids(6)
    assert torch.equal(
        model.answer(regions, ids, trim=Trim(regions=(8,))).logits_BA, model.answer(regions, ids).logits_BA
    )


def test_keep_by_numbers_exactly_k_and_has_gradients() -> None:
    scores = torch.randn(5, 8, requires_grad=True)
    kept = keep_by_number(scores, 3, 1.0)
    assert kept.sum(1).detach().round().tolist() == [3.0] * 5
    (kept * torch.rand(5, 8)).sum().backward()
    assert scores.grad is not None and (scores.grad.abs() > 0).all()


def test_attention_matches_pytorch() -> None:
    """One layer's attention against torch.nn.functional.scaled_dot_product_attention."""
    layer = tiny_vlm().fusion.layers[0].attention
    x = torch.randn(2, 9, 32)
    mask = torch.zeros(2, 1, 1, 9)
    mask[:, :, :, 7:] = -1e4
    ours, _ = layer(x, mask, None)
    q, k, v = (
        f(x).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        for f in (layer.query, layer.key, layer.value)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, layer.output(theirs.transpose(1, 2).flatten(2)), atol=TOLERANCE, rtol=0)
