"""Anchor tokens in a transformer's calls: added to its input, cut from its output. `plans.anchored` defines them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines import context_parallel
from dit_accel.pipelines.family import CallLayout, Family, ModelInputs
from dit_accel.plans.anchored import AnchoredPlan
from dit_accel.plans.plan import Plan


class AnchorTokens:
    """The anchors of one transformer.

    Args:
        transformer: its module `rope`, if it has one, makes tables of positions [1, tokens, 1, D] for the raster.

    Attributes:
        plan: of the call under way; None if it has no anchors.

    Raises:
        DitAccelError: the family takes no anchors.
    """

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        if family.extend is None:
            raise DitAccelError(
                "Anchors change the transformer's input, which is written for the families flux, flux2 and wan, not "
                f"for {family.name}. Set factor=0 for windows alone."
            )
        self._transformer, self._extend = transformer, family.extend
        self.plan: AnchoredPlan | None = None
        self._shape: torch.Size = torch.Size()

    def attach(self) -> Iterator[Any]:
        """Hook the transformer; the handles."""
        yield self._transformer.register_forward_hook(self._cut, always_call=True)  # after an error too
        if isinstance(rope := getattr(self._transformer, "rope", None), nn.Module):
            yield rope.register_forward_hook(self._place)

    def add(self, call: ModelInputs, layout: CallLayout, plans: list[Plan], compiled: bool) -> dict[str, Any]:
        """The call's arguments with anchors.

        Raises:
            DitAccelError: the transformer is compiled as a whole or shards its sequence, the call has masked text or
                conditioning tokens, or layers want other anchors than the first.
        """
        first = next(plan for plan in plans if isinstance(plan, AnchoredPlan))
        wrong = {
            "a transformer that is compiled as a whole (compile its blocks)": compiled,
            "context parallelism": context_parallel.config_of(self._transformer) is not None,
            "masked text": layout.text_lens is not None,
            "conditioning tokens": layout.grid.conditioning > 0,
            "other anchors in other layers": any(plan.grid != first.grid for plan in plans),
        }
        if conflicts := [name for name, present in wrong.items() if present]:
            raise DitAccelError(f"Anchors do not work with {', '.join(conflicts)}. Leave that out, or set factor=0.")
        arguments = self._extend(call, first)
        self.plan, self._shape = first, call.get("hidden_states").shape
        return arguments

    def _cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        plan, self.plan = self.plan, None
        if plan is None or output is None:
            return output
        sample = output[0][tuple(map(slice, self._shape))]
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)

    def _place(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Give each anchor the position of a token of its frame."""
        plan = self.plan
        if plan is None:
            return output
        frames = [table.unflatten(1, plan.grid.shape)[:, :, : plan.base.height].flatten(2, 3) for table in output]
        places = plan.places.to(output[0].device)
        return tuple(torch.cat((table, table[:, :, places]), 2).flatten(1, 2) for table in frames)


def in_packed(call: ModelInputs, plan: AnchoredPlan) -> dict[str, Any]:
    """`Family.extend` of one image in packs of 2 x 2 latents [B, N, 4C], with `img_ids` [N, axes] or [B, N, axes]."""
    if plan.base.frames > 1 or call.get("controlnet_block_samples") or call.get("controlnet_single_block_samples"):
        raise DitAccelError("Anchors are for one image without conditioning images and ControlNets. Set factor=0.")
    packed, ids = call.tensor("hidden_states", 3), call.get("img_ids")
    height, width = plan.base.height, plan.base.width
    latent = packed.reshape(len(packed), height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    longer = plan.extend(latent.reshape(len(packed), -1, 2 * height, 2 * width))
    cells = longer.reshape(len(packed), -1, plan.grid.height, 2, width, 2).permute(0, 2, 4, 1, 3, 5)
    ids = torch.cat((ids, ids.index_select(-2, plan.places.to(ids.device))), -2)
    return call.arguments | {"hidden_states": cells.reshape(len(packed), -1, packed.shape[-1]), "img_ids": ids}


def in_latent(call: ModelInputs, plan: AnchoredPlan) -> dict[str, Any]:
    """`Family.extend` of a latent video [B, C, F, H, W] with one timestep a sample."""
    if call.owner != "WanTransformer3DModel" or call.get("timestep").ndim > 1:
        raise DitAccelError(
            f"Anchors are for WanTransformer3DModel with one timestep a sample, not {call.owner}'s call."
        )
    return call.arguments | {"hidden_states": plan.extend(call.tensor("hidden_states", 5))}
