"""Families of packed images with text: FLUX.1 and the models built on its blocks, Bria, FLUX.2 and 3, and others.

Text and image are one sequence. Position ids or a list of sizes in the call tell the images' rows and columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.anchors import in_packed
from dit_accel.pipelines.family import CallLayout, Family, ModelInputs, Preset, patch_grid
from dit_accel.pipelines.reading import bias_text, dense_note, image_grids, images_and_text, mask_text, packed_images
from dit_accel.pipelines.sharding import IMAGE_TOKENS, Sharding
from dit_accel.pipelines.sizes import Config, Sizes, image_sizes, packed_sizes, patched_sizes, vae_pixels
from dit_accel.pipelines.stacks import TEXT_FIRST, VISUAL, VISUAL_FIRST, BlockStack

BLOCKS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
# Single blocks get text and image apart, or joined.
APART = BlockStack({"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": TEXT_FIRST})
JOINED = BlockStack({"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": VISUAL})
PADDING, IMAGE = 0, 2  # values of Ideogram's `indicator`; text is 3


def bria(transformer: Any, call: ModelInputs) -> CallLayout:
    """As FLUX.1, with FIBO's mask bool [B, 1, 1, tokens] in `joint_attention_kwargs`."""
    layout = flux(transformer, call)
    mask = (call.get("joint_attention_kwargs") or {}).get("attention_mask")
    if mask is None or mask.dtype != torch.bool:
        return layout
    return mask_text(call, layout.grid, mask, layout.notes)


def flux(transformer: Any, call: ModelInputs) -> CallLayout:
    """Packed image [B, N, C], text [B, T, C] and image ids [N, 3], or [B, N, 3] as in older code.

    A conditioning image of the same size (Kontext) is a further frame; others are dense both ways. A boolean mask masks
    Chroma's text. Its pipelines pass ones and zeros in the model's dtype, which the model adds to the logits.
    """
    layout = packed_images(call)
    mask = call.get("attention_mask")
    if mask is None:
        return layout
    read = mask_text if mask.dtype == torch.bool else bias_text
    return dataclasses.replace(read(call, layout.grid, mask), notes=layout.notes, masks=("attention_mask",))


def flux2(transformer: Any, call: ModelInputs) -> CallLayout:
    """Packed images [B, N, C], text [B, T, C] and image ids [B, N, 4] or [N, 4]: time, row, column, layer."""
    if call.get("kv_cache_mode") is not None:
        raise DitAccelError(
            f"FLUX.2 has kv_cache_mode={call.get('kv_cache_mode')!r}, which takes keys from a cache. Sparse "
            "attention needs the whole sequence: use Flux2KleinPipeline in place of Flux2KleinKVPipeline, or leave "
            "the model dense."
        )
    return packed_images(call)


def flux3(transformer: Any, call: ModelInputs) -> CallLayout:
    """Packed image [B, N, C] with ids [N, 4], text [B, T, C], and conditioning tokens [B, R, C] or None."""
    layout = packed_images(call)
    if layout.grid.conditioning:
        raise DitAccelError(
            f"{call.owner} needs img_ids of one image, or of several of one size; got {layout.grid}. Put conditioning "
            "images into image_cond_hidden_states."
        )
    if call.get("image_cond_hidden_states") is None:
        return layout
    conditioning = call.length("image_cond_hidden_states")
    return CallLayout(dataclasses.replace(layout.grid, conditioning=conditioning), notes=dense_note(conditioning))


def ideogram4(transformer: Any, call: ModelInputs) -> CallLayout:
    """Roles (`indicator`) and samples (`segment_ids`) [B, tokens], places [B, tokens, 3]."""
    indicator = call.tensor("indicator", 2)
    roles, samples = (call.once(ids, torch.Tensor.clone) for ids in (indicator, call.tensor("segment_ids", 2)))
    places = call.once(call.tensor("position_ids", 3), torch.Tensor.clone)
    text = int((roles[0] != IMAGE).sum())
    ordered = torch.equal(roles == IMAGE, (torch.arange(roles.shape[1]) >= text).expand_as(roles))
    if not ordered or not torch.equal(roles != PADDING, samples == samples[:, -1:]):
        raise DitAccelError(
            f"{call.owner} needs sequences that hold one sample each, [padding | text | image] of the same lengths, by "
            "indicator and segment_ids. Pass what the pipeline makes, or run it dense."
        )
    return images_and_text(call, image_grids(places[0, text:]), text, indicator)


