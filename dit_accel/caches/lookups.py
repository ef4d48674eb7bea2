"""Diffusers' caches that look for modules by name or class, TaylorSeer and SeaCache, told what a model's are.

This module imports Diffusers: import it where a cache is put to work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.hooks import apply_sea_cache, apply_taylorseer_cache
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from dit_accel.caches.step_cache import StepCache
from dit_accel.caches.streams import describe
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.family import fits_path
from dit_accel.pipelines.stacks import BlockStack


def put_taylorseer(transformer: nn.Module, stack: BlockStack, cache: StepCache) -> Any:
    """Put TaylorSeer on a transformer; return its config.

    Lite mode goes by the names that this model has: Diffusers' patterns know ``*block*`` and ``proj_out`` alone.
    """
    config = cache.build()
    if config.use_lite_mode:
        stacked = [name for name, _, _ in stack.blocks(transformer)]
        names = [name for name, _ in transformer.named_modules()]
        blocks = stacked + [
            name for name in names if re.fullmatch(r"[^.]*block[^.]*\.[^.]+", name) and name not in stacked
        ]
        if stack.last_alone:
            blocks.remove(stacked[-1])
        outputs = [name for name in names if any(fits_path(path, name) for path in stack.outputs)]
        identifiers = {"skip_predict_identifiers": [re.escape(name) for name in blocks]}
        identifiers["cache_identifiers"] = [re.escape(name) for name in outputs]
        config = dataclasses.replace(config, use_lite_mode=False, **identifiers)
    apply_taylorseer_cache(transformer, config)
    return config


def put_sea(transformer: nn.Module, stack: BlockStack, cache: StepCache) -> Any:
    """Put SeaCache on a transformer; return its config.

    Raises:
        DitAccelError: the transformer's input is no latent video that its blocks alone change.
    """
    if not stack.latent:
        kind = type(transformer).__name__
        raise DitAccelError(
            f"sea reads the latent video of Wan, ChronoEdit and HunyuanVideo. {kind} takes another input, or adds "
            "something between its blocks. Use first-block, mag, taylorseer or steps."
        )
    config = cache.build(raw_vision_callback=_latents)
    with _registered(transformer, stack):
        apply_sea_cache(transformer, config)
    return config


@contextlib.contextmanager
def _registered(transformer: nn.Module, stack: BlockStack) -> Iterator[None]:
    """The streams of the blocks whose classes Diffusers does not know are in its registry meanwhile."""
    TransformerBlockRegistry._register()  # its own
    known: dict[type, Any] = TransformerBlockRegistry._registry
    added = {type(block): streams for block, streams in describe(transformer, stack) if type(block) not in known}
    known.update(added)
    try:
        yield
    finally:
        for kind in added:
            del known[kind]


def _latents(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """By sample, the latent video [C, T, H, W] that a call denoises: conditioning channels stand behind it."""
    module: Any = unwrap_module(transformer)
    call = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    channels = module.config.out_channels or module.config.in_channels
    return list(call["hidden_states"][:, :channels])
