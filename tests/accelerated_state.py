"""A transformer's result, and the state that `remove` restores."""

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

WINDOW = {"window": (3, 5, 4)}


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def state_of(transformer):
    """What `remove` must restore: processors, hooks, weights by name, attributes, and Diffusers' global back end."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    return {
        "processors": {name: id(processor) for name, processor in transformer.attn_processors.items()},
        "hooks": [
            (name, hook, list(getattr(module, hook))) for name, module in transformer.named_modules() for hook in hooks
        ],
        "weights": list(transformer.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in transformer.named_modules()},
        "back end": _AttentionBackendRegistry._active_backend,
    }
