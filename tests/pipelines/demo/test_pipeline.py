import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from messages import names

from dit_accel.pipelines.demo import DEFAULTS, LARGE, WEIGHTS, load_demo

LIMIT = 16_000_000  # bytes of all weights together


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_weights_are_small_and_free_of_pickle():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= LIMIT


def test_it_is_a_stock_wan_pipeline():
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]


def test_the_sizes_give_something_to_skip():
    assert (DEFAULTS.num_frames, DEFAULTS.height, DEFAULTS.width) == (17, 192, 192)
    assert LARGE.tokens >= 8000
    for size in (DEFAULTS, LARGE):
        assert size.height % 16 == size.width % 16 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_generates(dtype):
    pipe = load_demo(dtype)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "generator": generator}
    video = pipe("a red circle moves right on a blue background", **call).frames[0]
    assert video.shape == (5, 32, 48, 3)
    assert np.isfinite(video).all()
    assert video.min() >= 0
    assert video.max() <= 1


def test_seed_and_prompt_decide_the_video(pipe):
    def generate(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "generator": generator}
        return pipe(prompt, **call).frames[0]

    first = generate("a red circle moves right on a blue background", 0)
    assert np.array_equal(first, generate("a red circle moves right on a blue background", 0))
    assert not np.array_equal(first, generate("a red circle moves right on a blue background", 1))
    assert not np.array_equal(first, generate("a green square moves up on a white background", 0))


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=names("model_index.json")):
        load_demo(folder=tmp_path)


def test_loading_needs_no_network_and_importing_needs_no_diffusers():
    script = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("the demo must not use the network")
socket.socket.connect = refuse
import dit_accel.pipelines.demo as demo
assert "diffusers" not in sys.modules and "torch" not in sys.modules, "the import must stay light"
demo.load_demo()
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
