"""Published models.

FLUX.1 makes images of 2,048 and 4,096 pixels a side. HunyuanVideo has no text at 768p, as GNA's paper measures it
(arXiv:2504.16922). `anchor-110k` has the size of a published figure of a block-sparse kernel on an H200: 64x64 blocks,
64 of them a row, 317 TFLOP/s without routing (FlashInfer, pull request 5326).
"""

from dit_accel.bench.rows import Shape, Target

SHAPES = (
    Shape(
        "anchor-110k",
        (1, 64, 1713),
        heads=7,
        targets=(Target.of("sparge", 64 / 1713, topk=0.0374, topp=0.0, block_q=64),),
        directions=("forward",),
        devices=(),  # where it is named
    ),
    Shape("cogvideox", (13, 30, 45), heads=48, head_dim=64, text=226, text_first=True),
    Shape("flux-2k", (1, 128, 128), heads=24, text=512, text_first=True),
    Shape("flux-4k", (1, 256, 256), heads=24, text=512, text_first=True),
    Shape("hunyuan-720p", (33, 45, 80), heads=24, text=256),
    Shape("hunyuan-768p", (30, 48, 80), heads=24),
    Shape("mochi", (28, 30, 53), heads=24, text=256),
    Shape("wan-1.3b-480p", (21, 30, 52), heads=12),
    Shape("wan-14b-480p", (21, 30, 52), heads=40),
    Shape("wan-14b-720p", (21, 45, 80), heads=40),
)
