"""Help is complete and instant."""

import resource
import subprocess
import sys

import pytest
from messages import says

VERBS = ("generate", "eval", "tune", "train", "bench", "plan", "ls", "doctor", "env")
# Options that `generate` must keep.
GENERATE = (
    "--model --prompt --method --set --dense-steps --dense-last-steps --dense-layers --preset --steps --seed --frames "
    "--height --width --fps --negative-prompt --guidance --image --lora --load --dtype --device --offload --vae-tiling "
    "--compile --revision --pipe --output --compare"
).split()


def test_main_help_lists_the_verbs(cli):
    outcome = cli("--help")
    assert outcome.status == 0
    assert all(verb in outcome.out for verb in VERBS)


def test_without_a_verb_there_is_help_and_what_is_missing(cli):
    outcome = cli()
    assert outcome.status == 2
    assert all(verb in outcome.out for verb in VERBS)
    (line,) = outcome.err.splitlines()
    assert line.startswith("dit-accel: error: ") and says(line, "generate")


@pytest.mark.parametrize("verb", VERBS)
def test_verb_help(cli, verb):
    outcome = cli(verb, "--help")
    assert outcome.status == 0
    assert f"dit-accel {verb}" in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_shows_a_list_of_python(cli, verb):
    assert "<list[" not in cli(verb, "--help").out


def test_an_example_is_a_paragraph_of_its_own(cli):
    for verb in VERBS:
        lines = [line.strip() for line in cli(verb, "--help").out.splitlines()]
        assert all(not lines[i - 1] for i, line in enumerate(lines) if line.startswith("Example: ")), verb


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
    """Of the processor's time, which another process does not take."""

    def used():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    command, before = [sys.executable, "-m", "dit_accel", *verb.split(), "--help"], used()
    subprocess.run(command, cwd=root, capture_output=True, check=True)
    assert used() - before < 2
