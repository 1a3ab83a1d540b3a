"""Budgets in milliseconds: tables, what lies between their points, the pieces that are measured, and the closed loop."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.artifacts import Checkpoint, DeviceFacts, LatencyTable, PieceTimes, Provenance, Structure
from edgevlm.bench import latency
from edgevlm.bench.latency import Times, measure_table, take_turns
from edgevlm.compress import prune as pruning
from edgevlm.compress.latency import LatencyModel, grid, interpolate, latency_model, monotone
from edgevlm.compress.prune import CHOSEN, prune
from edgevlm.compress.shrink import fill_budget
from edgevlm.compress.structure import TRAINED
from edgevlm.errors import RecipeError, TargetError
from edgevlm.job import Job
from edgevlm.manifests import write_manifest
from edgevlm.models import vlm
from edgevlm.models.groups import Group, groups_of
from edgevlm.models.vlm import VLM
from edgevlm.recipes import load_recipe, time_budget
from edgevlm.stages import stages_of
from targets.pieces import Example, groups_in, pieces_of, program_of
from targets.source import CalibrationData
from tests.edgevlm.test_prune import distilled  # noqa: F401  (a fixture)
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, dual_vlm, tiny_ids, tiny_vlm

DEVICE = DeviceFacts(name="d", system="s", processor="p", num_cores=1, memory_gb=1.0, threads=1)
WHERE = Provenance(stage="latency", key="k")


def table_of(pieces: dict[str, PieceTimes], whole: float) -> LatencyTable:
    return LatencyTable(
        provenance=WHERE, target="onnx", precision="fp32", threads=1, device=DEVICE, whole_ms=whole, pieces=pieces
    )


def measured(groups: tuple[str, ...], points: tuple[tuple[int, ...], ...], ms: Callable[..., float]) -> PieceTimes:
    return PieceTimes(groups=groups, points=points, ms=tuple(ms(*sizes) for sizes in itertools.product(*points)))


# --- between the points ------------------------------------------------------------------------------------------


@given(st.integers(4, 300), st.integers(8, 300), st.floats(0.001, 2), st.floats(0, 0.01))
def test_a_product_of_widths_is_met_exactly_everywhere(a: int, b: int, fixed: float, slope: float) -> None:
    """A convolution's multiply-adds are a product of two widths; between four points that is no approximation."""

    def truth(x: float, y: float) -> float:
        return fixed + slope * x * y + 0.001 * x

    piece = measured(("a", "b"), ((2, 150, 301), (4, 301)), truth)
    assert interpolate(piece, [a, b]) == pytest.approx(truth(a, b), rel=1e-9)


def test_slopes_are_those_of_the_segment() -> None:
    piece = measured(("a",), ((8, 16, 64),), {8: 1.0, 16: 1.4, 64: 5.0}.__getitem__)
    for count, slope in ((4.0, 0.05), (10.0, 0.05), (16.5, 0.075), (63.0, 0.075), (64.0, 0.075)):
        x = torch.tensor(count, requires_grad=True)
        interpolate(piece, [x]).backward()
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(slope, abs=1e-6)


@given(st.lists(st.floats(0.01, 10), min_size=12, max_size=12))
def test_noise_does_not_make_a_smaller_piece_dearer(times: list[float]) -> None:
    piece = PieceTimes(groups=("a", "b"), points=((1, 2, 4), (8, 16, 24, 32)), ms=tuple(times))
    smooth = monotone(piece)
    table = np.array(smooth.ms).reshape(3, 4)
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert smooth.ms[-1] == times[-1], "the whole was measured against the whole model"
    assert monotone(smooth) == smooth


@given(st.integers(1, 4000), st.integers(2, 6), st.sampled_from([1, 2, 8, 16]))
def test_sizes_to_measure(size: int, points: int, step: int) -> None:
    chosen = grid(size, points, step)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) <= points
    assert chosen[0] == min(step, size) and chosen[-1] == size
    assert all(value % step == 0 for value in chosen[:-1] if size >= step)


def model_of(pieces: dict[str, PieceTimes], whole: float) -> LatencyModel:
    sizes = {
        name: points[-1] for piece in pieces.values() for name, points in zip(piece.groups, piece.points, strict=True)
    }
    return latency_model(table_of(pieces, whole), sizes)


