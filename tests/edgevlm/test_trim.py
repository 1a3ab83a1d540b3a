"""Stage `trim`: what a step draws, what the cost share counts, how the ladder is chosen, and the comparison."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgevlm.artifacts import WEIGHTS, Checkpoint, Rung, TrimConfig
from edgevlm.cli import app
from edgevlm.commands import redo
from edgevlm.compare.trim import WAYS, compare_trim
from edgevlm.compress import ladder
from edgevlm.compress.cost import fusion_macs
from edgevlm.compress.distil import distil
from edgevlm.compress.ladder import Candidate, pareto, search, spread
from edgevlm.compress.prune import prune
from edgevlm.compress.trim import TrimObjective, check_trim, cost_share, trim
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.trimmer import FULL, Trim, trim_of
from edgevlm.pipeline import run
from edgevlm.progress import Reporter
from edgevlm.recipe import TrimSection
from edgevlm.recipes import load_recipe
from edgevlm.stages import stages_of
from edgevlm.train.answering import predict, question_scores, train_teacher
from edgevlm.train.regions import AnswerBatch, RegionSplit
from tests.edgevlm.runs import SMALL, cached_job, job_for
from tests.edgevlm.tiny import tiny_ids, tiny_regions, tiny_vlm

FEW = ("teacher.steps=3", "distil.steps=3", "prune.steps=4", "prune.recover_steps=2", "prune.round_to=2")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of the stage `trim`."""
    folder = tmp_path_factory.mktemp("trim")
    job = cached_job(folder, *FEW, stage="teacher")
    train_teacher(job)
    inputs = {**job.inputs, "teacher": job.out_dir}
    for name, stage in (("distil", distil), ("prune", prune)):
        its_job = job_for(name, folder, job.recipe, inputs)
        stage(its_job)
        inputs = {**inputs, name: its_job.out_dir}
    return job_for("trim", folder, job.recipe, inputs)


def section(**changes: Any) -> TrimSection:
    return TrimSection.model_validate({"steps": 12, "rungs": 3, "layers": (0,), **changes})


def trimmed(job: Job, out: Path, **changes: Any) -> Checkpoint:
    """Run the stage with other settings into another folder."""
    out.mkdir(parents=True)
    new = TrimSection.model_validate({**job.recipe.trim.model_dump(), **changes})
    return trim(replace(job, recipe=job.recipe.model_copy(update={"trim": new}), out_dir=out))


def batch(rows: int = 6) -> AnswerBatch:
    regions = tiny_regions(rows)
    zeros = torch.zeros(rows, regions.scores_BN.shape[1], dtype=torch.uint8)
    return AnswerBatch(regions, tiny_ids(rows), torch.zeros(rows, dtype=torch.long), zeros, torch.zeros(rows))


def objective(**changes: Any) -> TrimObjective:
    model = tiny_vlm(trim=TrimConfig(layers=(0,), words=True))
    return TrimObjective(model, section(**changes), 0.0, seed=7)


def test_steps_take_turns_and_repeat() -> None:
    """Thresholds, fixed numbers, the full path; the same step draws the same, whenever it is asked."""
    made = objective()
    drawn = []
    for step in range(12):
        made.step = step
        drawn.append(made._draw(1.0, batch()))
        assert made._draw(1.0, batch()) == drawn[-1]
    assert all(t.threshold is not None and t.noise for t in drawn[0::3])
    assert all(t.threshold is None and t.regions and t.words for t in drawn[1::3])
    assert all(t == FULL for t in drawn[2::3])
    assert len({t.regions for t in drawn[1::3]}) > 1


def test_budgets_begin_with_everything_and_never_rise_from_layer_to_layer() -> None:
    made = objective(layers=(0, 1), least=0.1)
    made.step = 1
    assert made._draw(0.0, batch()).regions == (8, 8)
    for step in range(1, 300, 3):
        made.step = step
        trim = made._draw(1.0, batch())
        assert list(trim.regions) == sorted(trim.regions, reverse=True) and trim.regions[-1] >= 1
        assert list(trim.words) == sorted(trim.words, reverse=True) and trim.words[-1] >= 2


