"""Loading what `Accelerator.save_pretrained` wrote, and published weights."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from dit_accel.accelerator import Accelerator, accelerate
from dit_accel.caches.step_cache import StepCache
from dit_accel.checkpoint import few_steps, published
from dit_accel.checkpoint import format as checkpoint
from dit_accel.checkpoint import lora as adapters
from dit_accel.checkpoint.weight_files import locate, open_weights
from dit_accel.errors import DitAccelError
from dit_accel.hooks.selfcheck import Verify
from dit_accel.pipelines.targets import find_transformers
from dit_accel.setting import Setting


def load(
    target: Any,
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    setting: Setting | None = None,
    verify: Verify | None = None,
    keep_dense_above: float | None = None,
    dense_backend: str | None = None,
    cache: StepCache | str | None = None,
    replace: bool = False,
    any_weights: bool = False,
    keep_int8: bool = False,
    **config: Any,
) -> Accelerator:
    """Accelerate `target` as `Accelerator.save_pretrained` saved it, or with published weights.

    Published weights are known by their tensors' names and their configuration; `dit-accel ls formats` lists the
    formats. Their number of steps and guidance become defaults of the pipeline's calls, and few-step weights bring
    their scheduler; the report says so. `Accelerator.remove` restores all of it, weights bit for bit.

    Args:
        target: a pipeline or transformer of the class and configuration that the weights belong to.
        path: a folder, a file, or a repository on the Hugging Face Hub, as ``owner/name``, with ``/file.safetensors``
            and ``@revision`` behind it or not. The Hub is asked only if nothing here has that name.
        revision: branch, tag or commit of the repository.
        setting: in place of the saved one, or of that which published weights were tuned for. Its sparse layers are
            those that the saved learned weights are for.
        verify, keep_dense_above, dense_backend, cache, replace: as in `accelerate`.
        any_weights: load a fine-tuning into other base weights than those it started from.
        keep_int8: leave published int8 weights in int8, through torchao; otherwise they are dequantised. Move the
            pipeline to its device first: where weights are moved, torchao rounds their scales to the model's dtype.
        config: settings of the method in place of a published format's own.

    Raises:
        DitAccelError: the files are missing, damaged, incomplete, pickled or of another model. The model is as it was;
            with `replace` the old accelerator may be removed, as a fine-tuning is compared with the base weights.
    """
    where = locate(path, revision)
    how: dict[str, Any] = {"verify": verify, "keep_dense_above": keep_dense_above, "dense_backend": dense_backend}
    how |= {"cache": cache}
    if not (where / checkpoint.SETTINGS_FILE).is_file():
        files = open_weights(where, str(path))
        return published.load(target, files, config, setting, keep_int8=keep_int8, replace=replace, **how)
    if named := [*config, *(["keep_int8"] if keep_int8 else [])]:
        raise DitAccelError(f"{path} is a saved accelerator with settings of its own. Leave out {', '.join(named)}.")
    saved = checkpoint.read(where)
    transformers, pipeline = find_transformers(target)
    modules = {name: transformer for name, (transformer, _) in transformers.items()}
    checkpoint.check_identity(where, saved.models, checkpoint.identify(modules))
    accel = accelerate(
        target,
        saved.setting if setting is None else setting,
        impl=saved.impl,
        replace=replace,
        **how,
    )
    try:
        checkpoint.load_weights(where, saved.weights, accel.learned_weights())
        if saved.trained is not None:
            with contextlib.ExitStack() as undo:
                trained, unload = adapters.apply(where, saved.trained, modules, any_weights=any_weights)
                undo.callback(unload)
                restore, notes = few_steps.install(pipeline, trained.call, trained.sampler)
                undo.callback(restore)
                accel.take_training(trained, undo.pop_all().close, notes)
    except BaseException:
        accel.remove()
        raise
    return accel
