"""GLM-Image: glyph text precedes the image; all of it is attended.

Editing caches the keys of conditioning images, which then have no queries; such calls are refused.
"""

from __future__ import annotations

from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import image_of
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, vae_pixels


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The latent [B, C, H, W] in patches, and text [B, T, C]."""
    if call.get("attention_mask") is not None:
        raise DitAccelError(
            f"{call.owner} adds its attention_mask to the logits, where zeros mask nothing; sparse attention cannot "
            "honour it. Call it without one, as its pipeline does, or leave the model dense."
        )
    caches = call.get("kv_caches")
    if caches is not None and caches[0].mode == "read":
        raise DitAccelError(
            f"{call.owner} takes the keys of conditioning images from a cache, and sparse attention needs queries and "
            "keys of one sequence. Make images from text alone, or leave the model dense."
        )
    text = call.length("encoder_hidden_states")
    return CallLayout(image_of(call, transformer.config.patch_size, text, text_first=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: the words that the prompt asks to be written in the image."""
    return image_sizes(vae_pixels(vae) * transformer["patch_size"], text=2048, text_first=True)


FAMILY = Family(
    name="glm_image",
    transformers=("GlmImageTransformer2DModel",),
    attention=("transformer_blocks.*.attn1",),
    layout=layout,
    sizes=sizes,
    summary="GLM-Image, from text",
)
