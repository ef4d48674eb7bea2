"""`dit-accel env`."""

import json
import re

import torch
from messages import says

from dit_accel import __version__


def test_report_names_versions_and_machine(cli):
    lines = cli("env").out.splitlines()
    for name, version in (("dit_accel", __version__), ("torch", torch.__version__), ("gpus", "")):
        assert any(says(line, name, version) for line in lines), name


def test_json_holds_settings_but_no_secrets(cli, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = cli("env", "--json").out
    assert json.loads(out)["environment"]["TRITON_INTERPRET"] == "1"
    assert "hf_secret" not in out


def test_a_missing_package_is_said_to_be_missing(cli, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (line,) = [line for line in cli("env").out.splitlines() if says(line, "peft")]
    assert not re.search(r"\d", line), "it has no version"
