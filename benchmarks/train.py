"""Print the training speed of this machine as Markdown: `python benchmarks/train.py [--seconds 20]`.

Each row is `fit` itself on random data of the shapes named: images/s for TEE, questions/s for the fusion on cached
regions, the share of the time that steps waited for their data, and what an epoch of NLVR's 74,460 training questions
takes at that speed (worked out from the measured steps, not run whole). On an NVIDIA GPU the row of bf16 names its share
of the card's peak, from the multiply-adds that PyTorch counts in one step, forward and backward, times two.
"""

import argparse
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgevlm.artifacts import Labels, ModelConfig, PreprocessSpec, TokenizerSpec
from edgevlm.bench.facts import num_cores, processor
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.vlm import VLM
from edgevlm.progress import Reporter
from edgevlm.recipe import TrainSection
from edgevlm.tasks.detection import DetectionObjective
from edgevlm.train.answering import AnswerObjective, batch_of
from edgevlm.train.loop import Batch, fit
from edgevlm.train.regions import RegionSplit
from edgevlm.train.shards import MappedColumn

NLVR_QUESTIONS = 74_460
"""Training sentences of NLVR v1."""
NUM_IMAGES = 512
NUM_QUESTIONS = 20_000
PEAK_BF16_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}
"""Dense, from the makers' data sheets."""
LABELS = Labels(
    classes=tuple(f"c{i}" for i in range(12)),
    attributes=tuple(f"a{i}" for i in range(8)),
    answers=tuple(f"x{i}" for i in range(24)),
)
Task = tuple[str, nn.Module, int, Callable[[Tensor], Batch], str]
"""Row name, objective, number of rows, make_batch, unit."""


def model_of(tee: str, fusion: str, size_px: tuple[int, int], max_tokens: int) -> VLM:
    """A random model of registered parts."""
    torch.manual_seed(0)
    tokenizer = TokenizerSpec(vocab_sha256="", vocab_size=1024, max_tokens=max_tokens)
    spec = PreprocessSpec(height=size_px[0], width=size_px[1])
    return VLM(ModelConfig(tee=TEES[tee], fusion=FUSIONS[fusion]), spec, tokenizer, LABELS)


def tee_task(tee: str, size_px: tuple[int, int]) -> Task:
    """Images of noise with six objects each."""
    model = model_of(tee, "none", size_px, 24)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_IMAGES, *size_px, 3), dtype=torch.uint8, generator=generator)
    corners = torch.rand(NUM_IMAGES, 6, 2, generator=generator) * torch.tensor([size_px[1], size_px[0]]) * 0.7
    boxes = torch.cat([corners, corners + 0.25 * min(size_px)], -1)
    classes = torch.randint(0, len(LABELS.classes), (NUM_IMAGES, 6), generator=generator)
    attributes = torch.randint(0, 2, (NUM_IMAGES, 6, len(LABELS.attributes)), generator=generator).float()

    def make_batch(rows: Tensor) -> Batch:
        truth = {"boxes_BG4": boxes[rows], "classes_BG": classes[rows], "attributes_BGA": attributes[rows]}
        return {"pixels_BHWC": pixels[rows], **truth}

    model.tee.to(memory_format=torch.channels_last)  # pyright: ignore
    return f"TEE {tee}, {size_px[1]} x {size_px[0]} px", DetectionObjective(model.tee), NUM_IMAGES, make_batch, "images"