def test_the_budget_pulls_the_share_down() -> None:
    """Descending on the budget alone makes the thresholds drop tokens until the share is what was asked."""
    torch.manual_seed(0)
    made = objective(budget=0.5, steps=400, ramp=0.01, budget_weight=100.0)
    trimmers = made.model.fusion.trimmers
    assert trimmers is not None
    optimiser = torch.optim.Adam(trimmers.parameters(), lr=0.02)
    shares = []
    for step in range(0, 360, 3):
        made.step = step
        data = batch()
        answer = made.model.answer(data.regions, data.input_ids, made._draw(1.0, data))
        share = made._share(answer, data)
        optimiser.zero_grad()
        (share - 0.5).square().backward()
        optimiser.step()
        shares.append(share.item())
    assert shares[0] > 0.8, "training starts near full capacity"
    assert sum(shares[-10:]) / 10 == pytest.approx(0.5, abs=0.08)  # draws of some 60 tokens


def test_cost_share_is_that_of_the_fixed_numbers() -> None:
    """Rows without padding: the share of masked fixed numbers is the formula's."""
    model = tiny_vlm(trim=TrimConfig(layers=(0,), words=True))
    regions, ids = tiny_regions(3), tiny_ids(3, length=12)
    regions = regions._replace(scores_BN=torch.ones_like(regions.scores_BN))
    trim = Trim(regions=(3,), words=(5,), temperature=1.0)
    answer = model.answer(regions, ids, trim)
    share = cost_share(model.config.fusion, 32, answer, torch.full((3,), 12.0), torch.full((3,), 8.0))
    wanted = fusion_macs(model.config.fusion, 12, 8, 32, trim) / fusion_macs(model.config.fusion, 12, 8, 32)
    torch.testing.assert_close(share, torch.full((3,), wanted), rtol=1e-5, atol=0)


# --- the ladder --------------------------------------------------------------------------------------------------


def candidates(*pairs: tuple[int, float]) -> list[Candidate]:
    return [Candidate(Trim(num_words=i), macs, accuracy) for i, (macs, accuracy) in enumerate(pairs)]


def test_pareto_front() -> None:
    tried = candidates((100, 0.9), (80, 0.9), (80, 0.8), (50, 0.85), (60, 0.84), (20, 0.5))
    assert [(c.macs, c.accuracy) for c in pareto(tried)] == [(20, 0.5), (50, 0.85), (80, 0.9)]


def test_rungs_are_spread_by_cost_within_what_may_be_lost() -> None:
    tried = candidates((1000, 0.90), (640, 0.90), (320, 0.895), (160, 0.89), (80, 0.88), (40, 0.60))
    chosen = spread(pareto(tried), tried[0], section(rungs=4, max_loss=0.03))
    assert [c.macs for c in chosen] == [640, 160, 80] or [c.macs for c in chosen] == [640, 320, 80]
    assert spread(pareto(tried), tried[0], section(rungs=1)) == []
    assert [c.macs for c in spread(pareto(tried), tried[0], section(rungs=2, max_loss=0.012))] == [160]


