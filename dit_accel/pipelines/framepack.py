"""FramePack (HunyuanVideo): the section of the video that is generated; its history is dense both ways.

The sequence is [history at a quarter of the size | at half | clean frames | section | image embeddings | text]. Text
behind the mask's number of valid tokens is masked, and with one sample left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelCall
from dit_accel.pipelines.reading import video_of
from dit_accel.pipelines.sizes import Config, Shape, Sizes, patch_of, vae_pixels
from dit_accel.tokens import TokenGrid

# Arguments with the history's latents, and how many times as large as (1, 2, 2) the patches are.
HISTORY = {"latents_history_4x": 4, "latents_history_2x": 2, "latents_clean": 1}
PATCH = (1, 2, 2)
SECTION = 9  # latent frames that are generated at once, by default
KEPT = {"latents_history_4x": 16, "latents_history_2x": 2, "latents_clean": 2}  # latent frames of the history
IMAGE, PROMPT = 729, 256  # tokens of SigLIP's embedding and of the longest prompt


def layout(transformer: Any, call: ModelCall) -> CallLayout:
    """The section [B, C, F, H, W] in patches, the history's latents, image embeddings and text with its mask."""
    image, mask = call.length("image_embeds"), call.tensor("encoder_attention_mask", 2)
    lens = call.once(mask, _lengths) + image
    alone = len(lens) == 1
    text = int(lens) if alone else image + call.length("encoder_hidden_states")
    grid = video_of(call, patch_of(transformer.config), text)
    given = [(call.get(name), times) for name, times in HISTORY.items()]
    history = sum(count_tokens(latents.shape[2:], PATCH, times) for latents, times in given if latents is not None)
    grid = TokenGrid(*grid.shape, text=text, conditioning=history)
    order = torch.arange(grid.tokens)
    stop = history + grid.visual
    rows = torch.cat((order[history:stop], order[:history], order[stop:])).expand(len(lens), -1)
    note = f"{history} tokens of the history are dense both ways"
    return CallLayout(
        grid,
        text_lens=None if alone else lens.to(call.device),
        rows=rows.to(call.device) if history else None,
        notes=(note,) if history else (),
    )


def _lengths(mask: torch.Tensor) -> torch.Tensor:
    return mask.sum(1).int()


def count_tokens(latents: Sequence[int], patch: Shape, times: int) -> int:
    """Tokens of latents of these sizes in patches that are so many times as large, padded at the end."""
    return math.prod(math.ceil(size / (times * step)) for size, step in zip(latents, patch, strict=True))


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Every section has the same number of tokens, however many make up the video."""
    patch = patch_of(transformer)
    pixels = vae_pixels(vae) * patch[1]

    def history(shape: Shape) -> int:
        sides = [side * patch[1] for side in shape[1:]]
        return sum(count_tokens((KEPT[name], *sides), PATCH, times) for name, times in HISTORY.items())

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


FAMILY = Family(
    name="framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
    sizes=sizes,
    summary="FramePack, HunyuanVideo in sections: image to video",
    recommended=TRAINING_FREE,
)
