"""What every target exports from: the static programs of one checkpoint, with each conversion step done once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from edgevlm.artifacts import Checkpoint
from edgevlm.errors import TargetError
from edgevlm.models.vlm import VLM
from targets.program import ENCODE, Program, build_programs
from targets.runtime import Arrays

if TYPE_CHECKING:
    import onnx

T = TypeVar("T")


@dataclass
class CalibrationData:
    """Training samples that quantisers measure activations on."""

    images: np.ndarray
    """(K, H, W, 3) uint8."""
    input_ids: np.ndarray
    """(K, L) int32."""
    texts: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Source:
    """One model on its way to the targets."""

    model: VLM
    manifest: Checkpoint
    calibration: CalibrationData | None = None
    _memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def programs(self) -> list[Program]:
        """`encode_image` first, then the answer programs, largest budget first."""
        return build_programs(self.model, self.manifest)

    @property
    def encode(self) -> Program:
        return self.programs[0]

    @property
    def answers(self) -> list[Program]:
        return self.programs[1:]

    @property
    def static(self) -> tuple[str, ...]:
        """Names of the programs whose convolutions become static int8."""
        return (ENCODE,)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The result of `make`, remembered under `key` for later precisions and targets."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def samples(self, target: str) -> CalibrationData:
        """The calibration samples.

        Raises:
            TargetError: there are none.
        """
        if self.calibration is None:
            raise TargetError(f"{target} int8 needs calibration samples", "Give a calibration set")
        return self.calibration

    def exported(self, program: Program) -> torch.export.ExportedProgram:
        """`torch.export` of a program."""
        return self.once(
            f"torch/{program.name}",
            lambda: torch.export.export(program.module, tuple(program.inputs.values()), strict=False),
        )

    def onnx(self, program: Program) -> "onnx.ModelProto":
        """A copy of the fp32 ONNX form of a program, weights inside."""

        def convert() -> "onnx.ModelProto":
            converted = torch.onnx.export(
                self.exported(program),
                (),
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                opset_version=18,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            return cast(torch.onnx.ONNXProgram, converted).model_proto

        proto = self.once(f"onnx/{program.name}", convert)
        copy = type(proto)()
        copy.CopyFrom(proto)
        return copy

    def calibration_inputs(self, program: Program, target: str) -> list[Arrays]:
        """Inputs of a program for every calibration sample; answer programs get PyTorch's regions.

        Raises:
            TargetError: there are no calibration samples.
        """
        samples = self.samples(target)
        if program.name == ENCODE:
            return [{"image": image[None]} for image in samples.images]
        regions = self.once("regions", lambda: list(run_rows(self.encode, {"image": samples.images})))
        rows = zip(regions, samples.input_ids, strict=True)
        return [{**row, "input_ids": ids[None].astype(np.int32)} for row, ids in rows]


@torch.no_grad()
def run_batch(program: Program, inputs: Arrays) -> Arrays:
    """A program's module in PyTorch on a batch: inputs and outputs by name, (B, ...) each."""
    tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in program.inputs]
    return {name: y.numpy() for name, y in zip(program.outputs, program.module(*tensors), strict=True)}


def run_rows(program: Program, inputs: Arrays, batch: int = 32) -> Iterator[Arrays]:
    """`run_batch` in pieces, row by row, each with a batch axis of 1."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, batch):
        piece = run_batch(program, {name: x[start : start + batch] for name, x in inputs.items()})
        rows = len(next(iter(piece.values())))
        yield from ({name: x[i : i + 1] for name, x in piece.items()} for i in range(rows))


def run_all(program: Program, inputs: Arrays, batch: int = 32) -> Arrays:
    """`run_batch` in pieces, put together again."""
    rows = list(run_rows(program, inputs, batch))
    return {name: np.concatenate([row[name] for row in rows]) for name in program.outputs}


def folder_mb(folder: Path) -> float:
    """Size of all files under a folder, in MB (1e6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def files_under(folder: Path) -> tuple[str, ...]:
    """All files under a folder, relative to it, sorted."""
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))


def named_module(program: Program) -> nn.Module:
    """The program as a module that takes and returns tensors by name."""
    return _Named(program).eval()


class _Named(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.inputs, self.outputs = program.module, tuple(program.inputs), program.outputs

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.outputs, self.program(*(inputs[name] for name in self.inputs)), strict=True))
