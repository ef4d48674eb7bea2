"""Readers of a call's grid and text that several families share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import CallLayout, ModelInputs, patch_grid
from dit_accel.pipelines.sizes import Shape, patch_of
from dit_accel.tokens import TokenGrid


def image_of(call: ModelInputs, patch: int, text: int = 0, text_first: bool = False) -> TokenGrid:
    """The grid of the latent image [B, C, H, W] in hidden_states, cut into patches, with text tokens."""
    height, width = call.tensor("hidden_states", 4).shape[2:]
    return patch_grid((1, height, width), (1, patch, patch), text, text_first)


def video_of(
    call: ModelInputs, patch: Sequence[int], text: int = 0, text_first: bool = False, axes: Shape = (2, 3, 4)
) -> TokenGrid:
    """The grid of the latent video in hidden_states, cut into patches, with text tokens.

    Args:
        axes: of frames, height and width among the five; [B, C, F, H, W] by default.
    """
    sizes = call.tensor("hidden_states", 5).shape
    return patch_grid(tuple(sizes[axis] for axis in axes), patch, text, text_first)


def video_alone(transformer: Any, call: ModelInputs) -> CallLayout:
    """`Family.layout` where self-attention sees the video tokens alone: the latent [B, C, F, H, W] in patches."""
    return CallLayout(video_of(call, patch_of(transformer.config)))


def packed_video(transformer: Any, call: ModelInputs) -> CallLayout:
    """`Family.layout` of a packed video [B, N, C] with num_frames, height and width in tokens, or video_coords.

    With both, tokens beyond the sizes follow the video. With coordinates [B, 3, N] or [B, 3, N, bounds] alone, the
    video comes last: it starts where time decreases. The other tokens (keyframes, conditioning videos) are dense both
    ways.

    Raises:
        DitAccelError: neither tells which tokens are the video's, or these are no raster.
    """
    tokens, coordinates = call.tensor("hidden_states", 3).shape[1], call.get("video_coords")
    sizes = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    stated = all(isinstance(size, int) for size in sizes)
    if stated and math.prod(sizes) == tokens:
        return CallLayout(TokenGrid(*sizes))
    came = "none"
    if isinstance(coordinates, torch.Tensor):
        came = str(tuple(coordinates.shape))
        places = call.once(coordinates, _places)
        if places is not None and places.shape[1] == tokens:
            start, shape = (0, sizes) if stated else last_raster(places)
            stop = start + math.prod(shape)
            if is_raster(places[:, start:stop], shape) and (stated or stop == tokens):
                frames, height, width = shape
                others = tokens - (stop - start)
                grid = TokenGrid(frames, height, width, conditioning=others)
                order = torch.cat((torch.arange(start, stop), torch.arange(start), torch.arange(stop, tokens)))
                rows = order.expand(len(coordinates), -1).to(call.device) if start else None
                return CallLayout(grid, rows=rows, notes=dense_note(others, "of keyframes or conditioning videos"))
    raise DitAccelError(
        f"A packed video needs num_frames, height and width of its {tokens} tokens, or video_coords that show its "
        f"place; got {' x '.join(map(str, sizes))} and coordinates of shape {came}. Pass either, or run it dense."
    )


def _places(coordinates: torch.Tensor) -> torch.Tensor | None:
    """Time, row and column of each token, [3, N], the first of several bounds; None if samples differ."""
    starts = coordinates[..., 0] if coordinates.ndim == 4 else coordinates
    if starts.ndim != 3 or starts.shape[1] != 3 or bool((starts != starts[:1]).any()):
        return None
    return starts[0]


def last_raster(places: torch.Tensor) -> tuple[int, tuple[int, int, int]]:
    """Start of the last raster among tokens at `places` [3, N], and its sizes if `is_raster` agrees.

    It starts where the order of time, row and column goes back.
    """
    back = torch.zeros(places.shape[1] - 1, dtype=torch.bool)
    for axis in places.flip(0):  # from columns to time, which counts most
        back = (axis[1:] < axis[:-1]) | ((axis[1:] == axis[:-1]) & back)
    starts = torch.nonzero(back).flatten()
    start = int(starts[-1]) + 1 if len(starts) else 0
    times, rows, _ = places[:, start:]
    frame = int((times == times[0]).sum())
    width = int((rows[:frame] == rows[0]).sum())
    return start, (len(times) // frame, frame // width, width)


def is_raster(places: torch.Tensor, shape: tuple[int, int, int]) -> bool:
    """Whether tokens at `places` [3, n] are a raster of that shape, each axis rising."""
    if places.shape[1] != math.prod(shape) or min(shape) < 1:
        return False
    grid = places.reshape(3, *shape)
    axes = grid[0, :, 0, 0], grid[1, 0, :, 0], grid[2, 0, 0, :]
    raster = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.equal(grid, raster) and all(bool((axis[1:] > axis[:-1]).all()) for axis in axes)


def mask_text(call: ModelInputs, grid: TokenGrid, mask: torch.Tensor | None, notes: tuple[str, ...] = ()) -> CallLayout:
    """The layout of a grid with a mask over its text tokens.

    Args:
        call: the call.
        grid: with the masked tokens.
        mask: [B, text], or [B, tokens] in the sequence's order, with or without further axes of length 1; nonzero for
            valid tokens, in any pattern. None: all are valid.
        notes: of the layout.

    Raises:
        DitAccelError: the mask is shaped otherwise, or masks more than text.
    """
    if mask is None:
        return CallLayout(grid, notes=notes)
    text = slice(grid.text_start, grid.text_start + grid.text)
    valid = call.once(mask, _is_valid)
    if valid.ndim == 2 and valid.shape[1] == grid.tokens:
        others = valid.clone()
        others[:, text] = True
        if not others.all():
            raise DitAccelError("The model masks image tokens, but sparse attention knows masks of text alone.")
        valid = valid[:, text]
    if valid.ndim != 2 or valid.shape[1] != grid.text:
        raise DitAccelError(
            f"The mask of {grid.text} text tokens must be [batch, {grid.text}], got {tuple(mask.shape)}."
        )
    lens = valid.sum(1, dtype=torch.int32)
    rows = None
    if not torch.equal(valid, torch.arange(grid.text) < lens[:, None]):
        rows = torch.arange(grid.tokens).repeat(len(valid), 1)
        rows[:, text] = grid.text_start + (~valid).long().argsort(dim=1, stable=True)
        rows = rows.to(call.device)
    return CallLayout(grid, text_lens=lens.to(call.device), rows=rows, notes=notes)


def lengths(mask: torch.Tensor) -> torch.Tensor:
    """Valid tokens of each sample of a mask [B, T], wherever they stand: int32 [B]."""
    return mask.sum(1, dtype=torch.int32)


def _is_valid(mask: torch.Tensor) -> torch.Tensor:
    return (mask != 0).flatten(1)


def bias_text(call: ModelInputs, grid: TokenGrid, mask: torch.Tensor) -> CallLayout:
    """The layout where the model adds the products m_i m_j of a mask over queries i and keys j to the logits.

    A mask of ones and zeros therefore masks nothing. Softmax ignores a constant added to all logits of a query. So
    valid queries lower the logits of padded text by 1, and padded queries change nothing.

    Args:
        call, grid: as for `mask_text`.
        mask: as there.

    Raises:
        DitAccelError: the mask has values besides 0 and 1, or as for `mask_text`.
    """
    if not call.once(mask, _is_zeros_and_ones):
        raise DitAccelError(
            f"{call.owner} adds its attention_mask to the logits; sparse attention takes one of ones and zeros, and "
            f"this one has other values ({mask.dtype}). Pass such a mask, or leave the model dense."
        )
    layout = mask_text(call, grid, mask)
    assert layout.text_lens is not None
    place = torch.arange(grid.tokens, device=call.device) - grid.text_start
    padding = (place >= layout.text_lens[:, None]) & (place < grid.text)
    return dataclasses.replace(layout, text_bias=padding.float() - 1)


def _is_zeros_and_ones(mask: torch.Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())


def packed_images(call: ModelInputs) -> CallLayout:
    """The layout of text [B, T, C] before packed images [B, N, C] with positions in `img_ids`.

    Args:
        call: with `hidden_states`, `encoder_hidden_states` and `img_ids` [N, 3 or more]: image, row, column. Of ids
            [B, N, 3 or more] the first sample's are read, as the models do.

    Raises:
        DitAccelError: there are no ids for each token, or they are no raster.
    """
    images, text = call.length("hidden_states"), call.length("encoder_hidden_states")
    ids = call.get("img_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim < 2 or ids.shape[-2] != images:
        came = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise DitAccelError(f"{call.owner} needs img_ids for each of the {images} image tokens, got {came}.")
    return images_and_text(call, call.once(ids, _read_ids), text)


def _read_ids(ids: torch.Tensor) -> tuple[int, int, int, int]:
    return image_grids((ids if ids.ndim == 2 else ids[0])[:, :3])


def images_and_text(
    call: ModelInputs,
    images: tuple[int, int, int, int],
    text: int,
    mask: torch.Tensor | None = None,
    *,
    text_first: bool = True,
) -> CallLayout:
    """The layout of images as `image_grids` returns them, with text tokens and their mask as for `mask_text`."""
    frames, height, width, conditioning = images
    grid = TokenGrid(frames, height, width, text=text, text_first=text_first, conditioning=conditioning)
    return mask_text(call, grid, mask, dense_note(conditioning))


def dense_note(tokens: int, which: str = "of conditioning images") -> tuple[str, ...]:
    """The note on tokens around the visual ones; empty without any."""
    return (f"{tokens} tokens {which} are dense both ways",) if tokens else ()


def image_grids(ids: torch.Tensor) -> tuple[int, int, int, int]:
    """Read a packed image sequence from its position ids.

    Args:
        ids: [N, 3] on the CPU, image, row and column of each token. Tokens of one image are adjacent, in raster order.
            The first image is the generated one.

    Returns:
        Number of leading images of the first one's size, height, width, and number of tokens behind them.

    Raises:
        DitAccelError: the first image is not a raster.
    """
    bounds = torch.nonzero(ids[1:, 0] != ids[:-1, 0]).flatten() + 1
    pieces = torch.tensor_split(ids[:, 1:], bounds)
    sizes = [_raster(piece) for piece in pieces]
    if sizes[0] is None:
        raise DitAccelError(
            f"The first {len(pieces[0])} image ids are not a full grid of rows and columns in raster order, so "
            "neighbours are unknown. Pass img_ids as the pipeline makes them."
        )
    frames = 0
    while frames < len(sizes) and sizes[frames] == sizes[0]:
        frames += 1
    height, width = sizes[0]
    return frames, height, width, len(ids) - frames * height * width


def _raster(positions: torch.Tensor) -> tuple[int, int] | None:
    """Height and width of tokens at consecutive rows and columns, positions [n, 2]; None if they are no raster."""
    start = positions[0]
    width = int((positions[:, 0] == start[0]).sum())
    height, rest = divmod(len(positions), width)
    token = torch.arange(len(positions))
    expected = torch.stack((token // width, token % width), -1) + start.double()
    # Ids have the model's dtype; bfloat16 rounds positions above 256, so the expected ones are rounded too.
    return (height, width) if rest == 0 and torch.equal(positions, expected.to(positions.dtype)) else None
