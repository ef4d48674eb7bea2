"""The demo's video codec: blocks of pixels as channels, without loss, with the interface that `WanPipeline` expects.

Frames are cut into blocks of 2 frames x 4 x 4 pixels, causally as in Wan's VAE. The first frame stands alone (it is
doubled), and the rest come in pairs. So 1 + 2n frames make 1 + n latent frames. Nothing is learned and nothing is lost.
The transformer predicts the clean clip, whose blocks are simple, and not its noise, which is not.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

FRAMES, PIXELS = 2, 4  # a block's extent in time and along each side
CHANNELS = 3 * FRAMES * PIXELS * PIXELS


class BlockCodec(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Blocks of 2 x 4 x 4 pixels as a drop-in VAE: 3 colours x 32 pixels = 96 latent channels.

    Args:
        z_dim: number of latent channels, always 96.
        latents_mean, latents_std: per-channel statistics by which the pipeline scales latents, [96] each.
        scale_factor_temporal, scale_factor_spatial: frames and pixels a latent position stands for.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = CHANNELS,
        latents_mean: tuple[float, ...] = (0.0,) * CHANNELS,
        latents_std: tuple[float, ...] = (1.0,) * CHANNELS,
        scale_factor_temporal: int = FRAMES,
        scale_factor_spatial: int = PIXELS,
    ):
        super().__init__()
        if z_dim != CHANNELS:
            raise ValueError(f"BlockCodec has {CHANNELS} latent channels (3 colours x 32 pixels), got z_dim={z_dim}")
        self.use_tiling = self.use_slicing = False  # blocks are independent: nothing to gain from either
        self.register_buffer("anchor", torch.zeros(1))  # a module without tensors has no dtype and no device

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[IdentityDistribution]:
        """Video [B, 3, 1 + 2n, 4h, 4w] in [-1, 1] to a distribution. Its sample and mode are [B, 96, 1 + n, h, w].

        Raises:
            ValueError: the frames are not odd in number, or the sides not multiples of 4.
        """
        _, colours, frames, height, width = x.shape
        if colours != 3 or frames % FRAMES != 1 or height % PIXELS or width % PIXELS:
            raise ValueError(
                f"BlockCodec encodes [B, 3, 1 + 2n, 4h, 4w], got {tuple(x.shape)}; crop or pad the video to that"
            )
        x = torch.cat([x[:, :, :1], x], dim=2)
        blocks = x.unflatten(4, (-1, PIXELS)).unflatten(3, (-1, PIXELS)).unflatten(2, (-1, FRAMES))
        latents = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [B, 3 * 2 * 4 * 4, t, h, w]
        posterior = IdentityDistribution(latents)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, 96, 1 + n, h, w] to video [B, 3, 1 + 2n, 4h, 4w], clamped to [-1, 1]."""
        if z.ndim != 5 or z.shape[1] != CHANNELS:
            raise ValueError(f"BlockCodec decodes [B, {CHANNELS}, T, h, w], got {tuple(z.shape)}")
        blocks = z.unflatten(1, (3, FRAMES, PIXELS, PIXELS)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        video = blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 1:].clamp(-1, 1)
        return DecoderOutput(sample=video) if return_dict else (video,)
