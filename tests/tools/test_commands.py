import runpy
import sys

import pytest

TOOLS = (
    "demo.train",
    "demo.evaluate",
    "demo.finetuning",
    "demo.key_order",
    "demo_clip.train",
    "demo_clip.accuracy",
    "kernel_package",
    "kernels.ahead_of_time",
    "steps.measure",
)


@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_starts_from_the_checkout(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"tools.{tool}", run_name="__main__")
    assert stop.value.code == 0
    assert f"python -m tools.{tool}" in capsys.readouterr().out
