"""Generation against the whole fusion run anew for every word, a textbook beam search, and all captions there are."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.artifacts import ModelConfig, TokenizerSpec
from edgevlm.models import decoding
from edgevlm.models.decoding import beam_search, greedy, next_word, read_context, sample, word_log_probs
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from tests.edgevlm.tiny import LABELS, SPEC, tiny_regions

TOLERANCE = 1e-5  # float32 sums in another order
NUM_CAPTION, NUM_TAGS = 8, 4
SPECIALS = {0, 1, 2, 4}  # [PAD] [UNK] [CLS] [MASK]; [SEP] is 3


def tokens(vocab_size: int) -> TokenizerSpec:
    return TokenizerSpec(vocab_sha256="", vocab_size=vocab_size, max_tokens=NUM_CAPTION + NUM_TAGS)


def captioner(seed: int, vocab_size: int = 40, name: str = "test-fusion", **fusion: object) -> VLM:
    """A random model whose words differ in probability as a trained one's do."""
    torch.manual_seed(seed)
    config = FUSIONS[name].model_copy(update=fusion)
    model = VLM(ModelConfig(tee=TEES["test-tee"], fusion=config, heads=("words",)), SPEC, tokens(vocab_size), LABELS)
    with torch.no_grad():
        model.fusion.words.weight.mul_(20)
        model.fusion.positions.weight.mul_(20)
    return model.eval()


