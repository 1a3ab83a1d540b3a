"""Training captioners: what is masked, what is seen, that both objectives and CIDEr optimisation do what they claim."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.artifacts import Checkpoint, ModelConfig, Provenance, TokenizerSpec
from edgevlm.data.text import SPECIAL_TOKENS, Tokenizer, make_spec, write_vocabulary
from edgevlm.errors import RecipeError
from edgevlm.job import Job
from edgevlm.models import vlm
from edgevlm.models.decoding import greedy, next_word, read_context, word_log_probs
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.recipe import Recipe
from edgevlm.recipes import load_recipe
from edgevlm.stages import stages_of
from edgevlm.tasks import caption_metrics
from edgevlm.tasks.captioning import (
    END,
    CaptionBatch,
    CaptionObjective,
    SelfCritical,
    choose_masked,
    nearest_by_tags,
    reward_words,
)
from edgevlm.tasks.cider import CiderD
from edgevlm.train.captioning import caption_section, describe, train_captioner
from edgevlm.train.detector import train_detector
from edgevlm.train.prepare import prepare
from edgevlm.train.regions import RegionSplit, cache_regions
from tests.edgevlm.tiny import LABELS, SPEC, tiny_regions

WORDS = ("red", "dog", "cat", "sees", "a", "mat")
NUM_CAPTION = 8


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    path = tmp_path / "vocab.txt"
    write_vocabulary(path, [*SPECIAL_TOKENS, *WORDS, "."])
    return Tokenizer(path, make_spec(path, NUM_CAPTION))


def captioner(spec: TokenizerSpec, seed: int = 0, name: str = "test-fusion") -> VLM:
    torch.manual_seed(seed)
    spec = spec.model_copy(update={"max_tokens": NUM_CAPTION + 4})
    return VLM(ModelConfig(tee=TEES["test-tee"], fusion=FUSIONS[name], heads=("words",)), SPEC, spec, LABELS)


def batch_of(tokenizer: Tokenizer, captions: list[str], seed: int = 0) -> CaptionBatch:
    """Captions of as many different images, without tags."""
    ids = torch.from_numpy(tokenizer.encode_batch(captions))
    masked = choose_masked(ids, tokenizer.spec, 0.15, 3, torch.Generator().manual_seed(seed))
    return CaptionBatch(tiny_regions(len(captions), seed), ids, masked, torch.arange(len(captions)))


# --- masking -----------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    share=st.floats(0.05, 1.0),
    most=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_the_right_number_of_words_is_masked(lengths: list[int], share: float, most: int, seed: int) -> None:
    spec = TokenizerSpec(vocab_sha256="", vocab_size=40, max_tokens=24)
    ids = torch.zeros(len(lengths), 24, dtype=torch.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[: length + 2] = torch.tensor([2, *range(5, 5 + length), 3])
    masked = choose_masked(ids, spec, share, most, torch.Generator().manual_seed(seed))
    assert not masked[:, 0].any() and not masked[ids == 0].any()
    for row, length in zip(masked, lengths, strict=True):
        assert row.sum() == min(max(round((length + 1) * share), 1), most, length + 1)


def test_every_word_and_the_end_are_masked_equally_often() -> None:
    """One of four words, 4,000 times; 0.03 is more than four standard deviations."""
    spec = TokenizerSpec(vocab_sha256="", vocab_size=40, max_tokens=6)
    captions = torch.tensor([[2, 7, 8, 9, 3, 0]]).repeat(4000, 1)
    masked = choose_masked(captions, spec, 0.15, 3, torch.Generator().manual_seed(0))
    shares = masked.float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0, 0.25, 0.25, 0.25, 0.25, 0]), atol=0.03, rtol=0)


# --- objectives --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_stands_behind_a_masked_word_does_not_matter(tokenizer: Tokenizer) -> None:
    model = captioner(tokenizer.spec).eval()
    batch = batch_of(tokenizer, ["red dog sees a cat"])
    ids = batch.input_ids.clone()
    ids[0, 3] = tokenizer.spec.mask_id
    states = [model.fuse(batch.regions, ids, num_caption=NUM_CAPTION, seq2seq=True).hidden_BTD[-1]]
    ids[0, 4:] = torch.tensor([9, 8, 3, 0])
    states.append(model.fuse(batch.regions, ids, num_caption=NUM_CAPTION, seq2seq=True).hidden_BTD[-1])
    # Not a tolerance: what is hidden has a weight of exactly 0, and the context never sees the caption.
    assert torch.equal(states[0][:, :4], states[1][:, :4])
    assert torch.equal(states[0][:, NUM_CAPTION:], states[1][:, NUM_CAPTION:])
    ids[0, 2] = 9
    changed = model.fuse(batch.regions, ids, num_caption=NUM_CAPTION, seq2seq=True).hidden_BTD[-1]
    assert (changed[:, 3] - states[1][:, 3]).abs().max() > 1e-4, "the word before must matter"


@torch.no_grad()
@pytest.mark.parametrize("name", ["test-fusion", "test-dual"])
def test_the_loss_on_every_word_is_the_mean_over_generation_steps(tokenizer: Tokenizer, name: str) -> None:
    model = captioner(tokenizer.spec, name=name).eval()
    captions = ["red dog sees a cat", "mat"]
    batch, smoothing = batch_of(tokenizer, captions), 0.1
    objective = CaptionObjective(model, tokenizer.spec, NUM_CAPTION, label_smoothing=smoothing, every_word=True)
    losses = []
    for row, ids in enumerate(batch.input_ids.tolist()):
        one = Regions(*(part[row : row + 1] for part in batch.regions))
        draft = read_context(model, one, batch.input_ids[row : row + 1, NUM_CAPTION:], NUM_CAPTION)
        for last, word in itertools.pairwise(ids[: ids.index(3) + 1]):
            log_probs = next_word(model, draft, torch.tensor([[last]]), tokenizer.spec.mask_id)[0, 0].log_softmax(-1)
            losses.append(-(1 - smoothing) * log_probs[word] - smoothing * log_probs.mean())
    assert len(losses) == 6 + 2  # [SEP] counts
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(objective(batch)[0], expected, atol=1e-5, rtol=0)  # sums in another order


@pytest.mark.parametrize("every_word", [False, True])
@pytest.mark.parametrize("name", ["test-fusion", "test-dual"])
def test_all_that_has_gradients_is_used_and_nothing_else(tokenizer: Tokenizer, name: str, every_word: bool) -> None:
    """A trainable parameter without a gradient stops training on several GPUs."""
    model = captioner(tokenizer.spec, name=name)
    batch = batch_of(tokenizer, ["red dog sees a cat", "mat"])
    tags = torch.tensor([[5, 3, 0, 0], [6, 7, 3, 0]], dtype=torch.int32)
    batch = batch._replace(input_ids=torch.cat([batch.input_ids, tags], 1))
    objective = CaptionObjective(model, tokenizer.spec, NUM_CAPTION, every_word=every_word)
    objective(batch)[0].backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"fusion", "word_head"}


@pytest.mark.parametrize("every_word", [False, True])
def test_learns_captions_by_heart(tokenizer: Tokenizer, every_word: bool) -> None:
    captions = ["red dog sees a cat", "a cat", "a mat sees red", "dog dog dog"]
    model, batch = captioner(tokenizer.spec), batch_of(tokenizer, captions)
    objective = CaptionObjective(model, tokenizer.spec, NUM_CAPTION, label_smoothing=0.0, every_word=every_word)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(120 if every_word else 400):
        generator = torch.Generator().manual_seed(step)
        batch = batch._replace(masked=choose_masked(batch.input_ids, tokenizer.spec, 0.3, 3, generator))
        optimiser.zero_grad()
        objective(batch)[0].backward()
        optimiser.step()
    model.eval()
    draft = read_context(model, batch.regions, batch.input_ids[:, NUM_CAPTION:], NUM_CAPTION)
    said = greedy(model, draft, tokenizer.spec, NUM_CAPTION - 1).ids_BKT[:, 0]
    assert [tokenizer.decode(row) for row in said.tolist()] == captions


# --- CIDEr optimisation ------------------------------------------------------------------------------------------


def test_reward_words_have_an_end_and_no_punctuation(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a red dog .")
    assert reward_words(tokenizer, ids) == ["a", "red", "dog", END]
    assert reward_words(tokenizer, ids[:3]) == ["a", "red"]


def critic(model: VLM, tokenizer: Tokenizer, references: list[list[str]], samples: int, words: int) -> SelfCritical:
    tokens = [[reward_words(tokenizer, tokenizer.encode(text)) for text in image] for image in references]
    return SelfCritical(model, tokenizer, CiderD(tokens), NUM_CAPTION, samples, words)


def test_the_gradient_is_that_of_the_expected_reward(tokenizer: Tokenizer) -> None:
    """Against all captions of at most two words, each weighed with its probability; 4,000 samples of each image."""
    references = [["red dog", "red cat"], ["mat"]]
    model, batch = captioner(tokenizer.spec), batch_of(tokenizer, ["red", "mat"])
    objective = critic(model, tokenizer, references, 4000, 2)
    weight = model.fusion.region.weight

    words = range(5, 12)
    captions = torch.tensor([[word, second] for word in words for second in (3, *words)])
    draft = read_context(model, batch.regions, batch.input_ids[:, NUM_CAPTION:], NUM_CAPTION)
    chances_BK = word_log_probs(model, draft, captions.expand(2, -1, -1), tokenizer.spec).sum(-1).exp()
    torch.testing.assert_close(chances_BK.sum(1), torch.ones(2), atol=1e-5, rtol=0)
    rewards = [[objective.rewards.score(i, reward_words(tokenizer, ids)) for ids in captions.tolist()] for i in (0, 1)]
    expected = torch.autograd.grad((chances_BK * torch.tensor(rewards)).sum(1).mean(), weight)[0]

    torch.manual_seed(0)
    estimate = torch.autograd.grad(objective(batch)[0], weight)[0]
    assert F.cosine_similarity(-estimate.flatten(), expected.flatten(), dim=0) > 0.97
    assert estimate.norm() == pytest.approx(expected.norm().item(), rel=0.15)


def test_steps_raise_the_reward(tokenizer: Tokenizer) -> None:
    """The mean reward of fresh samples, before and after; three images with one right caption each."""
    references = [["red dog"], ["a mat"], ["cat sees"]]
    model, batch = captioner(tokenizer.spec), batch_of(tokenizer, [texts[0] for texts in references])
    objective = critic(model, tokenizer, references, 32, 3)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    torch.manual_seed(0)
    sampled = []
    for _ in range(40):
        optimiser.zero_grad()
        loss, logs = objective(batch)
        loss.backward()
        optimiser.step()
        sampled.append(logs["sampled"].item())
    before, after = sum(sampled[:3]) / 3, sum(sampled[-3:]) / 3
    assert after > 2 * before, sampled


# --- retrieval by tags -------------------------------------------------------------------------------------------

multisets = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 3), max_size=4).map(Counter)


@settings(deadline=None)
@given(st.lists(multisets, min_size=1, max_size=4), st.lists(multisets, min_size=1, max_size=5))
def test_nearest_by_tags_equals_brute_force(tags: list[Counter[str]], known: list[Counter[str]]) -> None:
    def overlap(a: Counter[str], b: Counter[str]) -> float:
        return (a & b).total() / max(1, (a | b).total())

    for image, index in zip(tags, nearest_by_tags(tags, known), strict=True):
        values = [overlap(image, other) for other in known]
        assert values[index] == pytest.approx(max(values)) and values.index(max(values)) == index


def test_images_are_described_by_the_regions_that_count(tokenizer: Tokenizer) -> None:
    model = captioner(tokenizer.spec)
    head = model.tee.box_head
    with torch.no_grad():  # feature k names class or attribute k
        for part, size in ((head.classes, 4), (head.attributes, 2)):
            part.weight.zero_()
            part.bias.fill_(-1.0)
            part.weight[:, :size] = 10 * torch.eye(size)
            if part is head.attributes:
                part.weight.zero_()
                part.weight[0, 4] = part.weight[1, 5] = 10.0
    features = torch.zeros(1, 8, 32)
    for region, numbers in enumerate([(1, 4), (0, 4, 5), (1,), (2,)]):
        features[0, region, list(numbers)] = 1.0
    scores = torch.tensor([[0.9, 0.8, 0.5, 0.1, 0, 0, 0, 0]])
    regions = RegionSplit(features, torch.zeros(1, 8, 4), scores, *[torch.zeros(0)] * 5, kinds=[])
    found = describe(model.tee, regions, LABELS.classes, LABELS.attributes, 0.2)[0]
    assert found == Counter({"b": 2, "a": 1, "d": 2, "e": 1, "d b": 1, "d e a": 1})
    head.attributes = None  # as beside an attribute head of its own
    found = describe(model.tee, regions, LABELS.classes, LABELS.attributes, 0.2)[0]
    assert found == Counter({"b": 2, "a": 1})


# --- the stage ---------------------------------------------------------------------------------------------------

OVERRIDES = ["text.max_tokens=32", "captioning={fusion: {name: test-fusion}, num_caption: 24, num_tags: 8, steps: 4}"]
OVERRIDES += ["captioning.batch_size=16", "captioning.max_words=12"]


def job(recipe: Recipe, folder: Path, stage: str, *inputs: str) -> Job:
    out = folder / stage
    out.mkdir(exist_ok=True)
    return Job(recipe, {name: folder / name for name in inputs}, out, Provenance(stage=stage, key=stage))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny extractor, barely trained, and its regions."""
    folder = tmp_path_factory.mktemp("captions")
    recipe = load_recipe("test-scenes", OVERRIDES)
    prepare(job(recipe, folder, "prepare"))
    train_detector(job(recipe, folder, "detector", "prepare"))
    cache_regions(job(recipe, folder, "regions", "detector"))
    return folder


