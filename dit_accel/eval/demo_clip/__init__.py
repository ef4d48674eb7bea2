"""The embedded CLIP: a small `transformers` CLIP trained on the demo's captioned clips, for machines without network.

`FOLDER` holds it in transformers' format, and `dit_accel.eval.networks.Clip.load("demo-clip")` loads it. `README.md`
beside this file is the model card; `tools/demo_clip` makes the weights and the card's figures.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
NAME = "demo-clip"  # in the names of figures made with it: fid[demo-clip]
