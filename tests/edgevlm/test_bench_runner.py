"""The bench on bundles built by hand: a tiny ONNX model whose answers numpy predicts, and the PyTorch baseline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgevlm.artifacts import Bundle, Checkpoint, ExportedModel, ExportFailure, LatencyRow, Provenance, Rung
from edgevlm.bench import runner
from edgevlm.bench.local import bench_bundle, run_in_process
from edgevlm.manifests import write_manifest
from edgevlm.recipe import BenchSection
from targets.program import build_programs
from tests.edgevlm.tiny import LABELS, SPEC, TOKENIZER, tiny_ids, tiny_vlm

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CASES, REGIONS, WORDS = 3, 4, TOKENIZER.max_tokens
RUNGS = (Rung(name="full", regions=(REGIONS,)), Rung(name="b1", regions=(1,)))
PROVENANCE = Provenance(stage="test", key="k")
SETTINGS = BenchSection(threads=1, warmup=2, runs=12)
TOLERANCES = {"fp32": {"min_margin": 0.0, "max_differing_share": 0.0, "max_abs_logits": 1e-4}}
RNG = np.random.default_rng(0)
HEAD = RNG.normal(size=(3, len(LABELS.answers))).astype(np.float32)
WORDS_TABLE = RNG.normal(size=(TOKENIZER.vocab_size, len(LABELS.answers))).astype(np.float32)


def predicted(pixels: np.ndarray, input_ids: np.ndarray, num_keep: int) -> np.ndarray:
    """Logits of the hand-made model, by numpy: kept regions x mean colour x head, plus one row per word."""
    colour = pixels.astype(np.float64).mean((1, 2)) / 255
    return (num_keep * colour @ HEAD + WORDS_TABLE[input_ids].sum(1)).astype(np.float32)


def write_onnx(folder: Path, heavy: int) -> dict[str, str]:
    """`encode_image` and one answer program per rung; `heavy` idle multiplications slow the full rung down."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: list[int], kind: int = TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    def save(name: str, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> str:
        weights = [numpy_helper.from_array(array, key) for key, array in constants.items()]
        graph = helper.make_graph(nodes, name, inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{name}.onnx")
        return f"{name}.onnx"

    regions = [value("features", [1, REGIONS, 3]), value("boxes", [1, REGIONS, 4]), value("scores", [1, REGIONS])]
    node = helper.make_node
    programs = {
        "encode_image": save(
            "encode_image",
            [
                node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
                node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
                node("Div", ["mean", "white"], ["colour"]),
                node("Unsqueeze", ["colour", "axis"], ["one"]),
                node("Mul", ["one", "ones"], ["features"]),
                node("Identity", ["all_boxes"], ["boxes"]),
                node("Identity", ["all_scores"], ["scores"]),
            ],
            [value("image", [1, SPEC.height, SPEC.width, 3], TensorProto.UINT8)],
            regions,
            {
                "axes": np.array([1, 2], np.int64),
                "axis": np.array([1], np.int64),
                "white": np.float32(255).reshape(1),
                "ones": np.ones((1, REGIONS, 1), np.float32),
                "all_boxes": np.zeros((1, REGIONS, 4), np.float32),
                "all_scores": np.ones((1, REGIONS), np.float32),
            },
        )
    }
    for rung in RUNGS:
        busy = heavy if rung.name == "full" else 0
        chain = [node("MatMul", ["idle" if i == 0 else f"x{i}", "idle"], [f"x{i + 1}"]) for i in range(busy)]
        # Idle work that ONNX Runtime cannot fold away, because it starts from an input; its weight in the sum is 0.
        start = [node("Mul", ["scores_sum", "zeros"], ["idle0"]), node("Add", ["idle0", "square"], ["idle"])]
        end = [node("ReduceSum", [f"x{busy}"], ["work"], keepdims=0), node("Mul", ["work", "zero"], ["nothing"])]
        programs[f"answer_{rung.name}"] = save(
            f"answer_{rung.name}",
            [
                node("Mul", ["features", "keep"], ["kept"]),
                node("ReduceSum", ["kept", "axis"], ["bag"], keepdims=0),
                node("MatMul", ["bag", "head"], ["from_image"]),
                node("Gather", ["table", "input_ids"], ["words"]),
                node("ReduceSum", ["words", "axis"], ["from_text"], keepdims=0),
                node("ReduceSum", ["scores"], ["scores_sum"], keepdims=0),
                node("ReduceSum", ["boxes"], ["boxes_sum"], keepdims=0),
                *(start + chain + end if busy else [node("Mul", ["scores_sum", "zero"], ["nothing"])]),
                node("Mul", ["boxes_sum", "nothing"], ["nothing_at_all"]),
                node("Add", ["from_image", "from_text"], ["both"]),
                node("Add", ["both", "nothing_at_all"], ["logits"]),
                node("Identity", ["scores"], ["looked_at"]),
            ],
            [*regions, value("input_ids", [1, WORDS], TensorProto.INT32)],
            [value("logits", [1, len(LABELS.answers)]), value("looked_at", [1, REGIONS])],
            {
                "axis": np.array([1], np.int64),
                "keep": (np.arange(REGIONS) < rung.regions[0]).astype(np.float32).reshape(1, REGIONS, 1),
                "head": HEAD,
                "table": WORDS_TABLE,
                "zero": np.zeros((), np.float32),
                "zeros": np.zeros((256, 256), np.float32),
                "square": np.full((256, 256), 1 / 256, np.float32),
            },
        )
    return programs


def write_golden(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    (folder / "golden").mkdir()
    np.savez(folder / "golden" / "golden.npz", **arrays)  # pyright: ignore[reportArgumentType]
    description = {"cases": [{"id": f"case-{i}"} for i in range(CASES)], "tolerances": TOLERANCES}
    (folder / "golden" / "golden.json").write_text(json.dumps(description))


def write_bundle(
    folder: Path,
    *,
    heavy: int = 0,
    wrong_rung: str = "",
    before: tuple[ExportedModel, ...] = (),
    failures: tuple[ExportFailure, ...] = (),
) -> None:
    """A bundle with the hand-made ONNX model behind the models `before`."""
    folder.mkdir()
    programs = write_onnx(folder, heavy)
    pixels = RNG.integers(0, 256, (CASES, SPEC.height, SPEC.width, 3), np.uint8)
    ids = tiny_ids(CASES).numpy()
    logits = {f"logits_{rung.name}": predicted(pixels, ids, rung.regions[0]) for rung in RUNGS}
    if wrong_rung:
        logits[f"logits_{wrong_rung}"][1] *= -1
    write_golden(folder, {"pixels": pixels, "input_ids": ids, **logits})
    model = ExportedModel(
        target="onnx",
        precision="fp32",
        scheme="by hand",
        programs=programs,
        files=tuple(programs.values()),
        size_mb=0.5,
    )
    tiny = tiny_vlm()
    bundle = Bundle(
        provenance=PROVENANCE,
        name="by-hand",
        task="vqa",
        model=tiny.config,
        preprocess=SPEC,
        tokenizer=TOKENIZER,
        labels=LABELS,
        rungs=RUNGS,
        models=(*before, model),
        failures=failures,
    )
    write_manifest(folder, bundle)


def by_rung(rows: tuple[LatencyRow, ...], target: str) -> dict[str, LatencyRow]:
    return {row.rung: row for row in rows if row.target == target}


def test_timed_answers_are_numpys_and_numbers_are_those_of_the_runs(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", heavy=60)
    report = bench_bundle(tmp_path / "bundle", SETTINGS, PROVENANCE, raw_dir=tmp_path / "raw")
    rows = by_rung(report.rows, "onnx")
    assert list(rows) == ["full", "b1"]
    raw = json.loads((tmp_path / "raw" / "onnx_fp32.json").read_text())
    for name, row in rows.items():
        assert row.outputs_checked, row.reason
        assert row.reason == ""
        total = np.add(raw["encode_ms"][name], raw["answer_ms"][name])
        assert row.num_runs == SETTINGS.runs == len(total)
        assert row.p50_ms == pytest.approx(np.median(total))
        assert row.p90_ms == pytest.approx(np.quantile(total, 0.9))
        assert row.load_ms is not None
        assert row.load_ms > 0
        assert row.peak_memory_mb is not None
        assert row.peak_memory_mb >= raw["baseline_mb"] > 5
    # 60 products of 256 x 256 matrices cost about 2 GFLOP: visible on any machine.
    assert rows["full"].answer_p50_ms is not None
    assert rows["b1"].answer_p50_ms is not None
    assert rows["full"].answer_p50_ms > 3 * rows["b1"].answer_p50_ms
    assert report.device.threads == 1
    assert report.device.num_cores >= 1
    assert report.device.versions["onnxruntime"]


def test_wrong_answers_are_reported_for_their_rung_alone(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", wrong_rung="b1")
    rows = by_rung(bench_bundle(tmp_path / "bundle", SETTINGS, PROVENANCE).rows, "onnx")
    assert rows["full"].outputs_checked
    assert not rows["b1"].outputs_checked
    assert "case-1" in rows["b1"].reason
    assert rows["b1"].p50_ms is not None, "the time was measured and stays visible"


def test_what_fails_costs_its_own_rows_only(tmp_path: Path) -> None:
    not_a_model = dict.fromkeys(["encode_image", *(f"answer_{rung.name}" for rung in RUNGS)], "golden/golden.json")
    broken = ExportedModel(target="onnx", precision="int8", scheme="", programs=not_a_model, files=(), size_mb=0.1)
    coreml = ExportFailure(target="coreml", precision="int8", reason="no such op: frobnicate")
    write_bundle(tmp_path / "bundle", before=(broken,), failures=(coreml,))
    report = bench_bundle(tmp_path / "bundle", SETTINGS, PROVENANCE)
    assert len(report.rows) == 3 * len(RUNGS)
    for row in report.rows:
        if row.target == "onnx" and row.precision == "fp32":
            assert row.p50_ms is not None
        else:
            assert row.p50_ms is None
            assert ("frobnicate" if row.target == "coreml" else "golden.json") in row.reason


def test_core_ml_away_from_a_mac_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    coreml = ExportedModel(target="coreml", precision="fp32", scheme="", programs={}, files=(), size_mb=2.0)
    write_bundle(tmp_path / "bundle", before=(coreml,))
    rows = by_rung(bench_bundle(tmp_path / "bundle", SETTINGS, PROVENANCE).rows, "coreml").values()
    assert {row.rung for row in rows} == {"full", "b1"}
    assert all("macOS" in row.reason and row.size_mb == 2.0 for row in rows)


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(text)
    return [str(path)]


def test_a_crash_a_hang_and_silence_each_have_their_reason(tmp_path: Path) -> None:
    crash = script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert "SIGSEGV" in run_in_process(crash, {}, 60)["error"]
    assert "stopped after 0.5 s" in run_in_process(script(tmp_path, "import time; time.sleep(60)"), {}, 0.5)["error"]
    assert "no result" in run_in_process(script(tmp_path, "print('hello')"), {}, 60)["error"]
    raising = script(tmp_path, "raise RuntimeError('the disk is on fire')")
    assert run_in_process(raising, {}, 60)["error"] == "RuntimeError: the disk is on fire"


def test_peak_memory_is_the_processs_own(tmp_path: Path) -> None:
    """A child's ru_maxrss starts at its parent's; ours must not."""
    parents = np.ones(400_000_000, np.uint8)
    text = (
        f"import json, sys, numpy as np\nsys.path.insert(0, {str(Path(runner.__file__).parent)!r})\n"
        "from runner import peak_memory_mb\nlow = peak_memory_mb()\n"
        "x = np.ones(200_000_000, np.uint8)\ndel x\nprint(json.dumps([low, peak_memory_mb()]))"
    )
    low, high = run_in_process(script(tmp_path, text), {}, 60)  # type: ignore[misc]
    assert parents[-1] == 1
    assert low < 200
    assert 190 < high - low < 300


def test_the_pytorch_baseline_answers_its_own_golden_cases(tmp_path: Path) -> None:
    model = tiny_vlm()
    manifest = Checkpoint(
        provenance=PROVENANCE,
        model=model.config,
        task="vqa",
        preprocess=SPEC,
        tokenizer=TOKENIZER,
        labels=LABELS,
        rungs=(Rung(name="full", regions=(model.config.tee.num_regions,)),),
    )
    (tmp_path / "checkpoint").mkdir()
    save_file(model.state_dict(), tmp_path / "checkpoint" / "model.safetensors")
    manifest = write_manifest(tmp_path / "checkpoint", manifest)
    pixels, ids = torch.randint(0, 256, (CASES, SPEC.height, SPEC.width, 3), dtype=torch.uint8), tiny_ids(CASES)
    encode, answer = build_programs(model, manifest)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = torch.cat(
            [answer.module(*encode.module(pixels[i : i + 1]), ids[i : i + 1])[0] for i in range(CASES)]
        ).numpy()
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_golden(folder, {"pixels": pixels.numpy(), "input_ids": ids.numpy(), "logits_full": logits})
    bundle = Bundle(
        provenance=PROVENANCE,
        name="by-hand",
        task="vqa",
        model=model.config,
        preprocess=SPEC,
        tokenizer=TOKENIZER,
        labels=LABELS,
        rungs=manifest.rungs,  # type: ignore[attr-defined]
        models=(),
    )
    write_manifest(folder, bundle)
    (row,) = bench_bundle(folder, SETTINGS, PROVENANCE, checkpoint_dir=tmp_path / "checkpoint").rows
    assert (row.target, row.precision, row.rung) == ("pytorch", "fp32", "full")
    assert row.outputs_checked, row.reason
    assert row.size_mb == pytest.approx((tmp_path / "checkpoint" / "model.safetensors").stat().st_size / 1e6)
    assert row.p50_ms is not None
