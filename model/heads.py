"""What the two masked branches add to the encoders; none of it is used at inference.

Shapes: B batch, L tokens, P patches, V visible and M masked patches, D width, K codewords, N hidden words,
W vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Backend
from model.blocks import Transformer, linear, normal_parameter
from model.config import DistillConfig, MlmConfig, TextConfig, VisionConfig
from model.text import encode


def sincos_positions(side: int, width: int) -> Tensor:
    """[side * side, width] two-dimensional sine-cosine positions, as in MAE; `width` is a multiple of 4."""
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle_SF = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis_SA = torch.cat([angle_SF.sin(), angle_SF.cos()], dim=1)
    rows, columns = axis_SA.repeat_interleave(side, dim=0), axis_SA.repeat(side, 1)
    return torch.cat([rows, columns], dim=1).float()


class ImageDecoder(nn.Module):
    """Predicts the features of masked patches from the visible ones (one block in the paper).

    A shared mask token stands at every masked place. Positions are learned and begin as sine-cosine ones,
    width and heads are the encoder's (not from the paper).
    """

    def __init__(self, vision: VisionConfig, distill: DistillConfig, backend: Backend) -> None:
        super().__init__()
        side = vision.image_size // vision.patch_size
        self.mask_token = normal_parameter(vision.width, std=0.02)
        self.positions = nn.Parameter(sincos_positions(side, vision.width))
        self.transformer = Transformer(vision.width, distill.decoder_layers, vision.heads, backend=backend)

    def forward(self, tokens_BVD: Tensor, visible_BV: Tensor, masked_BM: Tensor) -> Tensor:
        """Features at the masked patches.

        Args:
            tokens_BVD: [B, 1 + V, D] the encoder's tokens of the visible patches, class token first.
            visible_BV: their places.
            masked_BM: the places to predict.

        Returns:
            [B, M, D], in the order of `masked_BM`.
        """
        # Tokens need not stand in image order: attention sees their positions, not their row.
        visible_BVD = tokens_BVD[:, 1:] + F.embedding(visible_BV, self.positions)
        masked_BMD = self.mask_token + F.embedding(masked_BM, self.positions)
        x_BND = self.transformer(torch.cat([tokens_BVD[:, :1], visible_BVD, masked_BMD], dim=1))
        return x_BND[:, -masked_BM.shape[1] :]


class Quantizer(nn.Module):
    """Online quantizer h: features to logits over K codewords.

    iBOT's patch head: an MLP of three layers, unit length, cosine with K unit codewords (not from the paper).
    Both unit vectors are normalised in fp32.
    """

    def __init__(self, width: int, distill: DistillConfig) -> None:
        super().__init__()
        hidden = distill.head_hidden
        self.mlp = nn.Sequential(
            linear(width, hidden, std=0.02),
            nn.GELU(),
            linear(hidden, hidden, std=0.02),
            nn.GELU(),
            linear(hidden, distill.head_bottleneck, std=0.02),
        )
        self.codewords = normal_parameter(
            distill.codewords, distill.head_bottleneck, std=distill.head_bottleneck**-0.5
        )

    def forward(self, x_BMD: Tensor) -> Tensor:
        """[B, M, D] -> [B, M, K] fp32 cosines."""
        features = F.normalize(self.mlp(x_BMD).float(), dim=-1).to(x_BMD.dtype)
        codewords = F.normalize(self.codewords.float(), dim=-1).to(x_BMD.dtype)
        return F.linear(features, codewords).float()


class TextDecoder(nn.Module):
    """Blocks between the text encoder and the prediction of words (four in the paper).

    Bidirectional (not from the paper): the encoder is causal, only here a hidden word sees what follows it.
    """

    def __init__(self, text: TextConfig, mlm: MlmConfig, backend: Backend) -> None:
        super().__init__()
        self.transformer = Transformer(text.width, mlm.decoder_layers, text.heads, backend=backend)

    def forward(self, states_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D] captions of these lengths -> [B, L, D]; rows of padding mean nothing."""
        return encode(self.transformer, states_BLD, lengths_B, causal=False)


class MlmHead(nn.Module):
    """Vocabulary scores of hidden words, tied to the token embedding as in BERT (not from the paper)."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.transform = linear(text.width, text.width, std=0.02)
        self.norm = nn.LayerNorm(text.width)
        self.bias = nn.Parameter(torch.zeros(text.vocab_size))

    def forward(self, states_ND: Tensor, embedding_WD: Tensor) -> Tensor:
        """[N, D] states and [W, D] token embedding -> [N, W] fp32 logits."""
        return F.linear(self.norm(F.gelu(self.transform(states_ND))), embedding_WD, self.bias).float()
