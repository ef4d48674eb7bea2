"""Training objectives, combined by weights.

An objective takes the outputs of the student and of the dense teacher for the same noisy sample, and the target of the
noise process. It returns a float32 scalar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.hooks.selfcheck import AttentionCall
from dit_accel.kernels.cuts import visual_of
from dit_accel.kernels.sla.call import apply_map, learned_inputs
from dit_accel.methods.moh import MohPlan
from dit_accel.methods.sla import SparseLinearAttention
from dit_accel.plans.gate import BlockGate, divergence, gate_of, pool
from dit_accel.plans.routed import RoutedPlan
from dit_accel.registry import did_you_mean

LEARNED_MAP = "hedgehog"  # the feature map of SLA that the objective imitation trains
NO_MAP = f"The objective imitation trains a learned feature map. Choose method sla with feature_map={LEARNED_MAP}."
NO_ROUTER = "The objective balance spreads the tokens over moh's routed heads. Choose method moh, or leave it out."
SAMPLED = 64  # queries of a head whose weights it compares


class GateSample(NamedTuple):
    """A call of a layer with a gate; the fields are arguments of `plans.gate.divergence`."""

    gate: BlockGate
    a: Tensor
    b: Tensor
    target: Tensor
    scale: float
    first: int


@dataclasses.dataclass
class Outputs:
    """The outputs of one transformer call.

    Args:
        prediction: float32, in the shape of the latents.
        attention: outputs of the recorded self-attention modules, [B, N, C]; joint ones have a second one for text.
        hidden: input of the output head, [B, N, C]; None if not recorded.
        gates: of the layers with a gate, in the order they ran; empty if not recorded.
        calls: of sparse attention, in the order they ran; empty if not recorded.
    """

    prediction: torch.Tensor
    attention: list[torch.Tensor] = dataclasses.field(default_factory=list)
    hidden: torch.Tensor | None = None
    gates: list[GateSample] = dataclasses.field(default_factory=list)
    calls: list[AttentionCall] = dataclasses.field(default_factory=list)


Objective = Callable[[Outputs, Outputs | None, torch.Tensor], torch.Tensor]


def flow(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error against the target: the model's own (noise − clean for flow matching).

    Of `consistency` it is the velocity to the segment's end, from `LevelSegments`.
    """
    return F.mse_loss(student.prediction, target)


