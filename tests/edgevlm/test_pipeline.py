"""Resume, locking and invalidation of the stage runner, with stages that leave a trace of each run."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from edgevlm.artifacts import Artifact, RegionCache
from edgevlm.errors import CheckpointError, DataError, OutputInUse, RecipeError
from edgevlm.job import Job
from edgevlm.manifests import read_manifest, write_manifest
from edgevlm.pipeline import Stage, data_fingerprint, run, stage_keys
from edgevlm.recipes import load_recipe


def tracing_stage(
    name: str, inputs: tuple[str, ...], sections: tuple[str, ...], log: Path, seconds: float = 0.0
) -> Stage:
    def work(job: Job) -> Artifact:
        with log.open("a") as file:
            file.write(f"{name}\n")
        (job.out_dir / "half.txt").write_text("half")
        time.sleep(seconds)
        (job.out_dir / "whole.txt").write_text(name)
        return write_manifest(
            job.out_dir,
            RegionCache(
                kind="regions", provenance=job.provenance, preprocess_hash="", extractor_hash="", num_images={}
            ),
        )

    return Stage(name, work, inputs, sections)


def flow(log: Path, slow: str = "") -> tuple[Stage, ...]:
    def seconds(name: str) -> float:
        return 60.0 if name == slow else 0.0

    return (
        tracing_stage("a", (), ("data",), log, seconds("a")),
        tracing_stage("b", ("a",), ("teacher",), log, seconds("b")),
        tracing_stage("c", ("a",), ("bench",), log, seconds("c")),
        tracing_stage("d", ("b", "c"), (), log, seconds("d")),
    )


def runs_of(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_second_run_does_nothing(tmp_path: Path) -> None:
    log, recipe = tmp_path / "log", load_recipe("scenes-tiny")
    run(flow(log), recipe, tmp_path / "out")
    run(flow(log), recipe, tmp_path / "out")
    assert runs_of(log) == ["a", "b", "c", "d"]


def test_changed_recipe_reruns_only_what_depends_on_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run(flow(log), load_recipe("scenes-tiny"), tmp_path / "out")
    log.unlink()
    run(flow(log), load_recipe("scenes-tiny", ["bench.runs=3"]), tmp_path / "out")
    assert runs_of(log) == ["c", "d"]


def test_seed_changes_every_key() -> None:
    stages = flow(Path("unused"))
    before, after = (stage_keys(stages, load_recipe("scenes-tiny", [f"seed={s}"]), None) for s in (0, 1))
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_other_weights_at_the_same_path_rerun_what_starts_from_them(tmp_path: Path, kind: str) -> None:
    weights = tmp_path / "weights"
    if kind == "checkpoint":
        stages = (tracing_stage("a", (), (), tmp_path / "log"),)
        made = [run(stages, load_recipe("scenes-tiny", [f"seed={s}"]), tmp_path / f"out{s}")["a"] for s in (0, 1)]
    else:
        made = [tmp_path / f"text{s}" for s in (0, 1)]
        for seed, folder in enumerate(made):
            folder.mkdir()
            (folder / "model.safetensors").write_text(f"as long as the other {seed}")

    def keys() -> dict[str, str]:
        return stage_keys(flow(tmp_path / "log"), load_recipe("scenes-tiny", [f"teacher.start={weights}"]), None)

    made[0].rename(weights)
    first = keys()
    assert keys() == first
    weights.rename(tmp_path / "moved")
    made[1].rename(weights)
    changed = {name for name, key in keys().items() if key != first[name]}
    assert changed == {"b", "d"}


def test_until_stops_and_goes_on(tmp_path: Path) -> None:
    log, recipe = tmp_path / "log", load_recipe("scenes-tiny")
    assert set(run(flow(log), recipe, tmp_path / "out", until="b")) == {"a", "b"}
    run(flow(log), recipe, tmp_path / "out")
    assert runs_of(log) == ["a", "b", "c", "d"]
    with pytest.raises(RecipeError, match="Stages: a, b, c, d"):
        run(flow(log), recipe, tmp_path / "out", until="zz")


@pytest.mark.parametrize("killed_in", ["a", "b", "d"])
def test_sigkill_in_any_stage_keeps_the_finished_ones(tmp_path: Path, killed_in: str) -> None:
    log, recipe, out = tmp_path / "log", load_recipe("scenes-tiny"), tmp_path / "out"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run, args=(flow(log, slow=killed_in), recipe, out))
    process.start()
    deadline = time.monotonic() + 30
    while killed_in not in runs_of(log) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # inside the stage, its first file written
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (out / killed_in).exists(), "nothing half-written may stand under the final name"
    before = runs_of(log)
    run(flow(log), recipe, out)
    again = runs_of(log)[len(before) :]
    assert again == [name for name in "abcd" if name not in before or name == killed_in]
    for name in "abcd":
        assert (out / name / "whole.txt").read_text() == name
        read_manifest(out / name, RegionCache)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    log, recipe, out = tmp_path / "log", load_recipe("scenes-tiny"), tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=run, args=(flow(log, slow="a"), recipe, out))
    process.start()
    try:
        deadline = time.monotonic() + 30
        while not runs_of(log) and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(OutputInUse, match="Another run is writing"):
            run(flow(log), recipe, out)
    finally:
        process.kill()
        process.join()


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputInUse, match="no run of edgevlm"):
        run(flow(tmp_path / "log"), load_recipe("scenes-tiny"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_data_fingerprint_sees_new_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1")
    before = data_fingerprint(str(tmp_path))
    (tmp_path / "b.jsonl").write_text("2")
    assert data_fingerprint(str(tmp_path)) != before
    with pytest.raises(DataError, match="--data"):
        data_fingerprint(str(tmp_path / "nowhere"))


def test_altered_artifact_is_noticed(tmp_path: Path) -> None:
    log, recipe, out = tmp_path / "log", load_recipe("scenes-tiny"), tmp_path / "out"
    run(flow(log), recipe, out)
    (out / "b" / "whole.txt").write_text("tampered")
    with pytest.raises(CheckpointError, match="altered"):
        read_manifest(out / "b", RegionCache)
    manifest = json.loads((out / "c" / "manifest.json").read_text())
    manifest["surprise"] = 1
    (out / "c" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="surprise"):
        read_manifest(out / "c", RegionCache)
