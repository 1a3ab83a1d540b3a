"""Trimming in all its forms: masked equals gathered equals dynamic, nothing leaks, padding and order do not matter, budgets
are monotone; for every policy, with and without merging, in both forms of the fusion."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edgevlm.artifacts import TrimConfig
from edgevlm.compress.cost import fusion_macs, macs_of
from edgevlm.models.dynamic import answer_dynamic
from edgevlm.models.tee import Regions
from edgevlm.models.trimmer import FULL, Trim, keep_by_threshold
from edgevlm.models.vlm import VLM
from tests.edgevlm.tiny import dual_vlm, tiny_ids, tiny_regions, tiny_vlm

TOLERANCE = 1e-5  # float32 sums in another order
MASK = 0.5  # a temperature: masked form; the forward pass does not depend on it
ROWS = 6
FORMS: dict[str, Callable[..., VLM]] = {"single stream": tiny_vlm, "two encoders": dual_vlm}


def make(form: str, layers: int = 3, **trim: object) -> VLM:
    """A model of three layers that trims behind the first two, its trimmers far from their even start."""
    changes: dict[str, object] = {"layer_heads": (2,) * layers, "layer_ffn": (32,) * layers}
    if form == "two encoders":
        changes["cross_heads"] = (2,) * layers
    config = TrimConfig(**{"layers": (0, 1), "words": True, **trim})  # pyright: ignore
    model = FORMS[form](trim=config, **changes)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            if name.startswith("trimmers") and name.endswith("score.weight"):
                parameter.normal_(std=3.0)
            if name == "words.weight":
                parameter.mul_(20)
            if name.endswith(("query.weight", "key.weight")):
                parameter.mul_(8)  # attention far from even, and so without ties
    if config.policy == "learned":
        _centre(model.eval())
    return model.eval()


@torch.no_grad()
def _centre(model: VLM) -> None:
    """Move the trimmers' biases so that half of the regions and words score above 0: some go, some stay."""
    given, ids = data()
    assert model.fusion.trimmers is not None
    for layer in (0, 1):
        for modality in ("words", "regions"):
            trimmers = getattr(model.fusion.trimmers, modality)
            if str(layer) not in trimmers:
                continue
            found: list[Tensor] = []
            handle = trimmers[str(layer)].register_forward_hook(
                lambda module, inputs, output, to=found: to.append(output)
            )
            model.answer(given, ids, Trim(threshold=0.0, temperature=MASK))
            handle.remove()
            trimmers[str(layer)].score.bias.sub_(found[0].median() + 0.01)  # no score at 0 itself


def valid_first(regions: Regions) -> Regions:
    """As an extractor hands them over: by falling score."""
    order = regions.scores_BN.argsort(1, descending=True)
    return Regions(
        regions.features_BND.gather(1, order[..., None].expand_as(regions.features_BND)),
        regions.boxes_norm_BN4.gather(1, order[..., None].expand(-1, -1, 4)),
        regions.scores_BN.gather(1, order),
    )


def data() -> tuple[Regions, Tensor]:
    ids = torch.cat([tiny_ids(2, length=4), tiny_ids(2, length=7, seed=1), tiny_ids(2, length=11, seed=2)])
    return valid_first(tiny_regions(ROWS)), ids


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


forms = pytest.mark.parametrize("form", list(FORMS))
contexts = pytest.mark.parametrize("context", [0, 1, 2])


@forms
@contexts
@pytest.mark.parametrize("policy", ["learned", "attention"])
@pytest.mark.parametrize(("regions", "words"), [((5, 3), (6, 4)), ((3, 3), ()), ((8, 4), (12, 2))])
def test_masked_equals_gathered(
    form: str, policy: str, context: int, regions: tuple[int, ...], words: tuple[int, ...]
) -> None:
    model, (given, ids) = make(form, policy=policy, context=context), data()
    trim = Trim(regions=regions, words=words)
    gathered, masked = (model.answer(given, ids, t) for t in (trim, replace(trim, temperature=MASK)))
    close(gathered.logits_BA, masked.logits_BA)
    close(gathered.fusion.looked_at_BN, masked.fusion.looked_at_BN)
    assert (gathered.logits_BA - model.answer(given, ids).logits_BA).abs().max() > 1e-4, "trimming must do something"


