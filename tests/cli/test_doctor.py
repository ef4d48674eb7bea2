"""`dit-accel doctor`."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import torch
from messages import says

from dit_accel.cli import doctor
from dit_accel.generation import sources
from dit_accel.kernels import impls
from dit_accel.pipelines import demo

EXTRA = re.compile(r"dit_accel\[([a-z-]+)\]")


def findings(cli, *arguments):
    listed = json.loads(cli("doctor", "--device", "cpu", "--json", *arguments).out)
    return {finding["subject"]: finding for finding in listed}


def test_every_implementation_and_what_auto_takes(cli):
    rows = findings(cli)
    assert {f"{row.kernel}, {row.name}" for row in impls.rows()} <= rows.keys()
    portable, reference, gluon = (rows[f"block_sparse, {name}"] for name in ("portable", "reference", "gluon"))
    assert portable["works"] and portable["detail"] == doctor.CHOSEN
    assert reference["works"] and reference["detail"] not in ("", doctor.CHOSEN)
    assert not gluon["works"] and says(gluon["detail"], "cpu") and not says(gluon["detail"], "float32")
    lines = cli("doctor", "--device", "cpu").out.splitlines()
    assert says(lines[0], "cpu", "float32")
    entries = [line.split()[0] for line in lines if line.startswith(("  yes ", "  no  "))]
    assert entries == ["yes" if row["works"] else "no" for row in rows.values()]


def test_the_last_line_is_a_verdict(cli, monkeypatch):
    def verdict():
        return cli("doctor", "--device", "cpu").out.splitlines()[-1]

    monkeypatch.setattr(doctor, "PACKAGES", (("json", "records", "nothing"),))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    complete = verdict()
    assert says(complete, "CPU", "portable") and not says(complete, "package")
    monkeypatch.setattr(doctor, "PACKAGES", (("no_such_package", "records", "nothing"),))
    assert says(verdict(), "CPU", "portable", "package no_such_package")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    kernels = [
        doctor.Finding("block_sparse, gluon", True, doctor.CHOSEN),
        doctor.Finding("block_sparse, flex", True, "runs only if you name it"),
        doctor.Finding("router, triton", True, doctor.CHOSEN),
        doctor.Finding("sla, gluon", True, doctor.CHOSEN),
    ]
    line = doctor._verdict(torch.device("cuda"), kernels, [])
    assert says(line, "NVIDIA H200", "gluon", "triton") and not says(line, "flex") and line.count("gluon") == 1


def test_what_is_missing_has_a_command(cli, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find_spec(name, *more)
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    by_subject = findings(cli)
    peft, compiler = by_subject["package peft"], by_subject["torch.compile"]
    assert (peft["works"], peft["remedy"]) == (False, "pip install 'dit_accel[lora]'")
    assert not compiler["works"] and compiler["remedy"]


def test_every_extra_that_an_error_asks_for_is_looked_for():
    """Otherwise "nothing missing" would be untrue."""
    package = Path(doctor.__file__).parents[1]
    named_by_errors = {
        extra for path in package.rglob("*.py") for extra in EXTRA.findall(path.read_text(encoding="utf-8"))
    }
    assert (
        {"lora", "quantize"}
        <= named_by_errors
        <= set(EXTRA.findall(" ".join(wanted for *_, wanted in doctor.PACKAGES)))
    )


def test_memory_of_a_model_from_its_settings_alone(cli, monkeypatch):
    pipe = demo.load_demo()
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    wanted = {name: 4 * sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    assert doctor.weight_bytes(sources.find("demo"), torch.float32) == wanted
    monkeypatch.setattr(doctor, "free_memory", lambda device: 2 * sum(wanted.values()))
    assert findings(cli, "--model", "demo")["demo"]["works"]
    monkeypatch.setattr(doctor, "free_memory", lambda device: sum(wanted.values()) - 1)
    short = findings(cli, "--model", "demo")["demo"]
    assert (short["works"], short["remedy"]) == (False, "--dtype bfloat16")
    assert cli("doctor", "--device", "cpu", "--model", "demo").status == 1


def test_weights_that_cannot_be_used(cli, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"damaged")
    assert not findings(cli, "--load", weights)[f"weights {weights}"]["works"]
    assert cli("doctor", "--device", "cpu", "--load", weights).status == 1


def test_memory_of_a_part_that_a_pipeline_has_for_itself(tmp_path):
    """LTX-2's files name the package of its pipeline, `ltx2`, where others name Diffusers."""
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    vocoder = LTX2Vocoder(in_channels=4, hidden_channels=4, upsample_kernel_sizes=[4], upsample_factors=[2])
    vocoder.save_config(tmp_path / "vocoder")
    index = {"_class_name": "LTX2Pipeline", "vocoder": ["ltx2", "LTX2Vocoder"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    wanted = 4 * sum(weight.numel() for weight in vocoder.parameters())
    assert doctor.weight_bytes(sources.find(str(tmp_path)), torch.float32) == {"vocoder": wanted}
