"""`dense_backend="auto8"`: dense attention on a kernel with 8-bit products, taken only after a verified call.

The first dense call of each layer runs on the exact back end, whose result it returns, and on candidates. A candidate
passes if its error is within `LIMIT`. The first layer compares all and, on CUDA, takes their times; the others verify
the fastest that is left. A call with other kinds of tensors, such as one with a mask, is verified anew.

The limit is twice what rounding makes, as a share of the output's norm:

* Weights and values in e4m3 are each off by at most 2^-4 of their binade, uniformly: 2^-3 / sqrt(12) times 0.74, the
  root mean square of 1/x over a binade. That is 0.027 each, 0.038 both.
* q and k in int8 have steps of 1/127 of a block's largest magnitude, about 4 standard deviations of 8,192 normal
  numbers: 4 / 127 / sqrt(12) = 0.009 each. Logits of a standard deviation of 2.5 are then off by 0.032, and so is the
  output, for independent errors.
* Together 0.049.

Of FlashAttention 3, Diffusers' dispatcher runs half precision alone: it hands over no scales of fp8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dit_accel.errors import DitAccelWarning

CANDIDATES = (
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp8_cuda",
    "sage",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "_flash_3",
)
LIMIT = 0.1
RUNS = 2  # timed runs of a candidate, behind the one that is verified
Kind = tuple[Any, ...]


class Verified:
    """Which back end each layer's dense calls run on.

    Args:
        exact: the name of the back end that the others are compared with; None: the model's own.

    Attributes:
        candidates: names of those that are installed. No network is asked: kernels of the Hub are none of them.
        called: whether a call has been verified.
    """

    def __init__(self, exact: str | None) -> None:
        self.candidates, missing = _installed()
        self.called = False
        self._exact, self._shown = exact, "the model's own back end" if exact is None else exact
        self._missing = missing
        self._rejected: dict[str, list[str]] = {}  # reasons by name
        self._orders: dict[Kind, list[str]] = {}  # those that passed in a first layer, the fastest first
        self._chosen: dict[tuple[str, Kind], str | None] = {}
        self._errors: dict[str, list[float]] = {}
        self._others = False
        if not self.candidates:
            self._warn("neither SageAttention nor FlashAttention 3 is installed")

    @property
    def notes(self) -> list[str]:
        """For the report: where dense attention runs, and each candidate that was rejected, with the reason."""
        install = "pip install 'sageattention>=2.1.1' --no-build-isolation, or build FlashAttention 3"
        if not self.candidates:
            missing = ", ".join(self._missing)
            return [f"dense attention runs on {self._shown}: auto8 finds none of {missing} installed; {install}"]
        if not self.called:
            where = [f"dense attention runs on {self._shown}: no dense call was verified yet"]
        else:
            layers: dict[str | None, set[str]] = {}
            for (layer, _), name in self._chosen.items():
                layers.setdefault(name, set()).add(layer)
            where = [f"dense attention runs on {self._named(name)} in {len(of)} layers" for name, of in layers.items()]
        rejected = [
            f"auto8 rejects {name}: {reasons[0]}" + (f", and {len(reasons) - 1} times more" if reasons[1:] else "")
            for name, reasons in self._rejected.items()
        ]
        if self._missing:
            rejected.append(f"auto8 rejects {', '.join(self._missing)}: not installed")
        others = (
            [f"dense calls with gradients enabled or in a function mode run on {self._shown}"] if self._others else []
        )
        return where + rejected + others

    def _named(self, name: str | None) -> str:
        if name is None or name == self._exact:
            return self._shown
        return f"{name} (relative error at most {max(self._errors[name]):.3g}, limit {LIMIT})"

    def run(self, layer: str, processor: Any, dense: Callable[[], Any], arguments: Iterable[Any]) -> Any:
        """A dense call of a layer.

        Args:
            layer: its name.
            processor: the model's own, whose back end is set.
            dense: runs it.
            arguments: what it is called with.
        """
        if torch.is_grad_enabled() or torch._C._len_torch_function_stack():  # a guider replaces the exact one alone
            self._others = True
            return self._on(self._exact, processor, dense)
        kind = tuple((i, x.ndim, x.dtype) for i, x in enumerate(arguments) if isinstance(x, torch.Tensor))
        if (layer, kind) in self._chosen:
            return self._on(self._chosen[layer, kind], processor, dense)
        out = self._on(self._exact, processor, dense)
        try:
            self._chosen[layer, kind] = self._verify(layer, kind, processor, dense, out)
        finally:
            processor._attention_backend = self._chosen.get((layer, kind), self._exact)
        return out

    def _verify(self, layer: str, kind: Kind, processor: Any, dense: Callable[[], Any], out: Any) -> str | None:
        """The back end of a layer for a kind of calls, by the result `out` of the exact one."""
        self.called = True
        if (order := self._orders.get(kind)) is not None:
            return next((name for name in order if self._passes(name, layer, processor, dense, out)), self._exact)
        passed = [name for name in self.candidates if self._passes(name, layer, processor, dense, out)]
        times = {name: self._milliseconds(name, processor, dense, _tensors(out)[0].device) for name in passed}
        if passed and times[passed[0]] is not None:
            exact_ms = self._milliseconds(self._exact, processor, dense, _tensors(out)[0].device)
            for name in [name for name in passed if times[name] >= exact_ms]:
                self._reject(name, f"{times[name]:.3g} ms in {layer}, and {self._shown} takes {exact_ms:.3g} ms")
                passed.remove(name)
            passed.sort(key=times.__getitem__)
        if not passed:
            self._warn(f"no back end passed in {layer}")
        self._orders[kind] = passed
        return passed[0] if passed else self._exact

    def _passes(self, name: str, layer: str, processor: Any, dense: Callable[[], Any], out: Any) -> bool:
        try:
            error = relative_error(self._on(name, processor, dense), out)
        except Exception as failure:  # a kernel may raise anything; the report says what
            text = str(failure).strip().split("\n")[0]
            return self._reject(name, f"{type(failure).__name__} in {layer}: {text}")
        if not error <= LIMIT:
            return self._reject(name, f"relative error {error:.3g} in {layer} is above {LIMIT}")
        self._errors.setdefault(name, []).append(error)
        return True

    def _reject(self, name: str, reason: str) -> bool:
        self._rejected.setdefault(name, []).append(reason)
        return False

    def _on(self, name: str | None, processor: Any, dense: Callable[[], Any]) -> Any:
        from diffusers.models.attention_dispatch import AttentionBackendName

        processor._attention_backend = None if name is None else AttentionBackendName(name)
        return dense()

    def _milliseconds(self, name: str | None, processor: Any, dense: Callable[[], Any], device: torch.device) -> Any:
        """The shortest of a few calls on CUDA; None elsewhere."""
        if device.type != "cuda":
            return None
        spans, stream = [], torch.cuda.current_stream(device)
        for _ in range(RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            self._on(name, processor, dense)
            end.record(stream)
            end.synchronize()
            spans.append(start.elapsed_time(end))
        return min(spans)

    def _warn(self, reason: str) -> None:
        text = f"Dense attention runs on {self._shown}: {reason}, with dense_backend='auto8'."
        warnings.warn(text, DitAccelWarning, stacklevel=2)


def relative_error(out: Any, exact: Any) -> float:
    """The norm of the difference of a layer's outputs over the exact one's; of several tensors the largest.

    inf: the outputs differ in number or shape, or are not finite.
    """
    pairs = list(zip(_tensors(out), _tensors(exact), strict=False))
    if len(_tensors(out)) != len(_tensors(exact)) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    errors = []
    for a, b in pairs:
        difference, size = (a.float() - b.float()).norm(), b.float().norm()
        errors.append(float(torch.where(difference > 0, difference / size, difference)))  # nan stays
    return float("inf") if any(error != error for error in errors) else max(errors)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]


def _installed() -> tuple[list[str], list[str]]:
    """The candidates that are installed, and the others."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    here: list[str] = []
    known = [name for name in CANDIDATES if name in {backend.value for backend in AttentionBackendName}]
    for name in known:
        try:
            _check_attention_backend_requirements(AttentionBackendName(name))
        except RuntimeError:  # a package is missing
            continue
        here.append(name)
    return here, [name for name in CANDIDATES if name not in here]