@forms
@contexts
@pytest.mark.parametrize("head_layers", [(), (1, 2)])
@pytest.mark.parametrize("threshold", [-3.0, 0.0, 0.5, 90.0])
def test_dynamic_equals_masked(form: str, context: int, head_layers: tuple[int, ...], threshold: float) -> None:
    """Grouping, gathering and skipping heads give what the masks of training give, row by row."""
    model, (given, ids) = make(form, context=context, head_layers=head_layers), data()
    heads = 0.2 if head_layers else None
    masked = model.answer(given, ids, Trim(threshold=threshold, head_threshold=heads, temperature=MASK))
    dynamic = answer_dynamic(model, given, ids, threshold, heads)
    close(dynamic.logits_BA, masked.logits_BA)
    if 2 not in head_layers:  # attention of the last layer is a mean over the heads that worked
        close(dynamic.looked_at_BN, masked.fusion.looked_at_BN)
    for row in range(ROWS):
        alone = answer_dynamic(
            model, Regions(*(part[row : row + 1] for part in given)), ids[row : row + 1], threshold, heads
        )
        close(alone.logits_BA, masked.logits_BA[row : row + 1])
    kept = torch.stack([t.regions_BN.sum(1) for t in masked.fusion.trimmings], 1)
    close(dynamic.regions_BL[:, 1:], kept.clamp(min=0))


@forms
def test_dynamic_takes_what_the_input_needs(form: str) -> None:
    model, (given, ids) = make(form), data()
    took = answer_dynamic(model, given, ids)
    counts = took.regions_BL[:, 2]
    assert len(counts.unique()) > 1, "rows keep different numbers"
    assert (took.regions_BL[:, 1:] <= took.regions_BL[:, :-1]).all() and (
        took.words_BL[:, 1:] <= took.words_BL[:, :-1]
    ).all()
    assert (took.words_BL >= 2).all(), "[CLS] and [SEP] stay"


@forms
@contexts
def test_ladder_equals_dynamic_where_the_counts_agree(form: str, context: int) -> None:
    """A rung with the numbers that the thresholds chose for a row gives that row's dynamic answer."""
    model, (given, ids) = make(form, context=context), data()
    for row in range(ROWS):
        one, its = Regions(*(part[row : row + 1] for part in given)), ids[row : row + 1]
        dynamic = answer_dynamic(model, one, its, 0.3)
        regions, words = (tuple(int(n) for n in counts[0, 1:]) for counts in (dynamic.regions_BL, dynamic.words_BL))
        if min(regions) <= context:
            continue
        close(model.answer(one, its, Trim(regions=regions, words=words)).logits_BA, dynamic.logits_BA)


@forms
def test_dropped_tokens_cannot_leak(form: str) -> None:
    """Whatever a dropped token would say later, the answer stays; nor does a dropped token change."""
    model, (given, ids) = make(form), data()
    trim = Trim(threshold=0.5, temperature=MASK)
    before = model.answer(given, ids, trim)
    dropped_BN = model.valid(given) * (1 - before.fusion.trimmings[0].regions_BN.detach().round())
    assert dropped_BN.any()
    stream = model.fusion.begin(given.features_BND, given.boxes_norm_BN4, model.valid(given), ids, trim)
    model.fusion.step(stream, 0, trim)
    noise = dropped_BN[..., None] * 7.0
    stream.regions = stream.regions._replace(x_BND=stream.regions.x_BND + noise)
    model.fusion.resume(stream)
    entered = stream.regions.x_BND
    for i in (1, 2):
        model.fusion.step(stream, i, trim)
    close(model.head(model.fusion.end(stream).pooled_BD), before.logits_BA)
    if form == "single stream":
        last = stream.x_BTD[:, -entered.shape[1] :]
        close(last * dropped_BN[..., None], entered * dropped_BN[..., None])


