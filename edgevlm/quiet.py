"""Keep third-party chatter off the user's screen; `-v` brings it back."""

import logging
import os
import warnings


def hush() -> None:
    """Silence library warnings and info logs of this process and its children."""
    warnings.filterwarnings("ignore")
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOG_minloglevel": "2",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("timm", "torch", "onnxscript", "onnx_ir", "coremltools", "nncf", "jax", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