def run(folder: Path, stage: str, *overrides: str) -> Checkpoint:
    recipe = load_recipe("test-scenes", [*OVERRIDES, *overrides])
    return train_captioner(job(recipe, folder, stage, "prepare", "detector", "regions"))


def test_the_stage_gives_a_captioner_its_captions_and_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)  # without Java: METEOR takes 20 s
    manifest = run(folder, "captioning", "captioning.self_critical={steps: 2, batch_size: 8, num_samples: 2}")
    for name in ("cider_val", "cider_test", "bleu4_test", "rouge_l_test", "cider_by_tags_test"):
        assert 0 <= manifest.metrics[name] <= 10
    assert "meteor_test" not in manifest.metrics
    results = json.loads((folder / "captioning" / "captions_test.json").read_text())
    assert [row["image_id"] for row in results] == [f"test-{i}" for i in range(24)]
    assert all(row["caption"] for row in results)
    model, loaded = vlm.load(folder / "captioning")
    assert loaded.task == "captioning" and model.word_head is not None
    detector, _ = vlm.load(folder / "detector")
    for name, value in detector.tee.state_dict().items():
        assert torch.equal(model.tee.state_dict()[name], value), "the extractor stays as it was"
    assert not list((folder / "captioning").glob(".snapshot*"))


