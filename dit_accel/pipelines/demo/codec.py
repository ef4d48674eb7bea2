"""The demo's video codec: a fixed linear transform with the interface that `WanPipeline` expects of its VAE.

Frames are cut into blocks of 2 frames x 4 x 4 pixels, as Wan's VAE does causally: the first frame stands alone (it is
doubled), the rest come in pairs, so 1 + 2n frames make 1 + n latent frames. Of the 32 numbers a colour has in a block,
four are kept: the mean and the slopes along x, y and time, which are orthonormal. That loses what bends inside a block
and nothing else; the demo's shapes have edges as wide as a block for that reason.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

FRAMES, PIXELS = 2, 4  # a block's extent in time and along each side


def slopes() -> Tensor:
    """The four kept directions of a block, orthonormal: mean, x, y, time; float32 [4, 2*4*4]."""
    t = torch.tensor([-1.0, 1.0]).view(FRAMES, 1, 1)
    s = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    ones = torch.ones(FRAMES, PIXELS, PIXELS)
    kept = torch.stack([ones, ones * s.view(1, 1, PIXELS), ones * s.view(1, PIXELS, 1), ones * t]).flatten(1)
    return kept / kept.norm(dim=1, keepdim=True)


class SlopeCodec(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Mean and slopes of 2x4x4 blocks, as a drop-in VAE: 3 colours x 4 numbers = 12 latent channels.

    Args:
        z_dim: number of latent channels, always 12.
        latents_mean, latents_std: per-channel statistics by which the pipeline scales latents, [12] each.
        scale_factor_temporal, scale_factor_spatial: frames and pixels a latent position stands for.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 12,
        latents_mean: tuple[float, ...] = (-1.3, 0, 0, 0, -0.4, 0, 0, 0, 0.1, 0, 0, 0),
        latents_std: tuple[float, ...] = (3.8, 0.6, 0.6, 0.5) * 3,
        scale_factor_temporal: int = FRAMES,
        scale_factor_spatial: int = PIXELS,
    ):
        super().__init__()
        if z_dim != 12:
            raise ValueError(f"SlopeCodec has 12 latent channels (3 colours x 4 numbers), got z_dim={z_dim}")
        self.use_tiling = self.use_slicing = False  # blocks are independent: nothing to gain from either
        self.register_buffer("basis", slopes())

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[IdentityDistribution]:
        """Video [B, 3, 1 + 2n, 4h, 4w] in [-1, 1] to a distribution whose sample and mode are [B, 12, 1 + n, h, w].

        Raises:
            ValueError: the frames are not odd in number, or the sides not multiples of 4.
        """
        _, colours, frames, height, width = x.shape
        if colours != 3 or frames % FRAMES != 1 or height % PIXELS or width % PIXELS:
            raise ValueError(
                f"SlopeCodec encodes [B, 3, 1 + 2n, 4h, 4w], got {tuple(x.shape)}; crop or pad the video to that"
            )
        x = torch.cat([x[:, :, :1], x], dim=2)
        blocks = x.unflatten(4, (-1, PIXELS)).unflatten(3, (-1, PIXELS)).unflatten(2, (-1, FRAMES))
        blocks = blocks.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5)  # [B, 3, t, h, w, 32]
        latents = (blocks @ self.basis.T).movedim(-1, 2).flatten(1, 2)  # [B, 3 * 4, t, h, w]
        posterior = IdentityDistribution(latents)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, 12, 1 + n, h, w] to video [B, 3, 1 + 2n, 4h, 4w], clamped to [-1, 1]."""
        if z.ndim != 5 or z.shape[1] != self.config.z_dim:
            raise ValueError(f"SlopeCodec decodes [B, {self.config.z_dim}, T, h, w], got {tuple(z.shape)}")
        blocks = z.unflatten(1, (3, -1)).movedim(2, -1) @ self.basis  # [B, 3, t, h, w, 32]
        blocks = blocks.unflatten(5, (FRAMES, PIXELS, PIXELS)).permute(0, 1, 2, 5, 3, 6, 4, 7)
        video = blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 1:].clamp(-1, 1)
        return DecoderOutput(sample=video) if return_dict else (video,)
