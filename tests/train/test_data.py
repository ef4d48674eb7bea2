"""Prepared data: what is written comes back, the order follows from seed and position, bad folders are refused."""

import json

import pytest
import torch
from messages import names

from dit_accel import DitAccelError
from dit_accel.train import data
from dit_accel.train.data import Dataset, Order, TrainingSample, collate


def sample(index: int, width: int = 4) -> TrainingSample:
    generator = torch.Generator().manual_seed(index)
    call = {
        "encoder_hidden_states": torch.randn(1, 3, 5, generator=generator),
        "img_ids": torch.arange(6).view(2, 3),
        "img_shapes": [[1, 2, width]],
    }
    return TrainingSample(torch.randn(1, 2, width, generator=generator), call, f"prompt {index}")


def test_round_trip_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 200)
    wanted = [sample(i) for i in range(5)]
    assert data.write(tmp_path, wanted, wanted[0].call, {"source": "test"}) == 5
    assert len(list(tmp_path.glob("0*.safetensors"))) > 1
    read = Dataset(tmp_path)
    assert len(read) == 5 and read.about == {"source": "test"}
    assert read.kinds() == [written.kind for written in wanted] == [read[0].kind] * 5
    for index, written in enumerate(wanted):
        back = read[index]
        assert torch.equal(back.latents, written.latents) and back.prompt == written.prompt
        assert back.call.keys() == written.call.keys() and back.call["img_shapes"] == written.call["img_shapes"]
        assert torch.equal(back.call["encoder_hidden_states"], written.call["encoder_hidden_states"])
    assert torch.equal(read.negative["img_ids"], wanted[0].call["img_ids"])


def test_collate_repeats_what_is_shared():
    batch = collate([sample(0), sample(1)])
    assert batch.latents.shape == (2, 2, 4) and batch.call["encoder_hidden_states"].shape == (2, 3, 5)
    assert torch.equal(batch.call["img_ids"], sample(0).call["img_ids"])


def test_samples_that_share_no_positions_are_not_batched():
    """An image of 2 x 3 tokens and one of 3 x 2 have tensors of the same shapes."""
    wide, tall = sample(0), sample(1)
    assert wide.kind == tall.kind
    tall.call["img_ids"] = wide.call["img_ids"].flip(0)
    assert wide.kind != tall.kind


def test_order_visits_every_sample_once_an_epoch_and_never_mixes_kinds():
    kinds = [sample(i, width=4 if i % 3 else 6).kind for i in range(12)]
    order = Order(kinds, batch=2, seed=1)
    epochs = [[order[epoch * order.batches + i] for i in range(order.batches)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(12))
        assert all(kinds[a] == kinds[b] for a, b in epoch)
    assert epochs[0] != epochs[1]
    again = Order(kinds, batch=2, seed=1)
    assert again[order.batches + 1] == epochs[1][1] and Order(kinds, batch=2, seed=2)[0] != epochs[0][0]


def test_a_kind_with_fewer_samples_than_a_batch_is_repeated():
    assert sorted(Order(["one", "one"], batch=5, seed=0)[3]) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_no_samples_leave_no_data_set(tmp_path):
    with pytest.raises(DitAccelError, match=names("data")):
        data.write(tmp_path, [], {}, {})
    with pytest.raises(DitAccelError, match=names("data")):
        Dataset(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 1, "samples": []})])
def test_a_damaged_index_is_refused(content, tmp_path):
    (tmp_path / data.INDEX).write_text(content)
    with pytest.raises(DitAccelError, match=r"[Pp]repare"):
        Dataset(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    data.write(tmp_path, [sample(0)], {}, {})
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(DitAccelError, match=names("00000.safetensors")):
        Dataset(tmp_path)[0]
