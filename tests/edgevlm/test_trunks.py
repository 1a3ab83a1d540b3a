"""Pre-trained trunks: weights arrive whole from every safe kind of file, and what does not fit is refused in one line."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from edgevlm.errors import CheckpointError
from edgevlm.models.backbone import create_trunk, load_trunk


def classifier() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return timm.create_model("test_edgevlm", num_classes=7).state_dict()


def write(folder: Path, kind: str) -> Path:
    weights = {name: value.contiguous() for name, value in classifier().items()}
    path = folder / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "pth":
        torch.save(weights, path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_a_classifiers_file_fills_the_trunk(tmp_path: Path, kind: str) -> None:
    trunk = create_trunk("test_edgevlm", 3, 3)
    load_trunk(trunk, "test_edgevlm", str(write(tmp_path, kind)))
    expected = classifier()
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_trunk_computes_what_the_classifier_computes(tmp_path: Path) -> None:
    """The features of the last level are the classifier's own, before its last convolution."""
    model = timm.create_model("test_edgevlm", num_classes=7).eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "all.safetensors")
    trunk = create_trunk("test_edgevlm", 3, 3).eval()
    load_trunk(trunk, "test_edgevlm", str(tmp_path / "all.safetensors"))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stem = model.bn1(model.conv_stem(pixels))  # pyright: ignore
        torch.testing.assert_close(trunk(pixels)[-1], model.blocks(stem))  # pyright: ignore


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    trunk = create_trunk("test_edgevlm", 3, 3)
    save_file(timm.create_model("edgevlm_nano").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the trunk test_edgevlm"):
        load_trunk(trunk, "test_edgevlm", str(tmp_path / "other.safetensors"))
    weights = classifier()
    del weights["conv_stem.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing, first conv_stem\.weight"):
        load_trunk(trunk, "test_edgevlm", str(tmp_path / "part.safetensors"))
    weights = {**classifier(), "blocks.9.0.conv.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown, first blocks\.9"):
        load_trunk(trunk, "test_edgevlm", str(tmp_path / "more.safetensors"))


class Harmful:
    """What a hostile .pth would hold."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (Path("touched"),)  # pyright: ignore[reportReturnType]


def test_unsafe_and_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trunk = create_trunk("test_edgevlm", 3, 3)
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Harmful()))
    torch.save({"state_dict": Harmful()}, tmp_path / "wrapped.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("harmful.pth", "wrapped.pth", "noise.pth", "noise.safetensors", "list.pth", "nowhere.pth"):
        with pytest.raises(CheckpointError):
            load_trunk(trunk, "test_edgevlm", str(tmp_path / name))
    assert not (tmp_path / "touched").exists()


def test_the_hub_has_no_weights_of_ours() -> None:
    with pytest.raises(CheckpointError, match="No pre-trained weights of test_edgevlm"):
        load_trunk(create_trunk("test_edgevlm", 3, 3), "test_edgevlm", "hub")
