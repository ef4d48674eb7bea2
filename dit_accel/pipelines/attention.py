"""Attention as a plan computes it: the decision for the call under way, and its computation in one layer.

A compiled model sees one opaque operator, `dit_accel::planned_attention`. Traced code passes q, k, v, the layer's
learned weights and the layer's key, a tensor whose value no guard reads. The operator finds plan, text lengths and
processes by that key. So a graph serves every grid, and every setting of a method; the sizes in it are symbolic. Which
layers are dense, where runs along a curve begin and end, and learned weights are in the graph: others make another.

The operator's backward needs the tensors that the plan's own kernels save, whose number and shapes depend on the plan.
So the forward records an autograd graph of its own and returns a ticket for it. The record lives as long as the
ticket's memory, which the compiled backward keeps.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse.api import in_autocast_dtype
from dit_accel.kernels.impls import Impl
from dit_accel.pipelines.context_parallel import Ulysses
from dit_accel.plans.head_balance import dealt
from dit_accel.plans.memory import ListMemory
from dit_accel.plans.plan import Plan, PlanArguments, building

Watch = Callable[[Tensor, Tensor, Tensor, Tensor, "float | None", "CallState"], None]

_NUMBERS = itertools.count(1)
_LAYERS: weakref.WeakValueDictionary[int, LayerAttention] = weakref.WeakValueDictionary()
_RECORDS: dict[int, tuple[Tensor, list[Tensor]]] = {}  # by ticket: an output with its graph, and its inputs


class CallState:
    """The decision for the transformer call under way, shared by layers with the same settings.

    Attributes:
        sparse: whether `plan` computes this call; otherwise the model's own processor does.
        dense: `plan` keeps every pair, in place of the model's own processor.
        plan: of the call's grid.
        text_lens, text_bias: as in `family.CallLayout`.
        segments: as in `family.CallLayout`.
        rows: `family.CallLayout.rows` and its inverse permutation; None if the sequence is in the grid's order.
        ulysses: how the sequence is sharded; None if this process holds all of it.
        impl: the implementation that computes the call; as in `plans.attention`.
        step: denoising step, number of the call within it, and whether it is the last, for methods that keep something
            between steps; else None.
        text_is_keys: as in `family.Family`.
    """

    def __init__(self, impl: Impl = "auto", text_is_keys: bool = False) -> None:
        self.sparse, self.dense, self.text_is_keys = False, False, text_is_keys
        self.plan: Plan | None = None
        self.text_lens: Tensor | None = None
        self.text_bias: Tensor | None = None
        self.segments: tuple[tuple[int, int], ...] = ()
        self.rows: tuple[Tensor, Tensor] | None = None
        self.ulysses: Ulysses | None = None
        self.step: tuple[int, int, bool] | None = None
        self.impl = impl

    def set(
        self,
        plan: Plan,
        text_lens: Tensor | None = None,
        text_bias: Tensor | None = None,
        rows: Tensor | None = None,
        segments: tuple[tuple[int, int], ...] = (),
        ulysses: Ulysses | None = None,
        dense: bool = False,
    ) -> None:
        """Let `plan` compute the call under way; lengths, bias, rows and segments as in `family.CallLayout`."""
        self.plan, self.text_lens, self.text_bias, self.ulysses = plan, text_lens, text_bias, ulysses
        self.sparse, self.dense, self.segments = True, dense, segments
        self.rows = None if rows is None else (rows, rows.argsort(-1))

    def end(self) -> None:
        """No plan computes calls from now on, and nothing of the last call is held."""
        self.sparse = self.dense = False
        self.plan = self.text_lens = self.text_bias = self.rows = self.ulysses = self.step = None
        self.segments = ()

    def text_of(self, samples: int) -> tuple[Tensor | None, Tensor | None]:
        """Lengths and bias for an attention call of that many samples.

        FasterCache drops the first half of a batch after the hook has read the transformer's call.
        """
        lens, bias = self.text_lens, self.text_bias
        return None if lens is None else _of_last(lens, samples), None if bias is None else _of_last(bias, samples)

    @property
    def tokens(self) -> int:
        """Tokens of an attention call in this process."""
        if self.ulysses is not None:
            return self.ulysses.tokens[self.ulysses.rank]
        return 0 if self.plan is None else self.plan.grid.tokens

    @property
    def missing(self) -> int:
        """Tokens that are keys but not queries."""
        return self.plan.grid.text if self.text_is_keys and self.plan is not None else 0

    def covers(self, queries: int, keys: int) -> bool:
        """Whether a call of these lengths is self-attention over the grid.

        Traced code must not read the grid, so any self-attention passes there. At run time a call that is not over the
        grid raises `sequence_error`.
        """
        if torch.compiler.is_compiling():
            return queries <= keys if self.text_is_keys else queries == keys
        return keys == self.tokens and queries == keys - self.missing

    def sequence_error(self, calls: int) -> DitAccelError:
        """The error about a layer with `calls` attention calls over the grid, which is not one."""
        where = "" if self.ulysses is None else f", {self.tokens} tokens of it in this process"
        return DitAccelError(
            f"The grid of this transformer call is {None if self.plan is None else self.plan.grid}{where}, and {calls} "
            "attention calls of one layer had that many tokens instead of 1; run the whole transformer, or leave this "
            "layer dense."
        )


class AtWork:
    """A part of an accelerator: copied with its transformer, and never pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DitAccelError(
            "An accelerated transformer cannot be pickled (torch.save): call remove() first, save its state_dict(), or "
            "use save_pretrained() of the model and of the accelerator."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


class LayerAttention(AtWork):
    """The attention of one layer.

    Attributes:
        state: decides the call under way.
        learned: the layer's learned weights; None without any.
        density_sum: as in `PlanArguments`; None if the plan is static.
        stored: what the layer keeps between steps, see `plans.memory`.
        head_pairs: the visual pairs that each head kept in the last call, float32 [H]; None unless processes share
            heads that differ. By them heads are given to processes in the next call.
        watch: called with q, k, v, out (the whole sequence), scale and state after sparse attention; never traced.
        arranged: the call's visual tokens are along the plan's curve, as in `PlanArguments`.
        key: int64 scalar on the CPU, by which `planned_attention` finds this object.
    """

    def __init__(self, state: CallState) -> None:
        self.state = state
        self.learned: nn.Module | None = None
        self.density_sum: Tensor | None = None
        self.stored: dict[int, Any] = {}
        self.head_pairs: Tensor | None = None
        self.watch: Watch | None = None
        self.arranged = False
        number = next(_NUMBERS)
        with building():
            self.key = torch.tensor(number)
        _LAYERS[number] = self

    @property
    def copied(self) -> bool:
        """Whether this is a copy, to which no `key` leads."""
        return _LAYERS.get(int(self.key)) is not self

    def take_learned(self, learned: nn.Module | None) -> None:
        """Set `learned`; not as a submodule where a subclass is an `nn.Module`."""
        vars(self)["learned"] = learned

    def gate_of(self, hidden: Tensor | None) -> Tensor | None:
        """What the learned weights make of the layer's hidden states [B, N, C]; None unless they read them."""
        learned: Any = self.learned
        return learned(hidden) if getattr(learned, "reads_hidden", False) else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, masked: bool, gate: Tensor | None = None
    ) -> Tensor:
        """The plan's attention: q [B, H, Nq, D], k and v [B, H, Nk, D] in the sequence's order; output as q.

        Args:
            q, k, v: Nq = Nk, or without text where text tokens are keys only.
            scale: factor of the logits; D ** -0.5 if None.
            masked: whether the model passed an attention mask.
            gate: [B, N, H * D], from `gate_of`.

        Raises:
            DitAccelError: the call is not over the grid, or has a mask that no text lengths stand for.
        """
        if not torch.compiler.is_compiling():
            return self.compute(q, k, v, scale, masked, self.arranged, gate)
        q, k, v = in_autocast_dtype(q, k, v)
        learned = [] if self.learned is None else list(self.learned.parameters())
        gates = [] if gate is None else [gate]
        record = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *gates, *learned))
        arranged = self.arranged and not torch.compiler.is_exporting()  # an exported graph has no runs along a curve
        out, _ = planned_attention(q, k, v, self.key, gates, learned, scale, masked, arranged, record)
        return out

    def compute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        masked: bool,
        arranged: bool,
        gate: Tensor | None = None,
    ) -> Tensor:
        """`attend`, never traced."""
        state = self.state
        assert state.plan is not None
        grid, missing = state.plan.grid, state.missing
        if k.shape[2] != state.tokens or q.shape[2] != state.tokens - missing:
            raise state.sequence_error(0)
        if masked and state.text_lens is None:
            raise DitAccelError(
                f"The model passed an attention mask, which {state.plan.method} cannot honour here; call it without "
                "one, or run it dense."
            )
        queries = slice(None)
        if missing:
            queries = slice(missing, None) if grid.text_first else slice(grid.tokens - missing)
            q = nn.functional.pad(q, (0, 0, missing, 0) if grid.text_first else (0, 0, 0, missing))
        heads, ulysses = q.shape[1], state.ulysses
        if gate is not None:
            if ulysses is not None or gate.shape[1] != k.shape[2]:
                raise DitAccelError(
                    f"A gate of hidden states needs those of all {k.shape[2]} tokens of the sequence in one process; "
                    f"{state.plan.method} got {gate.shape[1]}. Choose a gate of the queries, or leave the layer dense."
                )
            gate = gate.unflatten(-1, (heads, -1)).transpose(1, 2)
        rows = None if state.rows is None else tuple(_of_last(indices, len(q)) for indices in state.rows)
        order, pairs = None, None
        if ulysses is not None:
            balanced = self._balances(q)
            if balanced and self.head_pairs is not None and len(self.head_pairs) == heads:
                order = dealt(self.head_pairs.to(q.device), len(ulysses.tokens))
            q, k, v = ulysses.gather(q, k, v, order)
            pairs = q.new_zeros(q.shape[1], dtype=torch.float32) if balanced else None
        if rows is not None:
            q, k, v = (_take(x, rows[0]) for x in (q, k, v))
            gate = None if gate is None else _take(gate, rows[0])
        text_lens, text_bias = state.text_of(len(q))
        held = None if ulysses is None else (ulysses.first_head(heads), heads)
        memory = None if state.step is None else ListMemory(*state.step, self.stored)
        call = PlanArguments(
            scale=scale, text_lens=text_lens, text_bias=text_bias, impl=state.impl, module=self.learned,
            density_sum=self.density_sum, heads=held, memory=memory, gate=gate,
            segments=state.segments, head_pairs=pairs, arranged=arranged,
        )  # fmt: skip
        run = state.plan.run if ulysses is None else functools.partial(ulysses.attend, state.plan)
        out = run(q, k, v, call)
        if ulysses is not None and pairs is not None:
            self.head_pairs = ulysses.of_all_heads(pairs, heads, order)
        if self.watch is not None and not state.dense:
            self.watch(q, k, v, out, scale, state)
        if rows is not None:
            out = _take(out, rows[1])
        return (out if ulysses is None else ulysses.scatter(out, heads, order))[:, :, queries]

    def _balances(self, q: Tensor) -> bool:
        """Whether processes take heads by their pairs in the last call; alike on all of them.

        Gradients may compute a call anew when the last call is another.
        """
        plan = self.state.plan
        return plan is not None and plan.heads_differ and self.learned is None and not q.requires_grad


