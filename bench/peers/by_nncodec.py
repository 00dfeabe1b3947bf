"""NNCodec (ISO/IEC 15938-17): all tensors as one bitstream, with dependent quantization.

Its training and its data sets want torchvision and more; the modules that import these stay empty.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from job import Made, Task, run

for name in ("nncodec.framework", "nncodec.framework.applications"):
    sys.modules[name] = ModuleType(name)
for name in ("tensorflow_model", "pytorch_model", "use_case_init"):
    sys.modules[f"nncodec.framework.{name}"] = ModuleType(name)
    setattr(sys.modules["nncodec.framework"], name, sys.modules[f"nncodec.framework.{name}"])
nnc: Any = importlib.import_module("nncodec.nnc")


def compress(task: Task) -> Made:
    """`qp`: the step of weights is 2^(qp / 4) · (1 + (qp mod 4) / 4), roughly; vectors keep NNCodec's fine -75."""
    path = str(task.folder / "model.nnc")
    arrays = {name: w.numpy() for name, w in task.weights.items()}
    nnc.compress(
        arrays, bitstream_path=path, qp=task.setting["qp"], nonweight_qp=task.setting.get("vectors", -75), use_dq=True,
        opt_qp=False, param_opt=True, row_skipping=True, verbose=False,
    )  # fmt: skip
    return Made({name: torch.from_numpy(w) for name, w in nnc.decompress(path).items()}, list(task.weights))


if __name__ == "__main__":
    run(compress)
