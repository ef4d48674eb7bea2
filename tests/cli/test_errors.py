"""What the user can mend: one line on stderr, status 2, no traceback, and nothing written."""

import errno
import json
import os

import pytest
from messages import says
from PIL import Image

import dit_accel

SIZE = ("--frames", "5", "--height", "32", "--width", "48", "--steps", "1")
TILE = ("--method", "tile:references=1")


@pytest.fixture
def refused(cli, tmp_path):
    """Runs a verb that should be refused; returns the line it was refused with."""

    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = cli(*arguments)
        assert outcome.status == 2, outcome
        assert outcome.out == ""
        (line,) = outcome.err.splitlines()
        assert line.startswith("dit-accel: error: ")
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return line.removeprefix("dit-accel: error: ")

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "gnaa"), "method 'gnaa' 'gna'"),
        (("--method", "radial", "--set", "decat=0.2"), "radial 'decat' 'decay'"),
        (("--method", "gna:window=4x4x4"), "window"),
        (("--method", "tile"), "tile:references=2"),
        (("--method", "gna:window"), "key=value"),
        (("--method", "tile:references=4"), "references"),
        (("--method", "tile:references=3"), "keeps every pair"),
        (("--method", "heads"), "keeps every pair"),
        (("--method", "sol:sink=99999999999,block=4,block_q=4"), "keeps every pair"),
        (("--method", "sla:block=1024"), "keeps every pair"),
        (("--method", "sparge:block=1024"), "keeps every pair"),
        (("--method", "rectified:block=1024"), "keeps every pair"),
        (("--method", "proxy:block=1024"), "keeps every pair"),
        (("--method", "gna:window=0.5,share=residual"), "keeps every pair"),
        (("--method", "gna:window=0.5,share=output"), "keeps every pair"),
        (("--steps", "99999999999999999999"), "--steps"),
        (("--steps", "100000000"), "--steps '100000000'"),
        (("--model", ""), "--model demo"),
        (("--method", "radial:decay=0"), "decay"),
        (("--method", "sla:topk=0.95,skip=0.2,linear_scope=marginal"), "topk"),
        (
            ("--method", "tile", "--preset"),
            "tile wan",
        ),
        (("--method", "dense", "--preset"), "dense wan"),
        (("--preset",), "sol tau=1.0"),
        (("--level", "fast", "--method", "sol"), "--method"),
        (("--level", "fast", "--preset", "--set", "tau=1"), "--preset --set"),
        (("--level", "fast", "--load", "none"), "--load"),
        (("--level", "slow"), "--level"),
        (("--method", "fast"), "--level fast"),
        (("--dense-steps", "4"), "--method"),
        (("--set", "window=3"), "--method"),
        (
            ("--method", "tile:references=1", "--dense-steps", "many"),
            "dense_steps >= 0 [0 1] 'many'",
        ),
        (
            ("--method", "tile:references=1", "--dense-steps", "-1"),
            "dense_steps >= 0 [0 1] -1",
        ),
        (
            ("--method", "tile:references=1", "--dense-layers", "0,x"),
            "dense_layers >= 0 'x'",
        ),
        (
            ("--method", "tile:references=1", "--dense-layers", ","),
            "--dense-layers",
        ),
        (
            ("--method", "tile:references=1", "--dense-layers", "0,,1"),
            "--dense-layers",
        ),
        (("--frames", "4"), "3 5"),
        (("--height", "33"), "32 48"),
        (("--width", "8000"), "64"),
        (("--steps", "0"), "--steps '0'"),
        (("--steps", "four"), "--steps 'four'"),
        (("--seed", "-1"), "--seed '-1'"),
        (("--seed", str(2**64)), "0 2**64 - 1"),
        (("--guidance", "nan"), "guidance nan"),
        (("--guidance", "-1"), "--guidance 0 '-1'"),
        (("--method", ""), "''"),
        (("--dtype", "int8"), "--dtype"),
        (("--offload", "model"), "CPU"),
        (("--offload", "disk"), "--offload 'disk'"),
        (("--device", "cuda:97"), "--device cuda:97"),
        (("--device", "toaster"), "--device toaster"),
        (("--device", "meta"), "--device meta"),
        (("--image", "none.png"), "--image none.png"),
        (("--pipe", "max_sequence_lenght=3"), "'max_sequence_length'"),
        (("--pipe", "max_sequence_length"), "--pipe key=value"),
        (("--pipe", "max_sequence_length=many"), "'many'"),
        (("--pipe", "max_sequence_length=9.5"), "'9.5'"),
        (("--pipe", "max_sequence_length=true"), "'true'"),
        (("--pipe", "max_sequence_length=0"), "1 0"),
        (("--pipe", "latents=3"), "torch.Tensor '3'"),
        (("--pipe", "attention_kwargs=3"), "dict[str '3'"),
        (("--pipe", "height=64"), "--height"),
        (("--pipe", "num_videos_per_prompt=2"), "--seed"),
        (("--pipe", "attention_kwargs=[NaN]"), "--pipe NaN"),
        (("--lora", "no/such/lora"), "--lora no/such/lora .safetensors"),
        (("--lora", "/nope"), "--lora /nope"),
        (("--lora", "no/lora"), "--lora no/lora Hub"),
        (("--load", "none"), "--load none"),
        (("--revision", "main"), "--revision"),
        (("--promt", "a"), "--promt"),
        (("--verify",), "--verify"),
        (("--keep-dense-above", "0.1"), "--keep-dense-above 0.1"),
        ((*TILE, "--keep-dense-above", "0.1", "--compile"), "--keep-dense-above 0.1 --compile"),
        (("--any-weights",), "--any-weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options(refused, demo, tmp_path, options, message):
    line = refused("generate", *SIZE, "--output", tmp_path / "a.mp4", *options)
    assert says(line, message)
    assert "Value error" not in line and ("--verify" in line) == ("--verify" in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--pipe", "foo=1"), "'foo'"),
        (("generate", "--guidance", "nan"), "guidance"),
        (("generate", "--negative-prompt", "x", "--pipe", "height=1"), "--height"),
        (("eval", "--method", "gna:window=0.5", "--pipe", "foo=1"), "'foo'"),
        (
            ("eval", "--method", "gna:window=0.5", "--attention-report", "steps=0,99"),
            "step 99",
        ),
        (("train", "--recipe", "gna-demo", "--tracker", "banana"), "tracker 'banana'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_no_weights_is_refused_before_they_are_loaded(
    refused, demo, tmp_path, monkeypatch, arguments, message
):
    from dit_accel.generation import sources

    def load(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(sources, "load", load)
    size = () if arguments[0] == "train" else SIZE
    verb, *options = arguments
    output = tmp_path / ("a.mp4" if verb == "generate" else "out")
    assert says(refused(verb, *size, "--output", output, *options), message)


def test_pictures(refused, demo, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")
    assert says(refused("generate", *SIZE, "--image", tmp_path / "picture.png"), "WanPipeline", "--image")
    assert says(refused("generate", *SIZE, "--image", tmp_path / "text.png"), "--image", tmp_path / "text.png")


@pytest.mark.parametrize("verb", [("generate",), ("plan", "--method", "radial")], ids=" ".join)
class TestModels:
    """A model that is not there or not whole, for every verb that takes one."""

    def test_missing_folder(self, refused, verb):
        line = refused(*verb, "--model", "./no/such/folder")
        assert says(line, "./no/such/folder", "demo", "model_index.json", "owner/name")

    def test_hub_without_network(self, refused, verb):
        assert says(refused(*verb, "--model", "nobody/nothing"), "nobody/nothing", "Hub", "`hf auth login`")

    def test_not_a_pipeline(self, refused, verb, tmp_path):
        assert says(refused(*verb, "--model", tmp_path), tmp_path, "model_index.json")

    def test_a_file(self, refused, verb, tmp_path):
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(b"")
        assert says(refused(*verb, "--model", weights), "--model", weights, "model_index.json")

    def test_damaged_index(self, refused, verb, tmp_path):
        (tmp_path / "model_index.json").write_text('{"transformer": ')
        assert says(refused(*verb, "--model", tmp_path), tmp_path / "model_index.json", "JSON")

    def test_missing_configuration(self, refused, verb, copy, wan_folder):
        model = copy(wan_folder)
        (model / "vae" / "config.json").unlink()
        line = refused(*verb, "--model", model)
        assert says(line, "vae/config.json", os.strerror(errno.ENOENT))

    def test_family_that_is_not_supported(self, refused, verb, tmp_path):
        index = {"_class_name": "XPipeline", "transformer": ["diffusers", "XTransformer3DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        line = refused(*verb, "--model", tmp_path)
        assert says(line, tmp_path, "XTransformer3DModel", *dit_accel.list_families())

    def test_model_without_a_transformer(self, refused, verb, tmp_path):
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert says(refused(*verb, "--model", tmp_path), tmp_path, "transformer")


class TestWeights:
    """Weights that cannot be used."""

    @pytest.fixture
    def generate(self, refused, copy, wan_folder, tmp_path):
        model = copy(wan_folder)
        return model, lambda: refused("generate", *SIZE, "--model", model, "--output", tmp_path / "a.mp4")

    @pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
    @pytest.mark.parametrize("share", [0.5, 0], ids=["half", "empty"])
    def test_truncated_safetensors(self, generate, component, share):
        model, run = generate
        (weights,) = (model / component).glob("*.safetensors")
        content = weights.read_bytes()
        weights.write_bytes(content[: int(len(content) * share)])
        assert says(run(), weights)

    def test_missing_safetensors(self, generate, caplog):
        model, run = generate
        next((model / "transformer").glob("*.safetensors")).unlink()
        assert says(run(), model)
        assert caplog.messages == []  # where a library's log goes to stderr, these are further lines

    def test_pickles_are_not_read(self, generate):
        model, run = generate
        weights = next((model / "transformer").glob("*.safetensors"))
        weights.rename(weights.with_suffix(".bin"))
        assert says(run(), model)

    def test_code_of_the_model_is_not_run(self, generate):
        model, run = generate
        index = json.loads((model / "model_index.json").read_text())
        index["vae"] = ["own_code", "OwnCodec"]
        (model / "model_index.json").write_text(json.dumps(index))
        (model / "vae" / "own_code.py").write_text("raise SystemExit('the code of the model ran')")
        assert says(run(), model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.webm", ".mp4 .gif"),
        ("a.png", ".mp4 .gif"),
        ("folder.mp4", "folder"),
        ("file/a.mp4", os.strerror(errno.ENOTDIR)),
    ],
)
def test_outputs(refused, demo, tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    assert says(refused("generate", *SIZE, "--output", tmp_path / name), "--output", tmp_path / name, message)


def test_read_only_folder(refused, demo):
    assert says(refused("generate", *SIZE, "--output", "/proc/a.mp4"), "--output", "/proc/a.mp4")


def test_a_video_is_no_image_model(refused, flux_folder, tmp_path):
    options = ("--model", flux_folder, "--height", 32, "--width", 32)
    assert says(refused("generate", *options, "--output", tmp_path / "a.mp4"), "--output", tmp_path / "a.mp4", ".png")
    assert says(refused("generate", *options, "--frames", 5), "frames", 5)


class TestSaved:
    """A saved accelerator that does not fit or is not whole."""

    @pytest.fixture
    def saved(self, demo, tmp_path):
        import dit_accel
        from dit_accel.pipelines.demo import load_demo

        with dit_accel.accelerated(load_demo(folder=demo), "sla", topk=0.3, block=4) as accel:
            accel.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    def test_another_model(self, refused, saved, wan_folder, tmp_path):
        line = refused("generate", *SIZE, "--model", wan_folder, "--load", saved, "--output", tmp_path / "a.mp4")
        assert says(line, saved, "WanTransformer3DModel")

    def test_truncated(self, refused, saved, tmp_path):
        (weights,) = saved.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:100])
        assert says(refused("generate", *SIZE, "--load", saved, "--output", tmp_path / "a.mp4"), weights)

    def test_not_one(self, refused, demo, tmp_path):
        assert says(refused("generate", *SIZE, "--load", tmp_path), tmp_path, ".safetensors")

    def test_with_another_method(self, refused, saved):
        line = refused("generate", *SIZE, "--load", saved, "--method", "radial")
        assert says(line, "--load", saved, "--method")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--grid"),
        (("--grid", "2x2x2", "--model", "demo"), "--grid"),
        (("--grid", "2x2"), "--grid 2x2"),
        (("--grid", "0x2x2"), "frames 1 0"),
        (("--grid", "2x2x2", "--frames", "5"), "--frames --model --grid"),
        (("--grid", "2x2x2", "--revision", "main"), "--revision --model"),
        (("--model", "demo", "--text", "5"), "--text --grid"),
        (("--grid", "4x4x4", "--image", "mask.jpg"), "--image mask.jpg .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plan_options(refused, demo, options, message):
    assert says(refused("plan", "--method", "radial", *options), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "a=1"), "--set a=1 --load"),
        (("--set", "a=1", "--model", "demo"), "--set a=1 --load"),
        (("--revision", "x"), "--revision x --model"),
        (("--revision", "x", "--load", "none"), "--revision x --model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_doctor_options(refused, options, message):
    assert says(refused("doctor", *options), message)


@pytest.mark.parametrize("verb", ["plan", "generate"])
def test_a_size_that_the_pipeline_would_refuse_is_refused_by_both(refused, demo, tmp_path, verb):
    output = ("--output", tmp_path / "a.mp4") if verb == "generate" else ()
    line = refused(verb, "--method", "radial:decay=0.2", "--model", "demo", "--height", "136", *output)
    assert says(line, "height", 136, 16)
