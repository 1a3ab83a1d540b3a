"""Each term of distillation against its formula, the layer maps, and the stage `distil` with and without a live teacher."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from edgevlm import stages
from edgevlm.artifacts import WEIGHTS, Checkpoint
from edgevlm.compress import distil as stage
from edgevlm.compress.distil import Distiller, DistilObjective, check_distil, layer_map, published, start_from_teacher
from edgevlm.errors import CheckpointError, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest
from edgevlm.models import vlm
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM
from edgevlm.progress import Reporter
from edgevlm.recipe import DistilSection
from edgevlm.recipes import load_recipe
from edgevlm.stages import stages_of
from edgevlm.tasks.distillation import NCE_TEMPERATURE, StateContrast, attention_loss, logit_loss
from edgevlm.train.answering import train_teacher
from edgevlm.train.loop import fit
from edgevlm.train.regions import AnswerBatch
from edgevlm.train.teachers import open_live
from tests.edgevlm.runs import SMALL, cached_job, job_for
from tests.edgevlm.tiny import tiny_ids, tiny_regions, tiny_vlm


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- terms -------------------------------------------------------------------------------------------------------


def test_logits_are_compared_by_their_divergence() -> None:
    """Against the definition, answer by answer, in double precision."""
    student, teacher = numbers(5, 7).double(), numbers(5, 7, seed=1).double()
    p, q = teacher.softmax(1), student.softmax(1)
    expected = sum((p[i, a] * (p[i, a] / q[i, a]).log()).item() for i in range(5) for a in range(7)) / 5
    assert logit_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert logit_loss(student[:0], teacher[:0]) == 0


def test_an_answer_that_is_ruled_out_adds_nothing() -> None:
    """-1e4 stands for no probability: what is left is the divergence of the others, with all of the student's answers."""
    student, teacher = numbers(3, 4), numbers(3, 4, seed=1)
    teacher[:, 2] = -1e4
    p, q = teacher.softmax(1), student.softmax(1)
    kept = [0, 1, 3]
    expected = (p[:, kept] * (p[:, kept] / q[:, kept]).log()).sum() / 3
    torch.testing.assert_close(logit_loss(student, teacher), expected)


def test_attention_is_compared_head_by_head_where_it_can_be() -> None:
    student, teacher = numbers(2, 4, 6, 6).softmax(-1), numbers(2, 4, 6, 6, seed=1).softmax(-1)
    expected = 6 * ((student - teacher) ** 2).mean()
    torch.testing.assert_close(attention_loss(student, teacher), expected)
    shuffled = teacher[:, [1, 0, 3, 2]]
    assert attention_loss(shuffled, teacher) > 1e-3, "which head is which counts"
    fewer = student[:, :3]
    expected = 6 * ((fewer.mean(1) - teacher.mean(1)) ** 2).mean()
    torch.testing.assert_close(attention_loss(fewer, teacher), expected)


def test_distilling_from_oneself_costs_nothing() -> None:
    model = tiny_vlm()
    distiller = Distiller(model, model, 1.0, 1.0)
    assert not list(distiller.parameters()), "equal widths are compared as they are"
    with torch.no_grad():
        a = model.answer(tiny_regions(3), tiny_ids(3))
        b = model.answer(tiny_regions(3, seed=5), tiny_ids(3))
        assert distiller(a.logits_BA, a.fusion, a.logits_BA, a.fusion).item() == pytest.approx(0.0, abs=1e-6)
        assert distiller(a.logits_BA, a.fusion, b.logits_BA, b.fusion).item() > 1e-3


@pytest.mark.parametrize(("layers", "pairs"), [("even", [(0, 1), (1, 2)]), ((0, 2), [(0, 0), (1, 2)])])
@pytest.mark.parametrize(("hidden", "attention"), [(0.7, 1.3), (0.0, 2.0), (0.4, 0.0)])
def test_the_distiller_is_the_weighted_sum_of_means_over_layers(
    two_models: tuple[VLM, VLM], layers: Any, pairs: list[tuple[int, int]], hidden: float, attention: float
) -> None:
    """Two student layers of width 32 under three teacher layers of width 48, written out."""
    student, teacher = two_models
    distiller = Distiller(student, teacher, hidden, attention, layers)
    with torch.no_grad():
        a, b = (model.answer(tiny_regions(3), tiny_ids(3)) for model in two_models)
        expected = F.kl_div(a.logits_BA.log_softmax(1), b.logits_BA.softmax(1), reduction="batchmean")
        num_keys = a.fusion.attention_BHTT[0].shape[-1]
        for i, j in pairs:
            maps = a.fusion.attention_BHTT[i], b.fusion.attention_BHTT[j]
            expected += attention / 2 * num_keys * (maps[0] - maps[1]).square().mean()
        for (i, j), linear in zip([(0, 0), *((i + 1, j + 1) for i, j in pairs)], distiller.projections, strict=False):
            states = linear(a.fusion.hidden_BTD[i]), b.fusion.hidden_BTD[j]
            expected += hidden / 3 * (states[0] - states[1]).square().mean()
        found = distiller(a.logits_BA, a.fusion, b.logits_BA, b.fusion)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # the same sums in another order
    assert len(distiller.projections) == (3 if hidden else 0)


