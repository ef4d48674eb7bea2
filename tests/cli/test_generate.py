"""`dit-accel generate` on small models of the real classes."""

import contextlib
import json
import os
import subprocess
import sys

import imageio.v2
import pytest
import torch
from messages import says
from PIL import Image

from dit_accel import __version__, files
from dit_accel.cli import job
from dit_accel.generation import setup
from dit_accel.hooks.report import NOTHING_GAINED
from dit_accel.pipelines.demo import clips

SMALL = ("--frames", 5, "--height", 32, "--width", 48, "--steps", 2)
METHODS = ("gna:window=0.5", "tile:references=1", "radial:decay=0.2", "sla:topk=0.3,block=16")


@pytest.mark.parametrize("method", METHODS)
def test_compare(cli, demo, tmp_path, method):
    outcome = cli("generate", *SMALL, "--method", method, "--compare", "--output", tmp_path / "a.mp4")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-compare.mp4", "a-dense.mp4", "a.json", "a.mp4"]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["runs"].keys() == {"dense", "accelerated"}
    assert record["runs"]["dense"]["steps"] == record["runs"]["accelerated"]["steps"] == 2
    assert record["comparison"]["psnr"] > 10
    assert 0 < record["comparison"]["ssim"] <= 1
    # 2 layers, 2 steps
    assert (record["report"]["sparse_calls"], record["report"]["dense_calls"]) == (4, 0)
    speedup = f"{record['comparison']['speedup']:.2f}"
    assert says(outcome.out, tmp_path / "a-compare.mp4", "PSNR", "dB", "SSIM", speedup)


@pytest.mark.parametrize(
    ("setting", "warmed"),
    [
        (["--method", "gna:window=0.5", "--cache", "mag:threshold=0.1"], ["gna", "dense"]),
        (["--method", "dense", "--cache", "mag:threshold=0.1"], ["dense"]),
        (["--method", "dense", "--dense-backend", "auto"], ["dense", "dense"]),
    ],
    ids=["method", "cache alone", "back end"],
)
def test_what_is_warmed_up(setting, warmed, cli, demo, tmp_path, monkeypatch):
    """Each kind of step once: the computed steps of a cache alone are those of the dense run."""
    candidates, warm_up = [], setup.warm_up

    def note(pipe, arguments, candidate, **options):
        candidates.append(candidate.method)
        warm_up(pipe, arguments, candidate, **options)

    monkeypatch.setattr(setup, "warm_up", note)
    outcome = cli("generate", *SMALL, *setting, "--compare", "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    assert candidates == warmed


def test_dense_compared_with_itself_is_identical(cli, demo, tmp_path):
    outcome = cli("generate", *SMALL, "--method", "dense", "--compare", "--output", tmp_path / "a.mp4")
    assert outcome.status == 0, outcome.err
    comparison = json.loads((tmp_path / "a.json").read_text())["comparison"]
    assert comparison["psnr"] is None
    assert comparison["ssim"] == pytest.approx(1)
    assert says(outcome.out, "SSIM", "1.000") and "dB" not in outcome.out
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "a-dense.mp4").read_bytes()


def test_a_level_is_chosen_for_the_size_and_the_steps(cli, demo, tmp_path):
    outcome = cli("generate", *SMALL[:-1], 12, "--level", "fast", "--compare", "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["setting"]["cache"] == {"name": "steps", "config": {"computed": [0, 1, 4]}}
    (note,) = [note for note in record["report"]["notes"] if says(note, "level", "fast")]
    assert says(note, 12, "CPU") and note in outcome.out
    assert record["report"]["cache"]["branches"] and "cache=steps:computed=0x1x4: " in outcome.out
    options = ("--level", "fast", "--cache", "first-block:threshold=0.3", "--output", tmp_path / "b.gif")
    assert cli("generate", *SMALL[:-1], 12, *options).status == 0
    assert json.loads((tmp_path / "b.json").read_text())["setting"]["cache"]["name"] == "first-block"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("demo", "--level balanced 2.9 33.6 dB docs/results.md"),
        ("wan", "--level balanced wan"),
    ],
)
def test_the_last_line_of_a_dense_run_says_what_a_level_gains(cli, demo, wan_folder, tmp_path, model, words):
    """With the figure that was measured on the model, and without one where there is none."""
    model = demo if model == "demo" else wan_folder
    outcome = cli("generate", *SMALL[:-1], 12, "--model", model, "--output", tmp_path / "a.png", "--frames", 1)
    assert outcome.status == 0, outcome.err
    last = outcome.out.splitlines()[-1]
    assert says(last, words) and says(last, "dB") == ("dB" in words)
    outcome = cli("generate", *SMALL, "--method", "dense", "--output", tmp_path / "b.gif")
    assert "--level" not in outcome.out + outcome.err
    assert "--level" not in cli("generate", *SMALL, "--output", tmp_path / "c.gif").out  # few steps, few tokens


