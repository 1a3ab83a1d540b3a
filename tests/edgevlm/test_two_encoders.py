"""The fusion of two encoders against torch's own transformer layers; its masks, trimming and configs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgevlm.artifacts import FusionConfig
from edgevlm.errors import RecipeError
from edgevlm.models.registry import FUSIONS, resolve_fusion
from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import Trim
from edgevlm.recipe import Choice
from tests.edgevlm.tiny import dual_vlm, tiny_ids, tiny_regions

TOLERANCE = 1e-5  # float32 sums in another order
PARTS = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


def regions_with(score: float | None = None, batch: int = 4) -> Regions:
    regions = tiny_regions(batch)
    if score is not None:
        regions.scores_BN[1] = score
    return regions


# --- the network -------------------------------------------------------------------------------------------------


def as_torch_layer(layer: Any, kind: type[nn.Module]) -> Any:
    """One of our layers as PyTorch's own encoder or decoder layer."""
    d, heads, ffn = layer.ffn_in.in_features, layer.attention.num_heads, layer.ffn_in.out_features
    theirs: Any = kind(d, heads, ffn, 0.0, F.gelu, 1e-12, batch_first=True)  # pyright: ignore
    pairs = [(theirs.linear1, layer.ffn_in), (theirs.linear2, layer.ffn_out), (theirs.norm1, layer.attention_norm)]
    attentions = [(theirs.self_attn, layer.attention)]
    if kind is nn.TransformerDecoderLayer:
        pairs += [(theirs.norm2, layer.cross_norm), (theirs.norm3, layer.ffn_norm)]
        attentions.append((theirs.multihead_attn, layer.cross_attention))
    else:
        pairs.append((theirs.norm2, layer.ffn_norm))
    with torch.no_grad():
        for their, our in attentions:
            projections = (our.query, our.key, our.value)
            their.in_proj_weight.copy_(torch.cat([m.weight for m in projections]))
            their.in_proj_bias.copy_(torch.cat([m.bias for m in projections]))
            pairs.append((their.out_proj, our.output))
        for their, our in pairs:
            their.load_state_dict(our.state_dict())
    return theirs.eval()


@pytest.mark.parametrize("parts", [(), PARTS])
def test_it_is_torchs_encoder_and_decoder_layers(parts: Any) -> None:
    """nn.TransformerEncoderLayer over regions and over words, nn.TransformerDecoderLayer from words to regions."""
    model, regions, ids = dual_vlm(parts=parts), regions_with(), tiny_ids(4)
    fusion: Any = model.fusion
    with torch.no_grad():
        words = fusion.embed_words(ids)
        image = fusion.embed_image(regions.features_BND, regions.boxes_norm_BN4)
        no_word = ids == 0
        nothing = torch.cat([torch.zeros(4, len(parts)), 1 - model.valid(regions)], dim=1).bool()
        for layer in fusion.vision:
            image = as_torch_layer(layer, nn.TransformerEncoderLayer)(image, src_key_padding_mask=nothing)
        for layer in fusion.text:
            words = as_torch_layer(layer, nn.TransformerEncoderLayer)(words, src_key_padding_mask=no_word)
        for layer in fusion.layers:
            theirs = as_torch_layer(layer, nn.TransformerDecoderLayer)
            words = theirs(words, image, tgt_key_padding_mask=no_word, memory_key_padding_mask=nothing)
        output = model.fuse(regions, ids)
    counted = ~nothing[:, len(parts) :]
    last = output.stacks["vision"].hidden_BTD[-1][:, len(parts) :]
    torch.testing.assert_close(last[counted], image[:, len(parts) :][counted], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.hidden_BTD[-1][~no_word], words[~no_word], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.pooled_BD, torch.tanh(fusion.pooler(words[:, 0])), atol=TOLERANCE, rtol=0)


