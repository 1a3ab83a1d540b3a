"""Retrieval: recalls against sorting by hand, shortlists, folds, negatives, and a model that learns to match."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.artifacts import VOCABULARY, Checkpoint
from edgevlm.data import open_reader
from edgevlm.data.text import Tokenizer
from edgevlm.errors import RecipeError
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.tee import Regions
from edgevlm.recipe import Choice, RetrievalSection
from edgevlm.tasks import retrieval as task
from edgevlm.train.captions import CaptionSplit, load_captions
from edgevlm.train.regions import RegionSplit
from edgevlm.train.retrieval import (
    MatchObjective,
    caption_words,
    evaluate_retrieval,
    pairs_batch,
    score_pairs,
    train_retrieval,
)
from edgevlm.train.start import fine_tuning_model
from tests.edgevlm.runs import cached_job, detector_job
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_ids, tiny_regions, tiny_vlm


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and images with one to three captions in mixed order."""
    num_images = draw(st.integers(1, 6))
    images = [image for image in range(num_images) for _ in range(draw(st.integers(1, 3)))]
    image_C = np.array(draw(st.permutations(images)))
    values = draw(st.lists(st.integers(-3, 3), min_size=len(images) * num_images, max_size=len(images) * num_images))
    return np.array(values, float).reshape(len(images), num_images), image_C


def slow_recalls(scores_CI: np.ndarray, image_C: np.ndarray, k: int) -> tuple[float, float]:
    """(TR@k, IR@k) by sorting: at equal scores a wrong answer comes before a right one."""
    num_captions, num_images = scores_CI.shape
    text_hits = image_hits = 0
    for image in range(num_images):
        ranked = sorted(range(num_captions), key=lambda c: (-scores_CI[c, image], image_C[c] == image))
        text_hits += any(image_C[caption] == image for caption in ranked[:k])
    for caption in range(num_captions):
        ranked = sorted(range(num_images), key=lambda i: (-scores_CI[caption, i], i == image_C[caption]))
        image_hits += image_C[caption] in ranked[:k]
    return text_hits / num_images, image_hits / num_captions