@forms
@pytest.mark.parametrize("policy", ["learned", "attention", "similarity"])
def test_padding_does_not_matter(form: str, policy: str) -> None:
    """What padding holds is never read, and, but for pairing, how much of it there is."""
    model, (given, ids) = make(form, policy=policy, words=policy == "learned"), data()
    invalid = (given.scores_BN < model.config.tee.score_threshold)[..., None]
    assert invalid.any()
    loud = given._replace(
        features_BND=torch.where(invalid, torch.full_like(given.features_BND, 9.0), given.features_BND)
    )
    trim = Trim(regions=(5, 3), words=(6, 4) if policy == "learned" else ())
    close(model.answer(given, ids, trim).logits_BA, model.answer(loud, ids, trim).logits_BA)
    if policy != "similarity":
        close(model.answer(given, ids, trim).logits_BA, model.answer(given, ids[:, :11], trim).logits_BA)
    if policy == "learned":
        wide = answer_dynamic(model, given, ids, 0.3).logits_BA
        close(wide, answer_dynamic(model, loud, ids[:, :11], 0.3).logits_BA)


@forms
@contexts
def test_order_of_regions_does_not_matter(form: str, context: int) -> None:
    model, (given, ids) = make(form, context=context), data()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = Regions(*(part[:, order] for part in given))
    for trim in (Trim(regions=(5, 3), words=(6, 4)), Trim(threshold=0.3, temperature=MASK)):
        a, b = model.answer(given, ids, trim), model.answer(shuffled, ids, trim)
        close(a.logits_BA, b.logits_BA)
        close(a.fusion.looked_at_BN[:, order], b.fusion.looked_at_BN)


@forms
def test_a_higher_threshold_keeps_fewer(form: str) -> None:
    """In the first trimming layer, whose scores do not depend on the threshold: what is kept is nested."""
    model, (given, ids) = make(form), data()
    before = torch.ones(ROWS, 8)
    for threshold in (-50.0, -5.0, -1.0, 0.0, 0.5, 1.0, 5.0, 50.0):
        kept = model.answer(given, ids, Trim(threshold=threshold, temperature=MASK)).fusion.trimmings[0].regions_BN
        assert (kept <= before + 1e-6).all()
        before = kept


@forms
@pytest.mark.parametrize("policy", ["learned", "attention", "random", "similarity"])
def test_full_numbers_are_the_untrimmed_model(form: str, policy: str) -> None:
    model, (given, ids) = make(form, policy=policy, words=policy != "similarity"), data()
    assert torch.equal(
        model.answer(given, ids, Trim(regions=(8, 8))).logits_BA, model.answer(given, ids, FULL).logits_BA
    )


@pytest.mark.parametrize("num_keep", [7, 5, 4, 3, 1])
def test_pairing_keeps_numbers_and_weights(num_keep: int) -> None:
    """ToMe: the asked number of tokens, whose sizes add up to those that were there; nothing is lost or invented."""
    model, (given, ids) = make("single stream", policy="similarity", words=False), data()
    trim = Trim(regions=(num_keep, num_keep))
    stream = model.fusion.begin(given.features_BND, given.boxes_norm_BN4, model.valid(given), ids, trim)
    model.fusion.step(stream, 0, FULL)
    whole = stream.x_BTD[:, -8:] * model.valid(given)[..., None]
    stream = model.fusion.begin(given.features_BND, given.boxes_norm_BN4, model.valid(given), ids, trim)
    model.fusion.step(stream, 0, trim)
    tokens = stream.regions
    assert tokens.x_BND.shape[1] == num_keep and tokens.sizes_BN is not None and tokens.origin_BNM is not None
    sizes = tokens.sizes_BN * tokens.present_BN
    close(sizes.sum(1), model.valid(given).sum(1))
    close((tokens.x_BND * sizes[..., None]).sum(1), whole.sum(1))
    close(tokens.origin_BNM.sum(1), model.valid(given))


