"""Families of images with text whose sequences the model pads, packs or reorders."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, Family, ModelInputs, patch_grid
from dit_accel.pipelines.reading import dense_note, image_of, lengths, mask_text
from dit_accel.pipelines.sharding import Sharding
from dit_accel.pipelines.sizes import Config, Shape, Sizes, image_sizes, square_sizes, vae_pixels
from dit_accel.pipelines.stacks import VISUAL, VISUAL_FIRST, BlockStack
from dit_accel.tokens import TokenGrid

MULTIPLE = 32  # of Z-Image's captions and images


def hidream(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W]; or its patches [B, N, C] with `img_sizes` and `hidden_states_masks`."""
    if call.get("hidden_states_masks") is None:
        image = image_of(call, transformer.config.patch_size)
        height, width = call.tensor("hidden_states", 4).shape[2:]
        tokens = image.visual if height == width else transformer.max_seq
    else:
        image = _hidream_packed(call)
        tokens = call.length("hidden_states")
    t5, llama = call.length("encoder_hidden_states_t5"), call.get("encoder_hidden_states_llama3")
    # A block sees T5, the last of Llama's chosen layers, and its own layer of Llama.
    text = t5 + 2 * llama[0].shape[-2]
    conditioning = tokens - image.visual
    grid = TokenGrid(*image.shape, text=text, conditioning=conditioning)
    return CallLayout(grid, notes=dense_note(conditioning, "that pad the image"))


def _hidream_packed(call: ModelInputs) -> TokenGrid:
    sizes = call.get("img_sizes")
    if isinstance(sizes, torch.Tensor):
        sizes = call.once(sizes, torch.Tensor.tolist)
    if len({tuple(size) for size in sizes}) > 1:
        raise DitAccelError(
            f"The images of a batch must have one size, got img_sizes={sizes}; call once for each size."
        )
    return patch_grid((1, *sizes[0]), (1, 1, 1))


def hidream_sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 128 tokens of T5, and twice 128 of Llama."""
    patch = transformer["patch_size"]
    rows, columns = transformer["max_resolution"]
    most = rows * columns // patch**2

    def padding(shape: Shape) -> int:
        _, height, width = shape
        if height * width > most and height != width:
            raise DitAccelError(
                f"{height} x {width} tokens cannot be made: an image that is not square has at most {most} tokens."
            )
        return 0 if height == width else most - height * width

    return image_sizes(vae_pixels(vae) * patch, text=384, conditioning=padding)


def hunyuan_image(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] or [B, C, F, H, W] in patches; text [B, T, C], glyph text, and the mask of each."""
    patch = transformer.config.patch_size
    sizes = call.tensor("hidden_states", len(patch) + 2).shape[2:]
    image = [1] * (3 - len(patch))
    visual = patch_grid((*image, *sizes), (*image, *patch))
    mask = call.tensor("encoder_attention_mask", 2)
    if call.get("encoder_hidden_states_2") is None or transformer.context_embedder_2 is None:
        return mask_text(call, dataclasses.replace(visual, text=mask.shape[1]), mask)
    valid = torch.cat((mask, call.tensor("encoder_attention_mask_2", 2)), 1) != 0
    return CallLayout(dataclasses.replace(visual, text=valid.shape[1]), text_lens=valid.sum(1, dtype=torch.int32))


def hunyuan_image_sizes(transformer: Config, vae: Config) -> Sizes:
    """Text: 1,000 tokens, and 128 of glyphs."""
    pixels = vae_pixels(vae)
    return image_sizes(pixels * transformer["patch_size"][-1], 64 * pixels, text=1128)


def lumina2(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, H, W] in patches, and the caption's mask [B, T], valid tokens first."""
    lens = call.once(call.tensor("encoder_attention_mask", 2), lengths)
    grid = image_of(call, transformer.config.patch_size, int(lens.max()), text_first=True)
    if bool((lens == grid.text).all()):
        return CallLayout(grid)
    return CallLayout(grid, text_lens=lens.to(call.device), rows=pack(grid, lens).to(call.device))


def pack(grid: TokenGrid, lens: torch.Tensor) -> torch.Tensor:
    """`CallLayout.rows` of samples packed as [valid text | image | padding], int64 [B, tokens], from lengths [B]."""
    text = torch.arange(grid.text).expand(len(lens), -1)
    lens = lens[:, None].long()
    text = torch.where(text < lens, text, text + grid.visual)
    return torch.cat((text, lens + torch.arange(grid.visual)), 1)


