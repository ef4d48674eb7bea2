"""Run a model's own attention processor with only its attention call replaced.

A processor's projections, norms, rotary embedding and output stay the model's code: its `__call__` is rebuilt over a
copy of its globals in which the attention function is ours. What Dynamo needs of this arrangement:

* the copied globals belong to a module in `sys.modules`, where guards look them up; there is one for the code of each
  processor class, kept for the process, and it holds no accelerator: a compiled model would keep the first one's plan
  for good;
* so the replaced function finds plan and weights through a slot, one per thread, that the wrapper fills from itself;
* nothing is counted in traced code. `ran` is only ever set there, which adds no guard and no graph.

Where a model's processor itself wastes memory or time on masks, its family's file has a function that computes the same
without, for sparse calls only (`Family.sparse_calls`); it ends in `attend`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import threading
import types
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.kernels.impls import Impl
from dit_accel.pipelines.context_parallel import Ulysses
from dit_accel.plans.plan import Plan

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, "float | None", "CallState"], None]
# Called with a processor and then as the processor is: computes what it does, with its attention through `attend`.
SparseCall = Callable[..., Any]

_SERIAL = itertools.count()
_WRAPPERS: dict[tuple[type, Callable[..., Any], SparseCall | None], type[AcceleratedAttnProcessor]] = {}


class CallState:
    """What the root hook decided for the call under way. One per transformer; traced code only reads it.

    Attributes:
        sparse: whether `plan` computes this call; otherwise the model's own processor does.
        plan: of the call's grid.
        text_lens, text_bias: as in `family.CallLayout`.
        rows: int64 [B, tokens], where in the sequence each token of the grid lies, and the reverse; or None, where the
            sequence is in the grid's order.
        ulysses: how several processes share the call's sequence; None if this one holds it all.
        impl: the implementation that computes the call; as in `plans.attention`.
        text_is_keys: as in `family.Family`.
        learned: attribute of the attention modules that holds the method's learned weights; None if it has none.
    """

    def __init__(self, impl: Impl = "auto", text_is_keys: bool = False, learned: str | None = None) -> None:
        self.sparse, self.text_is_keys, self.learned = False, text_is_keys, learned
        self.plan: Plan | None = None
        self.text_lens: torch.Tensor | None = None
        self.text_bias: torch.Tensor | None = None
        self.rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.ulysses: Ulysses | None = None
        self.impl = impl

    def set(
        self,
        plan: Plan,
        text_lens: torch.Tensor | None = None,
        text_bias: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        ulysses: Ulysses | None = None,
    ) -> None:
        """Let `plan` compute the call under way; lengths, bias and rows as in `family.CallLayout`."""
        self.plan, self.text_lens, self.text_bias, self.ulysses = plan, text_lens, text_bias, ulysses
        self.sparse = True
        self.rows = None if rows is None else (rows, rows.argsort(-1))

    def text_of(self, samples: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Lengths and bias for an attention call of so many samples.

        FasterCache leaves out the first half of a batch, behind the hook that reads the transformer's call.
        """
        lens, bias = self.text_lens, self.text_bias
        return None if lens is None else _of_last(lens, samples), None if bias is None else _of_last(bias, samples)

    @property
    def tokens(self) -> int:
        """Tokens that an attention call has in this process."""
        if self.ulysses is not None:
            return self.ulysses.tokens[self.ulysses.rank]
        return 0 if self.plan is None else self.plan.grid.tokens

    @property
    def missing(self) -> int:
        """Tokens that are no queries."""
        return self.plan.grid.text if self.text_is_keys and self.plan is not None else 0


class AcceleratedAttnProcessor:
    """The processor of an accelerated attention module; see `wrap_processor`.

    Attributes:
        inner: the model's own processor.
        state: shared by the layers of a transformer.
        ran: set by every call; whoever counts resets it.
        watch: called with q, k, v, out (the whole sequence), scale and state after sparse attention, before the call is
            over: when it gives the layer a dense state, the layer's call is computed densely instead. Never traced.
    """

    def __init__(self, inner: Any, state: CallState) -> None:
        self.inner, self.state = inner, state
        self.ran = False
        self.watch: Watch | None = None

    # Diffusers finds processors by these two names: without them it would skip ours when it sets a back end, and
    # shard the sequence without telling us. A processor that lacks one makes ours lack it too.
    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.inner._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.inner._parallel_config = value


