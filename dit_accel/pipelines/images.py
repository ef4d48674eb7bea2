"""Families of images whose calls hold a latent [B, C, H, W] and at most one text: what tells them apart, as data.

Self-attention sees the image alone (`attn1`; text enters through cross-attention), or image and text in one sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelInputs
from dit_accel.pipelines.reading import bias_text, image_of, mask_text
from dit_accel.pipelines.sharding import Sharding
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, patched_sizes, square_sizes, vae_pixels
from dit_accel.pipelines.stacks import TEXT_FIRST, VISUAL, VISUAL_FIRST, BlockStack

Layout = Callable[[Any, ModelInputs], CallLayout]
REGISTERS = 8  # of AuraFlow


def image_alone(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] in patches."""
    return CallLayout(image_of(call, transformer.config.patch_size))


def with_text(*, first: bool, mask: str = "", bias: str = "") -> Layout:
    """The layout of a latent [B, C, H, W] in patches and text [B, T, C], before the image or behind it.

    Args:
        mask, bias: names of arguments, for `mask_text` and `bias_text`; "" and an argument that is None: neither.
    """

    def layout(transformer: Any, call: ModelInputs) -> CallLayout:
        grid = image_of(call, transformer.config.patch_size, call.length("encoder_hidden_states"), text_first=first)
        added = call.get(bias)
        if added is None:
            return mask_text(call, grid, call.get(mask))
        return dataclasses.replace(bias_text(call, grid, added), masks=(bias,))

    return layout


def lumina_next(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] in patches. The model makes a mask of the image tokens itself, in which all are valid."""
    samples = len(call.tensor("hidden_states", 4))
    no_text = torch.zeros(samples, dtype=torch.int32, device=call.device)
    return dataclasses.replace(image_alone(transformer, call), text_lens=no_text)


def aura_flow(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] in patches, behind the learned registers and text [B, T, C]; every token is attended."""
    text = transformer.register_tokens.shape[1] + call.length("encoder_hidden_states")
    return CallLayout(image_of(call, transformer.config.patch_size, text, text_first=True))


def ernie_image(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] in patches, text [B, T, C] behind it and its lengths [B]; padding is masked."""
    grid = image_of(call, transformer.config.patch_size, call.length("text_bth"))
    return CallLayout(grid, text_lens=call.tensor("text_lens", 1).to(torch.int32))


def glm_image(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] in patches, behind glyph text [B, T, C], all of which is attended.

    Editing caches the keys of conditioning images, which then have no queries; such calls are refused.
    """
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
    return with_text(first=True)(transformer, call)


def cogview_sizes(transformer: Config, vae: Config) -> Sizes:
    """CogView3-Plus has 224 text tokens; CogView4 as many as the prompt, padded to a multiple of 16."""
    text = 224 if transformer.get("_class_name") == "CogView3PlusTransformer2DModel" else 1024
    return square_sizes(transformer, vae, text=text, text_first=True, longest=transformer["pos_embed_max_size"])


def aura_flow_sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: the registers and 256 tokens; learned positions are a square of `pos_embed_max_size`."""
    longest = math.isqrt(transformer["pos_embed_max_size"])
    return square_sizes(transformer, vae, text=REGISTERS + 256, text_first=True, longest=longest)


FAMILIES = (
    Family(
        name="aura_flow",
        transformers=("AuraFlowTransformer2DModel",),
        attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        layout=aura_flow,
        sizes=aura_flow_sizes,
        stack=BlockStack({"joint_transformer_blocks": TEXT_FIRST, "single_transformer_blocks": VISUAL}),
        summary="AuraFlow",
        timestep_scale=1000.0,
    ),
    # Padded text is attended, as in training. CogView4 adds an `attention_mask` to the logits; its pipelines pass none.
    Family(
        name="cogview",
        transformers=("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
        layout=with_text(first=True, bias="attention_mask"),
        sizes=cogview_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST}),
        summary="CogView3-Plus, CogView4",
    ),
    Family(
        name="ernie_image",
        transformers=("ErnieImageTransformer2DModel",),
        attention=("layers.*.self_attention",),
        layout=ernie_image,
        # the pipeline packs 2 x 2 latents into one; the text is as long as the prompt
        sizes=lambda transformer, vae: image_sizes(2 * vae_pixels(vae) * transformer["patch_size"], text=512),
        stack=BlockStack({"layers": ("x",)}, visual="x", outputs=("final_linear",)),
        summary="ERNIE-Image",
    ),
    Family(
        name="glm_image",
        transformers=("GlmImageTransformer2DModel",),
        layout=glm_image,
        # text: the words that the prompt asks to be written in the image
        sizes=patched_sizes(text=2048, text_first=True),
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST}),
        summary="GLM-Image, from text",
    ),
    Family(
        name="hunyuan_dit",
        transformers=("HunyuanDiT2DModel",),
        attention=("blocks.*.attn1",),
        layout=image_alone,
        sizes=square_sizes,
        stack=BlockStack({"blocks": VISUAL}),
        summary="Hunyuan-DiT 1.0 to 1.2",
    ),
    Family(
        name="lumina_next",
        transformers=("LuminaNextDiT2DModel",),
        attention=("layers.*.attn1",),
        layout=lumina_next,
        sizes=square_sizes,
        stack=BlockStack({"layers": VISUAL}, outputs=("norm_out",)),
        summary="Lumina-Next",
        timestep_scale=1000.0,
        timestep_rises=True,
    ),
    Family(
        name="pixart",
        transformers=("PixArtTransformer2DModel",),
        layout=image_alone,
        sizes=square_sizes,
        summary="PixArt-alpha, PixArt-sigma",
    ),
    # Text is masked, and its tokens are keys without queries.
    Family(
        name="prx",
        transformers=("PRXTransformer2DModel",),
        attention=("blocks.*.attention",),
        layout=with_text(first=True, mask="attention_mask"),
        # text: as the tokenizer pads it
        sizes=patched_sizes(512, text=256, text_first=True),
        stack=BlockStack({"blocks": VISUAL}, outputs=("final_layer",)),
        summary="PRX",
        timestep_scale=1000.0,
        text_is_keys=True,
    ),
    # Padded text is attended, as in training. The first blocks of 3.5 medium have a second attention, `attn2`, over the
    # image alone; it shares its processor object with `attn`.
    Family(
        name="sd3",
        transformers=("SD3Transformer2DModel",),
        attention=("transformer_blocks.*.attn|attn2",),
        visual_attention=("transformer_blocks.*.attn2",),
        layout=with_text(first=False),
        # text: 77 tokens of CLIP and 256 of T5
        sizes=lambda transformer, vae: square_sizes(
            transformer, vae, text=333, longest=transformer["pos_embed_max_size"]
        ),
        stack=BlockStack({"transformer_blocks": TEXT_FIRST}, last_alone=True),
        sharding=Sharding.of_joint_blocks(),
        summary="Stable Diffusion 3 and 3.5",
    ),
)
