"""What all tests share."""

import dataclasses
import gc
import importlib.util
import multiprocessing
import os
import pathlib
import shutil
import sys

import hypothesis
import pytest
from interpreter import drop_unused_work
from support_table import COLUMNS, checks_of

from dit_accel.caches.record import CacheReport

# Before anything imports a Hugging Face library: no test asks the network for a model.
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples in every run, and no verdict on how fast this machine makes them.
PROFILE = {"derandomize": True, "deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same everywhere", **PROFILE)
hypothesis.settings.load_profile("same everywhere")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    drop_unused_work()

# Garbage is not looked for until all tests are there: modules and tests are a million objects that stay.
gc.disable()

ROOT = pathlib.Path(__file__).parent.parent
EVIDENCE = pytest.StashKey[bool]()
COLLECTED = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The checkout."""
    return ROOT


@pytest.hookimpl(tryfirst=True)  # before any test is deselected
def pytest_collection_modifyitems(config, items):
    import torch

    torch.set_num_threads(1)  # the problems are tiny, and sums are in one order on every machine
    config.stash[COLLECTED] = list(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """From here on, garbage is looked for among what tests make, and a tenth as often: graphs have many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(7_000)
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # extensions complain of what is left at the end


@pytest.fixture
def collected(request):
    """Every collected test, those that are not to run too."""
    return request.config.stash[COLLECTED]


@pytest.fixture
def evidence(request):
    """Takes the report of a test that shows a cell of the support table, and holds it against what a cell must show."""

    def take(report):
        if isinstance(report, CacheReport):
            assert report.computed and report.skipped, "a step cache computes some calls and skips others"
            request.node.stash[EVIDENCE] = True
            return
        sparse = [layer for layer in report.layers if layer.sparse_calls]
        assert sparse, "no attention call was sparse"
        assert max(layer.density for layer in sparse) < 0.9, "nearly dense"
        request.node.stash[EVIDENCE] = True

    return take


# Which tests share a process, and in which order they run there, is chance under xdist. So none sees what ran before.


def draw_the_same_numbers():
    import torch

    torch.manual_seed(1)


def forget_what_was_compiled():
    """Graphs, and how often the code of a model was compiled, which has a limit."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    draw_the_same_numbers()
    forget_what_was_compiled()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What a test with markers `check` shows, as properties of its result; the support table is made of these.

    A test that shows a cell of the table passes only with `evidence`.
    """
    draw_the_same_numbers()
    result = yield
    for family, method, column in checks_of(item):
        assert column not in COLUMNS or item.stash.get(EVIDENCE, False), "no report was given to `evidence`"
        item.user_properties.append(("check", f"{family}/{method}/{column}"))
    return result


# The small models and their calls with the sizes a test asks for; see `pipelines/tiny_models.py`.


@pytest.fixture
def tiny_wan():
    import tiny_models

    return tiny_models.module("wan").build


@pytest.fixture
def wan_inputs():
    import tiny_models

    return tiny_models.module("wan").inputs


@pytest.fixture
def tiny_flux():
    import tiny_models

    return tiny_models.module("flux").build


@pytest.fixture
def flux_inputs():
    import tiny_models

    return tiny_models.module("flux").inputs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Runs `dit-accel` with these arguments."""

    def run(*arguments) -> Outcome:
        from dit_accel.cli import app

        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Outcome(stop.value.code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def starter():
    """Starts processes that are forked from one which has imported what is slow to import."""
    context = multiprocessing.get_context("forkserver")
    libraries = "diffusers.pipelines.wan.pipeline_wan transformers.models.umt5.modeling_umt5 torchmetrics.image"
    package = "dit_accel.cli.app dit_accel.eval.quality dit_accel.checkpoint.load matplotlib.backends.backend_agg"
    context.set_forkserver_preload([*libraries.split(), *package.split()])
    return context


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The demo's pipeline, smaller and untrained."""
    import torch

    from tools.demo.model import build_pipeline

    torch.manual_seed(0)
    pipe = build_pipeline(dim=64, layers=2, ffn_dim=64)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3)
    folder = tmp_path_factory.mktemp("models") / "demo"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def demo(demo_folder, monkeypatch):
    """Makes `--model demo` the untrained one, so that these tests do not depend on the trained weights."""
    from dit_accel.pipelines import demo

    monkeypatch.setattr(demo, "WEIGHTS", demo_folder)
    return demo_folder


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """A Wan text-to-video pipeline with Wan's own codec, in random weights."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from tools.demo.model import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )
    folder = tmp_path_factory.mktemp("models") / "wan"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    """A FLUX pipeline in random weights."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from tools.demo.model import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    words = len(tokenizer)
    clip = CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        projection_dim=16,
    )
    t5 = T5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8,) * 2,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            shift_factor=0.0,
            scaling_factor=1.0,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    folder = tmp_path_factory.mktemp("models") / "flux"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tmp_path):
    """Copies a model, so that a test may damage it."""

    def copied(folder):
        return shutil.copytree(folder, tmp_path / "copy")

    return copied
