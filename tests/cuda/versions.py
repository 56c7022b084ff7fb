"""Prints, as JSON, what a run on a GPU was made with."""

import json
import platform
import sys

import torch

import fastlm
from fastlm import _native

print(
    json.dumps(
        {
            "commit": sys.argv[1] if len(sys.argv) > 1 else "",
            "fastlm": fastlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "capability": [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())],
            "cuda_runtime": _native.cuda.runtime_version() if _native.cuda else None,
            "cuda_driver": _native.cuda.driver_version() if _native.cuda else None,
            "problem": _native.reasons.get("cuda"),
        },
        indent=1,
    )
)
