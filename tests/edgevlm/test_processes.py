"""Several processes on one machine (gloo on loopback): the same training as one process, and a killed one resumes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edgevlm import processes
from edgevlm.artifacts import Checkpoint, RegionCache
from edgevlm.manifests import read_manifest
from edgevlm.train.regions import open_shards
from tests.edgevlm import toy_training
from tests.edgevlm.launching import ROOT, environment, finish, free_port, start

MODULE = "tests.edgevlm.toy_training"


def train_together(folder: Path, fsdp: bool = False, **options: object) -> None:
    more = {"ACCELERATE_USE_FSDP": "true"} if fsdp else {}
    results = finish(start(2, MODULE, folder, json.dumps(options), **more))
    assert [code for code, _, _ in results] == [0, 0], results


def losses_of(folder: Path) -> list[float]:
    return list(json.loads((folder / "losses.json").read_text()).values())


def largest_difference(one: Path, other: Path, but: str = " ") -> float:
    a, b = (load_file(folder / "weights.safetensors") for folder in (one, other))
    return max((a[name] - b[name]).abs().max().item() for name in a if but not in name)


def test_one_process_is_the_main_one() -> None:
    assert (processes.world_size(), processes.rank(), processes.is_main()) == (1, 0, True)
    processes.barrier()
    assert processes.from_main("x") == "x"
    assert processes.gathered("x") == ["x"]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """2 processes x 3 pieces of a batch of 16 against all 16 at once.

    The sums run in another order, so float32's rounding (6e-8) grows over 24 steps of AdamW: 1e-5 on losses of about 1,
    and 1e-4 on weights of about 0.2. The keys' bias is left out: softmax does not see it, so its gradient is rounding
    alone, and AdamW makes full steps of that.
    """
    toy_training.run(tmp_path / "one")
    train_together(tmp_path / "two", accumulate=3)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 24
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    assert largest_difference(tmp_path / "one", tmp_path / "two", but="key.bias") < 1e-4
    assert one[-1] < 0.8 * one[0], "it learns, so the comparison means something"


@pytest.mark.slow
def test_a_killed_rank_restarts_the_job_and_changes_nothing(tmp_path: Path) -> None:
    """`accelerate launch` with the shipped config: rank 1 dies by SIGKILL at step 13, all go on from step 10, bitwise."""
    options = {"dropout": 0.2, "ema": 0.9}
    train_together(tmp_path / "whole", **options)
    config = ROOT / "edgevlm" / "launch" / "ddp.yaml"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    launcher += ["--main_process_port", str(free_port()), "--max_restarts", "1", "-m", MODULE]
    command = [*launcher, str(tmp_path / "cut"), json.dumps({**options, "kill_at": 13})]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    assert min(map(int, json.loads((tmp_path / "cut" / "losses.json").read_text()))) == 10
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0


@pytest.mark.slow
def test_sharded_weights_train_like_one_process_and_resume(tmp_path: Path) -> None:
    """`fully_shard` on gloo: half of every weight in each process; tolerances as above, for the same reasons."""
    toy_training.run(tmp_path / "one", ema=0.9)
    with_kill = finish(
        start(2, MODULE, tmp_path / "two", json.dumps({"ema": 0.9, "kill_at": 13}), ACCELERATE_USE_FSDP="true")
    )
    assert with_kill[1][0] == -signal.SIGKILL, with_kill
    train_together(tmp_path / "two", fsdp=True, ema=0.9)
    losses = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert min(map(int, losses)) == 10
    assert max(abs(a - b) for a, b in zip(losses_of(tmp_path / "one")[10:], losses.values(), strict=True)) < 1e-5
    assert largest_difference(tmp_path / "one", tmp_path / "two", but="key.bias") < 1e-4


@pytest.mark.slow
def test_the_pipeline_runs_on_two_processes_with_one_writer(tmp_path: Path) -> None:
    """Both take part in every stage that trains, and leave the same artifacts; only the main one prints."""
    run = tmp_path / "run"
    options = ["--out", str(run), "--set", "regions.shard_images=16", "--set", "export.targets=[onnx]"]
    (first, _, said), (second, silent_out, silent) = finish(
        start(2, "edgevlm.cli", "run", "test-scenes", "--until", "trim", *options)
    )
    assert (first, second) == (0, 0), said + silent
    assert "teacher: accuracy" in said and "rung b3: accuracy" in said
    assert (silent_out.strip(), silent.strip()) == ("", "")
    trained = ["detector", "distil", "prune", "teacher", "trim"]
    assert sorted(path.name for path in run.iterdir()) == sorted([*trained, "prepare", "regions", "run.json"])
    for name in trained:
        read_manifest(run / name, Checkpoint)  # every file is whole: its hash is the manifest's
    assert read_manifest(run / "regions", RegionCache).num_images == {"train": 64, "val": 24, "test": 24}
    assert len(open_shards(run / "regions", "train")) == 4, "two shards from each process"
    (first, out, said), (second, silent_out, silent) = finish(
        start(2, "edgevlm.cli", "train", "--recipe", "test-scenes", *options)
    )
    assert (first, second) == (0, 0), said + silent
    assert said.count("done before") == 4 and f"Trained: {run / 'teacher'}" in out.replace("\n", "")
    assert (silent_out.strip(), silent.strip()) == ("", "")
