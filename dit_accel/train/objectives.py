"""Training objectives, combined by weights.

An objective takes the outputs of the student and of the dense teacher for the same noisy sample, and the target of the
noise process. It returns a float32 scalar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel.errors import DitAccelError
from dit_accel.method import Method
from dit_accel.method import Objective as MethodObjective
from dit_accel.registry import did_you_mean, get_methods


@dataclasses.dataclass
class Outputs:
    """The outputs of one transformer call.

    Args:
        prediction: float32, in the shape of the latents.
        attention: outputs of the recorded self-attention modules, [B, N, C]; joint ones have a second one for text.
        hidden: input of the output head, [B, N, C]; None if not recorded.
        records: of the methods' own objectives, by name, one for each layer in the order they ran.
    """

    prediction: torch.Tensor
    attention: list[torch.Tensor] = dataclasses.field(default_factory=list)
    hidden: torch.Tensor | None = None
    records: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


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
    return torch.stack([_relative(actual, wanted) for actual, wanted in pairs]).mean()


def final(student: Outputs, teacher: Outputs | None, target: torch.Tensor) -> torch.Tensor:
    """Squared error of the output head's input, over the teacher's mean square.

    Source: Efficient-vDiT (arXiv:2502.06155) matches attention outputs and the final output layer by layer.
    """
    assert teacher is not None and student.hidden is not None and teacher.hidden is not None
    return _relative(student.hidden, teacher.hidden)


OBJECTIVES: Mapping[str, Objective] = {
    "flow": flow,
    "teacher": teacher,
    "attention": attention,
    "final": final,
    "consistency": flow,
}
NEEDS_TEACHER = ("teacher", "attention", "final")


def of_methods() -> Mapping[str, MethodObjective]:
    """The objectives of methods' own, by name."""
    return {objective.name: objective for method in get_methods().values() for objective in method.objectives}


def losses(
    names: Iterable[str], student: Outputs, teacher: Outputs | None, target: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The loss of each objective.

    Raises:
        DitAccelError: no layer has what an objective of a method trains.
    """
    return {
        name: OBJECTIVES[name](student, teacher, target) if name in OBJECTIVES else _recorded(name, student)
        for name in names
    }


def _recorded(name: str, student: Outputs) -> torch.Tensor:
    objective, records = of_methods()[name], student.records.get(name)
    if not records:
        raise DitAccelError(f"No layer has {objective.trains}, which the objective {name} trains. {_advice(objective)}")
    return torch.stack([objective.loss(record) for record in records]).mean()


def _advice(objective: MethodObjective) -> str:
    methods = [method.name for method in get_methods().values() if objective in method.objectives]
    return f"Choose {' or '.join(methods)}{objective.needs and f' with {objective.needs}'}, or leave it out."


def check(weights: Mapping[str, float]) -> None:
    """Refuse objectives that do not exist or cannot be combined; `weights` are numbers."""
    names = [*OBJECTIVES, *of_methods()]
    if not weights:
        raise DitAccelError(f"Training needs an objective, such as teacher=1. Objectives: {', '.join(names)}.")
    for name, weight in weights.items():
        if name not in names:
            raise DitAccelError(
                f"Unknown objective {name!r}.{did_you_mean(name, names)} Objectives: {', '.join(names)}."
            )
        if not weight > 0:
            raise DitAccelError(f"The weight of objective {name} must be a number above 0, got {weight!r}.")
    if "consistency" in weights and "flow" in weights:
        raise DitAccelError("consistency and flow need different predictions of one sample. Choose one of them.")


def check_method(names: Iterable[str], method: Method, configs: Iterable[Any]) -> None:
    """Refuse objectives that this method has with none of these settings."""
    others = of_methods()
    for objective in (others[name] for name in names if name in others):
        if objective not in method.objectives or not any(map(objective.when, configs)):
            raise DitAccelError(
                f"The objective {objective.name} trains {objective.trains}, which {method.name} does not have with "
                f"these settings. {_advice(objective)}"
            )


def trains_model(names: Iterable[str]) -> bool:
    """Whether one of the objectives trains more than a part of the method's own weights."""
    others = of_methods()
    return not all(name in others and others[name].alone for name in names)


def _relative(actual: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    actual, wanted = actual.float(), wanted.float()
    return F.mse_loss(actual, wanted) / wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
