"""Families of videos whose calls need little reading: what tells them apart, as data.

Self-attention sees the video alone, and text enters through cross-attention, unless a family says otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.pipelines import demo
from dit_accel.pipelines.anchors import in_latent
from dit_accel.pipelines.family import TRAINING_FREE, CallLayout, Family, ModelInputs, Preset, video_family
from dit_accel.pipelines.levels import DEMO
from dit_accel.pipelines.reading import dense_note, packed_video, video_alone, video_of
from dit_accel.pipelines.sharding import IMAGE_TOKENS, TEXT_TOKENS, At, Sharding, Whole
from dit_accel.pipelines.sizes import Config, Sizes, patch_of, vae_frames, vae_pixels, video_sizes
from dit_accel.pipelines.stacks import VISUAL, VISUAL_FIRST, BlockStack
from dit_accel.tokens import TokenGrid


def anyflow(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, F, C, H, W], cut into patches."""
    return CallLayout(video_of(call, transformer.config.patch_size, axes=(1, 3, 4)))


def cogvideox(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, F, C, H, W], cut into patches, behind text [B, T, C]."""
    text = call.length("encoder_hidden_states")
    return CallLayout(video_of(call, patch_of(transformer.config), text, text_first=True, axes=(1, 3, 4)))


def easyanimate(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches within frames, behind text [B, T, C]."""
    text = call.length("encoder_hidden_states")
    if call.get("encoder_hidden_states_t5") is not None:
        text += call.length("encoder_hidden_states_t5")
    return CallLayout(video_of(call, patch_of(transformer.config), text, text_first=True))


def kandinsky5(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, F, H, W, C], cut into patches."""
    if call.get("sparse_params") is not None:
        raise DitAccelError(
            f"{call.owner} runs its own sparse attention (NABLA) with tokens in another order, so there is no dense "
            "attention to replace. Use a checkpoint with attention_type='regular', or leave the model as it is."
        )
    return CallLayout(video_of(call, transformer.config.patch_size, axes=(1, 2, 3)))


def kandinsky6(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, F, H, W, C], cut into patches, and its positions in time, rows and columns or None."""
    grid = video_of(call, transformer.config.patch_size, axes=(1, 2, 3))
    places = call.get("visual_rope_pos")
    frames = grid.frames if places is None else call.once(places[0], _rising)
    conditioning = (grid.frames - frames) * grid.height * grid.width
    grid = TokenGrid(frames, grid.height, grid.width, conditioning=conditioning)
    return CallLayout(grid, notes=dense_note(conditioning))


def _rising(places: torch.Tensor) -> int:
    """How many values rise from the start."""
    back = torch.nonzero(places[1:] <= places[:-1]).flatten()
    return int(back[0]) + 1 if len(back) else len(places)


def ltx2(transformer: nn.Module, call: ModelInputs) -> CallLayout:
    """The packed video [B, N, C] and its sizes in tokens, or its coordinates."""
    if call.get("video_self_attention_mask") is not None:
        raise DitAccelError(
            "LTX-2 is called with a video_self_attention_mask, which weighs pairs of tokens in ways that accelerated "
            "attention cannot; call it without, or run it dense."
        )
    return packed_video(transformer, call)


def skyreels_v2(transformer: Any, call: ModelInputs) -> CallLayout:
    """The latent [B, C, F, H, W], cut into patches.

    With causal blocks (`num_frame_per_block` above 1) the model masks later frames; such a model is refused.
    """
    block = transformer.config.num_frame_per_block
    if block > 1:
        raise DitAccelError(
            f"This SkyReels V2 has num_frame_per_block={block}: its frames may not see later blocks, which "
            "sparse attention cannot honour. Use one frame a block (causal_block_size=1), or run it dense."
        )
    return video_alone(transformer, call)


def cogvideox_sizes(transformer: Config, vae: Config) -> Sizes:
    """In version 1.5 a token holds two latent frames; the pipeline pads the latent by one frame."""
    pixels, text = vae_pixels(vae), transformer["max_text_seq_length"]
    default = transformer["sample_frames"], transformer["sample_height"] * pixels, transformer["sample_width"] * pixels
    return video_sizes(vae, patch_of(transformer), *default, text=text, text_first=True)


def cosmos_sizes(transformer: Config, vae: Config) -> Sizes:
    """Cosmos 1 makes 121 frames, 8 a latent; Predict 2 makes 93, 4 a latent."""
    return video_sizes(vae, transformer["patch_size"], 121 if vae_frames(vae) == 8 else 93, 704, 1280)


