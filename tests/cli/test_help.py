"""Help is complete and instant."""

import os
import subprocess
import sys
import time

import pytest

VERBS = ("generate", "train", "bench", "plan", "ls", "env")
# What the issue tracker promised of `generate`.
GENERATE = (
    "--model --prompt --method --set --dense-steps --dense-last-steps --dense-layers --preset --steps --seed --frames "
    "--height --width --fps --negative-prompt --guidance --image --lora --load --dtype --device --offload --vae-tiling "
    "--compile --revision --pipe --output --compare"
).split()


def test_main_help_lists_the_verbs(cli):
    outcome = cli("--help")
    assert outcome.status == 0
    assert all(verb in outcome.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_verb_help(cli, verb):
    outcome = cli(verb, "--help")
    assert outcome.status == 0
    assert f"dit-accel {verb}" in outcome.out


def test_generate_has_every_option(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = cli("generate", "--help").out
    assert [option for option in GENERATE if f"{option} " not in out] == []


def test_version(cli):
    import dit_accel

    assert cli("--version").out.split() == ["dit_accel", dit_accel.__version__]


def test_help_imports_nothing_heavy(root):
    program = (
        "import sys\nfrom dit_accel.cli.app import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n"
        "    print('heavy:', [m for m in ('torch', 'diffusers', 'transformers', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.timing
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_answers_in_two_seconds(root, verb):
    command = [sys.executable, "-m", "dit_accel", *verb.split(), "--help"]
    seconds = []
    while len(seconds) < 5 and min(seconds, default=2) >= 2:  # another process may have had the processor
        began = time.perf_counter()
        subprocess.run(command, cwd=root, env=os.environ, capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
