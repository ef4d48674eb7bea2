"""The demo's components before training: tokenizer, text encoder, transformer, scheduler, codec."""

from __future__ import annotations

import re

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.pipelines.demo import clips
from dit_accel.pipelines.demo.codec import BlockCodec

TEXT_DIM = 128
SHIFT = 16.0  # of the flow's noise schedule: what a clip shows is settled at noise levels above 0.9


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions; other words become <unk>, and </s> closes the prompt as in T5."""
    templates = " ".join((clips.CAPTION, *clips.PARAPHRASES))
    words = re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", templates))
    words = sorted({*words, *clips.PALETTE, *clips.SHAPES, *clips.DIRECTIONS})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_pipeline(dim: int = 256, layers: int = 6, ffn_dim: int = 768, shift: float = SHIFT) -> WanPipeline:
    """A stock `WanPipeline` with random weights; draw after `torch.manual_seed` for the same weights again.

    Args:
        dim: width of the transformer, a multiple of 64 (a head).
        layers: number of transformer blocks.
        ffn_dim: width of their feed-forward layers.
        shift: of the scheduler's noise levels.
    """
    if dim % 64:
        raise ValueError(f"dim must be a multiple of the head size 64, got {dim}")
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    codec = BlockCodec()
    transformer = WanTransformer3DModel(
        num_attention_heads=dim // 64,
        attention_head_dim=64,
        in_channels=codec.config.z_dim,
        out_channels=codec.config.z_dim,
        text_dim=TEXT_DIM,
        ffn_dim=ffn_dim,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=codec,
        scheduler=UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=shift),
        transformer=transformer,
    )
