"""Run a model's own attention processor with its attention call replaced.

A processor's projections, norms, rotary embedding and output stay the model's code: its `__call__` is rebuilt over a
copy of its globals in which the attention function is ours. Dynamo requires three things of this arrangement:

* The copied globals belong to a module in `sys.modules`, where guards look them up. There is one module for the code of
  each processor class. It is kept for the process and holds no accelerator: a compiled model would keep the first one.
* The replaced function finds its layer through a slot, one per thread, which the wrapper sets from `self`.
* Traced code counts nothing. It only sets `ran`, which adds no guard and no graph.

Where a model's processor wastes memory or time on masks, its family's file has a function that computes the same
without masks, for sparse calls only (`Family.sparse_calls`); it calls `attend`.
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
from dit_accel.pipelines.attention import CallState, LayerAttention

# Replaces a processor's `__call__` in sparse calls; takes the processor first, and calls `attend`.
SparseCall = Callable[..., Any]

_SERIAL = itertools.count()
_WRAPPERS: dict[tuple[type, Callable[..., Any], SparseCall | None], type[AcceleratedAttnProcessor]] = {}


class AcceleratedAttnProcessor(LayerAttention):
    """The processor of an accelerated attention module; see `wrap_processor`.

    Attributes:
        inner: the model's own processor.
        ran: set by every call; whoever counts resets it.
        intercepted: set by a call whose attention a function mode replaced (perturbed-attention guidance).
        unbound: made without arguments, as Diffusers does from a processor's class; it stays dense.

    A processor with weights (an IP-Adapter's) is a module. Then ours is one too, of a subclass: it shares the weights,
    so that state dicts and devices stay as they are, and has its settings until `settle`.

    When `watch` gives the layer a dense state, the call under way is computed again densely.
    """

    inner: Any
    inner_type: type

    def __init__(self, inner: Any = None, state: CallState | None = None) -> None:
        own = vars(inner) if isinstance(inner, nn.Module) else {}
        vars(self).update(own)
        LayerAttention.__init__(self, CallState() if state is None else state)
        self.unbound = inner is None
        vars(self)["inner"] = self.inner_type() if inner is None else inner
        self.ran = self.intercepted = False

    def settle(self) -> None:
        """Give the settings of a processor with weights back to the model's own."""
        if isinstance(self.inner, nn.Module):
            # What is a property here was set on the model's own processor already.
            settings = [name for name in vars(self.inner) if name in vars(self)]
            vars(self.inner).update({name: vars(self)[name] for name in settings})

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
    """The layer whose processor runs, and its attention calls: over the grid, computed by the plan, and others."""

    def __init__(self) -> None:
        self.layer: AcceleratedAttnProcessor | None = None
        self.replaced = self.planned = self.others = 0


_SLOT = _Slot()


def wrap_processor(
    inner: Any, state: CallState, sparse_calls: Mapping[str, SparseCall] = MappingProxyType({})
) -> AcceleratedAttnProcessor:
    """A processor that runs `inner`, with sparse attention whenever `state` is sparse.

    Args:
        inner: the model's own processor.
        state: of the transformer's calls.
        sparse_calls: by processor class, a function that replaces its `__call__` in sparse calls; the code of other
            classes is rebuilt.

    Raises:
        DitAccelError: `inner` cannot be rebuilt: it is no Python code, or calls no known attention.
    """
    sparse_call = sparse_calls.get(type(inner).__name__)
    kind = type(inner), type(inner).__call__, sparse_call  # a class's code may be patched between two accelerators
    if kind not in _WRAPPERS:
        _WRAPPERS[kind] = _wrapper_class(type(inner), sparse_call)
    _register(_WRAPPERS[kind], type(inner))
    return _WRAPPERS[kind](inner, state)


def _register(ours: type, inner: type) -> None:
    """Enter our class in Diffusers' registry as the inner class is: layer skipping and guiders look there."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(inner)
    except ValueError:  # the model itself cannot skip attention
        return
    AttentionProcessorRegistry.register(ours, metadata)


def _wrapper_class(inner_type: type, sparse_call: SparseCall | None) -> type[AcceleratedAttnProcessor]:
    sparse = sparse_call or _rebuild(inner_type)
    with_weights = issubclass(inner_type, nn.Module)

    def runs(ours: AcceleratedAttnProcessor) -> Any:
        """Whose settings and weights count."""
        return ours if with_weights else ours.inner

    # Legacy `Attention.forward` passes only the keywords that the signature names, so it is carried over.
    @functools.wraps(inner_type.__call__)
    def __call__(self: AcceleratedAttnProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.state.sparse:
            self.ran = True
            return inner_type.__call__(runs(self), attn, *args, **kwargs)
        _SLOT.layer = self
        _SLOT.replaced = _SLOT.planned = _SLOT.others = 0
        try:
            result = sparse(runs(self), attn, *args, **kwargs)
            # A model may skip attention itself: LTX-2's perturbed layers use the values instead.
            if _SLOT.replaced + _SLOT.others > 0:
                self.ran, self.intercepted = True, _SLOT.planned == 0
                if _SLOT.replaced != 1:
                    raise self.state.sequence_error(_SLOT.replaced)
        finally:
            _SLOT.layer = None
        if not self.state.sparse:
            return inner_type.__call__(runs(self), attn, *args, **kwargs)
        return result

    bases = (AcceleratedAttnProcessor, inner_type) if with_weights else (AcceleratedAttnProcessor,)
    return type(f"Accelerated{inner_type.__name__}", bases, {"__call__": __call__, "inner_type": inner_type})


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
    layer = _SLOT.layer
    assert layer is not None
    if not _is_ours(q.shape[2], k.shape[2]):
        raise layer.state.sequence_error(0)
    return _attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)


def _is_ours(queries: int, keys: int) -> bool:
    """Whether a call is self-attention over the grid, rather than over image prompts or other tokens."""
    layer = _SLOT.layer
    if layer is not None and layer.state.covers(queries, keys):
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
    """The plan's attention, [B, H, N, D], below the function modes that are active."""
    _SLOT.replaced += 1
    # Non-strict export runs below a function mode of its own, with tensors that cannot be made a subclass.
    if torch._C._len_torch_function_stack() == 0 or torch.compiler.is_exporting():
        return _planned(q, k, v, attn_mask, dropout_p, is_causal, scale)
    query = q.as_subclass(_Query)
    return nn.functional.scaled_dot_product_attention(query, k, v, attn_mask, dropout_p, is_causal, scale=scale)


class _Query(torch.Tensor):
    """A query whose `F.scaled_dot_product_attention` is the plan's.

    Function modes see the call first, as they see a dense one: Diffusers' layer skipping and perturbed-attention
    guidance replace its result. The call that a mode passes on arrives here.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return _planned(*args, **(kwargs or {}))


def _planned(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    if is_causal or dropout_p or query.shape[1] != key.shape[1]:
        raise DitAccelError(
            "Accelerated attention is neither causal nor with dropout, and has as many key heads as query heads; got "
            f"is_causal={is_causal}, dropout_p={dropout_p}, {query.shape[1]} and {key.shape[1]} heads."
        )
    layer = _SLOT.layer
    assert layer is not None
    _SLOT.planned += 1
    return layer.attend(query, key, value, scale, attn_mask is not None)