def easyanimate_sizes(transformer: Config, vae: Config) -> Sizes:
    """All but two stages of the VAE have a stride along time."""
    strides = dict(vae) | {"temporal_compression_ratio": 2 ** (len(vae["block_out_channels"]) - 2)}
    return video_sizes(strides, patch_of(transformer), 49, 512, 512, text=256, text_first=True)


def kandinsky_sizes(transformer: Config, vae: Config) -> Sizes:
    return video_sizes(vae, patch_of(transformer), 121, 512, 768)


def wan_sizes(transformer: Config, vae: Config) -> Sizes:
    """Rotary positions limit each axis; `WanPipeline.check_inputs` wants multiples of 16; the demo has its own size."""
    longest, size = transformer["rope_max_seq_len"], (81, 480, 832)
    if vae.get("_class_name") == DEMO:
        size = demo.DEFAULTS.num_frames, demo.DEFAULTS.height, demo.DEFAULTS.width
    return video_sizes(vae, transformer["patch_size"], *size, longest=longest, multiple=16)


def kandinsky_head_dim(attention: Any) -> int:
    return int(attention.query_norm.normalized_shape[0])


# Wan 2.2's TI2V-5B has a timestep for each token.
WAN = Sharding.of_blocks("blocks", rotary_emb=(1, 1), temb=At(1, dims=4))
WAN_STACK = BlockStack({"blocks": VISUAL}, by_token=WAN.inputs["blocks.*"], latent=True)
# Unlike Diffusers' own, which shares text too and then takes no mask of it.
LTX = Sharding.of_blocks("transformer_blocks", temb=1, image_rotary_emb=(1, 1))
COSMOS = Sharding.of_blocks(
    "transformer_blocks", output="transformer_blocks.-1", embedded_timestep=At(1, dims=3), temb=At(1, dims=3),
    image_rotary_emb=(0, 0), extra_pos_emb=1, controlnet_residual=1,
)  # fmt: skip
COGVIDEOX = Sharding.of_joint_blocks(image_rotary_emb=(0, 0))