@pytest.fixture(scope="module")
def two_models() -> tuple[VLM, VLM]:
    return tiny_vlm(), tiny_vlm(1, hidden=48, layer_heads=(2, 2, 2), layer_ffn=(64, 64, 64))


def test_the_teacher_has_no_gradient_and_no_dropout() -> None:
    student, teacher = tiny_vlm(0).train(), tiny_vlm(1, dropout=0.5).train()
    section = DistilSection(fusion={"name": "x"}, steps=1, kd_weight=1.0, hidden_weight=1.0, attention_weight=1.0)  # pyright: ignore
    objective = DistilObjective(student, teacher, section, 0.0)
    losses = [objective(a_batch(4)) for _ in range(2)]
    assert torch.equal(losses[0][0], losses[1][0])
    losses[0][0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.fusion.layers[0].ffn_in.weight.grad.abs().sum() > 0  # pyright: ignore
    assert not any("teacher" in name for name in objective.state_dict()), "snapshots leave it out"


def a_batch(rows: int, seed: int = 0) -> AnswerBatch:
    regions = tiny_regions(rows, seed)
    answers = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(rows, 8, dtype=torch.uint8)
    return AnswerBatch(regions, tiny_ids(rows, seed=seed), answers, none, none[:, 0])


# --- layer maps --------------------------------------------------------------------------------------------------


def test_layer_map_two_to_one_is_the_published_one() -> None:
    """EfficientVLM: attention map of student i comes from teacher 2i + 1."""
    assert layer_map(3, 6) == [1, 3, 5]
    assert layer_map(3, 4) == [0, 2, 3]
    assert layer_map(4, 4) == [0, 1, 2, 3]


@given(teacher=st.integers(1, 24), data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_even_map_rises_through_the_teacher_to_its_last_layer(teacher: int, data: st.DataObject) -> None:
    student = data.draw(st.integers(1, teacher))
    layers = layer_map(student, teacher)
    assert len(layers) == student
    assert all(a < b for a, b in zip(layers, layers[1:], strict=False))
    assert layers[0] >= 0 and layers[-1] == teacher - 1
    assert layer_map(student, teacher, tuple(layers)) == layers


@pytest.mark.parametrize(
    ("depths", "asked", "said"),
    [
        ((3, 6), (1, 3), "needs 3 teacher layers"),
        ((3, 6), (1, 3, 6), "from 0 to 5"),
        ((3, 6), (3, 1, 5), "none before its predecessor"),
        ((3, 6), (), r"for example \[1, 3, 5\]"),
        ((4, 2), "even", "student of 4 layers cannot spread over the 2"),
        ((4, 2), (0, 0, 1, 2), "Repeat some layers"),
    ],
)
def test_a_layer_map_that_does_not_fit_is_one_line(depths: tuple[int, int], asked: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        layer_map(*depths, asked)


def test_a_deeper_student_may_repeat_layers() -> None:
    assert layer_map(4, 2, (0, 0, 1, 1)) == [0, 0, 1, 1]


def test_a_wrong_map_is_noticed_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="layer_map"):
        load_recipe("test-scenes", ["distil.layer_map=[0, -1]"])
    for section in ("distil", "prune"):
        recipe = load_recipe("test-scenes", [f"{section}.layer_map=[0]"])
        with pytest.raises(RecipeError, match="needs 2 teacher layers"):
            check_distil(recipe)
    check_distil(load_recipe("test-scenes", ["distil.layer_map=[0, 1]"]))


def test_a_student_starts_from_the_layers_that_it_imitates() -> None:
    student = tiny_vlm()
    teacher = tiny_vlm(1, layer_heads=(2, 2, 2), layer_ffn=(64, 64, 64))
    start_from_teacher(student, teacher, (0, 1))
    for mine, theirs in ((0, 0), (1, 1)):
        ours, other = (m.fusion.layers[i].state_dict() for m, i in ((student, mine), (teacher, theirs)))
        assert all(torch.equal(ours[name], other[name]) for name in other)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kd", "per_layer", "layers"), [("vqa", 0.4, 0.5, 3), ("reasoning", 0.2, 0.33 * 0.5, 6)]
)
def test_open_weights_are_the_published_ones(task: str, kd: float, per_layer: float, layers: int) -> None:
    """EfficientVLM sums its cross encoder's terms over so many layers at that weight; here they are means."""
    recipe = load_recipe("test-scenes", [f"task={task}"])
    section = published(recipe.distil, recipe)
    assert section.kd_weight == kd
    assert section.attention_weight == section.hidden_weight == pytest.approx(per_layer * layers)


def test_a_weight_of_the_recipe_wins() -> None:
    recipe = load_recipe("test-scenes", ["distil.hidden_weight=0", "distil.kd_weight=0.9"])
    section = published(recipe.distil, recipe)
    assert (section.kd_weight, section.hidden_weight, section.attention_weight) == (0.9, 0.0, 1.5)


def test_written_logits_and_layers_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="need the live teacher"):
        load_recipe("test-scenes", ["distil.precompute=true", "distil.attention_weight=1"])
    with pytest.raises(RecipeError, match=r"needs teacher_outputs\.pooled"):
        load_recipe("test-scenes", ["distil.precompute=true", "distil.nce_weight=0.1"])
    recipe = load_recipe("test-scenes", ["distil.precompute=true"])
    section = published(recipe.distil, recipe)
    assert (section.attention_weight, section.hidden_weight) == (0, 0)


