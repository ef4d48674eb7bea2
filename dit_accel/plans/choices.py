"""Which kernels run the parts of a plan's calls, here or on a GPU that need not be present."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from typing import Any

import torch

from dit_accel.errors import DitAccelWarning
from dit_accel.kernels import impls
from dit_accel.kernels.impls import AUTO, Choice, Impl
from dit_accel.kernels.obstacles import Facts, capability_of


def _facts(gpu: str | None, head_dim: int, dtype: torch.dtype) -> Facts:
    """Those of `Kernels.implementation`."""
    capability = None if gpu is None else capability_of(gpu)
    device = torch.device("cpu" if gpu is None and not torch.cuda.is_available() else "cuda")
    return Facts(device, dtype, head_dim, capability=capability)


_WARNED: set[Choice] = set()  # in this process


class Kernels(abc.ABC):
    """What a plan knows of the kernels that it calls.

    Attributes:
        method, config: its method's name and settings.
    """

    method: str
    config: Any

    def calls(self, learned: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
        """The kernel of each part of a call, and what `Facts` say of it besides its tensors; parts as of `Choice`."""
        return {}

    def choices(self, facts: Facts, impl: Impl = AUTO, learned: bool = False) -> list[Choice]:
        """What runs each part of a call whose tensors are those of `facts`, visual queries first.

        Other queries follow the implementation of the visual ones where it can compute them, as in a model.
        """
        choices: list[Choice] = []
        for part, (kernel, more) in self.calls(learned).items():
            call, name = dataclasses.replace(facts, **more), impl
            if kernel == impls.TAIL and choices and impls.named(choices[0].name, choices[0].kernel).takes_tail(call):
                choices.append(choices[0]._replace(part=part, why="in attention's kernel", plain=False, faster=None))
                continue
            if choices or kernel == impls.ROUTER:
                name = impls.beside(choices[0].name if part == "text" else impl, call, kernel)
            choice = impls.explain(part, kernel, call, name, square=self.config.square_blocks)
            follows = part == "text" and name != AUTO
            choices.append(choice._replace(why="as for the visual queries") if follows else choice)
        return choices

    def implementation(
        self,
        gpu: str | None = None,
        *,
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        impl: Impl = AUTO,
        learned: bool = False,
    ) -> list[Choice]:
        """What would run each part of a call, and why; no tensors are needed, nor is the GPU.

        Args:
            gpu: compute capability, such as "sm_90"; None: this machine's GPU, or its CPU.
            head_dim, dtype: of the tensors.
            impl: as of `attention`.
            learned: `attend` gets a module with learned weights.

        Raises:
            DitAccelError: the GPU is unknown, or a named implementation cannot compute a call.

        Example:
            >>> [choice.name for choice in plan("sol", grid).implementation("sm_90")]
            ['gluon_triton', 'triton', 'gluon_triton']
        """
        return self.choices(_facts(gpu, head_dim, dtype), impl, learned)

    def only_named(
        self, gpu: str | None = None, *, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, learned: bool = False
    ) -> list[str]:
        """The values of `impl` that would run the attention there too, but that "auto" never takes.

        Args, and errors: as of `implementation`.
        """
        kernel, more = self.calls(learned).get("attention", ("", {}))
        return impls.only_named(dataclasses.replace(_facts(gpu, head_dim, dtype), **more), kernel)

    def start(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, impl: Impl, learned: bool = False
    ) -> tuple[str, str]:
        """Load what runs each part; warn once of what is not the fastest. The name and reason as of `prepare`."""
        # Whether a named one can compute gradients is asked in the call, by what needs them.
        gradients = impl == AUTO and torch.is_grad_enabled()
        choices = self.choices(Facts(device, dtype, head_dim, gradients=gradients), impl, learned)
        for choice in choices:
            impls.named(choice.name, choice.kernel).load()
            if choice.faster is not None and choice not in _WARNED:
                _WARNED.add(choice)
                how = f"plain PyTorch ({choice.name}), many times slower than kernels" if choice.plain else choice.name
                warnings.warn(
                    f"{self.method}: its {choice.part} runs as {how} here, since {choice.faster}.",
                    DitAccelWarning,
                    stacklevel=3,
                )
        attention = next(choice for choice in choices if choice.part == "attention")
        return attention.name, attention.why
