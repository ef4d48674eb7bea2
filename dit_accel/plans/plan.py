"""Plans: what a method does on one token grid, worked out once and then run many times."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import check_kinds
from dit_accel.kernels.block_sparse.geometry import BlockLists
from dit_accel.kernels.block_sparse.reference import masked_attention
from dit_accel.kernels.impls import AUTO, Impl
from dit_accel.plans.blocks import BlockMask
from dit_accel.plans.choices import Kernels
from dit_accel.plans.memory import ListMemory
from dit_accel.plans.sampled import SampledQueries
from dit_accel.tokens import TokenGrid

if TYPE_CHECKING:
    from PIL.Image import Image

Order = Literal["raster", "tile"]
Result = TypeVar("Result")
BLOCK_Q, BLOCK_K = 128, 64
PICTURE_LIMIT = 256_000  # of tokens: 4,000 blocks of 64 keys


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Makes ordinary CPU tensors, which training may save, whatever inference mode and default device are set."""
    # a device context costs a Python call at every operation, and planning has thousands: only where it is needed
    device = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), device:
        yield


def per_device(make: Callable[[Any, torch.device], Result]) -> Callable[[Any, torch.device], Result]:
    """Makes a plan's method, which builds tensors for a device, build them once."""

    @functools.wraps(make)
    def built(plan: Plan, device: torch.device) -> Result:
        key = make.__name__, device
        if key not in plan.built:
            with building():
                plan.built[key] = make(plan, device)
        return plan.built[key]

    return built


class PlanArguments(NamedTuple):
    """Arguments of `Plan.attend` besides q, k and v; `scale`, `text_lens` and `impl` are as in `attention`.

    text_bias: floating point [B, N], added to every query's scaled logits. Text behind `text_lens` then stays a key.
    module: a layer's learned weights.
    density_sum: float32 [2] on the device of q. A routed plan adds its density and 1 without waiting for the device.
    heads: which head of its layer q starts with, and how many the layer has; None: q holds all.
    memory: what the layer's calls share between denoising steps; None outside of a model.
    values: v in the order of q and k, for plans whose lists depend on it; plans with a tail set it.
    gate: [B, H, N, D], what `module` makes of the layer's hidden states; None unless it reads them.
    segments: start and stop of the runs of one kind of token around the visual ones, such as text and sound; empty:
        text and conditioning are one run each.
    head_pairs: float32 [H] on the device of q. A plan whose heads differ writes the visual pairs that each keeps, as a
        mean over samples, without waiting for the device.
    arranged: q, k, v and gate have their visual tokens along the plan's curve already, and so will the output.
    """

    scale: float | None = None
    text_lens: torch.Tensor | None = None
    text_bias: torch.Tensor | None = None
    impl: Impl = AUTO
    module: nn.Module | None = None
    density_sum: torch.Tensor | None = None
    heads: tuple[int, int] | None = None
    memory: ListMemory | None = None
    values: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    segments: tuple[tuple[int, int], ...] = ()
    head_pairs: torch.Tensor | None = None
    arranged: bool = False