# --- contrast ----------------------------------------------------------------------------------------------------


def test_the_contrast_is_its_definition_over_a_queue() -> None:
    """Against a plain loop with a Python list as the queue; five steps over a queue of 7."""
    contrast = StateContrast(6, 6, 7)
    queue: list[Tensor] = []
    for step in range(5):
        student, teacher = F.normalize(numbers(3, 6, seed=step)), F.normalize(numbers(3, 6, seed=50 + step))
        losses = []
        for s, t in zip(student, teacher, strict=True):
            scores = [float(s @ t) / NCE_TEMPERATURE, *(float(s @ other) / NCE_TEMPERATURE for other in queue)]
            losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[0])
        found = contrast(4.0 * student, 0.1 * teacher)  # lengths do not count
        assert found.item() == pytest.approx(sum(losses) / 3, abs=1e-4)
        queue = [*queue, *teacher][-7:]
        kept = {tuple(row.tolist()) for row in contrast.queue_KD if row.abs().sum() > 0}
        assert {tuple(round(x, 5) for x in row) for row in kept} == {
            tuple(round(x, 5) for x in row.tolist()) for row in queue
        }
    assert int(contrast.num_seen) == 15


def test_a_batch_larger_than_the_queue_leaves_its_end() -> None:
    contrast = StateContrast(4, 4, 3)
    states = F.normalize(numbers(5, 4))
    contrast.enqueue(states)
    assert torch.equal(contrast.queue_KD[contrast.queue_KD[:, 0].argsort()], states[2:][states[2:, 0].argsort()])


def test_the_contrast_pulls_the_student_to_its_own_teacher() -> None:
    torch.manual_seed(0)
    contrast, teacher = StateContrast(4, 8, 64), numbers(16, 8)
    contrast.enqueue(F.normalize(numbers(64, 8, seed=3)))
    student = torch.nn.Parameter(numbers(16, 4, seed=1))
    optimiser = torch.optim.Adam([student, *contrast.parameters()], lr=0.05)
    first = None
    for _ in range(150):
        loss = contrast(student, teacher)
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5 * first  # pyright: ignore


class Killed(Exception):
    pass


def train_with_contrast(folder: Path, kill_at: int | None = None) -> dict[str, Tensor]:
    student, teacher = tiny_vlm(0, dropout=0.2).train(), tiny_vlm(1)
    settings: dict[str, Any] = {"fusion": {"name": "x"}, "steps": 12, "batch_size": 8, "save_every": 5}
    weights = {"kd_weight": 0.5, "hidden_weight": 0.5, "attention_weight": 0.5, "nce_weight": 0.3, "nce_queue": 20}
    section = DistilSection(**settings, **weights)
    torch.manual_seed(7)
    objective = DistilObjective(student, teacher, section, 0.0)
    data = a_batch(40)

    def make_batch(rows: Tensor) -> dict[str, AnswerBatch]:
        return {"batch": AnswerBatch(Regions(*(part[rows] for part in data.regions)), *(x[rows] for x in data[1:5]))}

    def before_step(step: int) -> None:
        if step == kill_at:
            raise Killed

    where: dict[str, Any] = {"what": "distil", "work_dir": folder, "key": "k", "seed": 1, "reporter": Reporter()}
    fit(objective, 40, make_batch, section, before_step=before_step, **where)
    return objective.state_dict()


