"""BiFPN: effdet's, with two parts exchanged for forms that every converter maps exactly.

* Upsampling picks rows and columns by constant indices: converters differ on `F.interpolate(nearest)` when the ratio
  is not whole (3 -> 5), and one of them is silently wrong.
* Fusion is a running weighted sum instead of a stack along a fifth axis: same result, less memory traffic.
"""

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from edgevlm.models._torchvision import ensure_importable

ensure_importable()

from effdet.config.fpn_config import get_fpn_config  # noqa: E402
from effdet.efficientdet import BiFpn, FpnCombine, Interpolate2d, get_feat_sizes  # noqa: E402


class NearestResize(nn.Module):
    """Nearest-neighbour resize to a static size by `index_select`; PyTorch's rule: floor(i * in / out)."""

    rows: Tensor
    columns: Tensor

    def __init__(self, input_size: tuple[int, int], output_size: tuple[int, int]) -> None:
        super().__init__()
        for name in ("rows", "columns"):
            self.register_buffer(name, torch.empty(0, dtype=torch.long), persistent=False)
        self.set_sizes(input_size, output_size)

    def set_sizes(self, input_size: tuple[int, int], output_size: tuple[int, int]) -> None:
        """From now on, resize maps of `input_size` (rows, columns) to `output_size`."""
        device = self.rows.device
        self.rows, self.columns = (
            torch.arange(n_out, device=device) * n_in // n_out
            for n_in, n_out in zip(input_size, output_size, strict=True)
        )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return maps_BCHW.index_select(2, self.rows).index_select(3, self.columns)


class WeightedSum(nn.Module):
    """effdet's 'fastattn' combination: relu(w_i) / (sum relu(w) + 1e-4), added up one by one."""

    def __init__(self, combine: FpnCombine) -> None:
        super().__init__()
        self.inputs_offsets = combine.inputs_offsets
        self.resample = combine.resample
        self.edge_weights: nn.Parameter = combine.edge_weights  # pyright: ignore (there with 'fastattn')

    def forward(self, maps: list[Tensor]) -> Tensor:
        weights = nn.functional.relu(self.edge_weights)
        weights = weights / (weights.sum() + 1e-4)
        inputs = zip(self.inputs_offsets, self.resample.values(), weights, strict=True)
        total, *others = [resample(maps[offset]) * weight for offset, resample, weight in inputs]
        for term in others:
            total = total + term
        return total


def create_bifpn(
    in_channels: list[int], image_size: tuple[int, int], first_level: int, num_levels: int, channels: int, repeats: int
) -> nn.Module:
    """A BiFPN from the trunk's maps to `num_levels` maps of `channels` channels, finest first."""
    max_level = first_level + num_levels - 1
    config = OmegaConf.create(
        {
            "image_size": list(image_size),
            "min_level": first_level,
            "max_level": max_level,
            "num_levels": num_levels,
            "fpn_channels": channels,
            "fpn_cell_repeats": repeats,
            "fpn_name": None,
            "fpn_config": None,
            "norm_layer": None,
            "norm_kwargs": {"eps": 1e-3, "momentum": 0.03},
            "act_type": "relu6",
            "pad_type": "",
            "downsample_type": "max",
            "upsample_type": "nearest",
            "apply_resample_bn": True,
            "conv_bn_relu_pattern": False,
            "separable_conv": True,
            "redundant_bias": False,
        }
    )
    config.fpn_config = get_fpn_config(None, min_level=first_level, max_level=max_level)
    bifpn = BiFpn(config, [{"num_chs": channels_in, "reduction": 0} for channels_in in in_channels])
    for cell in bifpn.cell:
        for fnode in cell.fnode:  # pyright: ignore
            for resample in fnode.combine.resample.values():
                if isinstance(getattr(resample, "upsample", None), Interpolate2d):
                    resample.upsample = NearestResize((1, 1), (1, 1))
            fnode.combine = WeightedSum(fnode.combine)
    resize_bifpn(bifpn, image_size, first_level, num_levels)
    return bifpn


def resize_bifpn(bifpn: nn.Module, image_size: tuple[int, int], first_level: int, num_levels: int) -> None:
    """Fit the upsampling to images of another size (rows, columns); everything else fits any size.

    Its max pooling halves every side, rounding up, as the trunk does, as long as a map has more than one cell.
    """
    max_level = first_level + num_levels - 1
    sizes = get_feat_sizes(image_size, max_level=max_level)
    nodes = get_fpn_config(None, min_level=first_level, max_level=max_level).nodes
    for cell in bifpn.cell:  # pyright: ignore
        for fnode, node in zip(cell.fnode, nodes, strict=True):
            level = node["feat_level"]
            for resample in fnode.combine.resample.values():
                if isinstance(getattr(resample, "upsample", None), NearestResize):
                    resample.upsample.set_sizes(sizes[level + 1], sizes[level])
