"""What a command runs a pipeline with: a setting and where it was read from, or the untouched pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import published, weight_files
from dit_accel.errors import DitAccelError
from dit_accel.hooks import dense_backend
from dit_accel.hooks.selfcheck import SelfCheck
from dit_accel.registry import DENSE, get_method, parse_method
from dit_accel.schedule import Schedule
from dit_accel.setting import Setting

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.accelerator import Accelerator
    from dit_accel.plans.plan import Plan
    from dit_accel.tokens import TokenGrid

BASELINE = "baseline"  # the label of the untouched pipeline


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a pipeline.

    Args:
        setting: None for the untouched pipeline.
        folder: of the saved accelerator with the setting and its weights, or the path of published weights; None
            without either.
        any_weights, keep_int8: as in `checkpoint.load`.
        call: arguments of the pipeline's calls after a fine-tuning, such as fewer steps.
        published: what the user calls the published weights; None for a saved accelerator.
        overrides: settings in place of those that the published weights say.
        notes: remarks for its reports.
        words: the back end and the step cache that the user gave in place of those of the folder.
        parts: how many parts of the folder's path the label has.
    """

    setting: Setting | None = None
    folder: Path | None = None
    any_weights: bool = False
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    published: str | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_int8: bool = False
    notes: tuple[str, ...] = ()
    words: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: int = 1

    def __post_init__(self) -> None:
        if self.setting is not None and self.setting.dense_backend is not None:
            import torch

            dense_backend.choose(self.setting.dense_backend, torch.device("cpu"))  # refuses unknown names early

    @classmethod
    def read(
        cls,
        path: Path,
        settings: Iterable[str] = (),
        *,
        any_weights: bool = False,
        keep_int8: bool = False,
        **words: Any,
    ) -> Candidate:
        """The setting of a JSON file, of a folder that `Accelerator.save_pretrained` wrote, or of published weights.

        Args:
            path: a file, a folder, or published weights as `weight_files.locate` takes them.
            settings: ``key=value`` in place of what published weights say.
            words: another back end or step cache, as `Setting.changed` takes them.

        Raises:
            DitAccelError: there is none, it is damaged, or it does not take `any_weights` or `settings`.
        """
        is_file = path.is_file() and path.suffix not in (".safetensors", *weight_files.PICKLES)
        is_saved = (path / checkpoint.SETTINGS_FILE).is_file()
        if settings and (is_file or is_saved):
            raise DitAccelError(f"--load {path} has its own settings; --set is for published weights. Leave it out.")
        if any_weights and not is_saved:
            raise DitAccelError(f"{path} is not a saved accelerator, so leave out --any-weights.")
        if keep_int8 and (is_file or is_saved):
            raise DitAccelError(f"{path} holds no published weights, so leave out --keep-int8.")
        if is_file:
            return cls(Setting.read(path).changed(**words))
        if not is_saved:
            where = weight_files.locate(path, option="--load ")
            files = weight_files.open_weights(where, str(path))
            detected = published.detect(files)
            overrides = parse_method(detected.tuned(files).method, settings)[1]
            tuned = published.settings(detected, files, overrides)
            setting = Setting.make(tuned.method, tuned.config).changed(**words)
            return cls(setting, where, False, dict(tuned.call), str(path), overrides, keep_int8, words=words)
        saved = checkpoint.read(path)
        call = {} if saved.trained is None else saved.trained["call"]
        return cls(saved.setting.changed(**words), path, any_weights, call, words=words)

    @property
    def method(self) -> str:
        """Its name; dense for the untouched pipeline."""
        return DENSE if self.setting is None else self.setting.method

    @property
    def computes_densely(self) -> bool:
        """Whether each step that it computes is one of the untouched pipeline, as with a step cache alone."""
        default_backend = self.setting is None or self.setting.dense_backend is None
        return default_backend and self.folder is None and self.method == DENSE

    @property
    def layered(self) -> bool:
        """Whether layers have settings of their own."""
        return self.setting is not None and self.setting.layers is not None

    @property
    def title(self) -> str:
        """The method and its settings as typed, and the step cache."""
        if self.setting is None:
            return BASELINE
        return self.setting.title if self.setting.cache is None else f"{self.setting.title} cache={self.setting.cache}"

    @property
    def label(self) -> str:
        """The setting as a user types it, and the last `parts` of the folder's path."""
        if self.setting is None:
            return BASELINE
        return self.setting.text + (f" from {Path(*self.path_parts[-self.parts :])}" if self.path_parts else "")

    @property
    def path_parts(self) -> tuple[str, ...]:
        """Of the folder's path, or of what the user calls the published weights."""
        return () if self.folder is None else Path(self.published or self.folder).parts

    def plans(self, grid: TokenGrid) -> list[Plan]:
        """The plan of each of its `Setting.configs` on a grid; what does not fit, or keeps every pair, is refused."""
        import torch

        from dit_accel.hooks.plan_cache import PlanCache

        if self.setting is None:
            return []
        plans, device = PlanCache(get_method(self.setting.method), not self.layered), torch.device("cpu")
        return [plans.get(config, grid, device) for config in self.setting.configs()]

    def check_compiled(self) -> None:
        """Refuse --compile beside a step cache that breaks graphs: each block is to be one graph."""
        cache = None if self.setting is None else self.setting.cache
        if cache is not None and cache.breaks_graphs:
            raise DitAccelError(
                f"--compile makes one graph of each block, and the step cache {cache} decides within them. Leave out "
                "--compile, or take --cache steps, which decides before each call."
            )

    def record(self) -> dict[str, Any]:
        """The setting as plain values; dense for the untouched pipeline."""
        return (self.setting or Setting.make(DENSE)).as_dict()

    def apply(self, pipe: DiffusionPipeline, check: SelfCheck | None = None) -> Accelerator:
        """Accelerate the pipeline; errors as in `accelerate` and `checkpoint.load`."""
        from dit_accel import accelerator
        from dit_accel.checkpoint import load as saved

        assert self.setting is not None
        how = dataclasses.asdict(check or SelfCheck())
        if self.folder is None:
            accel = accelerator.accelerate(pipe, self.setting, **how)
            accel.add_notes(self.notes)
            return accel
        how |= {"setting": self.setting, "any_weights": self.any_weights, "keep_int8": self.keep_int8}
        return saved.load(pipe, self.folder, **how, **self.overrides)

    def without_dense_steps(self) -> Candidate:
        """The same without dense steps and step cache, so that a single step runs the method.

        Dense layers stay, as a folder has no learned weights for them.
        """
        assert self.setting is not None
        schedule = Schedule(dense_layers=self.setting.schedule.dense_layers)
        return dataclasses.replace(self, setting=dataclasses.replace(self.setting, schedule=schedule, cache=None))


def told_apart(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates, with as much of a folder's path in each label as it takes to tell them apart."""
    apart = list(candidates)
    while True:
        labels = [candidate.label for candidate in apart]
        longer = [
            dataclasses.replace(candidate, parts=candidate.parts + 1)
            if labels.count(candidate.label) > 1 and candidate.parts < len(candidate.path_parts)
            else candidate
            for candidate in apart
        ]
        if longer == apart:
            return apart
        apart = longer
