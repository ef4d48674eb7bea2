"""A cache that is taken off leaves Diffusers as it was."""

import pytest
from diffusers.hooks._helpers import TransformerBlockRegistry
from tiny_models import get

from dit_accel.caches.at_work import CacheAtWork
from dit_accel.caches.step_cache import StepCache
from dit_accel.registry import get_families


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, "first-block") for name in ("lumina2:t2i", "krea2:t2i", "ernie_image:t2i", "cosmos:2.5", "wan:t2v")),
        ("cosmos:2.5", "mag"),
        ("cosmos:2.5", "steps:computed=0x1"),
        ("wan:chronoedit", "sea"),
        ("wan:t2v", "sea"),
    ],
)
def test_the_classes_that_diffusers_knows_stay_the_same(name, cache):
    """Its own functions refuse or serve a class by this registry, with what it says of the class."""
    TransformerBlockRegistry._register()
    before = dict(TransformerBlockRegistry._registry)
    tiny = get(*name.split(":"))
    at = CacheAtWork("transformer", tiny.build(), get_families()[tiny.family], StepCache.parse(cache))
    at.attach()
    at.detach()
    assert TransformerBlockRegistry._registry == before
