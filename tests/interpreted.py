"""The kernels of `cmtool.networks.kernels` on a CPU, by Triton's interpreter: prints their errors as JSON.

python -m tests.interpreted; in a process of its own, since Triton is told before it is imported.
"""

from __future__ import annotations

import json
import os

import torch

from tests.unit.test_native import gradients, inputs

CASES = {
    "plain": {"channels": 32, "side": 8, "groups": 8, "dtype": torch.float32},
    "odd sizes, added, dropped": {
        **{"channels": 48, "side": 5, "groups": 12, "dtype": torch.float32},
        **{"added": True, "dropout": 0.3},
    },
    "several tiles": {"channels": 64, "side": 12, "groups": 16, "dtype": torch.float32, "added": True},
    "no silu": {"channels": 6, "side": 16, "groups": 2, "dtype": torch.float32, "silu": False, "dropout": 0.1},
    "bfloat16": {"channels": 96, "side": 9, "groups": 24, "dtype": torch.bfloat16, "added": True, "dropout": 0.2},
}


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from cmtool.networks import kernels
    from cmtool.networks.norms import _normalise

    class Kernels(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, added, weight, bias, keys, how):
            y, mean, rstd = kernels.forward(x, added, weight, bias, keys, how)
            ctx.save_for_backward(x, added, weight, bias, keys, mean, rstd)
            ctx.how = how
            return y

        @staticmethod
        def backward(ctx, grad):
            return *kernels.backward(grad, *ctx.saved_tensors, ctx.how), None, None

    found = {}
    for name, case in CASES.items():
        kernels._TILE, kernels._MEASURED = (1024, 2048) if name == "several tiles" else (4096, 16384)
        given = inputs(3, **{"added": False, "dropout": 0.0, "silu": True, **case})
        x, *rest = given
        if name == "several tiles":
            x = x + 300  # statistics of a large mean
        mine = gradients(Kernels.apply, x, *rest)
        exact = gradients(_normalise, x, *rest, dtype=torch.float64)
        found[name] = max(
            float((one.double() - other).abs().max() / other.abs().max())
            for one, other in zip(mine, exact, strict=True)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
