"""Several processes on one machine (gloo on loopback): the same training as one process, and a killed one resumes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edgevlm import processes
from tests.edgevlm import toy_training
from tests.edgevlm.launching import ROOT, environment, finish, free_port, start

MODULE = "tests.edgevlm.toy_training"


def train_together(folder: Path, **options: object) -> None:
    results = finish(start(2, MODULE, folder, json.dumps(options)))
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
    assert largest_difference(tmp_path / "one", tmp_path / "two", but="in_proj_bias") < 1e-4
    assert one[-1] < 0.8 * one[0], "it learns, so the comparison means something"


@pytest.mark.slow
def test_a_killed_rank_restarts_the_job_and_changes_nothing(tmp_path: Path) -> None:
    """`accelerate launch` with the shipped config: rank 1 dies by SIGKILL at step 13, all go on from step 10, bitwise."""
    options = {"dropout": 0.2, "ema": 0.9}
    train_together(tmp_path / "whole", **options)
    config = ROOT / "edgevlm" / "launch" / "ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port()), "--max_restarts", "1", "-m", MODULE]
    command = [*launcher, str(tmp_path / "cut"), json.dumps({**options, "kill_at": 13})]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    assert min(map(int, json.loads((tmp_path / "cut" / "losses.json").read_text()))) == 10
    assert largest_difference(tmp_path / "whole", tmp_path / "cut") == 0.0
