"""Calls whose tensors lie in memory in ways that models rarely use."""

import torch

import dit_accel

# how [B, H, N, D] lies in memory, from contiguous: channels apart, tokens last, one channel for all
LAYOUTS = {
    "channels apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "tokens last": lambda x: x.mT.contiguous().mT,
    "one channel": lambda x: x[..., :1].expand_as(x),
}


def check_layouts(plan, impl, dim=16):
    """Outputs and gradients are those of contiguous tensors with the same numbers; the upstream gradient's too."""
    generator = torch.Generator().manual_seed(0)
    names = ("q", "k", "v", "upstream")
    drawn = {name: torch.randn(1, 2, plan.grid.tokens, dim, generator=generator) for name in names}
    for name in names:
        for kind, layout in LAYOUTS.items():
            strided = layout(drawn[name])
            results = []
            for tensor in (strided, strided.contiguous()):
                *inputs, upstream = (drawn | {name: tensor}).values()
                inputs = [x.detach().requires_grad_() for x in inputs]
                out = dit_accel.attention(*inputs, plan, impl=impl)
                results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream)))
            for result, wanted in zip(*results, strict=True):
                torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4, msg=f"{name}, {kind}")