def test_beams_and_every_word_run_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)
    manifest = run(folder, "beams", "captioning.every_word=true", "captioning.num_beams=3", "captioning.no_repeat=2")
    captions = json.loads((folder / "beams" / "captions_val.json").read_text())
    assert len(captions) == 24 and all(row["caption"] for row in captions)
    assert "cider_val" in manifest.metrics


def test_mistakes_in_the_recipe_are_named(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"num_caption \+ num_tags is 40, but text\.max_tokens is 32"):
        run(folder, "wrong", "captioning.num_caption=32")
    with pytest.raises(RecipeError, match="no section 'captioning'"):
        train_captioner(job(load_recipe("test-scenes"), folder, "wrong", "prepare", "detector", "regions"))
    with pytest.raises(RecipeError, match="max_words must be smaller than num_caption"):
        load_recipe("test-scenes", [*OVERRIDES, "captioning.max_words=24"])


def test_the_shipped_recipe_fits(tmp_path: Path) -> None:
    recipe = load_recipe("scenes-captions")
    section = caption_section(Job(recipe, {}, tmp_path, Provenance(stage="captioning", key="")))
    assert [stage.name for stage in stages_of(recipe)] == ["prepare", "detector", "regions", "captioning"]
    assert section.label_smoothing == 0.1 and section.mask_share == 0.15 and section.max_masked == 3