def z_image(transformer: Any, call: ModelInputs) -> CallLayout:
    """Latents, a list of [C, F, H, W], and captions, a list of [T, C]."""
    images, captions = call.get("x"), call.get("cap_feats")
    if not images or not isinstance(images[0], torch.Tensor):
        raise DitAccelError(
            "Z-Image was called with several images a sample (Omni), where captions and images alternate; sparse "
            "attention takes one image and one caption. Leave the model dense."
        )
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        raise DitAccelError(
            f"The images of a batch must have one size, got latents of {sorted(sizes)} (frames, height, width); call "
            "the pipeline once for each size."
        )
    patch, frames_patch = (call.get(name) or default for name, default in (("patch_size", 2), ("f_patch_size", 1)))
    visual = patch_grid(sizes.pop(), (frames_patch, patch, patch))
    text = [_padded(len(caption)) for caption in captions]
    conditioning = _padded(visual.visual) - visual.visual
    grid = TokenGrid(*visual.shape, text=max(text), conditioning=conditioning)
    lens: Any = None if min(text) == max(text) else torch.tensor(text, dtype=torch.int32, device=call.device)
    return CallLayout(grid, text_lens=lens)


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def z_image_sizes(transformer: Config, vae: Config) -> Sizes:
    """2 x 2 latents a token."""

    def padding(shape: Shape) -> int:
        return _padded(math.prod(shape)) - math.prod(shape)

    longest = min(transformer["axes_lens"][1:])
    return image_sizes(2 * vae_pixels(vae), text=512, longest=longest, conditioning=padding)


FAMILIES = (
    # T5 tokens, Llama tokens and the block's own Llama tokens follow the image; all are attended. Images that are not
    # square are padded to the model's longest sequence. Padded keys are multiplied by zero, not masked, so they still
    # weigh in the softmax. They are conditioning tokens of the grid, dense both ways, which keeps the model's result.
    Family(
        name="hidream",
        transformers=("HiDreamImageTransformer2DModel",),
        attention=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
        layout=hidream,
        sizes=hidream_sizes,
        stack=BlockStack(
            {"double_stream_blocks": VISUAL_FIRST, "single_stream_blocks": VISUAL},
            image_first=True,
            outputs=("final_layer",),
        ),
        summary="HiDream: I1, E1",
        timestep_name="timesteps",
    ),
    # HunyuanImage 2.1 and its refiner, whose latents have a frame axis. Text follows the image; its padding is masked.
    # With glyph text (ByT5) the model reorders the tokens: valid glyph text, valid text, then the padding of both.
    Family(
        name="hunyuan_image",
        transformers=("HunyuanImageTransformer2DModel",),
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        layout=hunyuan_image,
        sizes=hunyuan_image_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST, "single_transformer_blocks": VISUAL_FIRST}),
        summary="HunyuanImage 2.1",
    ),
    # Each sample is packed as [caption | image], its caption without padding. Captions of different lengths therefore
    # move the image's first row from sample to sample; the rows behind the image are masked. The refiners stay
    # untouched.
    Family(
        name="lumina2",
        transformers=("Lumina2Transformer2DModel",),
        attention=("layers.*.attn",),
        layout=lumina2,
        # the caption is as long as the prompt
        sizes=lambda transformer, vae: square_sizes(
            transformer, vae, text=256, text_first=True, longest=min(transformer["axes_lens"][1:])
        ),
        stack=BlockStack({"layers": VISUAL}, outputs=("norm_out",)),
        summary="Lumina-Image 2.0",
        timestep_scale=1000.0,
        timestep_rises=True,
    ),
    # A sample is [image | padding | caption | padding]. Image and caption are each padded to a multiple of 32 with
    # learned tokens, which are attended. The image's padding counts as conditioning tokens, the caption's as text.
    # Padding to the batch's longest sample follows, and is masked.
    Family(
        name="z_image",
        transformers=("ZImageTransformer2DModel",),
        attention=("layers.*.attention",),
        layout=z_image,
        sizes=z_image_sizes,
        stack=BlockStack({"layers": ("x",)}, visual="x", outputs=("all_final_layer.*",)),
        sharding=Sharding.of_blocks("layers", "x", "layers.-1", freqs_cis=1, noise_mask=1),
        summary="Z-Image: base, Turbo",
        timestep_name="t",
        timestep_scale=1000.0,
        timestep_rises=True,
    ),
)