def test_a_preset_is_what_is_recommended_and_what_is_given_wins(cli, demo, tmp_path):
    options = ("--method", "sla", "--preset", "--set", "block=32", "--output", tmp_path / "a.gif")
    assert cli("generate", *SMALL, *options).status == 0
    config = json.loads((tmp_path / "a.json").read_text())["setting"]["config"]
    assert (config["topk"], config["block"]) == (0.1, 32)


def test_a_negative_prompt_that_nothing_guides_by_is_told(cli, demo, flux_folder, tmp_path):
    size = ("--frames", 1, "--height", 32, "--width", 48, "--steps", 1, "--negative-prompt", "a red square")
    flux = ("--model", flux_folder, "--height", 32, "--width", 32, *size[6:])
    for number, (options, words) in enumerate(
        (
            (size, "--guidance 1"),  # the demo's own
            ((*size, "--guidance", 0.5), "--guidance 0.5"),
            ((*size, "--guidance", 3), None),
            ((*flux, "--guidance", 3), "true_cfg_scale 1"),
            ((*flux, "--guidance", 1, "--pipe", "true_cfg_scale=2"), None),
        )
    ):
        outcome = cli("generate", *options, "--output", tmp_path / f"{number}.png")
        assert outcome.status == 0, outcome.err
        warnings = [line for line in outcome.err.splitlines() if says(line, "--negative-prompt")]
        assert [says(line, words) for line in warnings] == [True] * (words is not None), outcome.err


