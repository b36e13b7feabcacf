"""Image encoder: CLIP's vision transformer, on all patches or on the visible ones only.

Layout as in CLIP: patch embedding without bias, class token, learned positions, a norm before and after the
blocks. Pixels are normalised with ImageNet's mean and std, as in SLIP's recipe (not from the paper).

Shapes: B batch, C channels, P patches, V visible patches, F values of one patch, D width, T blocks.
"""

import torch
from torch import Tensor, nn

from model.attention import Backend
from model.blocks import Transformer, linear, normal_parameter, take_rows
from model.config import VisionConfig

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def split_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, P, 3, p, p], patches row by row; dtype unchanged."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images_BCHW.view(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels, patch_size, patch_size)


def normalise_pixels(patches_BPChw: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels (uint8 0..255 or float 0..1) to zero mean and unit std, computed in fp32, then `dtype`."""
    scale = 255.0 if patches_BPChw.dtype == torch.uint8 else 1.0
    # Python constants per channel: no buffer that a cast of the module could round, no copy to the device.
    channels = [
        ((patches_BPChw[:, :, channel].float() - mean * scale) / (std * scale)).to(dtype)
        for channel, (mean, std) in enumerate(zip(IMAGE_MEAN, IMAGE_STD, strict=True))
    ]
    return torch.stack(channels, dim=2)


def patch_pixels(images_BCHW: Tensor, index_BM: Tensor, config: VisionConfig) -> Tensor:
    """[B, M, F] fp32 pixels of the patches that `index_BM` names, each patch of zero mean and unit variance
    (MAE's target; not from the paper)."""
    patches = take_rows(split_patches(images_BCHW, config.patch_size), index_BM).flatten(2).float()
    return nn.functional.layer_norm(patches, patches.shape[-1:])


class VisionTower(nn.Module):
    """Vision transformer; token 0 is the class token."""

    def __init__(self, config: VisionConfig, backend: Backend, recompute_every: int = 0) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        std = config.width**-0.5
        self.patch_embedding = linear(3 * config.patch_size**2, config.width, std=0.02, bias=False)
        self.class_embedding = normal_parameter(config.width, std=std)
        self.positions = normal_parameter(1 + config.num_patches, config.width, std=std)
        self.input_norm = nn.LayerNorm(config.width)
        self.transformer = Transformer(
            config.width,
            config.layers,
            config.heads,
            backend=backend,
            recompute_every=recompute_every,
            activation=config.activation,
            layer_scale=config.layer_scale,
        )

    def forward(
        self,
        images_BCHW: Tensor,
        visible_BV: Tensor | None = None,
        branch_T2B: Tensor | None = None,
    ) -> Tensor:
        """Encode all patches, or only those that `visible_BV` names (the others cost nothing).

        Args:
            images_BCHW: uint8 0..255 or float 0..1, [B, 3, image_size, image_size].
            visible_BV: int64 indices of the patches to keep.
            branch_T2B: factor of each sample on both branches of each block, for stochastic depth.

        Returns:
            [B, 1 + P, D] or [B, 1 + V, D] token features after the final norm, in the module's dtype.
        """
        patches = split_patches(images_BCHW, self.patch_size)
        positions_PD = self.positions[1:]
        if visible_BV is not None:
            patches = take_rows(patches, visible_BV)
            positions_PD = nn.functional.embedding(visible_BV, positions_PD)
        pixels_BPF = normalise_pixels(patches, self.patch_embedding.weight.dtype).flatten(2)
        x_BPD = self.patch_embedding(pixels_BPF) + positions_PD
        class_B1D = (self.class_embedding + self.positions[0]).expand(x_BPD.shape[0], 1, -1)
        x_BLD = self.input_norm(torch.cat([class_B1D, x_BPD], dim=1))
        return self.transformer(x_BLD, branch_T2B=branch_T2B)
