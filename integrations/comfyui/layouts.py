"""The token layout of a call of ComfyUI's models: their token grid, from the arguments of the call."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.tokens import TokenGrid

Arguments = Mapping[str, Any]  # of a model's `_forward`, by name


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sequence of a call's self-attention.

    Args:
        grid: of the whole sequence.
        others: key lengths of the model's cross-attention, which must not be taken for self-attention.
    """

    grid: TokenGrid
    others: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelClass:
    """A class of ComfyUI's models.

    Args:
        family: dit_accel's family of the same model, for its levels.
        layout: of the model and the arguments of a call.
        video: whether the model makes videos.
    """

    family: str
    layout: Callable[[Any, Arguments], Layout]
    video: bool = True


def arguments_of(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a wrapper of the model passes on, by name."""
    bound = inspect.signature(model._forward).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    return arguments | arguments.pop("kwargs", {})


def patches(latent: Any, patch: Sequence[int]) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of a latent [B, C, F, H, W], or [B, C, H, W] of one frame.

    The models pad a latent to whole patches. `patch` has the same axes; without that of frames it is 1.
    """
    *frames, height, width = latent.shape[2:]
    *depth, rows, columns = patch
    return -(-(frames or [1])[0] // (depth or [1])[0]), -(-height // rows), -(-width // columns)


def wan(model: Any, call: Arguments) -> Layout:
    """The latent [B, C, F, H, W], further latents behind it, and a reference in front, which stays exact."""
    frames, height, width = patches(call["x"], model.patch_size)
    if call.get("time_dim_concat") is not None:
        frames += patches(call["time_dim_concat"], model.patch_size)[0]
    reference = call.get("reference_latent") if getattr(model, "ref_conv", None) is not None else None
    text = 0
    if reference is not None:
        text = math.prod(patches(reference, model.patch_size))
    images = () if call.get("clip_fea") is None else (call["clip_fea"].shape[-2],)
    grid = TokenGrid(frames, height, width, text=text, text_first=True)
    return Layout(grid, (call["context"].shape[1], *images))


def ltx(model: Any, call: Arguments) -> Layout:
    """The latent [B, C, F, H, W], one token a place."""
    if call.get("keyframe_idxs") is not None:
        raise DitAccelError(
            "LTX-Video is called with keyframes, whose tokens are on no grid. Remove the keyframes or this node."
        )
    return Layout(TokenGrid(*call["x"].shape[2:]), (call["context"].shape[1],))


def joint_image(model: Any, call: Arguments) -> Layout:
    """Text first, then the latent [B, C, H, W] or [B, C, F, H, W], then reference images."""
    patch = model.patch_size, model.patch_size
    beside = sum(math.prod(patches(latent, patch)) for latent in call.get("ref_latents") or ())
    frames, height, width = patches(call["x"], patch)
    text = call["context"].shape[1]
    return Layout(TokenGrid(frames, height, width, text=text, text_first=True, conditioning=beside))


def hunyuan_video(model: Any, call: Arguments) -> Layout:
    """The latent, then the texts; a reference stands in front, and then the texts count as conditioning."""
    frames, height, width = patches(call["x"], model.patch_size)
    text = call["context"].shape[1]
    if getattr(model, "byt5_in", None) is not None and call.get("txt_byt5") is not None:
        text += call["txt_byt5"].shape[1]
    if call.get("clip_fea") is not None:
        text += call["clip_fea"].shape[1]
    if call.get("ref_latent") is None:
        return Layout(TokenGrid(frames, height, width, text=text))
    front = math.prod(patches(call["ref_latent"], model.patch_size))
    return Layout(TokenGrid(frames, height, width, text=front, text_first=True, conditioning=text))


def minimax_h3(model: Any, call: Arguments) -> Layout:
    """`[text | references | sound | video]`: all before the video stays exact. The run's own layout says how much."""
    layout = (call.get("minimax_payload") or {}).get("layout")
    video, sound = call["x"][:2]
    _, rows, columns = model.patch_size
    frames, height, width = patches(video, model.patch_size)
    wanted = call["context"].shape[1], frames * model.patch_size[0], height * rows, width * columns, sound.shape[-1]
    if layout is None or tuple(layout.signature) != wanted:
        raise DitAccelError(
            f"MiniMax-H3 is called without its packed layout of {wanted}; got {getattr(layout, 'signature', None)}. "
            "Update ComfyUI, or remove this node."
        )
    start, stop, _ = next(segment for segment in layout.segments if segment[2] == "video")
    grid = TokenGrid(frames, height, width, text=start, text_first=True)
    if grid.tokens != stop:
        raise DitAccelError(f"MiniMax-H3's video ends at token {stop}, but its grid {grid} at {grid.tokens}.")
    return Layout(grid)


MODELS = {
    "WanModel": ModelClass("wan", wan),
    "VaceWanModel": ModelClass("wan", wan),
    "CameraWanModel": ModelClass("wan", wan),
    "HunyuanVideo": ModelClass("hunyuan_video", hunyuan_video),
    "Flux": ModelClass("flux", joint_image, video=False),
    "LTXVModel": ModelClass("ltx", ltx),
    "QwenImageTransformer2DModel": ModelClass("qwen_image", joint_image, video=False),
    "MiniMaxH3Model": ModelClass("minimax_h3", minimax_h3),
}
BESIDE = "puts tokens of sound or motion beside the video, whose layout this node does not know"
REFUSED = {
    "WanModel_S2V": BESIDE,
    "HumoWanModel": BESIDE,
    "AnimateWanModel": BESIDE,
    "LTXAVModel": "runs video and sound in one call, which this node was not tested with",
    "UNetModel": "is a U-Net, whose sequences are short",
}


def class_of(model: Any) -> ModelClass:
    """The class of a diffusion model.

    Raises:
        DitAccelError: the node cannot accelerate it, and why.
    """
    name = type(model).__name__
    if name not in MODELS:
        why = REFUSED.get(name, "has a token layout that this node does not know")
        raise DitAccelError(f"{name} {why}. Remove the node, or use one of {', '.join(MODELS)}.")
    return MODELS[name]
