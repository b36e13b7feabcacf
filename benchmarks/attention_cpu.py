"""Which attention kernel is the fastest on this CPU, forward and backward, in fp32 and in bf16?

    python -m benchmarks.attention_cpu

PyTorch's SDPA against plain products (`model/attention.py`), one thread, CPU time, at the shapes of the
demo's model, of ViT-B/16 and of its captions. With `model.attention=auto`, bf16 takes the products and fp32
SDPA.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from model.attention import Kernel, Mask, attention

SHAPES = {
    "demo, image": (96, 17, 3, False),
    "demo, captions": (192, 15, 3, True),
    "ViT-B/16, image": (8, 197, 12, False),
    "ViT-B/16, visible patches": (8, 50, 12, False),
    "CLIP, captions": (16, 32, 8, True),
}
"""Batch, tokens, heads of width 64, causal."""
KERNELS: tuple[Kernel, ...] = ("sdpa", "math")


def turn(qkv_BL3HD: torch.Tensor, kernel: Kernel, causal: bool) -> tuple[float, float]:
    """Seconds of CPU time of a forward and of its backward."""
    leaf = qkv_BL3HD.clone().requires_grad_()
    start = time.process_time()
    out = attention(*leaf.unbind(2), backend=kernel, mask=Mask(causal=causal)).flatten(2)
    between = time.process_time()
    out.backward(torch.ones_like(out))
    return between - start, time.process_time() - between


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    table = Table("shape", "precision", "SDPA ms", "products ms", "SDPA / products")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, (batch, tokens, heads, causal) in SHAPES.items():
            qkv = torch.randn(batch, tokens, 3, heads, 64).to(dtype)
            turns = [[turn(qkv, kernel, causal) for kernel in KERNELS] for _ in range(options.rounds + 1)][1:]
            times = [
                [1e3 * statistics.median(part) for part in zip(*side, strict=True)]
                for side in zip(*turns, strict=True)
            ]
            rows.append({"shape": name, "dtype": str(dtype), "sdpa_ms": times[0], "math_ms": times[1]})
            shown = [f"{forward:.2f} + {backward:.2f}" for forward, backward in times]
            table.add_row(name, str(dtype)[6:], *shown, f"{sum(times[0]) / sum(times[1]):.1f}x")
    console, about = Console(width=110), machine(["torch"])
    console.print(table)
    console.print("; ".join(f"{key} {value}" for key, value in about.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