def test_the_whole_costs_what_was_measured_and_less_what_its_pieces_save() -> None:
    a = measured(("x",), ((8, 32),), lambda n: 0.1 * n)
    b = measured(("x", "y"), ((8, 32), (8, 64)), lambda n, m: 0.001 * n * m)
    model = model_of({"a": a, "b": b}, 20.0)
    assert model.of({}) == 20.0 == model.whole
    assert model.of({"x": 16}) == pytest.approx(20 - 1.6 - 0.001 * 16 * 64)
    assert model.of({"y": 32}) == pytest.approx(20 - 0.001 * 32 * 32)
    own = model.only(["y"])
    assert own.whole == pytest.approx(0.001 * 32 * 64) and own.of({"y": 8}) == pytest.approx(0.001 * 32 * 8)
    assert model.show(1.23456) == "1.23 ms"


@given(st.floats(0.36, 0.99), st.integers(0, 5))
def test_a_structure_never_takes_more_than_the_budget(share: float, seed: int) -> None:
    groups = [Group("x", "vision", 32, (), ()), Group("heads.0", "fusion", 6, (), ())]
    a = measured(("x",), ((8, 16, 32),), lambda n: 0.1 * n + 0.5 * (n > 16))
    b = measured(("heads.0",), ((1, 3, 6),), lambda n: 0.2 * n)
    model = model_of({"a": a, "b": b}, 6.0)
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.size, generator=generator) for g in groups}

    def wanted(level: float) -> dict[str, float]:
        return {g.name: g.size / (1 + np.exp(-level)) for g in groups}

    kept = fill_budget(groups, model, 6.0 * share, 8, wanted, scores)
    assert model.of({name: len(members) for name, members in kept.items()}) <= 6.0 * share * (1 + 1e-9)
    with pytest.raises(RecipeError, match=r"1 ms is below the least that can be kept, 2.1 ms of 6 ms"):
        fill_budget(groups, model, 1.0, 8, wanted, scores)


# --- the pieces --------------------------------------------------------------------------------------------------


def example() -> Example:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, SPEC.height, SPEC.width), generator=generator).float()
    return Example(pixels, tiny_ids(1, TOKENIZER.max_tokens).long())


@torch.no_grad()
def seen(model: VLM, path: str) -> list[Tensor]:
    """What a module gives in a run of the whole model, all tensors of it."""
    found: list[Tensor] = []

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        found.clear()
        queue = [output]
        while queue:
            value = queue.pop(0)
            if isinstance(value, Tensor):
                found.append(value.clone())
            elif isinstance(value, list | tuple):
                queue = [*value, *queue]

    handle = model.get_submodule(path).register_forward_hook(note)
    model.answer(model.encode(example().pixels_BCHW), example().input_ids_BL)
    handle.remove()
    return found


