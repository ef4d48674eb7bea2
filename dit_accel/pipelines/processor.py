"""Run a model's own attention processor with its attention call replaced.

A processor's projections, norms, rotary embedding and output stay the model's code. Its `__call__` is rebuilt over a
copy of its globals, in which the attention function is ours. Dynamo requires three things:

* The copied globals belong to a module in `sys.modules`, where guards look them up. There is one module for the code of
  each processor class. It is kept for the process and holds no accelerator: a compiled model would keep the first one.
* The replaced function finds its layer through a slot, one per thread, which the wrapper sets from `self`.
* Traced code counts nothing. It only sets `ran`, which adds no guard and no graph.

A model's processor may waste memory or time on masks. Its family then has a function that replaces it in sparse calls
(`Family.sparse_calls`) and computes the same without masks: it calls `attend`. `joint_call` makes one.
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


def _of_inner(name: str) -> property:
    """An attribute that is the model's own processor's."""
    return property(lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value))


class AcceleratedAttnProcessor(LayerAttention):
    """The processor of an accelerated attention module; see `wrap_processor`.

    Attributes:
        inner: the model's own processor.
        ran: set by every call; whoever counts resets it.
        intercepted: set by a call whose attention a function mode replaced (perturbed-attention guidance).
        unbound: made without arguments, as Diffusers does from a processor's class; it stays dense.
        dense_call: runs a dense call, which it gets with the arguments; None: it runs as it is. Never traced.

    A processor with weights (an IP-Adapter's) is a module. Then ours is one too, of a subclass. It shares the weights,
    so state dicts and devices stay the same. It has the processor's settings until `settle`.

    When `watch` gives the layer a dense state, the call under way is computed again densely.
    """

    inner: Any
    inner_type: type

    def __init__(self, inner: Any = None, state: CallState | None = None) -> None:
        settings = vars(inner) if isinstance(inner, nn.Module) else {}
        vars(self).update(settings)
        LayerAttention.__init__(self, CallState() if state is None else state)
        self.unbound = inner is None
        vars(self)["inner"] = self.inner_type() if inner is None else inner
        self.ran = self.intercepted = False
        self.dense_call: Callable[[Callable[[], Any], tuple[Any, ...]], Any] | None = None

    def settle(self) -> None:
        """Give the settings of a processor with weights back to the model's own."""
        if isinstance(self.inner, nn.Module):
            # properties of ours were set on the model's own processor already
            settings = [name for name in vars(self.inner) if name in vars(self)]
            vars(self.inner).update({name: vars(self)[name] for name in settings})

    # Diffusers finds processors by these two names, to set a back end and to shard the sequence. Ours lacks a name if
    # the model's processor lacks it.
    _attention_backend = _of_inner("_attention_backend")
    _parallel_config = _of_inner("_parallel_config")


class _Slot(threading.local):
    """The layer whose processor runs, its gate, and its attention calls: over the grid, by the plan, and others."""

    def __init__(self) -> None:
        self.layer: AcceleratedAttnProcessor | None = None
        self.gate: torch.Tensor | None = None
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
        """The object with the processor's settings and weights."""
        return ours if with_weights else ours.inner

    # Legacy `Attention.forward` passes only the keywords that the signature names, so it is carried over.
    @functools.wraps(inner_type.__call__)
    def __call__(self: AcceleratedAttnProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.state.sparse:
            self.ran = True
            if self.dense_call is None or torch.compiler.is_compiling():
                return inner_type.__call__(runs(self), attn, *args, **kwargs)
            dense = functools.partial(inner_type.__call__, runs(self), attn, *args, **kwargs)
            return self.dense_call(dense, (*args, *kwargs.values()))
        state = self.state
        _SLOT.layer, _SLOT.gate = self, self.gate_of(args[0] if args else kwargs.get("hidden_states"))
        _SLOT.replaced = _SLOT.planned = _SLOT.others = 0
        try:
            result = sparse(runs(self), attn, *args, **kwargs)
            # A model may skip attention itself: LTX-2's perturbed layers use the values instead.
            if _SLOT.replaced + _SLOT.others > 0:
                self.ran, self.intercepted = True, _SLOT.planned == 0
                if _SLOT.replaced != 1:
                    raise self.state.sequence_error(_SLOT.replaced)
        finally:
            _SLOT.layer = _SLOT.gate = None
        return result if self.state is state else __call__(self, attn, *args, **kwargs)

    bases = (AcceleratedAttnProcessor, inner_type) if with_weights else (AcceleratedAttnProcessor,)
    return type(f"Accelerated{inner_type.__name__}", bases, {"__call__": __call__, "inner_type": inner_type})


def _rebuild(inner_type: type) -> Callable[..., Any]:
    """`inner_type.__call__` over a copy of its globals in which attention is ours."""
    call = inspect.unwrap(inner_type.__call__)
    if not isinstance(call, types.FunctionType):
        raise DitAccelError(f"{inner_type.__name__} is not a processor written in Python, so it cannot be accelerated.")
    replaced: dict[str, Any] = {}
    if "dispatch_attention_fn" in call.__code__.co_names:
        replaced["dispatch_attention_fn"] = _replaced(call.__globals__["dispatch_attention_fn"], 1)
    if "scaled_dot_product_attention" in call.__code__.co_names and "F" in call.__globals__:
        functional = call.__globals__["F"]
        name = f"dit_accel._rebuilt.functional.{next(_SERIAL)}"
        ours = {"scaled_dot_product_attention": _replaced(functional.scaled_dot_product_attention, 2)}
        replaced["F"] = _module(name, vars(functional), ours)
    if not replaced:
        raise DitAccelError(
            f"{inner_type.__name__} calls neither dispatch_attention_fn nor F.scaled_dot_product_attention, so there "
            "is no attention to replace. Set a processor that calls one of them, or remove this one."
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


def _replaced(original: Callable[..., torch.Tensor], axis: int) -> Callable[..., torch.Tensor]:
    """Ours in place of an attention function with tokens in `axis`: 1 for [B, N, H, D], 2 for [B, H, N, D]."""

    @functools.wraps(original)
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if not _is_ours(query.shape[axis], key.shape[axis]):
            return original(query, key, value, **options, **kwargs)
        if axis == 2:
            return _attend(query, key, value, **options)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _attend(q, k, v, **options).transpose(1, 2)

    return attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The plan's attention in a family's own sparse call: [B, H, N, D] in and out, N the tokens of the grid.

    Padded text is never a key (`CallLayout.text_lens`), so there is no mask to pass.
    """
    layer = _SLOT.layer
    assert layer is not None
    if not _is_ours(q.shape[2], k.shape[2]):
        raise layer.state.sequence_error(0)
    return _attend(q, k, v)


def joint_call(rotate: Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]) -> SparseCall:
    """A sparse call of a joint layer over [video | text], without a mask.

    It takes and returns video [B, N, C] and text [B, T, C]. The output of padded text is arbitrary and never read; the
    model's processor makes it zero.

    Args:
        rotate: rotary embedding of the video's queries or keys [B, N, H, D] by the call's tables.
    """

    def attend_video_and_text(
        processor: Any,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(2, (attn.heads, -1))  # [B, N, H, D]

        video, text = hidden_states, encoder_hidden_states
        queries, keys = attn.norm_q(split(attn.to_q(video))), attn.norm_k(split(attn.to_k(video)))
        if image_rotary_emb is not None:
            queries, keys = rotate(queries, image_rotary_emb), rotate(keys, image_rotary_emb)
        text_queries, text_keys = split(attn.add_q_proj(text)), split(attn.add_k_proj(text))
        if attn.norm_added_q is not None:
            text_queries = attn.norm_added_q(text_queries)
        if attn.norm_added_k is not None:
            text_keys = attn.norm_added_k(text_keys)
        values, text_values = split(attn.to_v(video)), split(attn.add_v_proj(text))
        pairs = ((queries, text_queries), (keys, text_keys), (values, text_values))
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
        joined = attend(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        video, text = joined.split((video.shape[1], text.shape[1]), 1)
        # Mochi's last block has no projection of text
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text) if hasattr(attn, "to_add_out") else text

    return attend_video_and_text


def _is_ours(queries: int, keys: int) -> bool:
    """Whether a call is self-attention over the grid, rather than over image prompts or other tokens."""
    layer = _SLOT.layer
    if layer is not None and layer.state.covers(queries, keys):
        return True
    _SLOT.others += 1
    return False


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """The plan's attention, [B, H, N, D], below the active function modes; options as for `_planned`."""
    _SLOT.replaced += 1
    # non-strict export runs below a function mode of its own, with tensors that cannot become a subclass
    if torch._C._len_torch_function_stack() == 0 or torch.compiler.is_exporting():
        return _planned(q, k, v, **options)
    return nn.functional.scaled_dot_product_attention(q.as_subclass(_Query), k, v, **options)


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
            "Accelerated attention takes no causal mask, no dropout, and as many key heads as query heads. It got "
            f"is_causal={is_causal}, dropout_p={dropout_p}, {query.shape[1]} and {key.shape[1]} heads."
        )
    layer = _SLOT.layer
    assert layer is not None
    _SLOT.planned += 1
    return layer.attend(query, key, value, scale, attn_mask is not None, _SLOT.gate)
