"""Golden cases: pixels, token ids, PyTorch's regions, logits and answers, with the tolerances that hold for them.

`golden/golden.json` says what the cases are, `golden/golden.npz` holds the arrays, `golden/caseN.png` the pixels as an
image file. They let an app, a device and a benchmark prove that they run the model that was trained.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.artifacts import Labels
from edgevlm.data.text import Tokenizer
from edgevlm.errors import BundleError
from targets.runtime import Arrays, Session, compare_golden, run_golden
from targets.source import Source, run_all

FOLDER = "golden"
MARGIN_QUANTILE = 0.25
"""The int8 threshold of the margin: this share of the chosen cases may lie below it."""
MAX_MARGIN = 1.0
"""Logits; above this a change of the answer is never excused."""
POOL = 256
"""Candidates drawn where there is no calibration set."""


def candidates(source: Source, tokenizer: Tokenizer, seed: int = 0) -> tuple[np.ndarray, list[str], str]:
    """Images (K, H, W, 3) uint8 and questions to choose from, and where they come from, in words."""
    calibration = source.calibration
    if calibration is not None and calibration.texts:
        return calibration.images, list(calibration.texts), "calibration samples of the training split"
    spec, limit = source.manifest.preprocess, source.manifest.tokenizer.max_tokens - 2
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(POOL // 4):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        images.append(np.asarray(coarse.resize((spec.width, spec.height), Image.Resampling.NEAREST)))
    words = [token for token in tokenizer.tokens if token.isalpha() and len(token) > 1] or ["a"]
    texts = [" ".join(rng.choice(words, rng.integers(1, max(2, limit // 2)))) for _ in images]
    return np.stack(images), texts, "seeded colour patterns and random words (no calibration set was given)"


def write_golden(source: Source, tokenizer: Tokenizer, folder: Path, num: int) -> None:
    """Choose `num` cases that every rung answers with a large margin, and write them under `folder/golden`."""
    images, texts, origin = candidates(source, tokenizer)
    input_ids = tokenizer.encode_batch(texts).astype(np.int32)
    regions = run_all(source.encode, {"image": images})
    logits = {p.name.removeprefix("answer_"): run_all(p, {**regions, "input_ids": input_ids}) for p in source.answers}
    by_rung = {rung: outputs["logits"] for rung, outputs in logits.items()}
    chosen = choose_cases(by_rung, num)

    out = folder / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    arrays: Arrays = {"pixels": images[chosen], "input_ids": input_ids[chosen]}
    arrays |= {name: regions[name][chosen].astype(np.float32) for name in source.encode.outputs}
    arrays |= {f"logits_{rung}": values[chosen].astype(np.float32) for rung, values in by_rung.items()}
    np.savez(out / "golden.npz", **arrays)  # pyright: ignore[reportArgumentType]
    cases = []
    for number, index in enumerate(chosen):
        name = f"case{number}.png"
        Image.fromarray(images[index]).save(out / name)
        answers = {
            rung: source.manifest.labels.answers[int(values[index].argmax())] for rung, values in by_rung.items()
        }
        margins = {rung: round(float(_margins(values[index : index + 1])[0]), 4) for rung, values in by_rung.items()}
        case = {"id": f"case{number}", "image": f"{FOLDER}/{name}", "question": texts[index]}
        cases.append({**case, "input_ids": input_ids[index].tolist(), "answers": answers, "margins": margins})
    smallest = np.array([min(case["margins"].values()) for case in cases])
    description = {"schema_version": 1, "origin": origin, "tolerances": tolerances(smallest), "cases": cases}
    (out / "golden.json").write_text(json.dumps(description, indent=1) + "\n")


def tolerances(margins: np.ndarray) -> dict[str, dict[str, Any]]:
    """What may differ at each precision; `margins` are those of the chosen cases."""
    excused = float(min(np.quantile(margins, MARGIN_QUANTILE), MAX_MARGIN)) if len(margins) else 0.0
    return {
        "fp32": {
            "max_abs_logits": 1e-3,
            "min_margin": 0.0,
            "max_differing_share": 0.0,
            "why": "Same arithmetic in another order: about 1e-5 is usual, 1e-3 leaves room for other processors.",
        },
        "int8": {
            "min_cosine": 0.9,
            "min_margin": round(excused, 4),
            "max_differing_share": 1 / 6,
            "why": "Eight bits move boxes and logits: one case in six may differ, and narrow answers may change.",
        },
    }


def choose_cases(by_rung: dict[str, np.ndarray], num: int) -> np.ndarray:
    """Indices of `num` cases: largest margin in the worst rung first, different answers before more of the same."""
    worst = np.min([_margins(values) for values in by_rung.values()], axis=0)
    answers = next(iter(by_rung.values())).argmax(1)
    order = np.argsort(-worst, kind="stable")
    seen: dict[int, int] = {}
    turn = np.zeros(len(order), np.int64)
    for index in order:
        turn[index] = seen.get(int(answers[index]), 0)
        seen[int(answers[index])] = int(turn[index]) + 1
    # The best case of each answer, then the second best of each; but never a coin toss for the sake of variety.
    clear = worst >= np.median(worst)
    return np.lexsort((-worst, turn, ~clear))[:num]


def read_golden(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and description of a bundle's golden cases.

    Raises:
        BundleError: they are missing or unreadable.
    """
    try:
        with np.load(folder / FOLDER / "golden.npz", allow_pickle=False) as archive:
            arrays = dict(archive)
        return arrays, json.loads((folder / FOLDER / "golden.json").read_text())
    except (OSError, ValueError) as problem:
        raise BundleError(
            f"The golden cases of {folder} cannot be read ({problem})", "Export the bundle again"
        ) from problem


def check_golden(session: Session, folder: Path, labels: Labels, precision: str) -> list[str]:
    """Run an opened model on a bundle's golden cases; problems in words, empty if it passes."""
    arrays, description = read_golden(folder)
    problems = compare_golden(run_golden(session, arrays), arrays, description, precision)
    for case, row in zip(description["cases"], range(len(arrays["pixels"])), strict=True):
        for rung, answer in case["answers"].items():
            if labels.answers[int(arrays[f"logits_{rung}"][row].argmax())] != answer:
                problems.append(f"{rung}, case {case['id']}: golden.json says '{answer}', its own logits say otherwise")
    return problems


def _margins(logits_NA: np.ndarray) -> np.ndarray:
    top = np.sort(logits_NA, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0] if logits_NA.shape[1] > 1 else np.zeros(len(logits_NA))
