"""The baseline every exported file is compared with: the same static programs in eager PyTorch, in a fresh process.

`python -m edgevlm.bench.reference job.json` is `runner.py` for a checkpoint: same golden cases, same clock.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgevlm.bench.runner import measure, peak_memory_mb, read_golden
from edgevlm.models.vlm import load
from targets.program import Program, build_programs
from targets.runtime import compare_golden


class PyTorchSession:
    """A checkpoint's programs behind the interface of an exported model."""

    def __init__(self, programs: list[Program]) -> None:
        self._programs = {program.name: program for program in programs}

    @torch.inference_mode()
    def run(self, program: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one program; inputs and outputs by name."""
        entry = self._programs[program]
        outputs = entry.module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in entry.inputs))
        return {name: output.numpy() for name, output in zip(entry.outputs, outputs, strict=True)}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time the checkpoint of a job on the golden cases of its bundle."""
    torch.set_num_threads(job["threads"])
    golden, description = read_golden(Path(job["bundle"]))
    baseline_mb = peak_memory_mb()
    start = time.perf_counter_ns()
    session = PyTorchSession(build_programs(*load(Path(job["checkpoint"]))))
    load_ms = (time.perf_counter_ns() - start) / 1e6
    result = measure(session, golden, job["rungs"], job["warmup"], job["runs"], job.get("max_seconds", 120.0))
    answers = result.pop("answers")
    problems = {
        rung: compare_golden({rung: answers[rung]}, {f"logits_{rung}": golden[f"logits_{rung}"]}, description, "fp32")
        for rung in job["rungs"]
    }
    return {
        "load_ms": load_ms,
        "baseline_mb": baseline_mb,
        "peak_memory_mb": peak_memory_mb(),
        "problems": problems,
        **result,
    }


if __name__ == "__main__":
    print(json.dumps(run_job(json.loads(Path(sys.argv[1]).read_text()))))