def fusion_task(fusion: str, folder: Path | None) -> Task:
    """NLVR's sizes: 24 regions, sentences of 8 to 30 word pieces (mean 16); from files where a folder is given."""
    model = model_of("edge-nano", fusion, (96, 384), 64)
    generator = torch.Generator().manual_seed(0)
    images = NUM_QUESTIONS // 8
    lengths = (torch.randn(NUM_QUESTIONS, generator=generator) * 5 + 16).round().clamp(8, 30)
    ids = torch.randint(5, 1024, (NUM_QUESTIONS, 64), generator=generator, dtype=torch.int32)
    corners = torch.rand(images, 24, 2, generator=generator) * 0.8
    split = RegionSplit(
        features=torch.rand(images, 24, TEES["edge-nano"].roi_hidden, generator=generator),
        boxes=torch.cat([corners, corners + 0.1], -1),
        scores=torch.ones(images, 24),
        image_index=torch.arange(NUM_QUESTIONS) // 8,
        input_ids=ids * (torch.arange(64) < lengths[:, None]),
        answers=torch.randint(0, 2, (NUM_QUESTIONS,), generator=generator),
        referred=torch.zeros(NUM_QUESTIONS, 24, dtype=torch.uint8),
        has_referred=torch.zeros(NUM_QUESTIONS, dtype=torch.uint8),
        kinds=[""] * NUM_QUESTIONS,
    )
    name = f"fusion {fusion}, cached regions"
    if folder is not None:
        split.save(folder, "train")
        split = RegionSplit.load(folder, "train", in_memory_mb=0)
        assert isinstance(split.features, MappedColumn)
        name += " mapped from files"

    def make_batch(rows: Tensor) -> Batch:
        return {"batch": batch_of(model, split, rows)}

    return name, AnswerObjective(model, 0.0), NUM_QUESTIONS, make_batch, "questions"


def flops_per_row(objective: nn.Module, batch: Batch, rows: int, device: torch.device) -> float:
    """Floating-point operations of one row, forward and backward, in matrix products and convolutions."""
    objective.to(device).train()
    with FlopCounterMode(display=False) as counter:
        loss, _ = objective(**send_to_device(batch, device))  # pyright: ignore
        loss.backward()
    objective.zero_grad()
    return counter.get_total_flops() / rows


def measure(task: Task, batch_size: int, precision: str, compiled: bool, seconds: float) -> list[str]:
    """One row of the table."""
    name, objective, num_rows, make_batch, unit = task
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = flops_per_row(objective, make_batch(torch.arange(batch_size)), batch_size, device)

    def speed(steps: int) -> dict[str, float]:
        section = TrainSection.model_validate(
            {"steps": steps, "batch_size": batch_size, "precision": precision, "compile": compiled, "save_every": 10**9}
        )
        with tempfile.TemporaryDirectory() as folder:
            options = {"what": "bench", "work_dir": Path(folder), "key": "", "seed": 0, "reporter": Reporter()}
            return fit(objective, num_rows, make_batch, section, **options)

    rate = speed(4)["samples_per_s"]
    result = speed(max(10, round(seconds * rate / batch_size)))
    rate = result["samples_per_s"]
    peak = next(
        (tflops for card, tflops in PEAK_BF16_TFLOPS.items() if card in device_name(device)),
        None,
    )
    share = f"{rate * work / peak / 1e10:.1f}" if peak and precision == "bf16" else ""
    epoch = f"{NLVR_QUESTIONS / rate / 60:.1f}" if unit == "questions" else ""
    cells = [name, f"{precision}{' compiled' if compiled else ''}", str(batch_size), f"{rate:.0f} {unit}/s"]
    return [*cells, f"{100 * result['stall_share']:.1f}", f"{work / 1e9:.3f}", share, epoch]


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name() if device.type == "cuda" else processor()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of training per row")
    parser.add_argument("--batch", type=int, default=0, help="rows per step; default 64 on a CPU, 512 on a GPU")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    batch = options.batch or (512 if gpu else 64)
    where = torch.device("cuda" if gpu else "cpu")
    threads = "" if gpu else f", {torch.get_num_threads()} threads of {num_cores()} cores"
    print(
        f"{date.today()}, {device_name(where)}{threads}; `python benchmarks/train.py --seconds {options.seconds:g}`.\n"
    )
    print(
        "| training | precision | batch | speed | waiting for data % | GFLOP per row | % of bf16 peak | NLVR epoch, min |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    settings = [("fp32", False), ("bf16", False), ("bf16", True)] if gpu else [("fp32", False)]
    with tempfile.TemporaryDirectory() as folder:
        tasks: list[tuple[Task, int]] = [
            (tee_task("edge-nano", (128, 128)), min(batch, NUM_IMAGES)),
            (fusion_task("edge-l3-h96", None), batch),
            (fusion_task("edge-l3-h96", Path(folder)), batch),
            (fusion_task("edge-l3-h128", None), batch),
        ]
        for task, size in tasks:
            for precision, compiled in settings:
                print("| " + " | ".join(measure(task, size, precision, compiled, options.seconds)) + " |", flush=True)


if __name__ == "__main__":
    main()
