"""Which kernel is chosen, and what is handed to it."""

import itertools

import pytest
import torch

from model.attention import (
    Kernel,
    Mask,
    attention,
    block_diagonal,
    dense,
    is_deterministic,
    padding_bias,
    resolve_backend,
)


def inputs(
    batch: int, length: int, heads: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, length, heads, width, generator=generator)
    return q, k, v


def test_auto_on_the_cpu_is_sdpa_and_plain_products_in_bf16():
    assert resolve_backend("auto", "cpu", torch.float32) == "sdpa"
    assert resolve_backend("auto", "cpu", torch.bfloat16) == "math"
    assert resolve_backend("sdpa", "cpu", torch.bfloat16) == "sdpa"
    assert resolve_backend("sdpa", "cuda", torch.float32) == "sdpa"


def test_what_is_asked_for_and_cannot_run_is_an_error():
    with pytest.raises(RuntimeError, match=r"set model\.attention to auto or sdpa"):
        resolve_backend("xformers", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="xformers cannot run on cpu"):
        attention(*inputs(1, 3, 2, 8), backend="xformers")


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("sdpa", torch.float32, 1e-6), ("math", torch.float32, 1e-6), ("math", torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("kind", ["none", "causal", "keys", "segments", "causal segments"])
def test_attention_and_its_gradient_are_those_of_the_softmax_of_scaled_products(
    kind: str, backend: Kernel, dtype: torch.dtype, tolerance: float
) -> None:
    batch = 1 if "segments" in kind else 3
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(batch, 7, 2, 8))
    keys = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    mask, hidden = Mask(), torch.zeros(batch, 1, 7, 7, dtype=torch.bool)
    if kind == "causal":
        mask = Mask(causal=True)
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1).expand(3, 1, 7, 7)
    elif kind == "keys":
        mask = Mask(keys_BL=keys)
        hidden = ~keys[:, None, None, :].expand(3, 1, 7, 7)
    elif "segments" in kind:
        mask = Mask(causal=kind.startswith("causal"), segments=(3, 1, 3))
        owner = [0, 0, 0, 1, 2, 2, 2]
        for i, j in itertools.product(range(7), range(7)):
            hidden[0, 0, i, j] = owner[i] != owner[j] or (mask.causal and j > i)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", exact[0], exact[1]) * 8**-0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), exact[2])
    out = attention(q, k, v, backend=backend, mask=mask)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert torch.allclose(out.double(), expected, atol=tolerance)
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=tolerance)


def test_only_plain_products_are_deterministic_on_a_gpu():
    assert is_deterministic("math", "cuda")
    assert not is_deterministic("sdpa", "cuda")
    assert not is_deterministic("xformers", "cuda")
    assert is_deterministic("sdpa", "cpu")


@pytest.mark.parametrize("length", [8, 13])
def test_xformers_takes_our_padding_bias(length: int):
    """Its own checks, all that run without a GPU: only the device may be wrong."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    q, k, v = (x.half() for x in inputs(2, length, 2, 16))
    keys = torch.arange(length) < torch.tensor([length, 3])[:, None]
    bias = padding_bias(keys, 2, length, q.dtype)
    given = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias)
    given.validate_inputs()
    for operator in (fmha.cutlass.FwOp, fmha.cutlass.BwOp):
        reasons = [why for why in operator.not_supported_reasons(given) if not why.startswith("device=")]
        assert reasons == []
    assert torch.equal(bias[1, 1, 5] == 0, keys[1])
    causal = fmha.Inputs(query=q, key=k, value=v, attn_bias=fmha.attn_bias.LowerTriangularMask())
    causal.validate_inputs()


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_bias_for_packed_captions_is_our_mask(causal: bool):
    """Written out by its own code; and its checks, as above."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    segments, cpu = (5, 1, 9, 3), torch.device("cpu")
    bias = block_diagonal(segments, causal, cpu)
    ours = dense(Mask(causal=causal, segments=segments), cpu)
    assert ours is not None
    assert torch.equal(bias.materialize((18, 18)) == 0, ours)
    q, k, v = (x.half() for x in inputs(1, 18, 2, 16))
    given = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias)
    given.validate_inputs()
    for operator in (fmha.cutlass.FwOp, fmha.cutlass.BwOp):
        reasons = [why for why in operator.not_supported_reasons(given) if not why.startswith("device=")]
        assert reasons == []
