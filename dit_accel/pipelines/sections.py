"""FramePack and Helios: the section of the video that is generated; the history before it is dense both ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from dit_accel.pipelines.family import CallLayout, ModelInputs, video_family
from dit_accel.pipelines.reading import dense_note, lengths, video_of
from dit_accel.pipelines.sharding import IMAGE_TOKENS, TEXT_TOKENS, Counted, Sharding
from dit_accel.pipelines.sizes import Config, Shape, Sizes, patch_of, vae_frames, vae_pixels, video_sizes
from dit_accel.pipelines.stacks import VISUAL, VISUAL_FIRST, BlockStack
from dit_accel.tokens import TokenGrid

SECTION = 9  # latent frames that are generated at once, by default
IMAGE, PROMPT = 729, 256  # tokens of SigLIP's embedding and of FramePack's longest prompt
PATCH = (1, 2, 2)  # of FramePack's history

# Parts of the history: how many patches a side make a token; latent frames by default.
FRAMEPACK_HISTORY = {"latents_history_4x": (4, 16), "latents_history_2x": (2, 2), "latents_clean": (1, 2)}
HELIOS_HISTORY = {"long": (4, 16), "mid": (2, 2), "short": (1, 2)}


def framepack(transformer: Any, call: ModelInputs) -> CallLayout:
    """The section [B, C, F, H, W] in patches, the history's latents, image embeddings and text with its mask."""
    image, mask = call.length("image_embeds"), call.tensor("encoder_attention_mask", 2)
    lens = call.once(mask, lengths) + image
    alone = len(lens) == 1
    text = int(lens) if alone else image + call.length("encoder_hidden_states")
    grid = video_of(call, patch_of(transformer.config), text)
    parts = [(call.get(name), times) for name, (times, _) in FRAMEPACK_HISTORY.items()]
    history = sum(count_tokens(latents.shape[2:], PATCH, times) for latents, times in parts if latents is not None)
    grid = TokenGrid(*grid.shape, text=text, conditioning=history)
    order = torch.arange(grid.tokens)
    stop = history + grid.visual
    rows = torch.cat((order[history:stop], order[:history], order[stop:])).expand(len(lens), -1)
    return CallLayout(
        grid,
        text_lens=None if alone else lens.to(call.device),
        rows=rows.to(call.device) if history else None,
        notes=dense_note(history, "of the history"),
    )


def framepack_sizes(transformer: Config, vae: Config) -> Sizes:
    """Every section has the same number of tokens, however many make up the video."""
    patch = patch_of(transformer)
    pixels = vae_pixels(vae) * patch[1]

    def history(shape: Shape) -> int:
        sides = [side * patch[1] for side in shape[1:]]
        return sum(count_tokens((frames, *sides), PATCH, times) for times, frames in FRAMEPACK_HISTORY.values())

    return Sizes(
        (pixels, pixels),
        frames_step=1,
        height=720,
        width=1280,
        frames=129,
        text=IMAGE + PROMPT,
        conditioning=history,
        tokens_step=0,
        tokens_first=SECTION // patch[0],
    )


def helios(transformer: Any, call: ModelInputs) -> CallLayout:
    """The section [B, C, F, H, W] in patches, and the history's parts that have latents and indices."""
    patch, history = patch_of(transformer.config), 0
    for name, (times, _) in HELIOS_HISTORY.items():
        latents = call.get(f"latents_history_{name}")
        if latents is not None and call.get(f"indices_latents_history_{name}") is not None:
            history += count_tokens(latents.shape[2:], patch, times)
    return CallLayout(video_of(call, patch, history, text_first=True), notes=dense_note(history, "of the history"))


def helios_sizes(transformer: Config, vae: Config) -> Sizes:
    """A video is made of whole sections, each with the same number of tokens."""
    patch = patch_of(transformer)

    def history(shape: Shape) -> int:
        sides = [side * step for side, step in zip(shape[1:], patch[1:], strict=True)]
        return sum(count_tokens((frames, *sides), patch, times) for times, frames in HELIOS_HISTORY.values())

    section = (SECTION - 1) * vae_frames(vae) + 1
    rest = {"frames_first": section, "tokens_step": 0, "tokens_first": SECTION // patch[0]}
    sizes = video_sizes(vae, patch, 4 * section, 384, 640, text=history, text_first=True, **rest)
    return dataclasses.replace(sizes, frames_step=section)


def count_tokens(latents: Sequence[int], patch: Shape, times: int) -> int:
    """Tokens of latents of these sizes in patches that are so many times as large, padded at the end."""
    return math.prod(math.ceil(size / (times * step)) for size, step in zip(latents, patch, strict=True))


FAMILIES = (
    # HunyuanVideo's blocks. The sequence is [history at a quarter of the size | at half | clean frames | section |
    # image embeddings | text]. Text behind the mask's number of valid tokens is masked, and with one sample left out.
    video_family(
        name="framepack",
        transformers=("HunyuanVideoFramepackTransformer3DModel",),
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        layout=framepack,
        sizes=framepack_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST, "single_transformer_blocks": VISUAL_FIRST}),
        # the section is cut out of the history behind the blocks
        sharding=Sharding.of_joint_blocks(freqs_cis=(0, 0)).with_inputs(
            {"single_transformer_blocks.*": {"image_rotary_emb": (0, 0)}},
            outputs={"single_transformer_blocks.-1": (IMAGE_TOKENS, TEXT_TOKENS)},
        ),
        summary="FramePack, HunyuanVideo in sections: image to video",
    ),
    # The sequence is [history at a quarter of the size | at half | at full size | section]; text enters by
    # cross-attention.
    video_family(
        name="helios",
        transformers=("HeliosTransformer3DModel",),
        attention=("blocks.*.attn1",),
        layout=helios,
        sizes=helios_sizes,
        stack=BlockStack({"blocks": VISUAL}),
        # the blocks divide history and section, so each part of a block shares its own tokens
        sharding=Sharding(
            {
                "blocks.*.attn1": {"hidden_states": 1, "rotary_emb": 1}
                | {"original_context_length": Counted(to_last=True)},
                "blocks.*.attn2": {"hidden_states": 1},
                "blocks.*.ffn": {"hidden_states": 1},
            },
            outputs={f"blocks.*.{part}": (IMAGE_TOKENS,) for part in ("attn1", "attn2", "ffn")},
        ),
        summary="Helios: text, image and video to video in sections",
    ),
)