@pytest.mark.parametrize("kill_at", [7, 10])
def test_killed_and_resumed_with_a_queue_equals_uninterrupted_bitwise(tmp_path: Path, kill_at: int) -> None:
    whole = train_with_contrast(tmp_path / "whole")
    with pytest.raises(Killed):
        train_with_contrast(tmp_path / "cut", kill_at)
    resumed = train_with_contrast(tmp_path / "cut")
    assert int(whole["contrast.num_seen"]) == 12 * 8 and whole["contrast.queue_KD"].abs().sum() > 0
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- teachers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job behind a run's own teacher, of two training steps."""
    job = cached_job(tmp_path_factory.mktemp("trained"), "teacher.steps=2", stage="teacher")
    train_teacher(job)
    return job


def with_recipe(job: Job, folder: Path, stage_name: str, *overrides: str) -> Job:
    """A job of a later stage of the same run, with changes to the recipe."""
    recipe = load_recipe("test-scenes", [*SMALL, *overrides])
    return job_for(stage_name, folder, recipe, {**job.inputs, "teacher": job.out_dir})


def test_a_named_checkpoint_stands_in_for_the_teacher(trained: Job, tmp_path: Path) -> None:
    """It is taken weight by weight, and measured on this run's data."""
    job = with_recipe(trained, tmp_path, "teacher", f"distil.teacher={trained.out_dir}")
    taken = stages.teacher(job)
    theirs = read_manifest(trained.out_dir, Checkpoint)
    assert taken.metrics == theirs.metrics and taken.provenance.stage == "teacher"
    assert taken.files[WEIGHTS] == theirs.files[WEIGHTS]
    assert stages_of(job.recipe)[3].sections[-1] == "distil.teacher"
    check_distil(job.recipe)
    with pytest.raises(RecipeError, match="layer_map"):
        check_distil(load_recipe("test-scenes", [f"distil.teacher={trained.out_dir}", "distil.layer_map=[0]"]))


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("labels", {"labels": {"answers": ("no", "yes")}}),
        ("tokenizer", {"tokenizer": {"vocab_sha256": "0" * 64}}),
        ("preprocess", {"preprocess": {"resize": "letterbox"}}),
    ],
)
def test_a_teacher_of_another_language_is_refused(
    trained: Job, tmp_path: Path, what: str, changed: dict[str, dict[str, Any]]
) -> None:
    ours = read_manifest(trained.out_dir, Checkpoint)
    for name, update in changed.items():
        ours = ours.model_copy(update={name: getattr(ours, name).model_copy(update=update)})
    job = with_recipe(trained, tmp_path, "distil")
    with pytest.raises(CheckpointError, match=f"has other {what} than the student"):
        stage.load_teacher(job, ours)


def test_a_teacher_of_another_extractor_is_refused(trained: Job) -> None:
    detector, manifest = vlm.load(trained.inputs["detector"])
    open_live(trained.out_dir, detector, manifest)
    with torch.no_grad():
        next(detector.tee.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match="another extractor"):
        open_live(trained.out_dir, detector, manifest)


def test_the_stage_follows_its_recipe(trained: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every term on, all open weights are published ones, and what is saved is the student alone."""
    seen: list[DistilObjective] = []

    class Watched(DistilObjective):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            seen.append(self)

    monkeypatch.setattr(stage, "DistilObjective", Watched)
    job = with_recipe(trained, tmp_path, "distil", "distil.nce_weight=0.2", "distil.nce_queue=32", "distil.steps=3")
    manifest = stage.distil(job)
    (objective,) = seen
    assert (objective.kd_weight, objective.nce_weight) == (0.4, 0.2)
    (term,) = objective.distiller.terms
    assert term.attention_weight == term.hidden_weight == 1.5
    assert objective.contrast is not None and int(objective.contrast.num_seen) == 3 * 16
    assert set(load_file(job.out_dir / WEIGHTS)) == set(vlm.build(manifest).state_dict())