def krea2(transformer: Any, call: ModelInputs) -> CallLayout:
    """Packed image [B, N, C], text [B, T, layers, C] with its mask [B, T] or None, positions [T + N, 3]."""
    images = call.length("hidden_states")
    text = call.length("encoder_hidden_states", 4)
    positions = call.once(call.tensor("position_ids", 2), torch.Tensor.clone)
    if len(positions) != text + images:
        raise DitAccelError(
            f"{call.owner} needs position_ids for {text} text and {images} image tokens, got {len(positions)}."
        )
    return images_and_text(call, image_grids(positions[text:]), text, call.get("encoder_attention_mask"))


def listed_images(
    call: ModelInputs, dims: int = 3, name: str = "img_shapes", *, text_first: bool = False
) -> CallLayout:
    """Image tokens [B, N, ...] of so many dimensions, text [B, T, C] and its mask [B, T] or None.

    The argument `name` lists, for each sample, the (frames, height, width) of its images or of its one image.

    Raises:
        DitAccelError: that argument is missing, the samples differ, or the sizes make another number of tokens.
    """
    tokens, shapes = call.length("hidden_states", dims), call.get(name)
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise DitAccelError(f"{call.owner} needs {name} with the images of each sample, got {shapes!r}.")
    samples = [sample if isinstance(sample, list) else [sample] for sample in shapes]
    if any(sample != samples[0] for sample in samples):
        raise DitAccelError(
            f"The samples of a batch must have images of the same sizes, got {name}={shapes}; call the pipeline "
            "once for each size."
        )
    frames, (height, width) = 0, samples[0][0][1:]
    for length, *size in samples[0]:
        if size != [height, width]:
            break
        frames += length
    counted = sum(length * rows * columns for length, rows, columns in samples[0])
    if counted != tokens:
        raise DitAccelError(f"{name}={shapes} make {counted} image tokens, but the call has {tokens}.")
    images = frames, height, width, tokens - frames * height * width
    text, mask = call.length("encoder_hidden_states"), call.get("encoder_hidden_states_mask")
    return images_and_text(call, images, text, mask, text_first=text_first)


def joyimage(transformer: Any, call: ModelInputs) -> CallLayout:
    """Latents [B, C, F, H, W], or [B, images, C, F, H, W], in patches; text [B, T, C].

    Or patches [B, N, C, F, H, W] of images with sizes in `shape_list`, and text with its mask [B, T] or None.
    """
    if call.get("shape_list") is not None:
        return listed_images(call, 6, "shape_list")
    latents = call.get("hidden_states")
    images = latents.shape[1] if latents.ndim == 6 else 1
    frames, height, width = call.tensor("hidden_states", latents.ndim).shape[-3:]
    sizes, text = (images * frames, height, width), call.length("encoder_hidden_states")
    return CallLayout(patch_grid(sizes, transformer.config.patch_size, text))


def bria_sizes(transformer: Config, vae: Config) -> Sizes:
    """A token is 2 x 2 latents, in FIBO one latent; FIBO's text is as long as the prompt, at most 3,000 tokens."""
    if transformer.get("_class_name") == "BriaFiboTransformer2DModel":
        return image_sizes(vae_pixels(vae), text=3000, text_first=True)
    return packed_sizes(text=128)(transformer, vae)


def flux_sizes(transformer: Config, vae: Config) -> Sizes:
    text = 256 if transformer.get("_class_name") == "OvisImageTransformer2DModel" else 512
    return packed_sizes(text)(transformer, vae)


