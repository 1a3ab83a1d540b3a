"""Let timm and effdet import beside a CPU-only torch.

The torchvision wheel of the package index is linked against CUDA, so beside a CPU-only torch its compiled ops do not
load and importing it fails on "operator torchvision::nms does not exist". edgevlm uses none of those ops (it has its
own NMS and RoIAlign), so it is enough to declare their schemas. Where torchvision works, this does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # kept alive: the schemas vanish with it


def ensure_importable() -> None:
    """Declare torchvision's op schemas if its compiled part cannot be loaded. Call before importing timm."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    for compiled in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(compiled)
            return
        except OSError:
            continue
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
