"""Pre-norm transformer blocks, as CLIP's, with CLIP's initialisation.

Shapes: B batch, L tokens, D width, H heads, T blocks.

Initialisation (openai/CLIP, `CLIP.initialize_parameters`): normal, std D**-0.5 for the fused query/key/value,
(2 D)**-0.5 for the MLP's first layer, D**-0.5 * (2 layers)**-0.5 for the two projections that write to the
residual stream; biases zero. Applied to every stack, the decoders included (not from the paper).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import EVERYTHING, Backend, Mask, attention
from model.config import Activation

MLP_RATIO = 4


def linear(in_features: int, out_features: int, *, std: float, bias: bool = True) -> nn.Linear:
    """Linear layer with normal weights of the given std and zero bias."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """Parameter of the given shape with normal values of the given std."""
    return nn.Parameter(torch.empty(shape).normal_(std=std))


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        depth: int,
        backend: Backend,
        activation: Activation = "gelu",
        layer_scale: float = 0.0,
    ) -> None:
        """
        Args:
            depth: number of blocks in the stack (it scales the residual projections).
            layer_scale: initial value of the learned factor on each branch; 0 for none.
        """
        super().__init__()
        self.heads = heads
        self.backend: Backend = backend
        self.activation = F.gelu if activation == "gelu" else quick_gelu
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        self.attention_norm = nn.LayerNorm(width)
        self.attention_qkv = linear(width, 3 * width, std=width**-0.5)
        self.attention_out = linear(width, width, std=residual_std)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = linear(width, MLP_RATIO * width, std=(2 * width) ** -0.5)
        self.mlp_out = linear(MLP_RATIO * width, width, std=residual_std)
        scaled = layer_scale > 0
        self.attention_scale = nn.Parameter(torch.full((width,), layer_scale)) if scaled else None
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale)) if scaled else None

    def forward(self, x_BLD: Tensor, mask: Mask = EVERYTHING, branch_2B: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D].

        Args:
            mask: what a token may see.
            branch_2B: factor of each sample on the attention and on the MLP branch; 0 skips it.
        """
        batch, length, width = x_BLD.shape
        qkv = F.linear(self.attention_norm(x_BLD), self.attention_qkv.weight, self._bias_without_keys())
        q_BLHD, k_BLHD, v_BLHD = qkv.view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        seen = attention(q_BLHD, k_BLHD, v_BLHD, backend=self.backend, mask=mask)
        branch_BLD = self.attention_out(seen.reshape(batch, length, width))
        x_BLD = x_BLD + _scaled(branch_BLD, self.attention_scale, branch_2B, 0)
        branch_BLD = self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x_BLD))))
        return x_BLD + _scaled(branch_BLD, self.mlp_scale, branch_2B, 1)

    def _bias_without_keys(self) -> Tensor:
        """[3 D] with zeros for the keys: a bias on them shifts every score of a query alike, so softmax
        ignores it.

        Its true gradient is zero. Left in, Adam would drive it by rounding noise alone, at full speed, and
        differently at every world size. The parameter keeps CLIP's layout.
        """
        query_D, key_D, value_D = self.attention_qkv.bias.chunk(3)
        return torch.cat((query_D, torch.zeros_like(key_D), value_D))


def _scaled(branch_BLD: Tensor, scale_D: Tensor | None, branch_2B: Tensor | None, which: int) -> Tensor:
    if scale_D is not None:
        branch_BLD = branch_BLD * scale_D
    if branch_2B is not None:
        branch_BLD = branch_BLD * branch_2B[which, :, None, None].to(branch_BLD.dtype)
    return branch_BLD


class Transformer(nn.Module):
    """A stack of blocks and the final norm."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        backend: Backend,
        recompute_every: int = 0,
        activation: Activation = "gelu",
        layer_scale: float = 0.0,
    ) -> None:
        """`recompute_every`: see `ModelConfig`; the rest: see `Block`."""
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                depth=layers,
                backend=backend,
                activation=activation,
                layer_scale=layer_scale,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.recompute_every = recompute_every
        self.backend: Backend = backend
        self.compiled = False

    def forward(self, x_BLD: Tensor, mask: Mask = EVERYTHING, branch_T2B: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D], normalised; arguments as `Block.forward`, `branch_T2B` for every block."""
        for number, block in enumerate(self.blocks):
            branch_2B = None if branch_T2B is None else branch_T2B[number]
            if self.recompute_every and number % self.recompute_every == 0 and torch.is_grad_enabled():
                # Nothing in a block draws numbers, so the generators' states need not be kept.
                x_BLD = checkpoint(
                    block, x_BLD, mask, branch_2B, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BLD = block(x_BLD, mask, branch_2B)
        return self.norm(x_BLD)


def compile_blocks(module: nn.Module) -> None:
    """Compile every block in place; parameter names stay. Blocks of one shape share what was compiled."""
    for stack in module.modules():
        if isinstance(stack, Transformer):
            stack.compiled = True
            for block in stack.blocks:
                block.compile()


def take_rows(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Rows of each sample: out[b, m] = x[b, index[b, m]]. Copies whole rows (faster than a gather)."""
    batch, rows = x_BND.shape[:2]
    offset_B1 = torch.arange(batch, device=index_BM.device)[:, None] * rows
    flat = x_BND.flatten(0, 1).index_select(0, (index_BM + offset_B1).flatten())
    return flat.view(*index_BM.shape, *x_BND.shape[2:])
