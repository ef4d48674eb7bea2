"""What the tests of the evaluation share: networks small enough to know their answers, and a tiny CLIP."""

import json

import numpy as np
import pytest
import torch

ORIGINAL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}  # as OpenAI's folders say it
ORIGINAL |= {"image_processor_type": "CLIPImageProcessor", "resample": 3, "do_center_crop": True}
ORIGINAL |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


class Pooled:
    """A stand-in for CLIP: its vectors are the colours of an image's quarters; every text is one fixed vector."""

    name = "pooled"

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(frames, 2).flatten(1)

    def images(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.features(frames), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.ones(len(texts), 12), dim=-1)


@pytest.fixture
def pooled():
    return Pooled()


@pytest.fixture
def clips():
    """Makes `count` random clips, uint8 [F, H, W, 3]."""

    def make(count: int, frames: int = 5, side: int = 16, seed: int = 0):
        source = np.random.default_rng(seed)
        return [source.integers(0, 256, (frames, side, side, 3), dtype=np.uint8) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights in the format of the hub's."""
    from transformers import CLIPConfig, CLIPModel

    from tools.demo.model import build_tokenizer

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps(ORIGINAL))
    return place