def _of_last(x: Tensor, samples: int) -> Tensor:
    return x[samples:] if len(x) == 2 * samples else x


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Row `rows[b, n]` of sample b as its row n; x [B, H, N, D], rows [B, N]."""
    return x.take_along_dim(rows[:, None, :, None], 2)


@torch.library.custom_op("dit_accel::planned_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    gates: list[Tensor],
    learned: list[Tensor],
    scale: float | None,
    masked: bool,
    arranged: bool,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """`LayerAttention.compute` of the layer with that key, as one operator.

    Args:
        q, k, v, scale, masked: as there.
        arranged: a constant of the graph, as is the order of the tokens that the graph computes.
        key: `LayerAttention.key`.
        gates: the gate, if there is one.
        learned: the parameters of the layer's learned weights; their gradients are returned for these inputs.
        record: whether a backward pass may follow.

    Returns:
        The output [B, H, Nq, D], whose memory is [B, Nq, H, D]; and the ticket for the backward pass, int64 [1].

    Raises:
        DitAccelError: as there, or the accelerator was removed.
    """
    layer = _LAYERS.get(int(key))
    if layer is None or layer.state.plan is None:
        raise DitAccelError("This compiled model was accelerated, and its accelerator is gone; compile it again.")
    if not record:
        ticket = torch.zeros(1, dtype=torch.int64, device="cpu")
        return _laid_out(layer.compute(q, k, v, scale, masked, arranged, *gates)), ticket
    # Clones: the compiled graph may reuse the memory of its own tensors before the backward pass.
    q, k, v, *gates = (x.detach().clone().requires_grad_() for x in (q, k, v, *gates))
    with _autograd(), torch.enable_grad():
        out = layer.compute(q, k, v, scale, masked, arranged, *gates)
    weights = [] if layer.learned is None else [x for x in layer.learned.parameters() if x.requires_grad]
    number = next(_NUMBERS)
    memory = np.array([number])
    _RECORDS[number] = out, [q, k, v, *gates, *weights]
    weakref.finalize(memory, _RECORDS.pop, number)
    return _laid_out(out.detach().clone()), torch.from_numpy(memory)


@planned_attention.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2), torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("dit_accel::planned_attention_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def planned_attention_backward(
    grad: Tensor, ticket: Tensor, gates: list[Tensor], learned: list[Tensor], keys: int
) -> list[Tensor]:
    """Gradients of `planned_attention` for q, k, v, `gates` and `learned`.

    Args:
        grad: of the output, [B, H, Nq, D].
        ticket: that `planned_attention` returned.
        gates, learned: as there.
        keys: Nk.
    """
    out, inputs = _RECORDS[int(ticket)]
    gradients = torch.autograd.grad(out, inputs, grad, retain_graph=True, allow_unused=True)
    grads = iter(torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in zip(inputs, gradients, strict=True))
    qkv = [_laid_out(next(grads)) for _ in range(3)]
    of_gates = [next(grads).contiguous() for _ in gates]
    rest = (next(grads).contiguous() if x.requires_grad else torch.zeros_like(x) for x in learned)
    return [*qkv, *of_gates, *rest]


@planned_attention_backward.register_fake
def _(grad: Tensor, ticket: Tensor, gates: list[Tensor], learned: list[Tensor], keys: int) -> list[Tensor]:
    batch, heads, queries, dim = grad.shape
    qkv = [grad.new_empty(batch, tokens, heads, dim).transpose(1, 2) for tokens in (queries, keys, keys)]
    return [*qkv, *(x.new_empty(x.shape) for x in (*gates, *learned))]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, k, _, _, gates, learned, *_ = inputs
    ctx.save_for_backward(output[1], *gates, *learned)
    ctx.keys, ctx.gates = k.shape[2], len(gates)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    ticket, *rest = ctx.saved_tensors
    gates, learned = rest[: ctx.gates], rest[ctx.gates :]
    q, k, v, *others = planned_attention_backward(grad, ticket, gates, learned, ctx.keys)
    return q, k, v, None, others[: ctx.gates], others[ctx.gates :], None, None, None, None


planned_attention.register_autograd(_differentiate, setup_context=_save)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, below which the dispatcher excludes it."""
    keys = torch._C.DispatchKey
    with contextlib.ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _laid_out(x: Tensor) -> Tensor:
    """x [B, H, N, D] with memory [B, N, H, D], as models reshape it for free."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
