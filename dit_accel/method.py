"""What a method declares: settings, plan, learned weights and their objectives, calibration, and when to choose it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

from dit_accel.plans.sharing import Share
from dit_accel.values import Checked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dit_accel.hooks.selfcheck import ComputedAttention
    from dit_accel.plans.curves import Curve
    from dit_accel.plans.plan import Plan
    from dit_accel.tokens import TokenGrid


@dataclasses.dataclass(frozen=True)
class MethodConfig(Checked):
    """The base of every method's settings. The properties are what hooks and plans read of any settings.

    A method overrides one with a field of the same name, or with a property that follows from its fields.
    """

    @property
    def keeps_all(self) -> bool:
        """Whether the settings ask for every pair, in so many words. If not, a plan that keeps all is refused."""
        return False

    @property
    def share(self) -> Share:
        """What a layer shares between denoising steps; see `plans.sharing`."""
        return "none"

    @property
    def refresh(self) -> int:
        """Denoising steps for which a layer uses what it computed once; 1: it keeps nothing."""
        return 1

    @property
    def anchors(self) -> bool:
        """Whether a call carries anchors besides its own tokens; see `plans.anchored`."""
        return False

    @property
    def curve(self) -> Curve | None:
        """The curve along which blocks are runs of tokens, by the field `order`; None without one."""
        order = getattr(self, "order", None)
        return order if order in ("morton", "hilbert") else None

    @property
    def budgets(self) -> Literal["equal"] | tuple[float, ...]:
        """A share of the key blocks for each head of a layer, or "equal": the same for all."""
        return "equal"

    @property
    def extra_tokens(self) -> int:
        """Tokens that every query block attends to exactly besides its blocks."""
        return 0

    @property
    def square_blocks(self) -> bool:
        """Whether blocks of queries always have the size of blocks of keys, so that no setting tells them apart."""
        return True


@dataclasses.dataclass(frozen=True)
class LearnedModule:
    """The learned weights that a method adds to every accelerated attention module.

    Args:
        attribute: their name on the attention module, in state dicts and checkpoints.
        make: makes them for a head dimension, a number of heads and the method's settings.
        when: whether settings learn them; None: all do.
        make_for: makes them, for some settings, for the channels of the layer's input too, which they read; None for
            other settings.
    """

    attribute: str
    make: Callable[[int, int, Any], nn.Module]
    when: Callable[[Any], bool] | None = None
    make_for: Callable[[int, int, int, Any], nn.Module | None] = lambda channels, head_dim, heads, config: None

    def build(self, channels: int, head_dim: int, heads: int, config: Any) -> nn.Module:
        """The weights of a layer whose input has that many channels, or 0 if that is unknown."""
        return self.make_for(channels, head_dim, heads, config) or self.make(head_dim, heads, config)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective of a method's own; its loss is averaged over the layers.

    Args:
        name: as `dit-accel train --objective` takes it. Methods that share an objective declare the same one.
        trains: the part of the learned weights that it trains, in words.
        record: what the loss needs of a sparse attention call of the student, made without gradients; None if the
            layer lacks the part. Recomputation in the backward pass does not record again.
        loss: of a record, a float scalar.
        part: the part among a layer's learned weights; None if they lack it.
        when: whether settings have the part.
        needs: these settings in words, such as "score=learned"; empty if all do.
        alone: the objective leaves all other weights as they are.
        exclusive: no other objective trains the part.
    """

    name: str
    trains: str
    record: Callable[[ComputedAttention], Any | None]
    loss: Callable[[Any], Tensor]
    part: Callable[[nn.Module], nn.Module | None] = lambda module: module
    when: Callable[[Any], bool] = lambda config: True
    needs: str = ""
    alone: bool = False
    exclusive: bool = False


@dataclasses.dataclass(frozen=True)
class RecallCalibration:
    """Settings of each layer that reach a recall: the share of dense attention's weights that a head keeps.

    Args:
        file: name of the file that a calibration writes.
        whole: settings of the run that is measured, in place of the given ones. They keep every pair.
        curve: the recall of each head of a call for a growing number of kept blocks, float64 [heads, numbers], as a
            mean over some visual queries, int64 [S] from the first visual token.
        settings: of a layer, in place of the given ones, from its curve and a recall; None: the layer is dense.
    """

    file: str
    whole: dict[str, Any]
    curve: Callable[[ComputedAttention, Tensor], Tensor]
    settings: Callable[[Tensor, float], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class LossCalibration:
    """Settings of each layer that change a model's prediction least at a mean density.

    Args:
        file: name of the file that a calibration writes.
        measure: a layer's record in plain values, from its number of heads and the loss of a Config in this layer.
        calls: losses that `measure` asks for, by the number of heads.
        choices: the Configs of a layer to choose from, with density and loss, from its record and number of heads.
            All layers have the same densities.
    """

    file: str
    measure: Callable[[int, Callable[[Any], float]], Any]
    calls: Callable[[int], int]
    choices: Callable[[Any, int], list[tuple[Any, float, float]]]


@dataclasses.dataclass(frozen=True)
class Method:
    """The declaration of an attention method.

    Args:
        name: lower case, the name of its file.
        config: frozen dataclass of its settings; the only place with defaults.
        plan: makes the plan for a grid and settings.
        summary: what it computes, in one line.
        source: its publication.
        good_for: when to choose it: the end of a sentence that begins with "Choose it for".
        module: the learned weights of a layer; None if no setting has any.
        objectives: training objectives of its own.
        calibration: how `dit-accel tune --calibrate` finds settings of each layer; None: it does not.
        needs_training: whether a model has to be fine-tuned with it.
        experimental: whether it may change or go.
        at_density: settings that keep about a given share of all pairs of a grid, text included, for benchmarks; None
            without such a rule.
        sparsest: the share of the visual pairs that every setting keeps on a grid; 1: all, or not for such grids.
        note: what every report says of it.
    """

    name: str
    config: type[MethodConfig]
    plan: Callable[[TokenGrid, Any], Plan]
    summary: str
    source: str
    good_for: str
    module: LearnedModule | None = None
    objectives: tuple[Objective, ...] = ()
    calibration: RecallCalibration | LossCalibration | None = None
    needs_training: bool = False
    experimental: bool = False
    at_density: Callable[[TokenGrid, float], dict[str, Any]] | None = None
    sparsest: Callable[[TokenGrid], float] = lambda grid: 0.0
    note: str | None = None

    @property
    def advice(self) -> str:
        """`good_for`, and whether the method is experimental or needs fine-tuning."""
        marks = ["experimental"] * self.experimental + ["fine-tune"] * self.needs_training
        return f"{self.good_for} ({', '.join(marks)})" if marks else self.good_for

    def learned(self, config: Any) -> LearnedModule | None:
        """The weights that these settings learn; None without any."""
        module = self.module
        return None if module is None or (module.when is not None and not module.when(config)) else module

    def choose_trained(self, module: nn.Module, objectives: Collection[str], *, with_model: bool) -> None:
        """Set which of a layer's learned weights get gradients: those of `objectives`, and others if the model's do."""
        module.requires_grad_(with_model)
        for objective in self.objectives:
            part = objective.part(module)
            if part is not None:
                part.requires_grad_(objective.name in objectives or (with_model and not objective.exclusive))