def test_merging_keeps_the_weighted_sum() -> None:
    model, (given, ids) = make("single stream", context=2, words=False), data()
    trim = Trim(regions=(4, 4))
    stream = model.fusion.begin(given.features_BND, given.boxes_norm_BN4, model.valid(given), ids, trim)
    model.fusion.step(stream, 0, FULL)
    whole = (stream.x_BTD[:, -8:] * model.valid(given)[..., None]).sum(1)
    stream = model.fusion.begin(given.features_BND, given.boxes_norm_BN4, model.valid(given), ids, trim)
    model.fusion.step(stream, 0, trim)
    tokens = stream.regions
    assert tokens.sizes_BN is not None
    sizes = (tokens.sizes_BN * tokens.present_BN)[..., None]
    close((tokens.x_BND * sizes).sum(1), whole)
    assert (tokens.sizes_BN > 1).any()


def test_similar_regions_are_the_ones_that_pair_up() -> None:
    """Two equal regions on different sides become one, before any others do."""
    model, (given, ids) = make("single stream", policy="similarity", words=False), data()
    given = given._replace(scores_BN=torch.ones_like(given.scores_BN))
    features, boxes = given.features_BND.clone(), given.boxes_norm_BN4.clone()
    features[:, 5], boxes[:, 5] = features[:, 2], boxes[:, 2]
    given = Regions(features, boxes, given.scores_BN)
    trim = Trim(regions=(7, 7))
    stream = model.fusion.begin(given.features_BND, given.boxes_norm_BN4, model.valid(given), ids, trim)
    model.fusion.step(stream, 0, trim)
    assert stream.regions.origin_BNM is not None
    pair = (stream.regions.origin_BNM[:, :, 2] * stream.regions.origin_BNM[:, :, 5]).sum(1)
    assert pair.tolist() == [1.0] * ROWS


@forms
def test_words_read_and_regions_read(form: str) -> None:
    """Reading fewer is the same as giving fewer."""
    model, (given, ids) = make(form), data()
    fewer = Regions(*(part[:, :5] for part in given))
    close(
        model.answer(given, ids, Trim(num_words=7, num_regions=5)).logits_BA, model.answer(fewer, ids[:, :7]).logits_BA
    )
    assert model.answer(given, ids, Trim(num_regions=5)).fusion.looked_at_BN.shape == (ROWS, 8)


def test_draws_keep_with_the_probability_of_the_logit() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([-2.0, 0.0, 1.5]).expand(20000, 3)
    kept = keep_by_threshold(scores, 0.0, 1.0, noise=True).mean(0)
    torch.testing.assert_close(kept, torch.sigmoid(scores[0]), atol=0.012, rtol=0)  # three deviations of 20,000 draws


@forms
def test_gradients_reach_every_trimmer(form: str) -> None:
    model, (given, ids) = make(form, head_layers=(0, 2)), data()
    model.train()
    torch.manual_seed(0)
    answer = model.answer(given, ids, Trim(threshold=0.0, head_threshold=0.0, temperature=5.0, noise=True))
    answer.logits_BA.square().sum().backward()
    assert model.fusion.trimmers is not None
    for name, parameter in model.fusion.trimmers.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@forms
def test_costs(form: str) -> None:
    """Fixed numbers cost what tensors of them cost, and fewer tokens never more."""
    model = make(form)
    config = model.config.fusion
    whole = fusion_macs(config, 12, 8, 32)
    assert whole == macs_of(config, 32, [12] * 3, [8] * 3)
    trims = [
        Trim(regions=(6, 6)),
        Trim(regions=(6, 4)),
        Trim(regions=(6, 4), words=(8, 8)),
        Trim(regions=(3, 3), words=(4, 4)),
    ]
    costs = [whole, *(fusion_macs(config, 12, 8, 32, trim) for trim in trims)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert fusion_macs(config, 12, 8, 32, replace(trims[1], num_words=6, num_regions=6)) < costs[2]
    tensors = macs_of(config, 32, [torch.tensor(12.0)] * 3, [torch.tensor(n) for n in (8.0, 6.0, 4.0)])
    assert int(tensors) == costs[2]
