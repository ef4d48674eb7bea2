"""From a model's JSON configuration to its family and the sizes it can make."""

from __future__ import annotations

import dataclasses

from dit_accel import registry
from dit_accel.errors import DitAccelError
from dit_accel.generation.sources import EMBEDDED, Source
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.refused import refusal
from dit_accel.pipelines.sizes import Sizes


def family_of(source: Source) -> Family:
    """The family of a model's transformer; no weights are read.

    Raises:
        DitAccelError: it has no transformer, or one of no supported family.
    """
    name = source.component_class("transformer")
    if name is None:
        raise DitAccelError(f"{source.model} has no transformer; only diffusion transformers can be accelerated.")
    family = registry.family_of([name])
    if family is None:
        raise DitAccelError(f"{source.model} has a {name}, which is not supported: {refusal([name])}")
    return family


def sizes_of(source: Source) -> Sizes:
    """What a model's configuration says of its sizes; no weights are read.

    Raises:
        DitAccelError: the transformer's family is not supported, or a configuration file is missing or incomplete.
    """
    family, transformer, vae = family_of(source), source.config("transformer"), source.config("vae")
    try:
        sizes = family.sizes(transformer, vae)
    except KeyError as missing:
        raise DitAccelError(
            f"The configuration of {source.model} does not say {missing}, on which the size of a token depends; save "
            "the pipeline anew with save_pretrained, or use --grid where there is one."
        ) from missing
    if source.model in EMBEDDED:
        from dit_accel.pipelines import demo

        own = demo.DEFAULTS
        sizes = dataclasses.replace(sizes, frames=own.num_frames, height=own.height, width=own.width)
    return sizes