@pytest.mark.parametrize("number", range(len(pieces_of(tiny_vlm()))))
def test_a_piece_computes_what_it_computes_in_the_model(number: int) -> None:
    model = tiny_vlm()
    piece, groups = pieces_of(model)[number], groups_of(model)
    program = program_of(model, piece, groups, {}, "p", example())
    with torch.no_grad():
        found = program.module(*program.inputs.values())
    expected = [tensor for path in piece.modules for tensor in seen(model, path)]
    assert expected
    for mine, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_every_group_is_in_a_piece_and_a_smaller_piece_has_fewer_weights() -> None:
    model = tiny_vlm()
    groups = groups_of(model)
    pieces = pieces_of(model)
    covered = {group.name for piece in pieces for group in groups_in(piece, groups)}
    assert covered == {group.name for group in groups}
    for piece in pieces:
        inside = groups_in(piece, groups)
        sizes = [
            sum(p.numel() for p in program_of(model, piece, groups, members, "p", example()).module.parameters())
            for members in ({}, {group.name: max(1, group.size // 2) for group in inside})
        ]
        assert sizes[1] < sizes[0] or not inside, piece.name


# --- measuring ---------------------------------------------------------------------------------------------------


def few_samples() -> CalibrationData:
    images = example().pixels_BCHW.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return CalibrationData(np.repeat(images, 2, 0), np.repeat(tiny_ids(1).numpy(), 2, 0))


def manifest_of(model: VLM) -> Checkpoint:
    facts = {"preprocess": SPEC, "tokenizer": TOKENIZER, "labels": LABELS}
    return Checkpoint(provenance=WHERE, model=model.config, task="vqa", **facts)


@pytest.mark.parametrize(
    ("target", "precision"), [("onnx", "fp32"), ("onnx", "int8"), ("openvino", "int8"), ("tflite", "int8")]
)
def test_a_table_is_measured_once(target: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real runtime; what was measured is not measured again, and a damaged cache is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "POINTS", {})  # fewer sizes, for speed
    model = tiny_vlm()
    chosen = [g for g in groups_of(model) if g.name in ("trunk.1.0", "box.2", "heads.0", "heads.1")]
    settings = {"target": target, "precision": precision, "threads": 1, "round_to": 8, "provenance": WHERE}

    def measure() -> LatencyTable:
        return measure_table(model, manifest_of(model), chosen, few_samples(), **settings)  # pyright: ignore

    table = measure()
    assert table.whole_ms > 0 and all(ms > 0 for piece in table.pieces.values() for ms in piece.ms)
    assert {name for piece in table.pieces.values() for name in piece.groups} == {g.name for g in chosen}
    layers = [piece for name, piece in table.pieces.items() if name.startswith("fusion.layers")]
    assert layers[0].ms == layers[1].ms, "layers of one shape are measured once"
    (file,) = (tmp_path / "edgevlm" / "latency").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(latency, "time_model", lambda *rest: 1.0)
        patch.setattr(latency, "load_exporter", lambda name: pytest.fail("exported again"))
        assert measure().pieces == table.pieces
    file.write_text(file.read_text()[:-9])
    assert Times(target, precision, 1).ms == {}


def test_runs_take_turns() -> None:
    order: list[str] = []
    times = take_turns([lambda: order.append("a"), lambda: order.append("b")], rounds=7, max_seconds=9)
    assert [len(values) for values in times] == [7, 7]
    assert "".join(order) == "ab" * 10


def test_what_cannot_be_timed_here_is_said_before_anything_runs() -> None:
    recipe = load_recipe("test-scenes", time_budget(1.0, "coreml", "fp32"))
    from edgevlm.stages import check

    with pytest.raises(TargetError, match=r"coreml models cannot be timed here.*prune.target"):
        check(recipe, None)
    with pytest.raises(RecipeError, match="Add --target-ms"):
        time_budget(None, "tflite", None)
    assert time_budget(None, None, None) == []
    with pytest.raises(RecipeError, match="target_ms needs measure: ms"):
        load_recipe("test-scenes", ["prune.target_ms=3"])


# --- pruning to a time -------------------------------------------------------------------------------------------


@pytest.fixture
def timed(distilled: Job, tmp_path: Path) -> Job:  # noqa: F811
    """A job of `prune` with a table in which nearly all time is spent in the trunk."""
    model, _ = vlm.load(distilled.inputs["distil"])
    pieces = {}
    for group in groups_of(model):
        slope = 0.1 if group.part == "vision" else 0.001
        points = grid(group.size, 3, 1)
        pieces[group.name] = measured((group.name,), (points,), lambda n, slope=slope: slope * n)
    whole = sum(piece.ms[-1] for piece in pieces.values()) + 1.0
    folder = tmp_path / "latency"
    folder.mkdir()
    write_manifest(folder, table_of(pieces, whole))
    section = distilled.recipe.prune.model_copy(
        update={
            "parts": ("vision", "fusion"),
            "measure": "ms",
            "round_to": 1,
            "images_per_step": 4,
            "target_ms": whole / 2,
        }
    )
    recipe = distilled.recipe.model_copy(update={"prune": section})
    out = tmp_path / "out"
    out.mkdir()
    return replace(distilled, recipe=recipe, inputs={**distilled.inputs, "latency": folder}, out_dir=out)


def predicted(job: Job) -> Callable[[VLM], float]:
    """What the table says of a model."""
    table = LatencyTable.model_validate_json((job.inputs["latency"] / "manifest.json").read_bytes())
    whole, _ = vlm.load(job.inputs["distil"])
    model = latency_model(table, {group.name: group.size for group in groups_of(whole)})
    return lambda smaller: model.of({group.name: group.size for group in groups_of(smaller)})


@pytest.mark.parametrize("method", ["fisher", "gates", "modality"])
def test_a_budget_in_ms_is_met_when_measured(timed: Job, method: str) -> None:
    """The runtime is a fifth slower than the table says of every model; the structure still takes what was asked."""
    section = timed.recipe.prune.model_copy(update={"method": method})
    job, asked = replace(timed, recipe=timed.recipe.model_copy(update={"prune": section})), section.target_ms
    table, calls = predicted(timed), []

    def meter(model: VLM) -> float:
        calls.append(1.2 * table(model))
        return calls[-1]

    manifest = prune(job, meter)
    assert asked is not None
    assert manifest.metrics["pruned_ms"] == pytest.approx(asked, rel=0.05)
    assert len(calls) >= 3, "one look, one correction, one at the end"
    structure = Structure.model_validate_json((timed.out_dir / "structure.json").read_bytes())
    shares = {
        part: sum(g.kept for g in structure.groups.values() if g.part == part)
        / sum(g.size for g in structure.groups.values() if g.part == part)
        for part in ("vision", "fusion")
    }
    if method in TRAINED:
        assert shares["vision"] < shares["fusion"], "time is lost where it is spent"


def test_what_a_resumed_run_chooses_does_not_depend_on_the_clock(timed: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the choice: the runtime is three times as slow when the run goes on, and the structure the same."""
    table = predicted(timed)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "evaluate", lambda *rest, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(timed, lambda model: 1.2 * table(model))
    first = (timed.out_dir / "structure.json").read_text()
    manifest = prune(timed, lambda model: 3 * table(model))
    assert (timed.out_dir / "structure.json").read_text() == first
    assert not (timed.out_dir / CHOSEN).exists(), "nothing is left behind"
    assert manifest.metrics["pruned_ms"] == pytest.approx(2.5 * timed.recipe.prune.target_ms, rel=0.05)  # pyright: ignore


def test_a_time_far_above_the_table_is_measured_again() -> None:
    model = tiny_vlm()
    for said, expected in (([3.0, 1.0, 9.0], 1.0), ([1.05], 1.05), ([2.0, 2.2, 2.1], 2.0)):
        times = iter(said)
        assert pruning._steady(lambda model, times=times: next(times), model, 1.0) == expected


def test_times_out_of_reach(timed: Job) -> None:
    for target_ms, message in ((0.5, r"0.5 ms is below the least that can be kept, [0-9.]+ ms"), (1e4, "no more than")):
        section = timed.recipe.prune.model_copy(update={"target_ms": target_ms})
        job = replace(timed, recipe=timed.recipe.model_copy(update={"prune": section}))
        with pytest.raises(RecipeError, match=message):
            prune(job, lambda model: pytest.fail("nothing was trained or measured"))


def test_the_stage_stands_before_prune_and_reruns_with_what_it_measures() -> None:
    from edgevlm.pipeline import stage_keys

    plain = load_recipe("test-scenes", [])
    assert "latency" not in [stage.name for stage in stages_of(plain)]
    keys = []
    for changes in ([], ["prune.sparsity=0.3"], ["prune.precision=int8"]):
        recipe = load_recipe("test-scenes", [*time_budget(2.0, "onnx", "fp32"), *changes])
        names = [stage.name for stage in stages_of(recipe)]
        assert names.index("latency") + 1 == names.index("prune")
        keys.append(stage_keys(stages_of(recipe), recipe, None))
    assert keys[0]["latency"] == keys[1]["latency"] != keys[2]["latency"]
    assert keys[0]["prune"] != keys[1]["prune"]


def test_pieces_of_two_encoders_compute_the_same() -> None:
    """Cross-modal layers are given an image beside their words; their pieces take its tensors as inputs."""
    model = dual_vlm()
    groups = groups_of(model)
    pieces = [piece for piece in pieces_of(model) if not piece.dense]
    assert {group.name for piece in pieces for group in groups_in(piece, groups)} >= {
        "heads.cross_image.0",
        "heads.text.0",
    }
    for piece in pieces:
        program = program_of(model, piece, groups, {}, "p", example())
        with torch.no_grad():
            (found,) = program.module(*program.inputs.values())
        torch.testing.assert_close(found, seen(model, piece.name)[0], atol=1e-5, rtol=1e-5)
