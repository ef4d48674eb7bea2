"""What holds for every published format: a file that does not fit changes nothing, and what is loaded goes and comes.

Each format has a test file of its name beside this one, with an EXAMPLE.
"""

import importlib.util
import pathlib

import pytest
import tiny_models
import torch
from published_weights import snapshot, unchanged
from safetensors.torch import save_file

import dit_accel
from dit_accel.checkpoint import published
from dit_accel.errors import DitAccelError
from dit_accel.files import MARK


def example(name):
    path = pathlib.Path(__file__).parent / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXAMPLE


each_format = pytest.mark.parametrize("name", published.get_formats())


@pytest.fixture
def case(name, tmp_path):
    """A format's example, its model, the file, and a function that writes tensors to it."""
    known = example(name)
    model = tiny_models.module(known.family).build()
    file = tmp_path / "weights.safetensors"
    tensors = known.published(model)

    def write(changed):
        save_file(changed, file, known.metadata(tensors))

    write(tensors)
    return known, model, file, tensors, write


def without(tensors, key):
    return {name: tensor for name, tensor in tensors.items() if name != key}


DAMAGES = {
    "missing": without,
    "foreign": lambda tensors, key: tensors | {f"{key}.other": tensors[key].clone()},
    "renamed": lambda tensors, key: without(tensors, key) | {f"other.{key}": tensors[key]},
    "shape": lambda tensors, key: tensors | {key: torch.zeros(*tensors[key].shape[:-1], tensors[key].shape[-1] + 1)},
    "axes": lambda tensors, key: tensors | {key: tensors[key][None].clone()},
}


@pytest.mark.parametrize("damage", DAMAGES)
@each_format
def test_each_tensor_that_does_not_fit_is_one_line_and_nothing_changes(damage, case):
    """One tensor after the other."""
    known, model, file, tensors, write = case
    before = snapshot(model)
    for key in tensors:
        write(DAMAGES[damage](tensors, key))
        with pytest.raises(DitAccelError) as caught:
            dit_accel.load(model, file, **known.settings)
        assert "\n" not in str(caught.value), key
    assert unchanged(model, before) and not hasattr(next(iter(model.attn_processors.values())), "inner")


@each_format
def test_a_file_cut_short_is_one_line_and_nothing_changes(case):
    known, model, file, _, _ = case
    before, content = snapshot(model), file.read_bytes()
    for length in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(DitAccelError) as caught:
            dit_accel.load(model, file, **known.settings)
        assert "\n" not in str(caught.value), length
    assert unchanged(model, before)


@each_format
def test_what_is_loaded_is_saved_as_ours_opens_again_and_leaves_no_trace(case, tmp_path):
    known, model, file, _, _ = case
    before, folder = snapshot(model), tmp_path / "ours"
    with dit_accel.load(model, file, **known.settings) as accel:
        loaded, config = snapshot(model), accel.setting.config
        assert file.name in str(accel.report())
        accel.save_pretrained(folder)
    assert not all(torch.equal(loaded[key], value) for key, value in before.items()) and unchanged(model, before)
    assert MARK in (folder / "accelerator.json").read_text()
    with dit_accel.load(model, folder) as accel:
        assert unchanged(model, loaded) and accel.setting.config == config
    assert unchanged(model, before)
