"""The smallest model with every part, for tests of the network and of compression."""

from typing import Any

import torch

from edgevlm.artifacts import Labels, ModelConfig, PreprocessSpec, TokenizerSpec, TrimConfig
from edgevlm.models.registry import FUSIONS, TEES
from edgevlm.models.tee import Regions
from edgevlm.models.vlm import VLM

SPEC = PreprocessSpec(height=64, width=64)
TOKENIZER = TokenizerSpec(vocab_sha256="", vocab_size=40, max_tokens=12)
LABELS = Labels(classes=("a", "b", "c"), attributes=("d", "e"), answers=("x", "y", "z", "w"))


def tiny_vlm(seed: int = 0, trim_after: int | None = None, **fusion: object) -> VLM:
    """A seeded random `test-tee` + `test-fusion` model in evaluation mode."""
    torch.manual_seed(seed)
    config = FUSIONS["test-fusion"].model_copy(update={**_trim(trim_after), **fusion})
    return VLM(ModelConfig(tee=TEES["test-tee"], fusion=config), SPEC, TOKENIZER, LABELS).eval()


def _trim(after: int | None) -> dict[str, TrimConfig]:
    return {} if after is None else {"trim": TrimConfig(layers=(after,))}


def tiny_regions(batch: int, seed: int = 0) -> Regions:
    """Random regions; about a quarter score below the threshold."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, 8, 2, 2, generator=generator).sort(2).values.transpose(2, 3)
    boxes = torch.stack([corners[..., 0, 0], corners[..., 1, 0], corners[..., 0, 1], corners[..., 1, 1]], -1)
    return Regions(torch.rand(batch, 8, 32, generator=generator), boxes, torch.rand(batch, 8, generator=generator))


def tiny_ids(batch: int, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Random token ids with [CLS], [SEP] and padding."""
    ids = torch.zeros(batch, TOKENIZER.max_tokens, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    ids[:, 1 : length - 1] = torch.randint(5, 40, (batch, length - 2), generator=generator).int()
    ids[:, 0], ids[:, length - 1] = TOKENIZER.cls_id, TOKENIZER.sep_id
    return ids


def dual_vlm(seed: int = 0, trim_after: int | None = None, **fusion: Any) -> VLM:
    """A seeded random model of two encoders in evaluation mode; biases and norms as after training."""
    torch.manual_seed(seed)
    config = FUSIONS["test-dual"].model_copy(update={**_trim(trim_after), **fusion})
    model = VLM(ModelConfig(tee=TEES["test-tee"], fusion=config), SPEC, TOKENIZER, LABELS)
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif "words" in name or "positions" in name:
                parameter.mul_(20)
    return model.eval()
