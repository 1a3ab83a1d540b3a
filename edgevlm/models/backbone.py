"""Trunks: any timm model with `features_only`, plus three of ours: two that train in minutes on a CPU, one for photos.

They follow EfficientNet-Lite (no squeeze-excite, ReLU6: what int8 and NPUs like), with fused MBConv blocks in the
early stages, where depthwise convolutions leave most of an int8 core idle.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from edgevlm.errors import CheckpointError, RecipeError, nearest
from edgevlm.models._torchvision import ensure_importable

ensure_importable()

import timm  # noqa: E402
from timm.layers.create_act import get_act_layer  # noqa: E402
from timm.models import generate_default_cfgs, register_model  # noqa: E402
from timm.models._efficientnet_builder import decode_arch_def  # noqa: E402
from timm.models.efficientnet import _create_effnet  # noqa: E402

# timm asks each trunk of a module for this table; ours have no pre-trained weights.
default_cfgs = generate_default_cfgs({"edgevlm_nano": {}, "edgevlm_fused": {}, "test_edgevlm": {}})


def _lite(name: str, stem: int, arch_def: list[list[str]], pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    settings: dict[str, Any] = {
        "block_args": decode_arch_def(arch_def),
        "num_features": 128,
        "stem_size": stem,
        "fix_stem": True,
        "act_layer": get_act_layer("relu6"),
        "norm_layer": nn.BatchNorm2d,
    }
    return _create_effnet(name, pretrained, **{**settings, **kwargs})


@register_model
def edgevlm_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """About 0.3M parameters in few, wide, dense convolutions: the form that keeps an int8 core busy."""
    arch_def = [["cn_r1_k3_s2_e1_c32"], ["cn_r2_k3_s2_e1_c64"], ["cn_r2_k3_s2_e1_c96"], ["cn_r1_k3_s2_e1_c128"]]
    return _lite("edgevlm_nano", 16, arch_def, pretrained, kwargs)


@register_model
def edgevlm_fused(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For photos of about 320 px: fused MBConv down to stride 16, few wide layers, depthwise ones only on the last map.

    A depthwise 3x3 takes as long in int8 as in fp32, so a trunk of MBConv blocks gains little from int8; pruning to
    milliseconds finds expanded channels to remove in every block of this one.
    """
    arch_def = [["er_r1_k3_s2_e3_c32"], ["er_r2_k3_s2_e3_c48"], ["er_r2_k3_s2_e3_c96"], ["ir_r3_k3_s2_e4_c160"]]
    return _lite("edgevlm_fused", 24, arch_def, pretrained, kwargs)


@register_model
def test_edgevlm(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The smallest trunk that has every kind of block; for fast tests only."""
    arch_def = [
        ["cn_r1_k3_s1_e1_c8"],
        ["er_r1_k3_s2_e2_c8"],
        ["er_r1_k3_s2_e2_c16"],
        ["ir_r1_k3_s2_e2_c16"],
        ["ir_r1_k3_s2_e2_c24"],
    ]
    return _lite("test_edgevlm", 8, arch_def, pretrained, kwargs)


def create_trunk(name: str, first_level: int, num_levels: int) -> nn.Module:
    """A trunk that maps (B, 3, H, W) to a list of maps, finest first, from stride `2**first_level` down to at most 32.

    Raises:
        RecipeError: timm does not know the name.
    """
    if not timm.is_model(name):
        raise RecipeError(f"Unknown trunk '{name}'", nearest(name, timm.list_models()) or "See timm.list_models()")
    levels = range(first_level, min(first_level + num_levels, 6))
    return timm.create_model(
        name, features_only=True, pretrained=False, out_indices=tuple(level - 1 for level in levels)
    )


def load_trunk(trunk: nn.Module, name: str, source: str) -> None:
    """Put pre-trained weights into a trunk of `create_trunk(name, ...)`.

    Args:
        trunk: changed in place.
        name: timm model name.
        source: `hub` for timm's own weights of that name (downloaded once, then cached), or a .safetensors or .pth
            file of them. A file may hold the whole classifier: modules that the trunk lacks are left out.

    Raises:
        CheckpointError: no such weights, an unsafe or damaged file, or weights that do not fit.
    """
    weights = _hub_weights(name) if source == "hub" else _file_weights(Path(source))
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    modules = {key.partition(".")[0] for key in trunk.state_dict()}
    weights = {key: value for key, value in weights.items() if key.partition(".")[0] in modules}
    try:
        missing, unexpected = trunk.load_state_dict(weights, strict=False)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[-1].strip()
        raise CheckpointError(
            f"{source} does not fit the trunk {name} ({reason})", f"Give weights of {name}"
        ) from problem
    # Counters of batches, which older files lack, decide nothing at inference.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind}, first {keys[0]}"
            for kind, keys in (("missing", missing), ("unknown", unexpected))
            if keys
        ]
        raise CheckpointError(f"{source} does not fit the trunk {name} ({'; '.join(parts)})", f"Give weights of {name}")


def _hub_weights(name: str) -> dict[str, torch.Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as problem:  # the hub's client, its cache and the network raise nearly anything
        raise CheckpointError(
            f"No pre-trained weights of {name} ({' '.join(str(problem).split())[:200]})",
            "Check the network, or put the file here and name it in detector.trunk_weights",
        ) from problem


def _file_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", "Check detector.trunk_weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise CheckpointError(f"{path} cannot be read safely ({reason})", "Save it as .safetensors") from problem
    for wrapper in ("state_dict_ema", "state_dict", "model"):
        value = value.get(wrapper, value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not all(isinstance(entry, torch.Tensor) for entry in value.values()):
        raise CheckpointError(f"{path} holds no table of weights", "Give a model's state_dict")
    return value
