"""Are the GPUs of this machine sound: memory errors, throttling, and sums that come out the same."""

import torch

QUERY = [
    "nvidia-smi",
    "--query-gpu=index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown",
    "--format=csv,noheader",
]
"""The command whose answer `reported` reads."""
_SIDE, _REPEATS = 4096, 8


def wrong_sums() -> dict[int, str]:
    """What is wrong with products, by number of the device; empty where all are sound or there is none."""
    return {index: found for index in range(torch.cuda.device_count()) if (found := _wrong_sums(index))}


def _wrong_sums(index: int) -> str | None:
    """The same product, again and again; bf16 on the matrix units, as training does it."""
    generator = torch.Generator(f"cuda:{index}").manual_seed(0)
    shape = (_SIDE, _SIDE)
    a, b = (
        torch.randn(shape, device=f"cuda:{index}", generator=generator, dtype=torch.bfloat16) for _ in "ab"
    )
    first = a @ b
    wrong = sum(not torch.equal(a @ b, first) for _ in range(_REPEATS))
    return f"{wrong} of {_REPEATS} products differ from the first" if wrong else None


def reported(lines: str) -> dict[int, str]:
    """Problems in nvidia-smi's answer to the query; what it does not support it calls [N/A]."""
    problems = {}
    for line in lines.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3 or not fields[0].isdecimal():
            continue
        index, errors, slowdown = fields
        found = []
        if errors.isdecimal() and int(errors):
            found.append(f"{errors} uncorrected memory errors")
        if slowdown == "Active":
            found.append("slowed down by the hardware (heat or power)")
        if found:
            problems[int(index)] = ", ".join(found)
    return problems