@given(case=scored(), k=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_recalls_are_what_sorting_finds(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    scores_CI, image_C = case
    rows = task.recalls(scores_CI, image_C, ks=(k,))
    assert (rows[f"tr@{k}"], rows[f"ir@{k}"]) == pytest.approx(slow_recalls(scores_CI, image_C, k))


def test_five_captions_hit_if_any_is_found() -> None:
    """Two images with five captions each; of the first, only the last caption is ranked above a wrong one."""
    image_C = np.repeat([0, 1], 5)
    scores_CI = np.zeros((10, 2))
    scores_CI[:4, 0], scores_CI[4, 0], scores_CI[5:, 0] = -1, 5, 1
    scores_CI[:5, 1], scores_CI[5:, 1] = 2, 1
    rows = task.recalls(scores_CI, image_C)
    assert rows["tr@1"] == 0.5 and rows["tr@5"] == 0.5 and rows["tr@10"] == 1.0
    assert rows["ir@1"] == 0.1 and rows["ir@5"] == 1.0


def test_a_model_that_knows_nothing_finds_nothing() -> None:
    assert task.recalls(np.zeros((20, 20)), np.arange(20))["ir@10"] == 0.0


def test_folds_of_the_1k_protocol() -> None:
    """Five folds of the 5K test: each is ranked among its own images alone, and the recalls are averaged."""
    rng = np.random.default_rng(0)
    image_C = np.repeat(np.arange(50), 5)
    scores_CI = rng.normal(size=(250, 50))
    parts = [
        slow_recalls(scores_CI[50 * fold : 50 * fold + 50, 10 * fold : 10 * fold + 10], image_C[:50], 5)
        for fold in range(5)
    ]
    rows = task.fold_recalls(scores_CI, image_C, fold_images=10)
    assert (rows["tr@5"], rows["ir@5"]) == pytest.approx(np.mean(parts, axis=0))
    assert rows["ir@5"] > task.recalls(scores_CI, image_C)["ir@5"]  # fewer rivals


@given(case=scored(), kept=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_shortlist_keeps_the_best_of_each_query(case: tuple[np.ndarray, np.ndarray], kept: int) -> None:
    cheap_CI, _ = case
    for axis, rows in ((1, cheap_CI), (0, cheap_CI.T)):
        mask = task.shortlist(cheap_CI, kept, axis)
        mask = mask if axis == 1 else mask.T
        for row, chosen in zip(rows, mask, strict=True):
            assert chosen.sum() == min(kept, len(row))
            assert row[chosen].min() >= row[~chosen].max(initial=-np.inf)


def test_outside_the_shortlist_nothing_is_found() -> None:
    scores_CI, kept_CI = np.full((4, 4), -7.0) + np.eye(4), ~np.eye(4, dtype=bool)
    assert task.recalls(scores_CI, np.arange(4))["ir@1"] == 1.0
    assert task.recalls(task.outside_shortlist(scores_CI, kept_CI), np.arange(4), scores_CI)["ir@1"] == 0.0


@given(num_images=st.integers(2, 9), each=st.integers(1, 5), batch=st.integers(1, 12), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_negatives_never_fit(num_images: int, each: int, batch: int, seed: int) -> None:
    image_C = torch.arange(num_images).repeat_interleave(each)
    rows = torch.randint(len(image_C), (batch,), generator=torch.Generator().manual_seed(seed))
    captions, images = task.draw_negatives(image_C, rows, seed)
    assert (image_C[captions] != images).all()
    assert ((captions == rows) | (images == image_C[rows])).all()  # one side is that of the pair that fits
    again = task.draw_negatives(image_C, rows, seed)
    assert torch.equal(again[0], captions) and torch.equal(again[1], images)


def test_negatives_change_captions_and_images_alike() -> None:
    rows, image_C = torch.arange(400), torch.arange(400)
    captions, _ = task.draw_negatives(image_C, rows, 0)
    assert 140 < int((captions != rows).sum()) < 260  # 200 expected, sigma 10
    assert not torch.equal(task.draw_negatives(image_C, rows, 1)[0], captions)


def test_tags_find_the_image_that_has_them() -> None:
    images = [["star", "red"], ["star", "blue"], ["circle", "red", "circle", "large"]]
    captions = [["a", "blue", "star"], ["large", "circles"], ["a", "red", "star"]]
    assert task.TagIndex(images).scores(captions).argmax(1).tolist() == [1, 2, 0]
    assert task.TagIndex(images).scores([["nothing", "known"]]).tolist() == [[0.0, 0.0, 0.0]]


def test_tag_words_name_the_regions_that_count() -> None:
    model, regions = tiny_vlm(), tiny_regions(2)
    head = model.tee.box_head
    with torch.no_grad():
        expected = []
        for image in range(2):
            words = []
            valid = [n for n in range(8) if regions.scores_BN[image, n] >= model.config.tee.score_threshold]
            words += [
                LABELS.classes[head.classes(regions.features_BND[image, n])[:-1].argmax().item()]  # pyright: ignore
                for n in valid
            ]
            for n in valid:
                probabilities = head.attributes(regions.features_BND[image, n]).sigmoid()
                words += [LABELS.attributes[a] for a in range(2) if probabilities[a] >= 0.5]
            expected.append(words)
    assert task.tag_words(model, regions, LABELS.classes, LABELS.attributes) == expected


def _matching_data(num_images: int = 12, each: int = 5) -> tuple[RegionSplit, CaptionSplit]:
    """Image i shows feature i, and each of its captions has the word 5 + i among random others."""
    generator = torch.Generator().manual_seed(0)
    regions = tiny_regions(num_images)
    features = torch.nn.functional.one_hot(torch.arange(num_images), 32).float()[:, None].expand(-1, 8, -1) * 3
    split = RegionSplit(
        features.contiguous(),
        regions.boxes_norm_BN4,
        torch.full((num_images, 8), 0.9),
        *(torch.zeros(0, dtype=torch.long) for _ in range(3)),
        torch.zeros(0, 8, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        [],
    )
    image_index = torch.arange(num_images).repeat_interleave(each)
    ids = tiny_ids(len(image_index), length=6)
    ids[:, 1:5] = torch.randint(20, 40, (len(ids), 4), generator=generator).int()
    ids[torch.arange(len(ids)), torch.randint(1, 5, (len(ids),), generator=generator)] = (5 + image_index).int()
    return split, CaptionSplit(image_index, ids)


def _match_model(seed: int = 0):
    model = tiny_vlm(seed)
    torch.manual_seed(seed)
    return type(model)(model.config.model_copy(update={"heads": ("match",)}), SPEC, TOKENIZER, LABELS)


def test_a_model_learns_to_match() -> None:
    split, captions = _matching_data()
    model, unknown_CI = _match_model(), np.zeros((60, 12))
    objective = MatchObjective(model).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    section = RetrievalSection(steps=1, fusion=Choice(name="test-fusion"))  # pyright: ignore[reportCallIssue]
    before = evaluate_retrieval(model, split, captions, unknown_CI, section)
    for step in range(250):
        rows = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:32]
        wrong = task.draw_negatives(captions.image_index, rows, 0)
        pairs = torch.cat([rows, wrong[0]]), torch.cat([captions.image_index[rows], wrong[1]])
        fits = torch.cat([torch.ones(32), torch.zeros(32)]).long()
        loss, _ = objective(pairs_batch(model, split, captions, *pairs, fits))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = evaluate_retrieval(model, split, captions, unknown_CI, section)
    assert before["ir@1"] < 0.4 and after["ir@1"] > 0.8 and after["tr@1"] > 0.8
    assert after["passes_per_caption"] == 12


def test_shortlisted_scores_are_those_of_all_pairs() -> None:
    split, captions = _matching_data(6, 2)
    model = _match_model()
    everything = score_pairs(model, split, captions, np.ones((12, 6), bool), batch_size=7)
    wanted = np.random.default_rng(0).random((12, 6)) < 0.4
    some = score_pairs(model, split, captions, wanted, batch_size=5)
    np.testing.assert_allclose(some[wanted], everything[wanted], atol=1e-5)  # other batches, other rounding
    assert (some[~wanted] == task.UNSCORED).all() and everything.min() > task.UNSCORED


def test_scores_are_those_of_one_pair_at_a_time() -> None:
    split, captions = _matching_data(4, 1)
    model = _match_model().eval()
    scores = score_pairs(model, split, captions, np.ones((4, 4), bool))
    with torch.no_grad():
        for caption in range(4):
            for image in range(4):
                regions = Regions(*(part[image : image + 1] for part in (split.features, split.boxes, split.scores)))
                logits = task.match_logits(model, regions, captions.input_ids[caption : caption + 1])[0]
                assert scores[caption, image] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)


def test_words_of_captions_are_those_of_the_dataset(tmp_path: Path) -> None:
    job = cached_job(tmp_path)
    captions = load_captions(job.inputs["regions"], "test")
    reader = open_reader(job.recipe.data, job.recipe.task, job.recipe.seed, None)
    expected = [(i, text) for i, sample in enumerate(reader.samples("test", 8)) for text in sample.captions]
    assert captions.image_index.tolist() == [i for i, _ in expected]
    folder = job.inputs["detector"]
    words = caption_words(captions, Tokenizer(folder / VOCABULARY, read_manifest(folder, Checkpoint).tokenizer))
    assert [" ".join(row) for row in words] == [text.replace(",", " ,").replace(".", " .") for _, text in expected]


def test_the_stage_leaves_a_checkpoint_that_matches(tmp_path: Path) -> None:
    job = cached_job(
        tmp_path, "retrieval={steps: 3, batch_size: 4, fusion: {name: test-fusion}, shortlist: 3}", stage="retrieval"
    )
    metrics = train_retrieval(job).metrics
    assert {"tr@1_test", "ir@10_val", "tags.ir@1_test"} <= set(metrics)
    assert 3 <= metrics["passes_per_caption_test"] < 8  # three images for the caption, and what its image's list adds
    model, manifest = vlm.load(job.out_dir)
    assert manifest.model.heads == ("match",) and model.match_head is not None


def test_without_its_section_the_stage_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no section 'retrieval'"):
        train_retrieval(detector_job(tmp_path))


def test_hard_negatives_come_from_the_near_images() -> None:
    image_C, near_IK = torch.arange(50).repeat_interleave(5), (torch.arange(50)[:, None] + torch.tensor([1, 2])) % 50
    rows = torch.arange(250)
    captions, images = task.draw_negatives(image_C, rows, 0, near_IK, hard=1.0)
    apart = (torch.where(captions == rows, images, image_C[captions]) - image_C[rows]) % 50
    assert set(apart.tolist()) == {1, 2}
    assert len(set((captions[captions != rows] % 5).tolist())) == 5  # any of the image's captions
    half = task.draw_negatives(image_C, rows, 0, near_IK, hard=0.5)
    apart = (torch.where(half[0] == rows, half[1], image_C[half[0]]) - image_C[rows]) % 50
    assert 90 < int(((apart == 1) | (apart == 2)).sum()) < 170  # 125 + 2 in 49 of the others; sigma 8


@given(
    images=st.lists(
        st.lists(st.sampled_from(["red", "blue", "star", "box", "large"]), max_size=5), min_size=2, max_size=9
    )
)
@settings(max_examples=50, deadline=None)
def test_near_images_are_those_with_the_most_similar_tags(images: list[list[str]]) -> None:
    index = task.TagIndex(images)
    scores, near = index.scores(images), index.near_images(2, chunk=3)
    for row, chosen in enumerate(near):
        others = [i for i in range(len(images)) if i != row]
        assert row not in chosen and len(set(chosen.tolist())) == min(2, len(others))
        expected = sorted((scores[row, i] for i in others), reverse=True)[: len(chosen)]
        assert sorted(scores[row, chosen], reverse=True) == pytest.approx(expected, abs=1e-6)


def test_fine_tuning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The fusion and the matching head are those of the start; the extractor is the run's."""
    first = cached_job(tmp_path, "retrieval={steps: 2, batch_size: 4, fusion: {name: test-fusion}}", stage="first")
    train_retrieval(first)
    section = first.recipe.retrieval.model_copy(update={"start": str(first.out_dir)})  # pyright: ignore
    model, _ = fine_tuning_model(first, section, ("match",))
    source = vlm.load(first.out_dir)[0].state_dict()
    for name, value in model.state_dict().items():
        if name.startswith(("fusion.", "match_head.", "tee.")):
            assert torch.equal(value, source[name]), name