FAMILIES = (
    # Blocks, text and image ids as in FLUX.1, but the timestep in the scheduler's own units.
    Family(
        name="bria",
        transformers=("BriaTransformer2DModel", "BriaFiboTransformer2DModel"),
        attention=BLOCKS,
        layout=bria,
        sizes=bria_sizes,
        stack=APART,
        stacks={"BriaFiboTransformer2DModel": JOINED},
        summary="Bria 3.2, Bria FIBO",
    ),
    # Padded text is attended, as in training. Single blocks get the joined sequence without the text's length, which
    # only the transformer's call has.
    Family(
        name="flux",
        transformers=(
            "FluxTransformer2DModel",
            "ChromaTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ),
        attention=BLOCKS,
        layout=flux,
        sizes=flux_sizes,
        stack=APART,
        stacks={"ChromaTransformer2DModel": JOINED},
        summary="FLUX.1: dev, schnell, Fill, Control, Kontext; Chroma, LongCat-Image, Ovis-Image",
        timestep_scale=1000.0,
        recommended={
            "gna": Preset(
                config={"window": ("full", 80 / 256, 80 / 256), "stride": (1, 16, 16)},
                schedule={"dense_steps": 9 / 28},
                source="GNA (arXiv:2504.16922): FLUX.1-dev at 4096x4096, window 80x80 of 256x256 tokens, 9 of 28 steps "
                "dense",
            ),
        },
        # positions [N, 3], or [1, N, 3] as in older code
        shardings=dict.fromkeys(
            ("ChromaTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
            Sharding(
                {"": {"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": -2, "txt_ids": -2}},
                outputs={"proj_out": (IMAGE_TOKENS,)},
                separate=True,
            ),
        ),
        extend=in_packed,
    ),
    # Conditioning images follow the generated one. The key-value cache of Klein KV puts conditioning images first and
    # lets them see only themselves; such calls are refused.
    Family(
        name="flux2",
        transformers=("Flux2Transformer2DModel",),
        attention=BLOCKS,
        layout=flux2,
        sizes=packed_sizes(text=512),
        stack=JOINED,
        summary="FLUX.2: dev, Klein (without its key-value cache)",
        timestep_scale=1000.0,
        extend=in_packed,
    ),
    # The first blocks attend within the text, the image and the conditioning images; joint single blocks follow, over
    # [text | image | conditioning]. Among the first blocks only the image's are accelerated.
    Family(
        name="flux3",
        transformers=("Flux3Transformer2DModel",),
        attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
        visual_attention=("mode_blocks.*.*.attn",),
        layout=flux3,
        sizes=packed_sizes(text=512),
        stack=BlockStack({"single_transformer_blocks": TEXT_FIRST}),
        summary="FLUX.3",
        timestep_scale=1000.0,
    ),
    # Padding, text and image are one sequence; guidance comes from a second transformer, without text. Padding attends
    # to itself alone, and nothing reads its output. The model makes its N x N mask in sparse calls too,
    # which do not read it.
    Family(
        name="ideogram4",
        transformers=("Ideogram4Transformer2DModel",),
        attention=("layers.*.attention",),
        layout=ideogram4,
        # 2 x 2 latents a token; the pipeline pads every prompt to 2,048 tokens
        sizes=lambda transformer, vae: image_sizes(2 * vae_pixels(vae), side=2048, text=2048, text_first=True),
        stack=BlockStack({"layers": VISUAL}, outputs=("final_layer",)),
        summary="Ideogram 4",
        timestep_scale=1000.0,
        timestep_rises=True,
    ),
    # Padded text is masked.
    Family(
        name="krea2",
        transformers=("Krea2Transformer2DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=krea2,
        sizes=packed_sizes(text=512),
        stack=BlockStack(outputs=("final_layer",)),
        summary="Krea 2",
        timestep_scale=1000.0,
    ),
    # Edit-Plus packs the generated image and conditioning images of any sizes, and masks padded text.
    Family(
        name="joyimage",
        transformers=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
        attention=("double_blocks.*.attn",),
        layout=joyimage,
        # of the generated image alone; the text encoder also sees the conditioning images
        sizes=patched_sizes(text=1024),
        stack=BlockStack({"double_blocks": VISUAL_FIRST}),
        summary="JoyImage-Edit, JoyImage-Edit-Plus",
    ),
    # Text follows the image, as keys without queries. Diffusers' TextKVCache, which keeps its keys and values between
    # steps, works with it.
    Family(
        name="nucleus_image",
        transformers=("NucleusMoEImageTransformer2DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=lambda transformer, call: listed_images(call),
        sizes=packed_sizes(text=1024, text_first=False),
        summary="Nucleus-Image",
        timestep_scale=1000.0,
        text_is_keys=True,
    ),
    # Text precedes the images. Edit puts the conditioning images behind the generated one; layered generates several
    # images of one size.
    Family(
        name="qwen_image",
        transformers=("QwenImageTransformer2DModel",),
        attention=("transformer_blocks.*.attn",),
        layout=lambda transformer, call: listed_images(call, text_first=True),
        sizes=packed_sizes(text=512),
        stack=BlockStack({"transformer_blocks": TEXT_FIRST}),
        summary="Qwen-Image: text to image, edit, layered",
        timestep_scale=1000.0,
    ),
)