def test_what_is_where() -> None:
    output = dual_vlm().fuse(tiny_regions(3), tiny_ids(3))
    depths = {name: (len(s.hidden_BTD), len(s.attention_BHTT), len(s.cross_BHTS)) for name, s in output.stacks.items()}
    assert depths == {"vision": (3, 2, 0), "text": (2, 1, 0), "cross": (3, 2, 2)}
    assert output.stacks["cross"].cross_BHTS[0].shape == (3, 2, 12, 8)
    assert output.hidden_BTD is output.stacks["cross"].hidden_BTD
    torch.testing.assert_close(output.looked_at_BN.sum(1), torch.ones(3), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("score", [None, 0.0])
def test_padding_does_not_matter(score: float | None) -> None:
    """Neither of regions nor of words; an image without a single region that counts included."""
    model, regions, ids = dual_vlm(), regions_with(score), tiny_ids(4, length=6)
    invalid = model.valid(regions) == 0
    assert invalid.any() and (score is None or invalid[1].all())
    noise = torch.where(invalid.unsqueeze(-1), torch.full_like(regions.features_BND, 9.0), regions.features_BND)
    a, b = model.answer(regions, ids), model.answer(regions._replace(features_BND=noise), ids)
    torch.testing.assert_close(a.logits_BA, b.logits_BA, atol=TOLERANCE, rtol=0)
    assert a.fusion.looked_at_BN[invalid].abs().max() == 0
    torch.testing.assert_close(a.logits_BA, model.answer(regions, ids[:, :7]).logits_BA, atol=TOLERANCE, rtol=0)
    changed = torch.where(invalid.unsqueeze(-1), regions.features_BND, torch.full_like(regions.features_BND, 9.0))
    other = model.answer(regions._replace(features_BND=changed), ids).logits_BA
    assert (other - a.logits_BA).abs().amax(1)[[0, 2, 3]].min() > 1e-3, "the image must count"


def test_order_of_regions_does_not_matter() -> None:
    model, regions, ids = dual_vlm(), tiny_regions(4), tiny_ids(4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    a, b = model.answer(regions, ids), model.answer(Regions(*(part[:, order] for part in regions)), ids)
    torch.testing.assert_close(a.logits_BA, b.logits_BA, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(a.fusion.looked_at_BN[:, order], b.fusion.looked_at_BN, atol=TOLERANCE, rtol=0)


def test_encoders_read_their_own_modality_and_referred_regions_both() -> None:
    model, regions = dual_vlm(), tiny_regions(2)
    a, b = model.answer(regions, tiny_ids(2)), model.answer(regions, tiny_ids(2, seed=3))
    other = model.fuse(tiny_regions(2, seed=4), tiny_ids(2))
    last = {name: states.hidden_BTD[-1] for name, states in a.fusion.stacks.items()}
    assert torch.equal(last["vision"], b.fusion.stacks["vision"].hidden_BTD[-1])
    assert torch.equal(last["text"], other.stacks["text"].hidden_BTD[-1])
    for output in (b.fusion, other):
        assert (last["cross"] - output.stacks["cross"].hidden_BTD[-1]).abs().max() > 1e-3
    assert (model.refer(a) - model.refer(b)).abs().max() > 1e-3, "which regions a text refers to depends on the text"


# --- trimming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(), PARTS])
@pytest.mark.parametrize("score", [None, 0.0])
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_masked_trimming_equals_gathered(keep: int, score: float | None, parts: Any) -> None:
    model, regions, ids = dual_vlm(trim_after=0, parts=parts), regions_with(score, 6), tiny_ids(6)
    full = model.answer(regions, ids)
    gathered = model.answer(regions, ids, trim=Trim(regions=(keep,)))
    masked = model.answer(regions, ids, trim=Trim(regions=(keep,), temperature=0.5))
    torch.testing.assert_close(gathered.logits_BA, masked.logits_BA, atol=TOLERANCE, rtol=0)
    looked = gathered.fusion.looked_at_BN, masked.fusion.looked_at_BN
    torch.testing.assert_close(*looked, atol=TOLERANCE, rtol=0)
    assert (looked[0] > 0).sum(1).max() <= keep
    assert gathered.fusion.stacks["cross"].cross_BHTS[1].shape[-1] == keep + len(parts)
    assert (full.logits_BA - gathered.logits_BA).abs().max() > 1e-4
    assert torch.equal(full.logits_BA, model.answer(regions, ids, trim=Trim(regions=(8,))).logits_BA)


def test_the_trimmer_learns_through_its_mask() -> None:
    model = dual_vlm(trim_after=0)
    model.answer(
        tiny_regions(6), tiny_ids(6), trim=Trim(regions=(2,), temperature=0.5)
    ).logits_BA.square().sum().backward()
    assert model.fusion.trimmers is not None
    score = model.fusion.trimmers.regions["0"].score  # pyright: ignore
    assert score.weight.grad is not None and score.weight.grad.abs().sum() > 0


# --- configs -----------------------------------------------------------------------------------------------------


def test_a_single_stream_is_written_as_before() -> None:
    """No new key in manifests, so no new hash; and an old one is read."""
    old = {"hidden": 32, "head_dim": 16, "layer_heads": [2, 2], "layer_ffn": [64, 64], "dropout": 0.0, "trim": None,
           "box_encoding": "plain", "parts": [], "edge_scale": 0.015, "box_bins": 10}  # fmt: skip
    assert FUSIONS["test-fusion"].model_dump(mode="json") == old
    assert FusionConfig.model_validate(old) == FUSIONS["test-fusion"]
    dual = FUSIONS["test-dual"]
    assert FusionConfig.model_validate_json(dual.model_dump_json()) == dual and dual.has_encoders


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"text_heads": [], "text_ffn": []}, "text_heads names none"),
        ({"vision_heads": [2]}, "vision_heads, vision_ffn must name the same number of layers"),
        ({"cross_heads": [2]}, "layer_heads, layer_ffn, cross_heads must name the same"),
    ],
)
def test_half_a_form_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"fusion 'test-dual': .*{said}"):
        resolve_fusion(Choice.model_validate({"name": "test-dual", **overrides}))
