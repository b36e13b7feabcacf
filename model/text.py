"""Text encoder: CLIP's causal transformer; the caption's feature is the state of its end token.

Causal attention (as in CLIP and SLIP; not from the paper) needs no padding mask: what follows the end token
is never seen. So a caption's states do not depend on its padding, and a batch is cut to its longest caption;
under xformers none of the padding is computed.

Shapes: B batch, L tokens, D width, N tokens of all captions together.
"""

import torch
from torch import Tensor, nn

from model.attention import Backend, Mask, resolve_backend
from model.blocks import Transformer, normal_parameter, take_rows
from model.config import TextConfig


def caption_lengths(tokens_BL: Tensor, config: TextConfig) -> Tensor:
    """[B] tokens of each caption up to and with its end token."""
    return (tokens_BL == config.end_token).int().argmax(dim=1) + 1


def cut_to_longest(tokens_BL: Tensor, config: TextConfig) -> Tensor:
    """The same captions without the columns that are padding in all of them (waits for the device)."""
    return tokens_BL[:, : int(caption_lengths(tokens_BL, config).max())]


def encode(transformer: Transformer, x_BLD: Tensor, lengths_B: Tensor, *, causal: bool) -> Tensor:
    """[B, L, D] captions of these lengths -> [B, L, D]; rows of padding mean nothing.

    Captions are packed for xformers, but not for compiled blocks, which each batch would compile again.
    """
    kernel = resolve_backend(transformer.backend, x_BLD.device.type, x_BLD.dtype)
    run = encode_packed if kernel == "xformers" and not transformer.compiled else encode_padded
    return run(transformer, x_BLD, lengths_B, causal=causal)


def encode_padded(transformer: Transformer, x_BLD: Tensor, lengths_B: Tensor, *, causal: bool) -> Tensor:
    """As `encode`, with the padding, which no token of a caption sees."""
    keys_BL = None if causal else _is_token(lengths_B, x_BLD.shape[1])
    return transformer(x_BLD, Mask(causal=causal, keys_BL=keys_BL))


def encode_packed(transformer: Transformer, x_BLD: Tensor, lengths_B: Tensor, *, causal: bool) -> Tensor:
    """As `encode`, with the captions one after another; rows of padding are 0 (waits for the device)."""
    places_N = _is_token(lengths_B, x_BLD.shape[1]).flatten().nonzero().squeeze(1)
    flat_XD = x_BLD.flatten(0, 1)
    mask = Mask(causal=causal, segments=tuple(lengths_B.tolist()))
    states_ND = transformer(flat_XD.index_select(0, places_N)[None], mask)[0]
    return torch.zeros_like(flat_XD).index_copy(0, places_N, states_ND).view(x_BLD.shape)


def _is_token(lengths_B: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=lengths_B.device) < lengths_B[:, None]


class TextTower(nn.Module):
    """Causal text transformer. With `mask_token` also a vector for hidden words (not from the paper)."""

    def __init__(
        self, config: TextConfig, backend: Backend, *, mask_token: bool, recompute_every: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.mask_embedding = normal_parameter(config.width, std=0.02) if mask_token else None
        self.positions = normal_parameter(config.context_length, config.width, std=0.01)
        self.transformer = Transformer(
            config.width,
            config.layers,
            config.heads,
            backend=backend,
            recompute_every=recompute_every,
            activation=config.activation,
        )

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Encode captions.

        Args:
            tokens_BL: int64 ids, L at most `context_length`; `config.mask_token` stands for a hidden word.

        Returns:
            [B, L, D] token states (those of padding mean nothing) and [B, D] state of the end token, after
            the final norm.
        """
        x_BLD = self.token_embedding(tokens_BL.clamp(max=self.config.vocab_size - 1))
        if self.mask_embedding is not None:
            hidden_BL1 = (tokens_BL == self.config.mask_token).unsqueeze(-1)
            x_BLD = torch.where(hidden_BL1, self.mask_embedding, x_BLD)
        lengths_B = caption_lengths(tokens_BL, self.config)
        x_BLD = x_BLD + self.positions[: tokens_BL.shape[1]]
        states_BLD = encode(self.transformer, x_BLD, lengths_B, causal=True)
        return states_BLD, take_rows(states_BLD, lengths_B[:, None] - 1).squeeze(1)
