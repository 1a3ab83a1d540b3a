"""Fail unless the core works in an environment that has no target's library: called by .ci/run in `build/venv-core`."""

import importlib
import importlib.util
import pkgutil
import sys

TARGET_LIBRARIES = (
    "ai_edge_litert",
    "ai_edge_quantizer",
    "coremltools",
    "litert_torch",
    "nncf",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
)


def main() -> int:
    """Exit status: 0 if every module imports."""
    present = [name for name in TARGET_LIBRARIES if importlib.util.find_spec(name)]
    if present:
        print(f"not a core-only environment: {', '.join(present)} can be imported", file=sys.stderr)
        return 1
    names = []
    for package in ("edgevlm", "targets", "calibration"):
        root = importlib.import_module(package)
        names += [package, *(module.name for module in pkgutil.walk_packages(root.__path__, f"{package}."))]
    failed = 0
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as problem:
            print(f"{name} does not import ({type(problem).__name__}: {problem})", file=sys.stderr)
            failed += 1
    if failed:
        return 1
    print(f"core-only: {len(names)} modules import without any target's library")
    return 0


if __name__ == "__main__":
    sys.exit(main())
