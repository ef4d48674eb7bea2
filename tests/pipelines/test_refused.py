"""Every transformer of Diffusers is supported, or refused by name with a reason; none is silently dense."""

import re

import diffusers
import pytest
from diffusers import ModelMixin
from messages import names
from torch import nn

import dit_accel
from dit_accel.pipelines.refused import REFUSED, refusal
from dit_accel.registry import family_of, get_families


def is_transformer(kind):
    """Whether Diffusers keeps the model among its transformers, whatever its name, or calls it one."""
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        return False
    return ".transformers." in kind.__module__ or re.fullmatch(r"\w*Transformer\w*Model", kind.__name__) is not None


EXPORTED = sorted(name for name in dir(diffusers) if is_transformer(getattr(diffusers, name)))
SUPPORTED = [name for family in get_families().values() for name in family.transformers]


def bare(name):
    """An object of that class, without weights: the class alone decides."""
    kind = getattr(diffusers, name)
    transformer = kind.__new__(kind)
    nn.Module.__init__(transformer)
    return transformer


def test_no_class_is_in_two_places():
    assert len(set(SUPPORTED)) == len(SUPPORTED)
    assert not set(SUPPORTED) & set(REFUSED)
    assert all(hasattr(diffusers, name) for name in [*SUPPORTED, *REFUSED])


@pytest.mark.parametrize("name", EXPORTED)
def test_every_transformer_is_supported_or_refused_with_its_reason(name):
    if family_of([name]) is not None:
        return
    assert name in REFUSED, f"{name} has neither a family nor a reason"
    with pytest.raises(dit_accel.DitAccelError, match=re.escape(f"{name} is not supported: {REFUSED[name]}.")):
        dit_accel.accelerate(bare(name), "gna", window=3)


def test_a_class_of_a_later_diffusers_is_refused():
    class NextYearTransformer3DModel(nn.Module):
        pass

    with pytest.raises(dit_accel.DitAccelError, match=names("NextYearTransformer3DModel wan")):
        dit_accel.accelerate(NextYearTransformer3DModel(), "dense")


def test_what_derives_from_a_class_is_treated_as_that_class():
    names = ["Mine", "SanaTransformer2DModel", "Module"]
    assert refusal(names).startswith(REFUSED["SanaTransformer2DModel"])
    assert family_of(["Mine", "FluxTransformer2DModel"]).name == "flux"
