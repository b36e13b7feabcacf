"""One attention call over three kernels: xformers on CUDA, plain products in bf16 on the CPU, PyTorch's SDPA
elsewhere. (The backward of SDPA takes 4 to 8 times as long there: benchmarks/2026-11-24-step.md.)

Shapes: B batch, L tokens (queries and keys), H heads, D width of one head.
"""

import logging
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["xformers", "sdpa", "math"]
Backend = Literal["auto", "xformers", "sdpa", "math"]


class Mask(NamedTuple):
    """What a token may see: without any of these, everything. `causal` and `keys_BL` exclude each other."""

    causal: bool = False
    """Token i sees the tokens up to i."""
    keys_BL: Tensor | None = None
    """bool, True where a key may be seen. Every row needs one True."""
    segments: tuple[int, ...] | None = None
    """Lengths of sequences that lie one after another; they add up to L, and B is 1. A token sees its own."""


EVERYTHING = Mask()

_BIAS_ALIGNMENT = 8  # xformers wants every row of a tensor bias to begin on 16 bytes

_logger = logging.getLogger(__name__)


@cache
def resolve_backend(requested: Backend, device_type: str, dtype: torch.dtype) -> Kernel:
    """The kernel that a request means on a device type ("cpu", "cuda", ...) for inputs of a dtype; chosen and
    logged once for each.

    Raises:
        RuntimeError: xformers was asked for and cannot run there.
    """
    if requested in ("sdpa", "math"):
        return requested
    usable = device_type == "cuda" and _xformers_importable()
    if requested == "xformers" and not usable:
        raise RuntimeError(f"xformers cannot run on {device_type} here: set model.attention to auto or sdpa")
    chosen: Kernel = "xformers" if usable else "sdpa"
    if device_type == "cpu" and dtype == torch.bfloat16:
        chosen = "math"
    _logger.info("attention on %s in %s: %s", device_type, dtype, chosen)
    return chosen


def is_deterministic(kernel: Kernel, device_type: str) -> bool:
    """Whether equal inputs give equal gradients to the bit. On CUDA the fused kernels add the gradients of
    keys and values in the order in which blocks finish."""
    return kernel == "math" or device_type == "cpu"


def _xformers_importable() -> bool:
    try:
        from xformers.ops import fmha
    except ImportError:
        return False
    # The one operator that takes a padding mask as a tensor, forward and backward.
    return fmha.cutlass.FwOp.is_available() and fmha.cutlass.BwOp.is_available()


def attention(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, backend: Backend, mask: Mask = EVERYTHING
) -> Tensor:
    """Softmax attention with scale D ** -0.5.

    Args:
        backend: kernel, resolved for the device and dtype of `q_BLHD`.
        mask: what a token may see.

    Returns:
        [B, L, H, D], in the dtype of the inputs.

    Raises:
        RuntimeError: see `resolve_backend`.
    """
    assert not (mask.causal and mask.keys_BL is not None), "causal and keys_BL exclude each other"
    kernel = resolve_backend(backend, q_BLHD.device.type, q_BLHD.dtype)
    if kernel == "xformers":
        return _xformers_attention(q_BLHD, k_BLHD, v_BLHD, mask)
    q_BHLD, k_BHLD, v_BHLD = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    seen = dense(mask, q_BLHD.device)
    if kernel == "math":
        if mask.causal and seen is None:
            length = q_BLHD.shape[1]
            seen = torch.ones(length, length, dtype=torch.bool, device=q_BLHD.device).tril()
        return _products(q_BHLD, k_BHLD, v_BHLD, seen).transpose(1, 2)
    causal = mask.causal and seen is None
    out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=seen, is_causal=causal)
    return out_BHLD.transpose(1, 2)


def dense(mask: Mask, device: torch.device) -> Tensor | None:
    """The mask as bool that goes with [B, H, L, L]; None where it is but causal, or nothing."""
    if mask.segments is not None:
        lengths = torch.tensor(mask.segments, device=device)
        owner_L = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        same_LL = owner_L[:, None] == owner_L
        return same_LL.tril() if mask.causal else same_LL
    return None if mask.keys_BL is None else mask.keys_BL[:, None, None, :]


def _products(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, seen: Tensor | None) -> Tensor:
    scores_BHLL = (q_BHLD * q_BHLD.shape[-1] ** -0.5) @ k_BHLD.transpose(-1, -2)
    if seen is not None:
        scores_BHLL = scores_BHLL.masked_fill(~seen, float("-inf"))
    return scores_BHLL.softmax(dim=-1) @ v_BHLD


def _xformers_attention(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Mask) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if mask.causal else None
    if mask.segments is not None:
        bias = block_diagonal(mask.segments, mask.causal, q_BLHD.device)
    elif mask.keys_BL is not None:
        bias = padding_bias(mask.keys_BL, q_BLHD.shape[2], q_BLHD.shape[1], q_BLHD.dtype)
    return memory_efficient_attention(q_BLHD, k_BLHD, v_BLHD, attn_bias=bias)


@lru_cache(maxsize=4)
def block_diagonal(segments: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    """xformers' bias for sequences one after another; kept, because every block of a tower wants the same."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    kind = BlockDiagonalCausalMask if causal else BlockDiagonalMask
    return kind.from_seqlens(segments, device=device)


def padding_bias(keys_BL: Tensor, heads: int, queries: int, dtype: torch.dtype) -> Tensor:
    """[B, H, queries, L] additive bias, -inf at hidden keys, laid out as xformers wants it.

    Rows are slices of a longer buffer so that each begins aligned; heads and queries share memory (stride 0).
    """
    batch, length = keys_BL.shape
    padded = -(-length // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    bias_B11L = torch.zeros(batch, 1, 1, padded, dtype=dtype, device=keys_BL.device)[..., :length]
    bias_B11L.masked_fill_(~keys_BL[:, None, None, :], float("-inf"))
    return bias_B11L.expand(batch, heads, queries, length)