class Plan(Kernels):
    """A method by its registered name, its settings, and the grid of the sequence that calls will have.

    Attributes:
        head_share: the share of the heads that attend; the plan's blocks are those of such a head.
        built: what was built at the first call and serves the next ones.
    """

    head_share = 1.0

    def __init__(self, method: str, config: Any, grid: TokenGrid) -> None:
        self.method, self.config, self.grid = method, config, grid
        self.built: dict[Any, Any] = {}

    @property
    def heads_differ(self) -> bool:
        """Whether heads keep different numbers of pairs, and may change places: no setting or memory is of one head."""
        return False

    @property
    def needs_whole(self) -> str | None:
        """Why a process needs the whole sequence; None if it can attend with some queries to some keys at a time."""
        return "it chooses keys of the whole sequence in each call"

    @property
    @abc.abstractmethod
    def pairs(self) -> int | None:
        """Number of attended (query, key) pairs, text included. A routed plan has an upper bound or None."""

    @property
    def density(self) -> float | None:
        """`pairs` over all pairs of tokens; None without `pairs`."""
        pairs = self.pairs
        return None if pairs is None else pairs / self.grid.tokens**2

    def block_mask(self, *args: Any, **kwargs: Any) -> BlockMask:
        """The blocks a kernel visits; see `static.MaskPlan.block_mask`."""
        raise self._routes("block mask")

    def _routes(self, mask: str) -> DitAccelError:
        return DitAccelError(
            f"{self.method} has no {mask} that is known before the call: it routes by content. route(q, k) returns the "
            "blocks of one call."
        )

    def route(self, q: torch.Tensor, k: torch.Tensor, **call: Any) -> BlockLists | None:
        """What a call with these queries and keys lists; None if the plan does not look at them."""
        return None

    @abc.abstractmethod
    def kept_keys(self, queries: torch.Tensor, lists: BlockLists | None = None, head: int = 0) -> torch.Tensor:
        """The keys that some visual queries attend to exactly, in one head: bool [S, tokens] in model order.

        Args:
            queries: int64 [S], indices of visual tokens.
            lists: from `route`, of one sample; None if the plan is static.
        """

    def token_mask(self) -> torch.Tensor:
        """Which token sees which: bool [tokens, tokens] in model order.

        Raises:
            DitAccelError: the method routes by content, or the sequence is longer than 20,000 tokens.
        """
        raise self._routes("token mask")

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any) -> torch.Tensor:
        """The method's attention on this grid: `attention` without its checks; `call` has fields of `PlanArguments`."""
        return self.run(q, k, v, PlanArguments(**call))

    @abc.abstractmethod
    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: PlanArguments) -> torch.Tensor:
        """What a method implements: q, k, v and the output as in `attention`."""

    def reference(
        self, call: SampledQueries, head: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        """The result of one head for some queries by plain PyTorch, [S, D], in the dtype of q; differentiable.

        It is softmax over the keys that the plan keeps; a plan with another result overrides it.

        Args:
            q, k, v: the queries of `call` alone [S, D]; all keys and values [N, D].
            weights: the parameters of the layer's module.
        """
        return masked_attention(q, k, v, call.seen(head))

    def single_keys(self, call: SampledQueries, head: int) -> torch.Tensor | None:
        """Keys that the queries of `call` attend to exactly besides `kept_keys`: bool [S, tokens]; None without any."""
        return None

    def misrouted(self, call: SampledQueries) -> str | None:
        """What is wrong with the blocks that a call lists; None if they are right."""
        return None

    @abc.abstractmethod
    def prepare(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl = AUTO, *, learned: bool = False
    ) -> tuple[str, str]:
        """Choose who computes `attend` for such tensors, and build what it needs. A traced call cannot do this.

        Args:
            learned: `attend` will get a module with learned weights.

        Returns:
            The implementation's name, which `attend` then gets as `impl`, and the reason, fit for a report.

        Raises:
            DitAccelError: a named implementation cannot compute it.
        """

    @building()
    def image(self) -> Image:
        """Picture of the block mask, queries down and keys across: full blocks dark, partial ones lighter.

        Raises:
            DitAccelError: the grid has more than 256,000 tokens.
        """
        from PIL import Image

        if self.grid.tokens > PICTURE_LIMIT:
            raise DitAccelError(
                f"A picture has a pixel a block and is drawn for at most {PICTURE_LIMIT:,} tokens, got "
                f"{self.grid.tokens:,}. Draw a smaller grid."
            )
        mask = self.block_mask()
        partial = mask.lists().map(mask.partial, mask.key_order.blocks)
        palette = torch.tensor([[250, 250, 250], [23, 63, 122], [120, 170, 220]], dtype=torch.uint8)
        picture = Image.fromarray(palette[mask.dense().long() + partial.long()].numpy())
        enlarge = max(1, 512 // max(picture.size))
        return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    scale: float | None = None,
    text_lens: torch.Tensor | None = None,
    impl: Impl = AUTO,
) -> torch.Tensor:
    """Attention as `plan` says, differentiable in q, k and v.

    Args:
        q, k, v: [B, H, N, D] with N = plan.grid.tokens, floating point, any strides. Grouped heads are refused.
        plan: from `plan`.
        scale: factor of the logits; D ** -0.5 if None.
        text_lens: int [B], valid text tokens of each sample; text behind them is never a key. None: all of them.
        impl: "auto", or the name of an implementation, which runs or raises.

    Returns:
        [B, H, N, D] in the dtype of q. Its memory is [B, N, H, D], as models flatten it, unless PyTorch's own attention
        computes whole heads (`dense`, `heads`, `moh`).

    Raises:
        DitAccelError: shapes, dtypes or devices do not fit the plan or each other, a tensor is empty, or `impl` cannot
            run here.
    """
    if not isinstance(plan, Plan):
        raise DitAccelError(f"attention takes a plan, which plan(method, grid) makes; got {plan!r}.")
    if not all(isinstance(tensor, torch.Tensor) for tensor in (q, k, v)):
        raise DitAccelError(f"q, k and v are tensors; got {', '.join(type(x).__name__ for x in (q, k, v))}.")
    if q.ndim != 4 or q.shape[2] != plan.grid.tokens or not q.shape == k.shape == v.shape or not q.numel():
        raise DitAccelError(
            f"q, k and v must be [batch, heads, {plan.grid.tokens}, head_dim] for the grid {plan.grid}, all of one "
            f"shape and none of them empty; got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}. Repeat the "
            "keys and values of grouped heads: k.repeat_interleave(n, 1)."
        )
    if not torch.is_autocast_enabled(q.device.type):  # which casts them to one dtype
        check_kinds(q, k, v)
    if text_lens is not None and (
        not isinstance(text_lens, torch.Tensor) or text_lens.is_floating_point() or text_lens.dtype == torch.bool
    ):
        kind = getattr(text_lens, "dtype", type(text_lens).__name__)
        raise DitAccelError(f"text_lens are numbers of tokens, as a tensor of integers; got {kind}.")
    return plan.attend(q, k, v, scale=scale, text_lens=text_lens, impl=impl)


def among_others(visual: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Kept visual keys [S, visual] with text and conditioning keys, which are always kept: bool [S, tokens]."""
    attended = torch.ones(len(visual), grid.tokens, dtype=torch.bool, device=visual.device)
    attended[:, grid.visual_rows] = visual
    return attended
