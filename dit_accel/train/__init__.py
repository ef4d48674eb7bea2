"""Fine-tuning that wins back the quality which sparse attention costs; `docs/fine-tuning.md` says how.

from dit_accel.train.settings import TrainSettings
from dit_accel.train.loop import train
train(pipe, TrainSettings(method="sla", config={"topk": 0.1}, objectives={"teacher": 1.0}), "data", "output")
"""
