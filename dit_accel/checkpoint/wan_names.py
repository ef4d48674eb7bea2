"""Names of Wan's weights: the original's and FastVideo's, as Diffusers has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from dit_accel.checkpoint.model_weights import NewWeight
from dit_accel.checkpoint.weight_files import StoredTensor

TRAINING = re.compile(r"^net\.|_checkpoint_wrapped_module\.")  # what training adds to a name
# Parts of FastVideo's names (fastvideo/configs/models/dits/wanvideo.py), each with that of Diffusers; a layer's own
# attention has no part of its name for it, and `attn2` no number in its output.
FASTVIDEO = {
    "patch_embedding.proj.": "patch_embedding.",
    "text_embedder.fc_in.": "text_embedder.linear_1.",
    "text_embedder.fc_out.": "text_embedder.linear_2.",
    ".mlp.fc_in.": ".linear_1.",
    ".mlp.fc_out.": ".linear_2.",
    ".time_modulation.linear.": ".time_proj.",
    ".ff.fc_in.": ".ff.net.0.proj.",
    ".ff.fc_out.": ".ff.net.2.",
    ".ffn.fc_in.": ".ffn.net.0.proj.",
    ".ffn.fc_out.": ".ffn.net.2.",
    ".self_attn_residual_norm.norm.": ".norm2.",
}
SELF_ATTENTION = re.compile(r"^(blocks\.\d+)\.(to_[qkv]|to_out|norm_[qk])\.")
OUTPUT = re.compile(r"^(blocks\.\d+\.attn[12]\.to_out)\.(?=weight|bias)")


def in_diffusers(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors by Diffusers' names, and notes.

    A file may hold one weight under two names (FastWan 14B); that of Diffusers counts.
    """
    plain = {TRAINING.sub("", name): stored for name, stored in tensors.items()}
    if any(".self_attn." in name for name in plain):
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

        # it looks at the shape of other models' tensors alone
        return convert_wan_transformer_to_diffusers(plain), ()
    named: dict[str, StoredTensor] = {}
    twice = 0
    for name, stored in sorted(plain.items(), key=lambda item: _diffusers_name(item[0]) != item[0]):
        twice += _diffusers_name(name) in named
        named.setdefault(_diffusers_name(name), stored)
    return named, (f"{twice} weights are in the file under two names; those of Diffusers are taken",) if twice else ()


def _diffusers_name(name: str) -> str:
    for part, replacement in FASTVIDEO.items():
        name = name.replace(part, replacement)
    return OUTPUT.sub(r"\1.0.", SELF_ATTENTION.sub(r"\1.attn1.\2.", name))


def unflattened(name: str, new: NewWeight, patch: tuple[int, int, int] = (1, 2, 2)) -> NewWeight:
    """The patch embedding as a convolution's, where it is stored as a linear layer's: [dim, C] of C * patch values."""
    if name != "patch_embedding.weight" or len(new.shape) != 2:
        return new
    values = patch[0] * patch[1] * patch[2]
    shape = new.shape[0], new.shape[1] // values, *patch

    def make(old: torch.Tensor) -> torch.Tensor:
        return new.make(old).reshape(shape)

    return NewWeight(new.keys, shape, make)
