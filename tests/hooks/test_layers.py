"""Settings layer by layer: each layer runs its own, a saved file brings them back, and a wrong file is refused."""

import dataclasses
import json

import pytest
import torch

import dit_accel
from dit_accel.hooks import layers as layerwise
from dit_accel.methods.tile import Config

REST = {"share": "none", "refresh": 1}
LAYERS = [{"references": 1, **REST}, None, {"references": 2, **REST}]


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.fixture
def schedule(tmp_path):
    settings = layerwise.from_dict("tile", {"transformer": LAYERS})
    path = tmp_path / "schedule.json"
    path.write_text(layerwise.to_json(settings, remark="made by hand"))
    return path


def test_each_layer_runs_its_own_setting(schedule, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(3), wan_inputs()
    grid = dit_accel.TokenGrid(5, 7, 9)
    with dit_accel.accelerated(transformer, layer_schedule=schedule) as accel:
        ours, report = run(transformer, inputs), accel.report()
    densities = [dit_accel.plan("tile", grid, references=count).density for count in (1, 2)]
    assert [layer.density for layer in report.layers] == [densities[0], None, densities[1]]
    assert report.layers[1].dense_reasons == {"layer schedule": 1}
    assert report.grids == {str(grid): sum(densities) / 2}
    assert str(report).startswith("tile(layer by layer): 2 sparse and 1 dense")
    assert json.loads(json.dumps(report.as_dict()))["config"]["layers"] == {"transformer": LAYERS}
    # Two uniform accelerators and the model itself, each for the layer that has its setting, give the same output.
    processors = {}
    for references, layer in ((1, 0), (2, 2)):
        with dit_accel.accelerated(transformer, "tile", references=references, dense_layers=(1,)) as accel:
            run(transformer, inputs)
            processors[layer] = transformer.blocks[layer].attn1.processor
    own = [block.attn1.processor for block in transformer.blocks]
    for layer, processor in processors.items():
        transformer.blocks[layer].attn1.processor = processor
    assert torch.equal(run(transformer, inputs), ours)
    for block, processor in zip(transformer.blocks, own, strict=True):
        block.attn1.processor = processor


def test_saved_and_loaded(schedule, tiny_wan, wan_inputs, tmp_path):
    transformer, inputs = tiny_wan(3), wan_inputs()
    with dit_accel.accelerate(transformer, layer_schedule=schedule) as accel:
        wanted = run(transformer, inputs)
        accel.save_pretrained(tmp_path / "saved")
    with dit_accel.load(transformer, tmp_path / "saved") as accel:
        assert torch.equal(run(transformer, inputs), wanted)
        assert accel.config.layers["transformer"] == (Config(1), None, Config(2))


def test_a_file_may_have_dense_steps_and_given_ones_win(schedule, tiny_wan, wan_inputs, tmp_path):
    """As training gives them: it takes a file's layers for all noise levels."""
    settings = layerwise.read(schedule)
    schedule.write_text(layerwise.to_json(dataclasses.replace(settings, schedule={"dense_steps": 1})))
    transformer, inputs = tiny_wan(3), wan_inputs()
    for given, sparse in (({}, 0), ({"dense_steps": 0}, 2)):
        with dit_accel.accelerate(transformer, layer_schedule=schedule, **given) as accel:
            accel.set_step(0, 4)
            run(transformer, inputs)
            assert accel.report().sparse_calls == sparse
            accel.save_pretrained(tmp_path / "saved")
        with dit_accel.load(transformer, tmp_path / "saved") as accel:
            assert bool(accel.schedule.dense_steps) == (not sparse)


def test_learned_weights_take_their_layers_settings(tiny_wan):
    layers = {"transformer": [{"topk": 0.3, "block": 16}, {"topk": 0.5, "block": 16}]}
    with dit_accel.accelerate(tiny_wan(), layer_schedule=layerwise.from_dict("sla", layers)) as accel:
        assert [module.config.topk for module in accel.learned_weights().values()] == [0.3, 0.5]


def test_pausing_in_a_pause_does_not_end_it(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(), wan_inputs()
    dense = run(transformer, inputs)
    with dit_accel.accelerated(transformer, "tile", references=1) as accel, accel.paused():
        with accel.paused():
            pass
        assert torch.equal(run(transformer, inputs), dense)


def test_pausing_runs_the_models_own_attention(schedule, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(3), wan_inputs()
    dense = run(transformer, inputs)
    with dit_accel.accelerate(transformer, layer_schedule=schedule) as accel:
        with accel.paused():
            assert torch.equal(run(transformer, inputs), dense)
        assert not torch.equal(run(transformer, inputs), dense)
        assert accel.report().layers[0].dense_reasons == {"paused": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "no layer schedule"),
        ('{"format": 1, "method": null, "layers": {"transformer": [null]}}', "should name a method"),
        ('{"format": 2, "method": "tile", "layers": {}}', "format 2"),
        ('{"format": 1, "method": "tile", "layers": {}}', "one per layer"),
        ('{"format": 1, "method": "tile", "layers": {"transformer": [3]}}', "got 3"),
        ('{"format": 1, "method": "tile", "layers": {"t": [null]}, "schedule": {"steps": 1}}', "dense_last_steps; got"),
        ('{"format": 1, "method": "tile", "layers": {"transformer": [{"reference": 1}]}}', "Did you mean"),
        ('{"format": 1, "method": "tile", "layers": {"transformer": [null]}}', "1 layers of transformer, which has 3"),
        ('{"format": 1, "method": "tile", "layers": {"unet": [null]}}', "is for unet, but this model has transformer"),
    ],
)
def test_other_files_are_refused(content, message, tiny_wan, tmp_path):
    if content is not None:
        (tmp_path / "schedule.json").write_text(content)
    with pytest.raises(dit_accel.DitAccelError, match=message) as caught:
        dit_accel.accelerate(tiny_wan(3), layer_schedule=tmp_path / "schedule.json")
    assert "\n" not in str(caught.value)


def test_a_schedule_says_everything(schedule, tiny_wan):
    for arguments in ({"method": "gna"}, {"references": 1}, {"dense_layers": 1}):
        with pytest.raises(dit_accel.DitAccelError, match="Leave out the method"):
            dit_accel.accelerate(tiny_wan(3), layer_schedule=schedule, **arguments)
    with pytest.raises(dit_accel.DitAccelError, match="needs a method"):
        dit_accel.accelerate(tiny_wan())
