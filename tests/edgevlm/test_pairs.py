"""Sentences about two images: consistency on NLVR2's own files with answers made so that it is known, and the stage."""

import json
import os
import random
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgevlm.data
from edgevlm.artifacts import Labels
from edgevlm.data.sample import Text
from edgevlm.errors import DataError, RecipeError
from edgevlm.models import vlm
from edgevlm.models.heads import PairHead
from edgevlm.models.tee import Regions
from edgevlm.tasks import pairs
from edgevlm.train.answering import batch_of
from edgevlm.train.pairs import PairObjective, pair_logits, train_pairs
from edgevlm.train.regions import RegionSplit
from tests.edgevlm.runs import Made, cached_job, made_sample, noise
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_ids, tiny_regions, tiny_vlm


@pytest.mark.data
@pytest.mark.parametrize("name", ["balanced_dev", "balanced_test1"])
def test_consistency_on_nlvr2s_files(name: str) -> None:
    """All right but one item in each of `broken` sentences: consistency is 1 - broken / sentences, exactly."""
    if "EDGEVLM_DATA" not in os.environ:
        pytest.skip("EDGEVLM_DATA does not name a folder with loader_samples/nlvr2")
    path = Path(os.environ["EDGEVLM_DATA"]) / "loader_samples" / "nlvr2" / f"{name}.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def sentence(row: dict) -> tuple[str, ...]:
        split, group, _, number = row["identifier"].split("-")
        return split, group, number

    chosen = random.Random(0)
    sentences = {key: list(items) for key, items in groupby(sorted(rows, key=sentence), key=sentence)}
    assert all(len({item["sentence"] for item in items}) == 1 for items in sentences.values())
    assert max(map(len, sentences.values())) == 4
    broken = chosen.sample(sorted(sentences), 100)
    wrong = {chosen.choice(sentences[key])["identifier"] for key in broken}
    right = np.array([row["identifier"] not in wrong for row in rows])
    groups = pairs.group_index([row["identifier"] for row in rows], [row["sentence"] for row in rows])
    assert len(set(groups.tolist())) == len(sentences)
    assert pairs.consistency(right, groups) == pytest.approx(1 - 100 / len(sentences))


@given(right=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_consistency_is_the_definition(right: list[tuple[bool, int]]) -> None:
    flags, groups = np.array([r for r, _ in right]), np.array([g for _, g in right])
    whole = [all(r for r, g in right if g == group) for group in set(groups.tolist())]
    assert pairs.consistency(flags, groups) == pytest.approx(sum(whole) / len(whole))


def test_other_datasets_group_by_the_sentence() -> None:
    index = pairs.group_index(["x1", "x2", "x3"], ["A dog.", "a  dog.", "A cat."])
    assert index[0] == index[1] != index[2]


@pytest.mark.parametrize(("num_layers", "linears"), [(1, 1), (2, 2), (3, 3)])
def test_pair_head_has_as_many_layers_as_asked(num_layers: int, linears: int) -> None:
    head = PairHead(16, 2, num_layers)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head.layers) == linears
    assert head(torch.zeros(3, 16), torch.ones(3, 16)).shape == (3, 2)


def _pair_model():
    model = tiny_vlm()
    torch.manual_seed(0)
    return type(model)(model.config.model_copy(update={"heads": ("pair",)}), SPEC, TOKENIZER, LABELS).eval()


def _pair_split(num_images: int = 6) -> RegionSplit:
    """Every ordered pair of different images; answer 1 if the left one shows less of feature 0."""
    regions = tiny_regions(num_images)
    features = regions.features_BND.clone()
    features[..., 0] = torch.arange(num_images).float()[:, None] - num_images / 2
    left, right = torch.cartesian_prod(torch.arange(num_images), torch.arange(num_images)).T
    left, right = left[left != right], right[left != right]
    ids = tiny_ids(1).expand(len(left), -1).contiguous()
    return RegionSplit(
        features,
        regions.boxes_norm_BN4,
        torch.full_like(regions.scores_BN, 0.9),
        left,
        ids,
        (left < right).long(),
        torch.zeros(len(left), 8, dtype=torch.uint8),
        torch.zeros(len(left), dtype=torch.uint8),
        [""] * len(left),
        second_index=right,
        group_index=torch.zeros_like(left),
    )


def test_each_pass_sees_its_own_image() -> None:
    model, split = _pair_model(), _pair_split()
    with torch.no_grad():
        batch = batch_of(model, split, torch.arange(4))
        logits = pair_logits(model, batch)
        for row in range(4):
            sides = []
            for image in (split.image_index[row], split.second_index[row]):  # pyright: ignore
                regions = Regions(split.features[image][None], split.boxes[image][None], split.scores[image][None])
                sides.append(model.fuse(regions, split.input_ids[row : row + 1]).pooled_BD)
            expected = model.pair_head(*sides)  # pyright: ignore
            torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-5, rtol=0)  # other batch, other sums
        swapped = batch._replace(regions=batch.second, second=batch.regions)
        assert not torch.allclose(pair_logits(model, swapped), logits, atol=1e-3)


def test_a_model_learns_which_image_shows_more() -> None:
    model, split = _pair_model(), _pair_split()
    objective = PairObjective(model).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(80):
        loss, _ = objective(batch_of(model, split, torch.arange(len(split.answers))))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    _, logs = objective(batch_of(model.eval(), split, torch.arange(len(split.answers))))
    assert logs["accuracy"] > 0.95


def test_single_images_are_refused() -> None:
    model, split = _pair_model(), replace(_pair_split(), second_index=None)
    with pytest.raises(DataError, match="single images"):
        pair_logits(model, batch_of(model, split, torch.arange(2)))


def test_the_stage_reads_both_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images to a checkpoint: the cache holds left and right rows, and the consistency is over two sentences."""

    def made(first: int, count: int):
        for i in range(first, first + count):
            text = Text(f"sentence {(i // 4)}", ("false", "true")[i % 2])
            yield replace(made_sample(i, text, second=noise(100 + i)), id=f"dev-{i // 4}-{i % 4}-0")

    labels = Labels(classes=("a",), attributes=("b",), answers=("false", "true"))
    reader = Made(labels, {"train": list(made(0, 16)), "val": list(made(16, 8)), "test": list(made(24, 8))})
    monkeypatch.setitem(edgevlm.data.READERS, "scenes", lambda *_: reader)
    job = cached_job(
        tmp_path, "task=reasoning", "pairs={steps: 3, batch_size: 4, fusion: {name: test-fusion}}", stage="pairs"
    )
    split = RegionSplit.load(job.inputs["regions"], "test")
    assert split.scores.shape[0] == 16 and split.second_index is not None and split.group_index is not None
    assert split.second_index.tolist() == list(range(8, 16))
    assert np.unique(split.group_index, return_inverse=True)[1].tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    metrics = train_pairs(job).metrics
    assert metrics["majority_test"] == 0.5 and metrics["consistency_test"] in (0.0, 0.5, 1.0)
    assert vlm.load(job.out_dir)[1].model.answer_dropout == 0.3


def test_without_its_section_the_stage_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no section 'pairs'"):
        train_pairs(cached_job(tmp_path))