def test_rungs_of_one_name_are_one(pruned: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets that round to the same percentage cannot both be programs."""
    manifest = read_manifest(pruned.inputs["prune"], Checkpoint)
    model, _ = vlm.load(pruned.inputs["prune"])
    close = candidates((1000, 0.90), (402, 0.89), (398, 0.885), (200, 0.88))
    tried = [replace(c, trim=FULL if i == 0 else Trim(num_words=6 - i, regions=(4,))) for i, c in enumerate(close)]
    monkeypatch.setattr(ladder, "search", lambda *args: tried)
    found = ladder.choose_ladder(model, manifest, pruned, section(rungs=4, max_loss=0.5))
    assert [rung.name for rung in found] == ["full", "m40", "m20"]


@pytest.mark.parametrize("policy", ["learned", "attention", "similarity"])
def test_the_search_walks_down_to_budgets_that_can_be(pruned: Job, policy: str) -> None:
    """Every budget that it tries costs less than the full one and never rises; the cheapest is cheap."""
    manifest = read_manifest(pruned.inputs["prune"], Checkpoint)
    words = policy != "similarity"
    fusion = manifest.model.fusion.model_copy(update={"trim": TrimConfig(layers=(0,), policy=policy, words=words)})  # pyright: ignore
    model = vlm.VLM(
        manifest.model.model_copy(update={"fusion": fusion}), manifest.preprocess, manifest.tokenizer, manifest.labels
    ).eval()
    split = RegionSplit.load(pruned.inputs["regions"], "val")
    tried = search(model, split, section(max_loss=0.9))
    assert tried[0].trim == FULL and len({c.trim for c in tried}) == len(tried)
    assert all(c.macs < tried[0].macs for c in tried[2:])
    for candidate in tried[1:]:
        numbers = [candidate.trim.num_regions or 0, *candidate.trim.regions]
        assert numbers == sorted(numbers, reverse=True) and numbers[-1] >= 1
    assert min(c.macs for c in tried) < (0.3 if words else 0.5) * tried[0].macs
    for candidate in tried[:: max(1, len(tried) // 5)]:
        assert candidate.accuracy == question_scores(predict(model, split, candidate.trim), split).mean()


# --- the stage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_a_ladder(pruned: Job, tmp_path: Path, way: str) -> None:
    manifest = trimmed(pruned, tmp_path / "out", **WAYS[way], rungs=3, steps=6, max_loss=0.5)
    assert manifest.rungs[0].name == "full" and len(manifest.rungs) >= 2
    costs = [rung.gmacs for rung in manifest.rungs]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    model, _ = vlm.load(tmp_path / "out")
    split = RegionSplit.load(pruned.inputs["regions"], "test")
    for rung in manifest.rungs:
        accuracy = question_scores(predict(model, split, trim_of(rung)), split).mean()
        assert manifest.metrics[f"accuracy_test@{rung.name}"] == pytest.approx(accuracy, abs=1e-9)


def test_a_named_ladder_is_taken_as_it_is(pruned: Job, tmp_path: Path) -> None:
    rungs = {"full": 8, "small": {"regions": [3], "words": [6], "num_words": 10, "num_regions": 6}}
    manifest = trimmed(pruned, tmp_path / "out", rungs=rungs, tune_steps=3)
    small = manifest.rungs[1]
    assert (small.regions, small.words, small.num_words, small.num_regions) == ((3,), (6,), 10, 6)


def test_a_stopped_stage_goes_on_to_the_same_weights(pruned: Job, tmp_path: Path) -> None:
    settings = {"steps": 9, "save_every": 2, "rungs": {"full": 8, "b4": 4}}
    trimmed(pruned, tmp_path / "whole", **settings)
    out = tmp_path / "stopped"
    out.mkdir()
    new = TrimSection.model_validate({**pruned.recipe.trim.model_dump(), **settings})
    job = replace(pruned, recipe=pruned.recipe.model_copy(update={"trim": new}), out_dir=out)
    with pytest.MonkeyPatch.context() as patch:
        forward = TrimObjective.forward

        def stop(self: TrimObjective, batch: AnswerBatch) -> Any:
            if self.step == 5:
                raise KeyboardInterrupt
            return forward(self, batch)

        patch.setattr(TrimObjective, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            trim(job)
    assert list(out.glob("*.safetensors")) or list(out.glob(".*.safetensors")), "a snapshot is left"
    trim(job)
    weights = [load_file(folder / WEIGHTS) for folder in (tmp_path / "whole", out)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": (1,)}, "something must follow"),
        ({"layers": (0, 0)}, "rising"),
        ({"layers": (-1,)}, "rising"),
        ({"head_layers": (2,)}, "counted from 0"),
        ({"context": 8}, "leaves no region"),
        ({"rungs": {"full": 7}}, "hands over 8"),
        ({"rungs": {"full": 8, "b2": 2}, "context": 2}, "Keep at least 3"),
        ({"rungs": {"full": 8, "b2": {"regions": [2], "words": [4]}}, "words": False}, "words are not trimmed"),
    ],
)
def test_impossible_trimming_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_trim(section(**changes), num_layers=2, num_regions=8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trim.rungs={full: 8, b5: 5, b6: 6}", "largest budget"),
        ("trim.rungs={full: 8, odd: {regions: [3, 5]}}", "must not rise"),
        ("trim.rungs={full: 8, odd: {regions: [5, 3]}}", "2 numbers of regions for 1"),
        ("trim.rungs={full: 8, none: {regions: [0]}}", "below 1"),
        ("trim.rungs={full: 8, w: {regions: [5], words: [1]}}", "at least 2 words"),
        ("trim.rungs=0", "at least the full one"),
        ("trim.budget=1.5", "less than 1"),
    ],
)
def test_budgets_that_cannot_be_are_refused_when_the_recipe_is_read(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("test-scenes", [override])


# --- the comparison ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to `prune`."""
    recipe = load_recipe("test-scenes", [*SMALL, *FEW, "trim.max_loss=0.6", "trim.steps=6"])
    out = tmp_path_factory.mktemp("compare") / "run"
    run(stages_of(recipe), recipe, out, until="prune")
    return out


def test_comparison_scores_every_rung_of_every_way(finished: Path) -> None:
    ways = ("learned", "similarity")
    found = compare_trim(finished, ways=ways, rungs=3, seeds=2)
    folder = finished / "compare-trim"
    for way in ways:
        static = [row for row in found.rows if row.way == way and row.ms]
        assert static[0].rung == "full" and all(row.ms["onnx fp32"] > 0 for row in static)
        assert all(len(row.accuracies) == 2 for row in static)
        ladders = [read_manifest(folder / f"{way}-{seed}" / "trim", Checkpoint).rungs for seed in (0, 1)]
        strip = [
            [Rung(**{**r.model_dump(), "gmacs": 0.0, "expected_accuracy": None}) for r in rungs] for rungs in ladders
        ]
        assert strip[0] == strip[1], "the seeds share the first one's ladder"
    dynamic = [row for row in found.rows if not row.ms]
    assert len(dynamic) == 3 and [row.mmacs for row in dynamic] == sorted((row.mmacs for row in dynamic), reverse=True)
    text = (folder / "trim.md").read_text()
    assert text.count("\n| ") == 2 + len(found.rows) and "| pruned |" in text
    assert (folder / "trim.png").stat().st_size > 10_000
    stamp = (folder / "learned-0" / "trim" / "manifest.json").stat().st_mtime
    shutil.rmtree(folder / "learned-1")
    assert compare_trim(finished, ways=("learned",), rungs=3, seeds=2).rows[0] == found.rows[0]
    timed = folder / "learned-0" / "latency-onnx-fp32.json"
    stale = {"checkpoint": "another", "rungs": {"full": {"answer_ms": 1e9, "image_and_answer_ms": 1e9}}}
    timed.write_text(json.dumps(stale))
    again = compare_trim(finished, ways=("learned",), rungs=3, seeds=1)
    assert again.rows[0].ms["onnx fp32"] < 1e6, "times of another checkpoint are measured again"
    assert (folder / "learned-0" / "trim" / "manifest.json").stat().st_mtime == stamp, "what is done stays"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ways": ("learnt",)}, "Did you mean"),
        ({"overrides": ("prune.steps=3",)}, "Override keys of the section trim"),
        ({"precisions": ("int8",)}, "no calibration set"),
    ],
)
def test_comparison_refuses(finished: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        compare_trim(finished, **settings)


def test_prune_and_trim_again_by_the_command_line(finished: Path, tmp_path: Path) -> None:
    """In a copy of the run: pruned less, then trimmed to a named ladder; what stands before is not done again."""
    again = tmp_path / "run"
    shutil.copytree(finished, again, symlinks=True)
    before = read_manifest(again / "prune", Checkpoint)
    stamp = (again / "distil" / WEIGHTS).stat().st_mtime_ns
    for arguments in (["prune", "--set", "prune.sparsity=0.2"], ["trim", "--set", "trim.rungs={full: 8, few: 3}"]):
        result = CliRunner().invoke(app, [arguments[0], str(again), *arguments[1:]])
        assert result.exit_code == 0, result.output
    assert read_manifest(again / "prune", Checkpoint).metrics["sparsity"] < before.metrics["sparsity"]
    trimmed = read_manifest(again / "trim", Checkpoint)
    assert trimmed.provenance.recipe["prune"]["sparsity"] == 0.2, "the settings of the pruned student are kept"
    assert [rung.name for rung in trimmed.rungs] == ["full", "few"]
    assert (again / "distil" / WEIGHTS).stat().st_mtime_ns == stamp
    with pytest.raises(RecipeError, match="Override keys of the section trim only"):
        redo(again, "trim", ["prune.sparsity=0.5"], None, Reporter())
    with pytest.raises(CheckpointError, match="distil"):
        redo(tmp_path / "nowhere", "prune", [], None, Reporter())