def teacher(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error against the dense model's prediction, without guidance.

    Source: TurboDiffusion's SLA training (arXiv:2512.16093); STA's "final" loss (arXiv:2502.04507).
    """
    assert teacher is not None
    return F.mse_loss(student.prediction, teacher.prediction)


def attention(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Squared error of the attention outputs over the teacher's mean square, averaged over the watched layers.

    Source: CLEAR (arXiv:2412.16112) and STA use the plain squared error. Dividing it gives all layers the same weight.
    """
    assert teacher is not None
    pairs = zip(student.attention, teacher.attention, strict=True)
    return torch.stack([_relative(own, wanted) for own, wanted in pairs]).mean()


def final(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Squared error of the output head's input, over the teacher's mean square.

    Source: Efficient-vDiT (arXiv:2502.06155) matches attention outputs and the final output layer by layer.
    """
    assert teacher is not None and student.hidden is not None and teacher.hidden is not None
    return _relative(student.hidden, teacher.hidden)


def gate(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Divergence of the gates' shares from the layers' own dense attention, by block, averaged over the layers.

    It has a gradient for the gates alone; q and k are those of the student's call. Source: `plans.gate`.
    """
    if not student.gates:
        raise DitAccelError("The objective gate trains the gates of score='learned', and no layer has one.")
    return torch.stack([divergence(*sample) for sample in student.gates]).mean()


def imitation(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the linear attention weights against softmax attention's, in nats, averaged over the layers.

    Source: Hedgehog (arXiv:2402.04347), section 4. Both are weights of the student's own q and k, which get no
    gradient: only the learned map trains. The paper takes all queries; here `SAMPLED` visual ones, evenly spaced, stand
    for them. The keys are all visual ones. As published, the denominator has no epsilon.
    """
    return torch.stack([_imitated(call) for call in student.calls]).mean()


def balance(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """MoH's load-balance loss, averaged over the layers. It has a gradient for the routers alone.

    Source: `methods.moh`, equation 7; the authors weigh it by 0.01.
    """
    losses = [call.plan.balance(call.q, call.module) for call in student.calls if isinstance(call.plan, MohPlan)]
    if not losses:
        raise DitAccelError(NO_ROUTER)
    return torch.stack(losses).mean()


OBJECTIVES: Mapping[str, Objective] = {
    "flow": flow,
    "teacher": teacher,
    "attention": attention,
    "final": final,
    "consistency": flow,
    "gate": gate,
    "imitation": imitation,
    "balance": balance,
}
NEEDS_TEACHER = ("teacher", "attention", "final")


def check(weights: Mapping[str, float]) -> None:
    """Refuse objectives that do not exist or cannot be combined; `weights` are numbers."""
    if not weights:
        raise DitAccelError(f"Training needs an objective, such as teacher=1. Objectives: {', '.join(OBJECTIVES)}.")
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise DitAccelError(
                f"Unknown objective {name!r}.{did_you_mean(name, OBJECTIVES)} Objectives: {', '.join(OBJECTIVES)}."
            )
        if not weight > 0:
            raise DitAccelError(f"The weight of objective {name} is a number above 0, got {weight!r}.")
    if "consistency" in weights and "flow" in weights:
        raise DitAccelError("consistency and flow need different predictions of one sample. Choose one of them.")


def _relative(own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    own, wanted = own.float(), wanted.float()
    return F.mse_loss(own, wanted) / wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _imitated(call: AttentionCall) -> torch.Tensor:
    features = call.module.map_of(call.q, call.heads) if isinstance(call.module, SparseLinearAttention) else None
    if features is None:
        raise DitAccelError(NO_MAP)
    q, k = (visual_of(x, call.plan.grid).detach().float() for x in (call.q, call.k))
    rows = torch.linspace(0, q.shape[2] - 1, min(SAMPLED, q.shape[2]), device=q.device).long()
    q, scale = q[:, :, rows], q.shape[-1] ** -0.5 if call.scale is None else call.scale
    wanted = (q @ k.mT * scale).softmax(-1)
    a, b = (apply_map(x, LEARNED_MAP) for x in learned_inputs(q, k, features))
    own = (a @ b.mT).clamp_min(torch.finfo(torch.float32).tiny)
    return (wanted * (own.sum(-1, keepdim=True).log() - own.log())).sum(-1).mean()


def gate_sample(call: AttentionCall) -> GateSample | None:
    """What a call teaches its layer's gate; None without a gate. Nothing carries a gradient to the model."""
    gate, plan = gate_of(call.module), call.plan
    if gate is None or not isinstance(plan, RoutedPlan):
        return None
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    pooled = pool(plan.arrange(call.q), plan.arrange(call.k), plan.query_order, plan.key_order)
    return GateSample(gate, *pooled, pooled_map(call), scale, 0 if call.heads is None else call.heads[0])


@torch.no_grad()
def pooled_map(call: AttentionCall) -> Tensor:
    """T of `plans.gate`: [B, H, query blocks, key blocks], each row sums to 1.

    Dense attention is computed for a few queries at a time and pooled at once: never N x N.
    """
    plan, (batch, heads, *_), grid = call.plan, call.q.shape, call.plan.grid
    assert isinstance(plan, RoutedPlan)
    rows, columns = (plan.block_of(order).to(call.q.device) for order in (plan.query_order, plan.key_order))
    queries, blocks = torch.arange(grid.visual, device=call.q.device), plan.key_order.visual_blocks
    found = torch.zeros(
        batch, heads, plan.query_order.visual_blocks, blocks, device=call.q.device,
        dtype=torch.promote_types(call.q.dtype, torch.float32),
    )  # fmt: skip
    for b in range(batch):
        for h in range(heads):
            for chunk, weights in call.dense_weights(b, h, queries):
                visual = weights[:, grid.visual_rows]
                of_blocks = visual.new_zeros(len(chunk), blocks)
                of_blocks.scatter_reduce_(1, columns.expand_as(visual), visual, "amax")
                found[b, h].scatter_reduce_(0, rows[chunk, None].expand_as(of_blocks), of_blocks, "amax")
    return found / found.sum(-1, keepdim=True)
