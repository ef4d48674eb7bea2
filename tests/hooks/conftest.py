"""Fixtures of the hooks' tests."""

import pytest

from dit_accel.hooks.arranged_stack import ArrangedStack


@pytest.fixture
def in_each_layer(monkeypatch):
    """A function's result as it is, and with every layer permuting its own tokens."""

    def both(work):
        arranged = work()
        with monkeypatch.context() as patch:
            patch.setattr(ArrangedStack, "begin", lambda *arguments: None)
            return arranged, work()

    return both