def tags(batch: int, seed: int = 0, vocab_size: int = 40) -> Tensor:
    """Tag ids; the first image has none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size, (batch, NUM_TAGS), generator=generator, dtype=torch.int32)
    ids[:, -1] = 0
    ids[0] = 0
    return ids


def whole_log_probs(model: VLM, regions: Regions, tag_ids: Tensor, row: int, words: list[int]) -> Tensor:
    """Log-probabilities (V,) of the word behind `words`, by the whole fusion without any cache."""
    ids = torch.zeros(1, NUM_CAPTION + tag_ids.shape[1], dtype=torch.int32)
    ids[0, : len(words) + 2] = torch.tensor([2, *words, 4])
    ids[0, NUM_CAPTION:] = tag_ids[row]
    one = Regions(*(part[row : row + 1] for part in regions))
    states = model.fuse(one, ids, num_caption=NUM_CAPTION, seq2seq=True).hidden_BTD[-1]
    assert model.word_head is not None
    return model.word_head(states[0, len(words) + 1], model.fusion.words.weight)


def allowed(logits: Tensor, words: list[int], no_repeat: int) -> Tensor:
    banned = SPECIALS if words else SPECIALS | {3}
    if no_repeat:
        said = [tuple(words[i : i + no_repeat]) for i in range(len(words) - no_repeat + 1)]
        tail = tuple(words[len(words) - no_repeat + 1 :]) if no_repeat > 1 else ()
        banned = banned | {gram[-1] for gram in said if gram[:-1] == tail}
    logits = logits.clone()
    logits[list(banned)] = -math.inf
    return logits.log_softmax(-1)


def stripped(ids: Tensor) -> list[int]:
    return [i for i in ids.tolist() if i != 0]


@torch.no_grad()
@pytest.mark.parametrize("num_captions", [1, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["test-fusion", "test-dual"])
def test_cached_logits_equal_the_whole_fusions(name: str, seed: int, num_captions: int) -> None:
    """Three images, one without tags, one without regions that count; captions of an image differ."""
    model, regions, tag_ids = captioner(seed, name=name), tiny_regions(3, seed), tags(3, seed)
    regions.scores_BN[1] = 0.0
    written = torch.randint(5, 40, (3, num_captions, 5), generator=torch.Generator().manual_seed(seed))
    draft = read_context(model, regions, tag_ids, NUM_CAPTION)
    for t in range(6):
        last = written[..., t - 1] if t else torch.full((3, num_captions), 2)
        logits = next_word(model, draft, last, mask_id=4)
        for row, k in itertools.product(range(3), range(num_captions)):
            expected = whole_log_probs(model, regions, tag_ids, row, written[row, k, :t].tolist())
            torch.testing.assert_close(logits[row, k], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_layers_of_different_widths_are_cached_too() -> None:
    """As after pruning."""
    model = captioner(0, layer_heads=(2, 1), layer_ffn=(24, 64))
    regions, tag_ids = tiny_regions(2), tags(2)
    draft = read_context(model, regions, tag_ids, NUM_CAPTION)
    logits = next_word(model, draft, torch.full((2, 1), 2), mask_id=4)
    expected = whole_log_probs(model, regions, tag_ids, 1, [])
    torch.testing.assert_close(logits[1, 0], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("no_repeat", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_greedy_without_cache(seed: int, no_repeat: int) -> None:
    model, regions, tag_ids = captioner(seed), tiny_regions(3, seed), tags(3, seed)
    draft = read_context(model, regions, tag_ids, NUM_CAPTION)
    captions = greedy(model, draft, tokens(40), NUM_CAPTION - 1, no_repeat)
    for row in range(3):
        words: list[int] = []
        total = 0.0
        while len(words) < NUM_CAPTION - 1 and words[-1:] != [3]:
            log_probs = allowed(whole_log_probs(model, regions, tag_ids, row, words), words, no_repeat)
            words.append(int(log_probs.argmax()))
            total += float(log_probs.max())
        assert stripped(captions.ids_BKT[row, 0]) == words
        assert captions.scores_BK[row, 0].item() == pytest.approx(total, abs=TOLERANCE * len(words))


@torch.no_grad()
def plain_beam_search(
    model: VLM, regions: Regions, tag_ids: Tensor, row: int, beams: int, penalty: float, no_repeat: int, max_words: int
) -> list[tuple[float, list[int]]]:
    """Beam search on lists, with the whole fusion for every candidate and no early end."""
    kept: list[tuple[float, float, list[int]]] = [(0.0, 0.0, [])]
    for _ in range(max_words):
        candidates = []
        for rank, total, words in kept:
            if words[-1:] == [3]:
                candidates.append((rank, total, words))
                continue
            log_probs = allowed(whole_log_probs(model, regions, tag_ids, row, words), words, no_repeat)
            for word in torch.isfinite(log_probs).nonzero().flatten().tolist():
                longer = total + float(log_probs[word])
                candidates.append((longer / (len(words) + 1) ** penalty, longer, [*words, word]))
        kept = sorted(candidates, key=lambda candidate: -candidate[0])[:beams]
    return [(rank, words) for rank, _, words in kept]


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    beams=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    no_repeat=st.integers(0, 2),
)
def test_beam_search_equals_the_textbooks(seed: int, beams: int, penalty: float, no_repeat: int) -> None:
    """The best caption and its score; the early end may leave the others unfinished."""
    model, regions, tag_ids = captioner(seed, 12), tiny_regions(2, seed), tags(2, seed, 12)
    draft = read_context(model, regions, tag_ids, NUM_CAPTION)
    captions = beam_search(model, draft, tokens(12), 5, beams, penalty, no_repeat)
    for row in range(2):
        score, words = plain_beam_search(model, regions, tag_ids, row, beams, penalty, no_repeat, 5)[0]
        assert captions.scores_BK[row, 0].item() == pytest.approx(score, abs=5 * TOLERANCE)
        assert stripped(captions.ids_BKT[row, 0]) == words


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_captions(seed: int, penalty: float) -> None:
    """Four words and [SEP], at most four long: all 340 + captions are scored one by one."""
    model, regions, tag_ids = captioner(seed, 9), tiny_regions(1, seed), tags(1, seed, 9)
    max_words, best = 4, (-math.inf, [])

    def extend(words: list[int], total: float) -> None:
        nonlocal best
        log_probs = allowed(whole_log_probs(model, regions, tag_ids, 0, words), words, 0)
        for word in (3, 5, 6, 7, 8):
            longer, caption = total + float(log_probs[word]), [*words, word]
            if word == 3 or len(caption) == max_words:
                if caption != [3]:
                    best = max(best, (longer / len(caption) ** penalty, caption))
            else:
                extend(caption, longer)

    extend([], 0.0)
    draft = read_context(model, regions, tag_ids, NUM_CAPTION)
    captions = beam_search(model, draft, tokens(9), max_words, 400, penalty)
    assert stripped(captions.ids_BKT[0, 0]) == best[1]
    assert captions.scores_BK[0, 0].item() == pytest.approx(best[0], abs=TOLERANCE)


@pytest.mark.parametrize("no_repeat", [0, 2])
@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_greedy(seed: int, no_repeat: int) -> None:
    model, regions, tag_ids = captioner(seed), tiny_regions(4, seed), tags(4, seed)
    narrow = beam_search(model, read_context(model, regions, tag_ids, NUM_CAPTION), tokens(40), 7, 1, 0.0, no_repeat)
    plain = greedy(model, read_context(model, regions, tag_ids, NUM_CAPTION), tokens(40), 7, no_repeat)
    assert torch.equal(narrow.ids_BKT, plain.ids_BKT)
    torch.testing.assert_close(narrow.scores_BK, plain.scores_BK)


def test_the_early_end_is_early_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that ends soon: few steps are run, though twelve words were allowed."""
    steps = 0

    def counted(*arguments: object) -> Tensor:
        nonlocal steps
        steps += 1
        return next_word(*arguments)  # pyright: ignore

    monkeypatch.setattr(decoding, "next_word", counted)
    model, regions, tag_ids = captioner(1), tiny_regions(2), tags(2)
    with torch.no_grad():
        assert model.word_head is not None
        model.word_head.bias[3] = 30.0
    captions = beam_search(model, read_context(model, regions, tag_ids, NUM_CAPTION), tokens(40), 7, 3, 0.0)
    assert steps < 5
    for row in range(2):
        score, words = plain_beam_search(model, regions, tag_ids, row, 3, 0.0, 0, 7)[0]
        assert stripped(captions.ids_BKT[row, 0]) == words
        assert captions.scores_BK[row, 0].item() == pytest.approx(score, abs=5 * TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test-fusion", "test-dual"])
def test_log_probs_in_one_pass_equal_those_word_by_word(name: str) -> None:
    model, regions, tag_ids = captioner(5, name=name), tiny_regions(3), tags(3)
    torch.manual_seed(0)
    drawn = sample(model, read_context(model, regions, tag_ids, NUM_CAPTION), tokens(40), 7, 4)
    together = word_log_probs(model, read_context(model, regions, tag_ids, NUM_CAPTION), drawn.ids_BKT, tokens(40))
    torch.testing.assert_close(together.sum(-1), drawn.scores_BK, atol=7 * TOLERANCE, rtol=0)
    words = stripped(drawn.ids_BKT[2, 1])
    for t, word in enumerate(words):
        expected = allowed(whole_log_probs(model, regions, tag_ids, 2, words[:t]), words[:t], 0)[word]
        assert together[2, 1, t].item() == pytest.approx(expected.item(), abs=TOLERANCE)


@torch.no_grad()
def test_samples_follow_the_models_distribution() -> None:
    """First words of 4,000 samples; 0.03 is four standard deviations of a share."""
    model, regions, tag_ids = captioner(3, 9), tiny_regions(1), tags(1, 0, 9)
    expected = allowed(whole_log_probs(model, regions, tag_ids, 0, []), [], 0).exp()
    torch.manual_seed(0)
    drawn = sample(model, read_context(model, regions, tag_ids, NUM_CAPTION), tokens(9), 1, 4000).ids_BKT[0, :, 0]
    shares = torch.bincount(drawn, minlength=9) / 4000
    assert (expected > 0.05).sum() > 1, "a distribution with one possible word would prove nothing"
    torch.testing.assert_close(shares, expected, atol=0.032, rtol=0)


def test_captions_end_with_sep_and_padding_and_say_something() -> None:
    model, regions, tag_ids = captioner(2), tiny_regions(8), tags(8)
    torch.manual_seed(1)
    drawn = sample(model, read_context(model, regions, tag_ids, NUM_CAPTION), tokens(40), 7, 50).ids_BKT.flatten(0, 1)
    ended = (drawn == 3).any(1)
    assert ended.any() and not ended.all()
    for row in drawn.tolist():
        words = row[: row.index(3)] if 3 in row else row
        assert words and not SPECIALS & set(words)
        assert set(row[len(words) + 1 :]) <= {0}
