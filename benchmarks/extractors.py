"""Print what extractors take on this machine, untrained, as Markdown: `python benchmarks/extractors.py tee-lite0-edge tee-fused-edge`.

Multiply-adds and parameters beside milliseconds per image on each runtime and in each precision, one thread: the
extractors' exported files take turns in one process, and the median of all rounds counts.
"""

import argparse
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from edgevlm.artifacts import ENCODE, Checkpoint, Labels, ModelConfig, PreprocessSpec, Provenance, TokenizerSpec
from edgevlm.bench.facts import processor
from edgevlm.bench.latency import take_turns
from edgevlm.models.inspect import count
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.vlm import VLM
from targets.base import load_exporter, open_model
from targets.quiet import quiet
from targets.source import CalibrationData, Source

LABELS = Labels(classes=tuple(f"c{i}" for i in range(80)), attributes=tuple(f"a{i}" for i in range(20)), answers=("x",))
TOKENIZER = TokenizerSpec(vocab_sha256="", vocab_size=64, max_tokens=8)


def source_of(name: str, size_px: int) -> Source:
    """An untrained extractor, and images of noise to quantise it with."""
    torch.manual_seed(0)
    config = ModelConfig(tee=TEES[name], fusion=FUSIONS["none"])
    spec = PreprocessSpec(height=size_px, width=size_px)
    facts = {"preprocess": spec, "tokenizer": TOKENIZER, "labels": LABELS}
    manifest = Checkpoint(provenance=Provenance(stage="", key=""), model=config, task="vqa", **facts)
    model = VLM(config, spec, TOKENIZER, LABELS).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, size_px, size_px, 3), dtype=np.uint8)
    return Source(model, manifest, CalibrationData(images, np.ones((2, TOKENIZER.max_tokens), np.int32)))


def main() -> None:
    """Read the command line, export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(TEES), metavar="name", help="registered extractors")
    parser.add_argument("--size", type=int, default=320, help="pixels of the square input")
    parser.add_argument("--targets", nargs="+", default=["onnx", "tflite", "openvino"])
    arguments = parser.parse_args()
    sources = {name: source_of(name, arguments.size) for name in arguments.names}
    columns = [(target, precision) for target in arguments.targets for precision in ("fp32", "int8")]
    cells: dict[str, list[str]] = {name: [] for name in sources}
    for target, precision in columns:
        with tempfile.TemporaryDirectory() as folder:
            sessions = []
            for name, source in sources.items():
                with quiet():
                    exported = load_exporter(target)(source, precision, Path(folder) / name)
                sessions.append(open_model(exported, Path(folder) / name))
            inputs = {"image": next(iter(sources.values())).samples(target).images[:1]}
            calls = [partial(session.run, ENCODE, inputs) for session in sessions]
            for name, times in zip(sources, take_turns(calls, 100, 60.0), strict=True):
                cells[name].append(f"{median(times):.2f}")
    print(f"{date.today()}, {processor()}, one thread, {arguments.size} x {arguments.size} px, untrained.\n")
    print("| extractor | parameters | MMAC | " + " | ".join(f"{t} {p} ms" for t, p in columns) + " |")
    print("|---" + "|--:" * (len(columns) + 2) + "|")
    for name, source in sources.items():
        cost = count(source.model.tee, torch.zeros(1, 3, arguments.size, arguments.size))
        print(f"| {name} | {cost.parameters:,} | {cost.macs / 1e6:,.0f} | " + " | ".join(cells[name]) + " |")


if __name__ == "__main__":
    main()