class _Slot(threading.local):
    def __init__(self) -> None:
        self.state: CallState | None = None
        self.learned: nn.Module | None = None
        self.watch: Watch | None = None
        self.replaced = self.others = 0


_SLOT = _Slot()


def wrap_processor(
    inner: Any, state: CallState, sparse_calls: Mapping[str, SparseCall] = MappingProxyType({})
) -> AcceleratedAttnProcessor:
    """A processor that does as `inner` does, with sparse attention whenever `state` says so.

    Args:
        inner: the model's own processor.
        state: of the transformer's calls.
        sparse_calls: by processor class, what runs in its place in sparse calls; the others' own code is rebuilt.

    Raises:
        DitAccelError: `inner` cannot be rebuilt: it is no Python code, holds weights, or calls no attention we know.
    """
    if isinstance(inner, nn.Module):
        raise DitAccelError(
            f"{type(inner).__name__} holds weights of its own (an IP-Adapter, for example), which cannot be combined "
            "with accelerated attention; unload it first."
        )
    sparse_call = sparse_calls.get(type(inner).__name__)
    kind = type(inner), type(inner).__call__, sparse_call  # a class's code may be patched between two accelerators
    if kind not in _WRAPPERS:
        _WRAPPERS[kind] = _wrapper_class(type(inner), sparse_call)
    return _WRAPPERS[kind](inner, state)


