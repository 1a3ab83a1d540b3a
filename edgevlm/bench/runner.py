"""Time one exported model in a process of its own. This file travels to devices, with `runtime.py` beside it.

It needs numpy and the one runtime it is asked for, and nothing else of edgevlm:

    python runner.py job.json        prints one JSON object

A job is `{"bundle": folder, "target", "precision", "programs": {name: file}, "rungs": [name], "threads", "warmup",
"runs", "max_seconds"}`. The golden cases of the bundle are asked in turn, and the answers of the timed runs are
compared with the golden ones: a runtime that is fast and wrong does not pass.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

MODULES = {
    "onnx": "onnxruntime",
    "tflite": "ai_edge_litert.interpreter",
    "openvino": "openvino",
    "coreml": "coremltools",
}
"""What to import before loading is timed: an app links its runtime, it does not import Python modules."""


def main(argv: list[str]) -> int:
    """Run the job file named on the command line; the result goes to stdout, all else to stderr."""
    if len(argv) != 2:
        print("usage: runner.py job.json", file=sys.stderr)
        return 1
    result_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # runtimes print banners on stdout
    job = json.loads(Path(argv[1]).read_text())
    json.dump(run_job(job), result_stream)
    result_stream.write("\n")
    result_stream.flush()
    return 0


def run_job(job: dict) -> dict:
    """Load the model of a job, time it and check its answers."""
    runtime = importlib.import_module("runtime")  # the file beside this one
    bundle = Path(job["bundle"])
    golden, description = read_golden(bundle)
    start = time.perf_counter_ns()
    importlib.import_module(MODULES[job["target"]])
    import_ms = (time.perf_counter_ns() - start) / 1e6

    baseline_mb = peak_memory_mb()
    start = time.perf_counter_ns()
    session = runtime.open_session(job["target"], bundle, job["programs"], threads=job["threads"])
    load_ms = (time.perf_counter_ns() - start) / 1e6

    result = measure(session, golden, job["rungs"], job["warmup"], job["runs"], job.get("max_seconds", 120.0))
    answers = result.pop("answers")
    problems = {}
    for rung in job["rungs"]:
        expected = {f"logits_{rung}": golden[f"logits_{rung}"]}
        problems[rung] = runtime.compare_golden({rung: answers[rung]}, expected, description, job["precision"])
    return {
        "import_ms": import_ms,
        "load_ms": load_ms,
        "baseline_mb": baseline_mb,
        "peak_memory_mb": peak_memory_mb(),
        "problems": problems,
        **result,
    }


def read_golden(bundle: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the description of a bundle's golden cases."""
    with np.load(bundle / "golden" / "golden.npz") as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    return golden, json.loads((bundle / "golden" / "golden.json").read_text())


def measure(
    session, golden: dict[str, np.ndarray], rungs: list[str], warmup: int, runs: int, max_seconds: float
) -> dict:
    """Time `session` on the golden cases.

    Args:
        session: has `run(program, inputs) -> outputs`, freshly loaded.
        golden: the arrays of `golden.npz`.
        rungs: token budgets to time. They take turns, so that a machine that slows down slows all of them.
        warmup: rounds before timing starts.
        runs: timed rounds.
        max_seconds: stop after this time, with at least five timed rounds.

    Returns:
        `first_encode_ms`, and per rung `first_answer_ms`, `encode_ms` and `answer_ms` (one number per timed round),
        and `answers`: rung -> logits (K, A) of the last runs.
    """
    num_cases = len(golden["pixels"])
    answers = {rung: np.full_like(golden[f"logits_{rung}"], np.nan) for rung in rungs}

    def ask(case: int, rung: str) -> tuple[float, float]:
        image, input_ids = golden["pixels"][case][None], golden["input_ids"][case][None]
        start = time.perf_counter_ns()
        regions = session.run("encode_image", {"image": image})
        encoded = time.perf_counter_ns()
        outputs = session.run(f"answer_{rung}", {**regions, "input_ids": input_ids})
        answered = time.perf_counter_ns()
        answers[rung][case] = outputs["logits"][0]
        return (encoded - start) / 1e6, (answered - encoded) / 1e6

    first = {rung: ask(0, rung) for rung in rungs}
    started = time.monotonic()
    # At least one answer to every case, so that all can be compared.
    for step in range(max(warmup, num_cases)):
        for rung in rungs:
            ask(step % num_cases, rung)
    times: dict[str, list[tuple[float, float]]] = {rung: [] for rung in rungs}
    for step in range(runs):
        if step >= 5 and time.monotonic() - started > max_seconds:
            break
        for rung in rungs:
            times[rung].append(ask(step % num_cases, rung))
    return {
        # Only the first rung's encoding was the process's first.
        "first_encode_ms": first[rungs[0]][0],
        "first_answer_ms": {rung: first[rung][1] for rung in rungs},
        "encode_ms": {rung: [encode for encode, _ in times[rung]] for rung in rungs},
        "answer_ms": {rung: [answer for _, answer in times[rung]] for rung in rungs},
        "answers": answers,
    }


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (1e6 bytes).

    On Linux not `ru_maxrss`: a child inherits that from the process that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv))
