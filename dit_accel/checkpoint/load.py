"""Loading what `Accelerator.save_pretrained` wrote."""

from __future__ import annotations

import pathlib
from typing import Any

from dit_accel.accelerator import Accelerator, accelerate
from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import lora as adapters
from dit_accel.hooks.selfcheck import Verify
from dit_accel.pipelines.targets import find_transformers


def load(
    target: Any,
    path: str | pathlib.Path,
    *,
    verify: Verify | None = None,
    keep_dense_above: float | None = None,
    dense_backend: str | None = None,
    replace: bool = False,
    any_weights: bool = False,
) -> Accelerator:
    """Accelerate `target` as `Accelerator.save_pretrained` saved it, with learned weights and fine-tuning.

    Args:
        target: a pipeline or transformer of the class and configuration it was saved from.
        path: the folder.
        verify, keep_dense_above, dense_backend, replace: as in `accelerate`.
        any_weights: load a fine-tuning into other base weights than those it started from.

    Raises:
        DitAccelError: the folder is missing, damaged or incomplete, or was saved for another model.
    """
    saved = checkpoint.read(path)
    transformers, _ = find_transformers(target)
    modules = {name: transformer for name, (transformer, _) in transformers.items()}
    checkpoint.check_identity(path, saved.models, checkpoint.identify(modules))
    accel = accelerate(
        target,
        saved.setting,
        impl=saved.impl,
        verify=verify,
        keep_dense_above=keep_dense_above,
        dense_backend=dense_backend,
        replace=replace,
    )
    try:
        checkpoint.load_weights(path, saved.weights, accel.learned_weights())
        if saved.trained is not None:
            accel.take_training(*adapters.apply(pathlib.Path(path), saved.trained, modules, any_weights=any_weights))
    except BaseException:
        accel.remove()
        raise
    return accel
