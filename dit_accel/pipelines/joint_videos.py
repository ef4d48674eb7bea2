"""HunyuanVideo 1.0 and 1.5, and Mochi 1: text follows the video in one sequence, and its padding is masked.

The processors of HunyuanVideo 1.5 and Mochi waste memory or time on the mask, so sparse calls replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelInputs, Preset, video_family
from dit_accel.pipelines.processor import joint_call
from dit_accel.pipelines.reading import mask_text, video_of
from dit_accel.pipelines.sharding import Axes, Counted, Sharding
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, video_sizes
from dit_accel.pipelines.stacks import VISUAL_FIRST, BlockStack


def hunyuan_video(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches, before text [B, T, C] with its mask [B, T]."""
    grid = video_of(call, patch_of(transformer.config), call.length("encoder_hidden_states"))
    valid = call.tensor("encoder_attention_mask", 2).sum(1, dtype=torch.int32)
    return CallLayout(grid, text_lens=valid)


def hunyuan_video_15(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches, before image, byT5 and text tokens, each [B, T, C].

    In text to video the image tokens are all zero, and the model treats them as padding.
    """
    image = call.tensor("image_embeds", 3)
    masks = [call.tensor(name, 2) for name in ("encoder_attention_mask", "encoder_attention_mask_2")]
    text = image.shape[1] + sum(mask.shape[1] for mask in masks)
    valid = sum((mask.bool().sum(1) for mask in masks), (image != 0).any() * image.shape[1])
    return CallLayout(video_of(call, patch_of(transformer.config), text), text_lens=valid.to(torch.int32))


def rotate_hunyuan(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, rotary, sequence_dim=1)


def hunyuan_video_15_sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 1,000 tokens, 256 of glyphs and 729 of an image; the default size follows `target_size`."""
    height, width = (720, 1280) if transformer["target_size"] >= 960 else (480, 848)
    return video_sizes(vae, patch_of(transformer), 121, height, width, text=1985)


def mochi(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches within frames, before text [B, T, C] with its mask [B, T]."""
    mask = call.tensor("encoder_attention_mask", 2)
    layout = mask_text(call, video_of(call, patch_of(transformer.config), mask.shape[1]), mask)
    if layout.rows is not None:
        raise DitAccelError(
            "Mochi's encoder_attention_mask has valid tokens behind padding. The model itself then adds the attention "
            "of one token to another; put the padding at the end of the text, as Mochi's pipeline does."
        )
    return layout


def rotate_mochi(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of adjacent channels of x [B, N, H, D] by cosines and sines [N, H, D / 2], one set a head."""
    cos, sin = rotary
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def mochi_sizes(transformer: Config, vae: Config) -> Sizes:
    """The pipeline fixes the VAE's strides at 6 frames and 8 pixels."""
    strides = {"temporal_compression_ratio": 6, "spatial_compression_ratio": 8}
    return video_sizes(strides, patch_of(transformer), 19, 480, 848, text=256)


# A replaced first frame (image to video) is counted by `num_tokens`. The lists of blocks name positions differently.
TOKENS: Mapping[str, Axes] = {"freqs_cis": (0, 0), "image_rotary_emb": (0, 0), "num_tokens": Counted()}

FAMILIES = (
    # Only the number of valid tokens in the mask counts, as in the model. A replaced first frame (image to video) has
    # its own modulation and is an ordinary frame of the grid. The text refiner's attention stays the model's own.
    Family(
        name="hunyuan_video",
        transformers=("HunyuanVideoTransformer3DModel",),
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        layout=hunyuan_video,
        sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 129, 720, 1280, text=256),
        stack=BlockStack(
            {"transformer_blocks": VISUAL_FIRST, "single_transformer_blocks": VISUAL_FIRST},
            by_token=TOKENS,
            latent=True,
        ),
        sharding=Sharding.of_joint_blocks(**TOKENS).with_inputs({"single_transformer_blocks.*": TOKENS}),
        summary="HunyuanVideo: text to video, image to video",
        recommended=TRAINING_FREE
        | {
            "radial": Preset(
                config={"decay": 0.95, "rule": "released", "sink": False},
                schedule={"dense_steps": 0.24},
                source="Radial Attention (arXiv:2506.19852), scripts/hunyuan_t2v_inference.sh: 117 frames of "
                "768x1280, 12 of 50 steps dense",
            ),
            "gna": Preset(
                config={"window": (0.6, 0.5, 0.3), "stride": (16, 8, 8)},
                schedule={"dense_steps": 0.3},
                source="GNA (arXiv:2504.16922): window 18x24x24 of 30x48x80 tokens, 15 of 50 steps dense",
            ),
        },
    ),
    # Image, byT5 and text tokens follow the video; the model reorders them so that each sample's valid ones come first.
    # Its processor masks the rest with an N x N tensor, 13 GB for 121 frames at 720p.
    video_family(
        name="hunyuan_video_15",
        transformers=("HunyuanVideo15Transformer3DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=hunyuan_video_15,
        sizes=hunyuan_video_15_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST}),
        sharding=Sharding.of_joint_blocks(freqs_cis=(0, 0)),
        summary="HunyuanVideo 1.5: text to video, image to video",
        sparse_calls={"HunyuanVideo15AttnProcessor2_0": joint_call(rotate_hunyuan)},
    ),
    # The model's processor cuts off each sample's padding and calls attention once per sample; the last block has no
    # text output. The timestep rises from 0 to 1000 while the noise falls, so a bare transformer needs `set_step`.
    video_family(
        name="mochi",
        transformers=("MochiTransformer3DModel",),
        layout=mochi,
        sizes=mochi_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST}),
        sharding=Sharding.of_joint_blocks(image_rotary_emb=(0, 0)),
        summary="Mochi 1: text to video",
        timestep_scale=None,
        sparse_calls={"MochiAttnProcessor2_0": joint_call(rotate_mochi)},
    ),
)
