"""MiniMax-H3: video with sound, in one packed sequence of text, conditions, sound and, always last, the video.

All tokens before the video attend to everything and everything to them: users report that speech falls apart where
the sound is sparse. Diffusers has this model as a modular pipeline only. Samples share one layout, which index tensors
describe. The token refiner's attention stays the model's own.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelInputs, Preset
from dit_accel.pipelines.reading import dense_note, is_raster, last_raster
from dit_accel.pipelines.sizes import Config, Shape, Sizes, patch_of, video_sizes
from dit_accel.pipelines.stacks import BlockStack
from dit_accel.tokens import TokenGrid

PROMPT_TOKENS = 512  # the pipeline sets no limit; longer than the prompts of its documentation
FRAME_RATE, SOUND_RATE, CHANNELS = 24, 40, 2  # frames and sound tokens a second, stereo


def layout(transformer: nn.Module, call: ModelInputs) -> CallLayout:
    """Places [N, 3] of all tokens, indices [V] of the video's, the conditions' first, and [S] of the sound's."""
    places = call.once(call.tensor("position_ids", 2), torch.t)
    video, sound = (call.once(call.tensor(f"{kind}_indices", 1), _runs) for kind in ("video", "audio"))
    run, stop = video[-1] if video else (0, 0)
    tokens = places.shape[1]
    if run < stop == tokens:
        start, shape = last_raster(places[:, run:])
        start += run
        if is_raster(places[:, start:], shape):
            grid = TokenGrid(*shape, text=start, text_first=True)
            edges = sorted({0, start, *(edge for span in (*video, *sound) for edge in span if edge < start)})
            notes = dense_note(start, "of text, conditions and sound")
            return CallLayout(grid, segments=tuple(itertools.pairwise(edges)), notes=notes)
    raise DitAccelError(
        f"{call.owner} needs a sequence that ends with the target video, a raster of frames, rows and columns by "
        f"position_ids; among {tokens} tokens the last of video_indices are {run} to {stop - 1}. Pass what the "
        "pipeline makes, or run it dense."
    )


def _runs(indices: torch.Tensor) -> list[tuple[int, int]]:
    """First and one past the last of each run of indices that follow one another."""
    gaps = torch.nonzero(indices[1:] != indices[:-1] + 1).flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in indices.tensor_split(gaps) if len(run)]


def sizes(transformer: Config, vae: Config) -> Sizes:
    """Chunks of 17 frames make 5 tokens along time, after 5 frames that make 2; 124 frames of 768 x 1344."""
    strides = {
        "scale_factor_spatial": math.prod(vae["spatial_downsample_factors"]),
        "scale_factor_temporal": vae["clip_length"],
    }
    chunk = math.ceil(vae["clip_length"] / math.prod(vae["temporal_downsample_factors"]))
    first = -vae["token_drop"] % chunk

    def before_the_video(shape: Shape) -> int:
        frames = (shape[0] - first) // chunk * vae["clip_length"] + chunk
        return PROMPT_TOKENS + CHANNELS * round(frames / FRAME_RATE * SOUND_RATE)

    rest = {"fps": FRAME_RATE, "frames_first": chunk, "tokens_step": chunk, "tokens_first": first}
    size = (124, 768, 1344)
    return video_sizes(strides, patch_of(transformer), *size, text=before_the_video, text_first=True, **rest)


FAMILY = Family(
    name="minimax_h3",
    transformers=("MiniMaxH3Transformer3DModel",),
    attention=("transformer_blocks.*.attn",),
    layout=layout,
    sizes=sizes,
    stack=BlockStack(outputs=("proj_out", "audio_proj_out"), by_token={"adaln_indices": 0, "rotary_emb": (0, 0)}),
    summary="MiniMax-H3: text, keyframes and references to video with sound; the video's tokens",
    timestep_scale=None,  # a call has one for each noise level in the sequence
    recommended=TRAINING_FREE
    | {
        "sol": Preset(
            config={"tau": 1.3},
            schedule={"dense_steps": 0.4, "dense_last_steps": 0.1},
            source="ComfyUI's documentation (Comfy-Org/docs, pull request 1698): MiniMax-H3 sparse from 0.4 to 0.9 of "
            "the steps, with tau 1.3. Blocks of 128 queries in place of 64",
        ),
    },
)