def test_record_holds_all_it_takes_to_do_it_again(cli, demo, tmp_path):
    options = ("--method", "gna", "--set", "window=2x2x3", "--dense-steps", "1", "--dense-layers", "0,1", "--seed", 7)
    assert cli("generate", *SMALL, *options, "--prompt", "a red square", "--output", tmp_path / "a.gif").status == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["request"]["seed"] == 7
    assert record["request"]["model"] == "demo"
    assert record["call"]["prompt"] == "a red square"
    assert record["call"]["num_inference_steps"] == 2
    assert record["setting"] == {
        "method": "gna",
        "config": {"window": [2, 2, 3], "stride": 1, "dilation": 1, "causal": False, "share": "none", "refresh": 1},
        "schedule": {"dense_steps": 1, "dense_last_steps": 0, "dense_layers": [0, 1]},
        "dense_backend": None,
        "cache": None,
    }
    assert record["report"]["sparse_calls"] == 0
    assert record["versions"]["dit_accel"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["comparison"] is None


def test_seed_decides_the_noise(cli, demo, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli("generate", *SMALL, "--seed", seed, "--output", tmp_path / f"{name}.gif").status == 0
    a, b, c = ((tmp_path / f"{name}.gif").read_bytes() for name in "abc")
    assert a == b != c


def test_words_that_the_demo_does_not_know_are_named(cli, demo, tmp_path):
    options = (*SMALL, "--output", tmp_path / "a.gif")
    outcome = cli("generate", *options, "--prompt", "A red dog moves right, on a blue Cloud.")
    assert outcome.status == 0
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert says(line, "dog", "cloud", *clips.SHAPES) and "moves" not in line
    assert "warning" not in cli("generate", *options, "--prompt", "A red circle moves right, on a blue background!").err


def test_rate_and_frames(cli, demo, tmp_path):
    assert cli("generate", *SMALL, "--fps", 5, "--output", tmp_path / "a.mp4").status == 0
    with imageio.v2.get_reader(tmp_path / "a.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 5
        assert reader.count_frames() == 5


def test_an_unknown_family_argument_of_the_call_reaches_it(cli, demo, tmp_path):
    options = ("--pipe", "max_sequence_length=9", "--guidance", "1", "--negative-prompt", "a blue circle")
    assert cli("generate", *SMALL, *options, "--output", tmp_path / "a.gif").status == 0
    call = json.loads((tmp_path / "a.json").read_text())["call"]
    assert (call["max_sequence_length"], call["guidance_scale"]) == (9, 1)
    assert call["negative_prompt"] == "a blue circle"


def test_wan_folder_with_its_codec_tiled(cli, wan_folder, tmp_path):
    options = ("--model", wan_folder, "--method", "gna:window=0.5", "--vae-tiling")
    outcome = cli("generate", *options, *SMALL, "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.size) == (5, (48, 32))


def test_flux_folder_makes_png(cli, flux_folder, tmp_path):
    options = ("--model", flux_folder, "--height", 32, "--width", 48, "--steps", 2, "--pipe", "max_sequence_length=16")
    outcome = cli("generate", *options, "--method", "gna:window=0.5", "--compare", "--output", tmp_path / "a.png")
    assert outcome.status == 0, outcome.err
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (48, 32)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["grid"]["text"] == 16
    assert list(record["report"]["grids"]) == ["1x8x12 + 16 text first"]
    assert (tmp_path / "a-compare.png").exists()


def test_saved_accelerator(cli, demo, tmp_path):
    import dit_accel
    from dit_accel.pipelines.demo import load_demo

    with dit_accel.accelerated(load_demo(folder=demo), "tile", references=1, dense_layers=1) as accel:
        accel.save_pretrained(tmp_path / "saved")
    outcome = cli("generate", *SMALL, "--load", tmp_path / "saved", "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    report = json.loads((tmp_path / "a.json").read_text())["report"]
    assert (report["setting"]["method"], report["setting"]["config"]["references"]) == ("tile", 1)
    assert report["sparse_calls"] == report["dense_calls"] == 2


def test_loras_add_up(cli, demo, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from dit_accel.pipelines.demo import load_demo

    for name in "ab":
        pipe = load_demo(folder=demo)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(tmp_path / name, transformer_lora_layers=layers)
    pictures = []
    for names in ("", "a", "b", "ab"):
        options = [option for name in names for option in ("--lora", tmp_path / name)]
        outcome = cli("generate", *SMALL, *options, "--output", tmp_path / f"{names or 'none'}.png", "--frames", 1)
        assert outcome.status == 0, outcome.err
        pictures.append((tmp_path / f"{names or 'none'}.png").read_bytes())
    assert len(set(pictures)) == 4


def test_progress_and_results_go_to_different_streams(cli, demo, tmp_path):
    outcome = cli("generate", *SMALL, "--output", tmp_path / "a.gif")
    assert "2/2" in outcome.err
    assert "2/2" not in outcome.out


def test_compiled(cli, demo, tmp_path, monkeypatch):
    """Whole graphs, dense and sparse steps in one run; without a C++ compiler, so traced but not lowered."""
    from diffusers import WanTransformer3DModel

    compile_blocks = WanTransformer3DModel.compile_repeated_blocks
    compiled = []

    def traced(self, *, fullgraph):
        compiled.append(fullgraph)
        compile_blocks(self, fullgraph=fullgraph, backend="eager")

    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", traced)
    options = ("--compile", "--compare", "--method", "gna:window=0.5", "--dense-steps", 1)
    outcome = cli("generate", *SMALL, *options, "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    assert compiled == [True]
    report = json.loads((tmp_path / "a.json").read_text())["report"]
    assert report["sparse_calls"] == report["dense_calls"] == 2


@pytest.mark.parametrize(
    "cache", ["first-block", "mag:threshold=0.1", "taylorseer:cache_interval=2", "sea", "pab", "faster"]
)
def test_a_cache_that_breaks_graphs_is_refused_beside_compile(cache, cli, demo, tmp_path):
    for verb, output in (("generate", "a.gif"), ("eval", "out")):
        outcome = cli(verb, *SMALL, "--compile", "--cache", cache, "--output", tmp_path / output)
        assert outcome.status == 2 and says(outcome.err.splitlines()[-1], "--compile", cache, "--cache steps")
    assert not list(tmp_path.iterdir())


def test_a_cache_of_guided_batches_is_refused_without_one(cli, demo, tmp_path):
    cache = "faster:spatial_attention_block_skip_range=2,tensor_format=BCFHW"
    outcome = cli("generate", *SMALL, "--cache", cache, "--output", tmp_path / "a.gif")
    assert outcome.status == 2 and says(outcome.err.splitlines()[-1], "faster is_guidance_distilled=true 1")
    assert not list(tmp_path.iterdir())
    cache += ",is_guidance_distilled=true"
    assert cli("generate", *SMALL, "--cache", cache, "--output", tmp_path / "a.gif").status == 0


def test_verify_reports_how_far_each_layer_is_from_dense(cli, demo, tmp_path):
    options = ("--method", "gna:window=0.5", "--output", tmp_path / "a.gif")
    outcome = cli("generate", *SMALL, *options, "--verify")
    assert outcome.status == 0, outcome.err
    layers = json.loads((tmp_path / "a.json").read_text())["report"]["layers"]
    for layer in layers:
        assert says(outcome.out, f"{layer['relative_error']:.3g}", f"{layer['kept_mass']:.3f}")
    assert all(0 < layer["relative_error"] and 0 < layer["kept_mass"] < 1 for layer in layers)
    limit = sum(layer["relative_error"] for layer in layers) / len(layers)
    assert cli("generate", *SMALL, *options, "--overwrite", "--keep-dense-above", limit).status == 0
    report = json.loads((tmp_path / "a.json").read_text())["report"]
    assert report["sparse_calls"] == report["dense_calls"] == 2
    assert says(cli("generate", *SMALL, *options, "--overwrite", "--verify", "--compile").err, "--verify --compile")


@pytest.mark.parametrize("amounts", [("--dense-steps", 12), ("--dense-steps", 0.5, "--dense-last-steps", 0.5)])
def test_a_run_without_sparse_steps_is_said_before_it(cli, demo, tmp_path, amounts):
    outcome = cli("generate", *SMALL, "--method", "radial", *amounts, "--output", tmp_path / "a.gif")
    (line, *_) = outcome.err.splitlines()
    names = [option.removeprefix("--").replace("-", "_") for option in amounts[::2]]
    settings = map("{}={}".format, names, amounts[1::2])
    assert outcome.status == 0 and line.startswith("warning: ") and says(line, *settings, 2)


def test_a_warning_is_one_line_without_the_place_in_the_code(cli, demo, tmp_path):
    options = ("--method", "radial:decay=0.2", "--dense-layers", "1.0", "--output", tmp_path / "o.mp4")
    outcome = cli("generate", "--model", "demo", *SMALL, *options)
    (line,) = [line for line in outcome.err.splitlines() if says(line, "dense_layers")]
    assert outcome.status == 0 and line.startswith("warning: ") and ".py" not in outcome.err


def test_the_last_line_says_that_nothing_was_gained(cli, demo, tmp_path):
    method = "sparge:topk=0.1,topp=1.0,block=4,block_q=4"  # by mass: only the calls tell
    outcome = cli("generate", *SMALL, "--method", method, "--output", tmp_path / "a.gif")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == NOTHING_GAINED
    assert json.loads((tmp_path / "a.json").read_text())["report"]["kept_every_pair"]
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "b.gif")
    assert NOTHING_GAINED in cli("generate", *SMALL, "--method", method, *options).err
    sparse = cli("generate", *SMALL, "--method", "radial:decay=0.2", "--output", tmp_path / "c.gif")
    assert NOTHING_GAINED not in sparse.out


def test_a_saved_copy_of_the_embedded_model_is_a_model(root, tmp_path):
    """In a process that has not imported the embedded model's codec."""
    from dit_accel.pipelines.demo import load_demo

    load_demo().save_pretrained(tmp_path / "copy")
    options = (*SMALL, "--model", tmp_path / "copy", "--output", tmp_path / "a.gif")
    command = [sys.executable, "-m", "dit_accel", "generate", *map(str, options)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gif").exists()


def test_the_search_for_values_that_are_not_finite_shows_no_bars(cli, demo, tmp_path):
    outcome = cli("generate", *SMALL, "--guidance", "1e38", "--output", tmp_path / "a.gif")
    assert outcome.status == 2 and says(outcome.err.splitlines()[-1], "WanPipeline", "NaN", "--guidance")
    assert "it/s" not in outcome.err and "s/it" not in outcome.err


def test_an_output_that_another_run_makes_is_refused_before_the_work(cli, demo, tmp_path):
    """Another file in that folder is free, and a run that is refused leaves nothing."""
    options = ("generate", "--model", "demo", *SMALL, "--method", "gna:window=0.5", "--output")
    with files.hold(tmp_path / "o.gif", folder=False):
        outcome = cli(*options, tmp_path / "o.mp4")
        assert outcome.status == 2 and says(outcome.err, "--output", tmp_path / "o.mp4", os.getpid())
        assert cli(*options, tmp_path / "other.mp4").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "other.mp4"]


def test_an_output_that_another_run_made_meanwhile_is_not_replaced(cli, demo, tmp_path, monkeypatch):
    """The other run ends between the first look and the reservation."""
    hold = files.hold

    @contextlib.contextmanager
    def late(output, **how):
        (tmp_path / "o.mp4").write_text(files.MARK)
        with hold(output, **how) as locked:
            yield locked

    monkeypatch.setattr(job, "hold", late)
    outcome = cli("generate", "--model", "demo", *SMALL, "--method", "gna:window=0.5", "--output", tmp_path / "o.mp4")
    assert outcome.status == 2 and says(outcome.err, "--output", "--overwrite", tmp_path / "o.mp4")
    assert (tmp_path / "o.mp4").read_text() == files.MARK and len(list(tmp_path.iterdir())) == 1