def _wrapper_class(inner_type: type, sparse_call: SparseCall | None) -> type[AcceleratedAttnProcessor]:
    sparse = sparse_call or _rebuild(inner_type)

    # Legacy `Attention.forward` passes only the keywords that the signature names, so it is carried over.
    @functools.wraps(inner_type.__call__)
    def __call__(self: AcceleratedAttnProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.state.sparse:
            self.ran = True
            return self.inner(attn, *args, **kwargs)
        learned = self.state.learned
        _SLOT.learned = None if learned is None else getattr(attn, learned)
        _SLOT.state, _SLOT.watch = self.state, self.watch
        _SLOT.replaced = _SLOT.others = 0
        try:
            result = sparse(self.inner, attn, *args, **kwargs)
            # No attention at all is the model's own doing: LTX-2's perturbed layers take the values instead.
            if _SLOT.replaced + _SLOT.others > 0:
                self.ran = True
                if _SLOT.replaced != 1:
                    raise _sequence_error(self.state, _SLOT.replaced)
        finally:
            _SLOT.state = _SLOT.learned = _SLOT.watch = None
        if not self.state.sparse:
            return self.inner(attn, *args, **kwargs)
        return result

    return type(f"Accelerated{inner_type.__name__}", (AcceleratedAttnProcessor,), {"__call__": __call__})


def _rebuild(inner_type: type) -> Callable[..., Any]:
    """`inner_type.__call__` over a copy of its globals in which attention is ours."""
    call = inspect.unwrap(inner_type.__call__)
    if not isinstance(call, types.FunctionType):
        raise DitAccelError(f"{inner_type.__name__} is not a processor written in Python, so it cannot be accelerated.")
    replaced: dict[str, Any] = {}
    if "dispatch_attention_fn" in call.__code__.co_names:
        replaced["dispatch_attention_fn"] = _dispatcher(call.__globals__["dispatch_attention_fn"])
    if "scaled_dot_product_attention" in call.__code__.co_names and "F" in call.__globals__:
        replaced["F"] = _functional(call.__globals__["F"])
    if not replaced:
        raise DitAccelError(
            f"{inner_type.__name__} calls neither dispatch_attention_fn nor F.scaled_dot_product_attention, so there "
            "is no attention to replace; set a processor that does, or remove it."
        )
    name = f"dit_accel._rebuilt.{inner_type.__module__}.{inner_type.__qualname__}.{next(_SERIAL)}"
    module = _module(name, call.__globals__, replaced)
    rebuilt = types.FunctionType(call.__code__, vars(module), call.__name__, call.__defaults__, call.__closure__)
    rebuilt.__kwdefaults__ = call.__kwdefaults__
    rebuilt.__module__ = name
    return rebuilt


def _module(name: str, contents: dict[str, Any], replaced: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update({**contents, **replaced, "__name__": name})
    sys.modules[name] = module
    return module


def _dispatcher(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Ours in place of Diffusers' `dispatch_attention_fn`: tensors are [B, N, H, D]."""

    @functools.wraps(original)
    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not _is_ours(query.shape[1], key.shape[1]):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, *args, **kwargs)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _attend(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)

    return dispatch_attention_fn


def _functional(original: types.ModuleType) -> types.ModuleType:
    """A copy of `torch.nn.functional` with our attention: tensors are [B, H, N, D]."""

    @functools.wraps(original.scaled_dot_product_attention)
    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not _is_ours(query.shape[2], key.shape[2]):
            dense = original.scaled_dot_product_attention
            return dense(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)

    name = f"dit_accel._rebuilt.functional.{next(_SERIAL)}"
    return _module(name, vars(original), {"scaled_dot_product_attention": scaled_dot_product_attention})


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The plan's attention in a family's own sparse call: [B, H, N, D] in and out, N the tokens of the grid.

    Padded text is never a key (`CallLayout.text_lens`), so there is no mask to pass.

    Raises:
        DitAccelError: q and k are no self-attention over the grid.
    """
    state = _SLOT.state
    assert state is not None
    if not _is_ours(q.shape[2], k.shape[2]):
        raise _sequence_error(state, 0)
    return _attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)


def _is_ours(queries: int, keys: int) -> bool:
    """Whether a call is self-attention over the grid, and not over image prompts or other tokens."""
    state = _SLOT.state
    if state is not None and keys == state.tokens and queries == keys - state.missing:
        return True
    _SLOT.others += 1
    return False


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """The plan's attention, [B, H, N, D]."""
    state = _SLOT.state
    assert state is not None and state.plan is not None
    if attn_mask is not None and state.text_lens is None:
        raise DitAccelError(
            f"The model passed an attention mask {tuple(attn_mask.shape)}, which {state.plan.method} cannot honour "
            "here; call it without one, or run it dense."
        )
    if is_causal or dropout_p or q.shape[1] != k.shape[1]:
        raise DitAccelError(
            "Accelerated attention is neither causal nor with dropout, and has as many key heads as query heads; got "
            f"is_causal={is_causal}, dropout_p={dropout_p}, {q.shape[1]} and {k.shape[1]} heads."
        )
    _SLOT.replaced += 1
    queries = slice(None)
    if state.missing:
        grid = state.plan.grid
        queries = slice(grid.text, None) if grid.text_first else slice(grid.tokens - grid.text)
        q = nn.functional.pad(q, (0, 0, grid.text, 0) if grid.text_first else (0, 0, 0, grid.text))
    heads, ulysses = q.shape[1], state.ulysses
    rows = None if state.rows is None else tuple(_of_last(each, len(q)) for each in state.rows)
    if ulysses is not None:
        q, k, v = ulysses.gather(q, k, v)
    if rows is not None:
        q, k, v = (_take(x, rows[0]) for x in (q, k, v))
    text_lens, text_bias = state.text_of(len(q))
    out = state.plan.attend(
        q, k, v, scale=scale, text_lens=text_lens, text_bias=text_bias, impl=state.impl, module=_SLOT.learned
    )
    if _SLOT.watch is not None:
        _SLOT.watch(q, k, v, out, scale, state)
    if rows is not None:
        out = _take(out, rows[1])
    return (out if ulysses is None else ulysses.scatter(out, heads))[:, :, queries]


def _of_last(x: torch.Tensor, samples: int) -> torch.Tensor:
    return x[samples:] if len(x) == 2 * samples else x


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens in another order: row `rows[b, n]` of sample b as its row n; x [B, H, N, D], rows [B, N]."""
    return x.take_along_dim(rows[:, None, :, None], 2)


def _sequence_error(state: CallState, calls: int) -> DitAccelError:
    where = "" if state.ulysses is None else f", {state.tokens} tokens of it in this process"
    return DitAccelError(
        f"The grid of this transformer call is {None if state.plan is None else state.plan.grid}{where}, and {calls} "
        "attention calls of one layer had that many tokens instead of 1; run the whole transformer, or leave this "
        "layer dense."
    )
