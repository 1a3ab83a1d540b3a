import importlib.util
import sys

import pytest

from edgevlm.artifacts import Provenance
from edgevlm.errors import TargetError
from targets import base
from targets.bundle import export_bundle


def test_a_mistyped_target_or_precision_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"Unknown target 'tflight'.*Did you mean 'tflite'"):
        base.check_target("tflight")
    with pytest.raises(TargetError, match=r"has no precision 'int9'.*Did you mean 'int8'"):
        base.check_target("onnx", "int9")
    with pytest.raises(TargetError, match="Unknown target"):
        base.runtime_status("tensorrt")


@pytest.fixture
def without(monkeypatch):
    """Make modules look as if they were not installed."""

    def hide(*names: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in names else find(n, *a))
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize(
    ("target", "module"), [("tflite", "litert_torch"), ("coreml", "coremltools"), ("openvino", "nncf")]
)
def test_a_missing_library_names_the_extra(without, target: str, module: str) -> None:
    without(module)
    with pytest.raises(TargetError, match=rf"needs .* not installed.*pip install 'edgevlm\[{target}\]'"):
        base.load_exporter(target)


def test_a_missing_runtime_names_the_extra(without, world) -> None:
    without("openvino")
    assert base.runtime_status("openvino") == (False, "openvino is not installed")
    model = next(m for m in world.bundle.models if m.target == "openvino")
    with pytest.raises(TargetError, match=r"cannot run here.*pip install 'edgevlm\[openvino\]'"):
        base.open_model(model, world.bundle_dir)


def test_if_nothing_can_be_exported_it_is_an_error(without, world, tmp_path) -> None:
    without("coremltools", "onnxscript")
    with pytest.raises(TargetError, match=r"No target could be exported.*edgevlm\[coreml\].*edgevlm\[onnx\]"):
        export_bundle(
            world.checkpoint,
            None,
            tmp_path,
            targets=("coreml", "onnx"),
            precisions=("fp32",),
            num_golden=2,
            provenance=Provenance(stage="export", key="x"),
        )


def test_int8_without_calibration_says_so(world, tmp_path) -> None:
    with pytest.raises(TargetError, match="int8 needs calibration samples"):
        export_bundle(
            world.checkpoint,
            None,
            tmp_path,
            targets=("onnx",),
            precisions=("int8",),
            num_golden=2,
            provenance=Provenance(stage="export", key="x"),
        )
