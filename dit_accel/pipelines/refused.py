"""Transformers of Diffusers that are refused, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from dit_accel import registry

_UNET = "it is a part of a U-Net, whose attention is spread over several resolutions"
_AUDIO = "it makes audio, whose tokens have no rows and columns"
_LINEAR = "its self-attention is linear already"
_BLOCK_CAUSAL = "its self-attention is causal between blocks, by a mask of its own"
_CACHE = "part of its keys comes from a cache"

# By class. A class in neither this table nor a family is newer than the table.
REFUSED = {
    "AceStepTransformer1DModel": _AUDIO,
    "AnyFlowFARTransformer3DModel": _BLOCK_CAUSAL,
    "BriaFibo2Transformer2DModel": "its sequence mixes gist, image and context tokens in an order set by the prompts",
    "Cosmos3OmniTransformer": "samples share one sequence, causal in its text, with fewer key heads than query heads",
    "DiTTransformer2DModel": "its images have 1,024 tokens at most, too few to be faster",
    "DreamLiteTransformer2DModel": _UNET,
    "Kandinsky6SRTransformer3DModel": "its self-attention is sparse already (NABLA)",
    "LatteTransformer3DModel": "a layer sees one frame, or one position in all frames: short sequences already",
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "MotifVideoTransformer3DModel": "its last layers attend to two copies of the video at once",
    "OmniGenTransformer2DModel": "an N x N mask makes its text causal and its images not",
    "PriorTransformer": "it makes one embedding, and no image",
    "QwenImage21Transformer2DModel": _BLOCK_CAUSAL,
    "RFD4ProteinaTransformer": "it makes proteins, whose residues have no rows and columns",
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": _CACHE,
    "SanaWMTransformer3DModel": "most of its layers are linear already",
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "Transformer2DModel": _UNET,
    "TransformerTemporalModel": _UNET,
    "WanAnimate2Transformer3DModel": _CACHE,
}


def refusal(names: Iterable[str]) -> str:
    """Why a transformer is refused, given the name of its class and those of its bases, and what is supported."""
    reason = next((REFUSED[name] for name in names if name in REFUSED), "no family covers it yet")
    families = ", ".join(registry.list_families())
    return f"{reason}. Supported families: {families} (`dit-accel ls` names their classes)."