FAMILIES = (
    video_family(
        name="anyflow",
        transformers=("AnyFlowTransformer3DModel",),
        attention=("blocks.*.attn1",),
        layout=anyflow,
        sizes=wan_sizes,
        stack=BlockStack({"blocks": VISUAL}),
        sharding=Sharding.of_blocks("blocks", temb=1, rotary_emb={"query": 2, "key": 2}),
        summary="AnyFlow, bidirectional",
    ),
    # Text precedes the video in every block. Its padding is attended, as in training. CogVideoX 1.5 also cuts the
    # latent into patches along time. ConsisID has the blocks of 1.0; its face features enter through cross-attention
    # between the blocks, which stays untouched.
    video_family(
        name="cogvideox",
        transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        layout=cogvideox,
        sizes=cogvideox_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST}),
        sharding=COGVIDEOX,
        # ConsisID normalizes text and video together behind the blocks
        shardings={
            "ConsisIDTransformer3DModel": dataclasses.replace(
                COGVIDEOX, outputs={"transformer_blocks.-1": (IMAGE_TOKENS, TEXT_TOKENS)}
            )
        },
        summary="CogVideoX 1.0 and 1.5: text, image and video to video, control; ConsisID",
    ),
    # Image features enter through cross-attention too. The timestep is a function of sigma that differs between the
    # generations, so a bare transformer needs `set_step`.
    Family(
        name="cosmos",
        transformers=("CosmosTransformer3DModel",),
        layout=video_alone,
        sizes=cosmos_sizes,
        sharding=COSMOS,
        summary="Cosmos 1, Predict 2 and 2.5: text, image and video to world, text to image",
        timestep_scale=None,
        recommended=TRAINING_FREE
        | {
            "gna": Preset(
                config={"window": ("full", 32 / 44, 0.6), "stride": (1, 8, 16)},
                schedule={"dense_steps": 12 / 35},
                source="GNA (arXiv:2504.16922): Cosmos-7B, window 16x32x48 of 16x44x80 tokens, 12 of 35 steps dense",
            ),
        },
    ),
    # Text precedes the video in every block. Its padding is attended, as in training. Text of a second encoder follows
    # the first's. Inpainting and control latents are further channels of the same grid.
    video_family(
        name="easyanimate",
        transformers=("EasyAnimateTransformer3DModel",),
        layout=easyanimate,
        sizes=easyanimate_sizes,
        stack=BlockStack({"transformer_blocks": VISUAL_FIRST}),
        sharding=COGVIDEOX,
        summary="EasyAnimate: text, image and video to video, control",
    ),
    video_family(
        name="kandinsky5",
        transformers=("Kandinsky5Transformer3DModel",),
        attention=("visual_transformer_blocks.*.self_attention",),
        layout=kandinsky5,
        sizes=kandinsky_sizes,
        stack=BlockStack(
            {"visual_transformer_blocks": ("visual_embed",)}, visual="visual_embed", outputs=("out_layer",)
        ),
        sharding=Sharding.of_blocks(
            "visual_transformer_blocks", "visual_embed", "visual_transformer_blocks.-1", rope=1
        ),
        summary="Kandinsky 5 (without its own sparse attention)",
        head_dim=kandinsky_head_dim,
    ),
    # The video's part of each block; sound and text stay the model's own. A reference frame behind the video, whose
    # position in time starts again, is dense both ways.
    video_family(
        name="kandinsky6",
        transformers=("Kandinsky6Transformer3DModel",),
        attention=("visual_transformer_blocks.*.video_dec_block.self_attention",),
        layout=kandinsky6,
        sizes=kandinsky_sizes,
        stack=BlockStack(
            {"visual_transformer_blocks": ("vis", "aud")},
            visual="vis",
            both=True,
            outputs=("out_layer", "audio_out_layer"),
        ),
        # sound is the same in every process, and attends to all of the video
        sharding=Sharding(
            {
                "visual_transformer_blocks.0": {"vis": 1},
                "visual_transformer_blocks.*.video_dec_block.self_attention": {"rotary_emb": 0},
                "visual_transformer_blocks.*.va_cross_attention": {"rope_q": 0},
                "visual_transformer_blocks.*.av_cross_attention": {"encoder_hidden_states": Whole(1)},
            },
            outputs={"visual_transformer_blocks.-1": (IMAGE_TOKENS, None)},
        ),
        summary="Kandinsky 6: text and image to video with sound; the video's self-attention",
        head_dim=kandinsky_head_dim,
    ),
    # The packed video follows the keyframes of `LTXConditionPipeline`. The call has the video's sizes, or the
    # coordinates of all tokens.
    video_family(
        name="ltx",
        transformers=("LTXVideoTransformer3DModel",),
        layout=packed_video,
        sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 161, 512, 704),
        stack=BlockStack(by_token=LTX.inputs["transformer_blocks.*"]),
        sharding=LTX,
        summary="LTX-Video: text and image to video, keyframes",
    ),
    # The audio stream's self-attention and the attention between the streams stay untouched. A layer whose attention
    # the model skips (spatio-temporal guidance) stays skipped. Keyframes and conditioning videos behind the video are
    # dense both ways. A mask over pairs of video tokens (IC-LoRA below full strength) is refused.
    Family(
        name="ltx2",
        transformers=("LTX2VideoTransformer3DModel",),
        layout=ltx2,
        sizes=lambda transformer, vae: video_sizes(vae, patch_of(transformer), 121, 512, 768),
        stack=BlockStack(
            {"transformer_blocks": ("hidden_states", "audio_hidden_states")},
            both=True,
            outputs=("proj_out", "audio_proj_out"),
        ),
        # sound is the same in every process, and attends to all of the video, whose places Diffusers' own leaves out
        sharding=Sharding.of_blocks(
            "transformer_blocks", temb=1, temb_ca_scale_shift=1, temb_ca_gate=1, video_rotary_emb=(-2, -2)
        ).with_inputs(
            {"transformer_blocks.*.audio_to_video_attn": {"query_rotary_emb": (-2, -2)}}
            | {"transformer_blocks.*.video_to_audio_attn": {"encoder_hidden_states": Whole(1)}}
        ),
        summary="LTX-2: video with audio, keyframes, conditioning videos; the video's self-attention",
        recommended=TRAINING_FREE
        | {
            "sol": Preset(
                config={"tau": "1.3..0.8"},
                schedule={},
                source="Wan2GP, pull request 2289: LTX-2 with tau from 1.3 in the first step of each phase to 0.8 in "
                "the last, no dense steps; marked as experimental there. Blocks of 128 queries in place of 64",
            ),
            "sla": Preset(
                config={"topk": 0.3},
                schedule={},
                source="TurboT2AV: LTX-2 19B at 1024x1792 with step-distilled weights, which hold no SLA; the share "
                "was chosen by eye",
            ),
        },
    ),
    # The blocks are Wan's. In diffusion forcing the frames of one call are at different denoising steps. The schedule
    # follows the largest timestep, that of the frame furthest behind.
    video_family(
        name="skyreels_v2",
        transformers=("SkyReelsV2Transformer3DModel",),
        attention=("blocks.*.attn1",),
        layout=skyreels_v2,
        # rotary positions limit each axis
        sizes=lambda transformer, vae: video_sizes(
            vae, transformer["patch_size"], 97, 544, 960, longest=transformer["rope_max_seq_len"]
        ),
        stack=BlockStack({"blocks": VISUAL}),
        # in diffusion forcing every token has a timestep
        sharding=Sharding.of_blocks("blocks", rotary_emb=(1, 1), temb=At(2, dims=4)),
        summary="SkyReels V2: text to video, image to video, diffusion forcing (without causal blocks)",
    ),
    # The image tokens of Wan 2.1's image-to-video enter through cross-attention too. TI2V-5B has one timestep per
    # token. VACE's control blocks attend over the same grid as the video. Animate's conditioning image is the first
    # frame of its latent; its face adapters are cross-attention. ChronoEdit has the same blocks.
    Family(
        name="wan",
        transformers=(
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        attention=("vace_blocks.*.attn1", "blocks.*.attn1"),
        layout=video_alone,
        sizes=wan_sizes,
        stack=BlockStack({"blocks": VISUAL}),
        # between VACE's blocks hints are added, between Animate's are face adapters
        stacks={"WanTransformer3DModel": WAN_STACK, "ChronoEditTransformer3DModel": WAN_STACK},
        sharding=WAN,
        # the hints of VACE's blocks are shares; a face adapter of Animate compares frames with frames
        shardings={
            "WanVACETransformer3DModel": WAN.with_inputs(
                {"vace_blocks.0": {"control_hidden_states": 1}}
                | {"vace_blocks.*": {"hidden_states": 1, "rotary_emb": (1, 1)}}
            ),
            "WanAnimateTransformer3DModel": WAN.with_inputs(
                {"face_adapter.*": {"hidden_states": Whole(1)}}, results={"face_adapter.*": 1}
            ),
        },
        summary="Wan 2.1 and 2.2: text to video, image to video, VACE, Animate; ChronoEdit",
        recommended=TRAINING_FREE
        | {
            "radial": Preset(
                config={"decay": 0.2, "rule": "released"},
                schedule={"dense_steps": 0.24, "dense_layers": 1},
                source="Radial Attention (arXiv:2506.19852), scripts/wan_t2v_inference.sh: Wan2.1-14B, 69 frames of "
                "768x1280, 12 of 50 steps dense",
            ),
            "sla": Preset(
                config={"topk": 0.1, "block_q": 128},
                schedule={},
                source="TurboDiffusion: --sla_topk 0.1 for its fine-tuned Wan2.1 and Wan2.2, 128 queries and 64 keys "
                "a block (turbodiffusion/inference/modify_model.py); needs fine-tuned weights",
            ),
            "rectified": Preset(
                config={"drop": 0.75},
                schedule={"dense_steps": 0.2, "dense_layers": 2},
                source="Rectified SpaAttn (arXiv 2511.19835): Wan2.1 with drop 0.75 and layers 0 and 1 dense; dense "
                "steps as for Sol-Attn (arXiv 2607.24027)",
            ),
        },
        # of Wan 2.2 A14B, whose two transformers run on one trajectory
        recommended_pair={
            "radial": Preset(
                config={"decay": 0.8, "rule": "released", "block": 64},
                schedule={"dense_steps": 11 / 40, "dense_layers": 1},
                source="Radial Attention (arXiv:2506.19852), scripts/wan_22_t2v_inference.sh: Wan2.2-A14B, 77 frames "
                "of 768x1280, 11 of 40 steps dense, blocks of 64 tokens",
            ),
            "rectified": Preset(
                config={"drop": 0.85},
                schedule={"dense_steps": 0.2, "dense_layers": 2},
                source="Rectified SpaAttn (arXiv 2511.19835): Wan2.2-A14B with drop 0.85 and layers 0 and 1 of both "
                "dense; dense steps as for Sol-Attn (arXiv 2607.24027)",
            ),
        },
        extend=in_latent,
    ),
)
