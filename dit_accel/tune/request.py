"""What `dit-accel tune` is asked."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel import registry
from dit_accel.caches.step_cache import StepCache
from dit_accel.errors import DitAccelError
from dit_accel.eval.request import EvalRequest, PromptsRequest
from dit_accel.files import replace_file
from dit_accel.generation.processes import ProcessRank
from dit_accel.generation.request import CACHE_FORM, METHOD_FORM, ScheduleOptions
from dit_accel.values import option

if TYPE_CHECKING:
    from dit_accel.method import Method
    from dit_accel.setting import Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneRequest(ScheduleOptions, PromptsRequest):
    """The options of `dit-accel tune`."""

    PANEL: ClassVar[str] = "Tuning"

    target: str | None = option(
        None, "A speed-up such as 1.5x, or limits such as 'psnr>=25,speedup>=1.2'.", metavar="N.Nx|LIMITS"
    )
    calibrate: float | None = option(
        None,
        "Do not search: measure how many blocks each head needs to keep this share of its softmax. With "
        "--method heads, choose the heads to keep if this share of them may stay.",
        metavar="SHARE",
        above=0,
        most=1,
    )
    method: tuple[str, ...] = option(
        (), "Try only this method, repeatable. With settings, try only those.", metavar=METHOD_FORM, repeatable=True
    )
    cache: str | None = option(
        None,
        "Step cache for all settings; none tries no cache. By default the last round tries some. mag without "
        "--target measures MagCache's ratios.",
        metavar=CACHE_FORM,
    )
    minutes: float | None = option(None, "Time limit of the search; with less time it tries fewer settings.", above=0)
    output: Path = option(
        Path("tuned"), "Folder for all files. Run the same command again to resume.", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None and self.calibrate is None and not self.measures_ratios:
            raise DitAccelError(
                "tune needs --target, such as 1.5x, or --calibrate SHARE, or --cache mag to measure its ratios."
            )
        if self.calibrate is not None and (self.target is not None or self.cache is not None):
            raise DitAccelError("--calibrate measures every step and searches nothing. Leave out --target and --cache.")
        if self.minutes is not None and self.target is None:
            raise DitAccelError("--minutes limits a search. Give --target, or leave --minutes out.")
        if ProcessRank.here().count > 1:
            raise DitAccelError("tune decides from its own measurements, in one process. Start it without a launcher.")
        if self.calibrate is not None:
            self.calibrated()

    @property
    def measures_ratios(self) -> bool:
        """Whether MagCache's ratios are measured, and nothing is searched."""
        cache = StepCache.of(self.cache)
        return self.target is None and cache is not None and cache.name == "mag"

    def calibrated(self) -> tuple[Method, dict[str, Any]]:
        """The method to calibrate, and its settings; methods without a calibration and odd settings are refused."""
        from dit_accel.method import LossCalibration  # which imports PyTorch

        methods = {name: method for name, method in registry.get_methods().items() if method.calibration is not None}
        name, config = registry.parse_method(self.method[0]) if self.method else (_usual(methods), {})
        method = methods.get(name)
        if len(self.method) > 1 or method is None or (isinstance(method.calibration, LossCalibration) and config):
            raise DitAccelError(
                f"--calibrate takes at most one --method, of {', '.join(methods)}; got {', '.join(self.method)}. A "
                "method whose calibration tries settings layer by layer takes none of them."
            )
        if self.compile:
            raise DitAccelError("--calibrate watches attention, which --compile hides. Leave it out for that run.")
        registry.make_config(name, config)
        return method, config

    def evaluation(self, **more: Any) -> EvalRequest:
        """The evaluation of this model with these prompts, seeds and size; `more` are further fields of it."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(PromptsRequest)}
        return EvalRequest(**{**shared, "output": self.output, **more})

    def write(self, name: str, setting: Setting, **remarks: Any) -> list[str]:
        """Write a setting with remarks to the output folder; lines that name its file and say how to try it."""
        path = self.output / name
        replace_file(path, setting.to_json(**remarks).encode())
        return [f"settings: {path}", f"try it:   {self.command(load=path)}"]

    def command(self, **more: Any) -> str:
        """A command that generates with this model and size; `more` are further options."""
        from dit_accel.eval.summary import generating, model_options  # which imports PyTorch

        return shlex.join(generating({"model": self.model} | model_options(self) | more))


def _usual(methods: Mapping[str, Method]) -> str:
    """The method that is calibrated if none is named: the first one by recall."""
    from dit_accel.method import RecallCalibration

    return next(name for name, method in methods.items() if isinstance(method.calibration, RecallCalibration))
