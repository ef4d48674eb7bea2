"""Settings layer by layer: each layer runs its own, a saved file brings them back, and a wrong file is refused."""

import contextlib
import copy
import json

import pytest
import torch
from messages import names

import dit_accel
from dit_accel.methods.tile import Config
from dit_accel.setting import Setting

REST = {"share": "none", "refresh": 1}
LAYERS = [{"references": 1, **REST}, None, {"references": 2, **REST}]


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.fixture
def schedule(tmp_path):
    setting = Setting.from_dict({"method": "tile", "layers": {"transformer": LAYERS}})
    path = tmp_path / "schedule.json"
    path.write_text(setting.to_json(remark="made by hand"))
    return path


def test_each_layer_runs_its_own_setting(schedule, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(3), wan_inputs()
    grid = dit_accel.TokenGrid(5, 7, 9)
    with dit_accel.accelerated(transformer, layer_schedule=schedule) as accel:
        output, report = run(transformer, inputs), accel.report()
    densities = [dit_accel.plan("tile", grid, references=count).density for count in (1, 2)]
    assert [layer.density for layer in report.layers] == [densities[0], None, densities[1]]
    assert report.layers[1].dense_reasons == {"layer schedule": 1}
    assert report.grids == {str(grid): sum(densities) / 2}
    assert str(report).startswith("tile(layer by layer): 2 sparse and 1 dense")
    assert json.loads(json.dumps(report.as_dict()))["setting"]["layers"] == {"transformer": LAYERS}
    # Copies under two uniform accelerators lend the layer that has their setting; the output is the same.
    with contextlib.ExitStack() as stack:
        copies = [copy.deepcopy(transformer) for _ in range(2)]
        for references, layer, uniform in ((1, 0, copies[0]), (2, 2, copies[1])):
            stack.enter_context(dit_accel.accelerated(uniform, "tile", references=references, dense_layers=(1,)))
            run(uniform, inputs)
            transformer.blocks[layer].attn1.processor = uniform.blocks[layer].attn1.processor
        assert torch.equal(run(transformer, inputs), output)


def test_saved_and_loaded(schedule, tiny_wan, wan_inputs, tmp_path):
    transformer, inputs = tiny_wan(3), wan_inputs()
    with dit_accel.accelerate(transformer, layer_schedule=schedule) as accel:
        wanted = run(transformer, inputs)
        accel.save_pretrained(tmp_path / "saved")
    with dit_accel.load(transformer, tmp_path / "saved") as accel:
        assert torch.equal(run(transformer, inputs), wanted)
        assert accel.setting.layers["transformer"] == (Config(1), None, Config(2))


def test_a_file_may_have_dense_steps_and_given_ones_win(schedule, tiny_wan, wan_inputs, tmp_path):
    """As training gives them: it takes a file's layers for all noise levels."""
    schedule.write_text(Setting.read(schedule).changed(dense_steps=1).to_json())
    transformer, inputs = tiny_wan(3), wan_inputs()
    for options, sparse in (({}, 0), ({"dense_steps": 0}, 2)):
        with dit_accel.accelerate(transformer, layer_schedule=schedule, **options) as accel:
            accel.set_step(0, 4)
            run(transformer, inputs)
            assert accel.report().sparse_calls == sparse
            accel.save_pretrained(tmp_path / "saved")
        with dit_accel.load(transformer, tmp_path / "saved") as accel:
            assert bool(accel.setting.schedule.dense_steps) == (not sparse)


def test_learned_weights_take_their_layers_settings(tiny_wan):
    layers = {"transformer": [{"topk": 0.3, "block": 16}, {"topk": 0.5, "block": 16}]}
    with dit_accel.accelerate(tiny_wan(), Setting.from_dict({"method": "sla", "layers": layers})) as accel:
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
        ("{", "JSON"),
        ("[]", "setting"),
        ('{"format": 2, "method": null, "layers": {"transformer": [null]}}', "method None"),
        ('{"format": 1, "method": "tile", "layers": {}}', "1 2"),
        ('{"format": 3, "method": "tile", "layers": {}}', "3 2"),
        ('{"format": 2, "method": "tile", "layers": {}}', "layers"),
        ('{"format": 2, "method": "tile", "config": [1]}', "1"),
        ('{"format": 2, "method": "tile", "config": {"references": 1}, "dense_backend": 1}', "dense_backend 1"),
        ('{"format": 2, "method": "tile", "layers": {"transformer": [3]}}', "3"),
        (
            '{"format": 2, "method": "tile", "layers": {"t": [null]}, "schedule": {"steps": 1}}',
            "steps",
        ),
        ('{"format": 2, "method": "tile", "layers": {"transformer": [{"reference": 1}]}}', "reference references"),
        ('{"format": 2, "method": "tile", "layers": {"transformer": [null]}}', "1 3"),
        ('{"format": 2, "method": "tile", "layers": {"unet": [null]}}', "unet transformer"),
    ],
)
def test_other_files_are_refused(content, message, tiny_wan, tmp_path):
    if content is not None:
        (tmp_path / "schedule.json").write_text(content)
    with pytest.raises(dit_accel.DitAccelError, match=names(message)) as caught:
        dit_accel.accelerate(tiny_wan(3), layer_schedule=tmp_path / "schedule.json")
    assert "\n" not in str(caught.value)


def test_a_schedule_says_everything(schedule, tiny_wan):
    for arguments, word in (
        ({"method": "gna"}, "gna"),
        ({"references": 1}, "references"),
        ({"preset": True}, "True"),
    ):
        with pytest.raises(dit_accel.DitAccelError, match=word):
            dit_accel.accelerate(tiny_wan(3), layer_schedule=schedule, **arguments)
    with pytest.raises(dit_accel.DitAccelError, match=names("references balanced sol")):
        dit_accel.accelerate(tiny_wan(), references=1)


def test_dense_layers_beside_a_schedule(schedule, tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(3), wan_inputs()
    with dit_accel.accelerated(transformer, layer_schedule=schedule, dense_layers=1) as accel:
        run(transformer, inputs)
        reasons = [layer.dense_reasons for layer in accel.report().layers]
    assert reasons == [{"dense_layers=1": 1}, {"layer schedule": 1}, {}]


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "gna:window=18x24x24,stride=4",
        "gna:window=full,causal=TruexFalsexFalse",
        "radial:decay=0.2 dense_steps=12 dense_last_steps=0.1",
        "sol dense_layers=0,3 dense_backend=auto",
        "tile:references=1 dense_layers=5,",
    ],
)
def test_the_text_of_a_setting_parses_back(text):
    setting = Setting.parse(text)
    assert setting.text == text and Setting.parse(setting.text) == setting
    assert Setting.from_dict(json.loads(json.dumps(setting.as_dict()))) == setting


def test_the_text_of_a_files_layers_parses_back(schedule):
    setting = Setting.read(schedule).changed(dense_steps=1)
    assert setting.text == f"tile:layers={schedule} dense_steps=1" and Setting.parse(setting.text) == setting
    shared = Setting.parse(f"tile:layers={schedule},share=output,refresh=2")
    assert [config and config.refresh for config in shared.layers["transformer"]] == [2, None, 2]
    with pytest.raises(dit_accel.DitAccelError, match=names("gna tile")):
        Setting.parse(f"gna:layers={schedule}")


def test_settings_beside_a_text_win():
    setting = Setting.parse("sol:tau=1.5 dense_steps=3", ["tau=0.5"], dense_steps=0, dense_layers=2)
    assert setting.text == "sol:tau=0.5 dense_layers=2"


@pytest.mark.parametrize("text", ["sol dense_steps=1 dense_steps=2", "sol dense_steps=", "sol dense_steps=-1"])
def test_words_are_refused_by_name(text):
    with pytest.raises(dit_accel.DitAccelError, match=names("dense_steps")):
        Setting.parse(text)


@pytest.mark.parametrize(
    ("text", "rest"), [("sol tau=1", "'tau=1'"), ("sol fast", "'fast'"), ("sol tau=1 cache=mag", "'tau=1'")]
)
def test_what_is_neither_a_setting_nor_a_word_is_named(text, rest):
    with pytest.raises(dit_accel.DitAccelError, match=names("sol", rest, "sol:key=value dense_steps")):
        Setting.parse(text)


def test_space_around_a_text_is_nothing():
    assert Setting.parse(" sol:tau=2 dense_steps=1 \n").text == "sol:tau=2 dense_steps=1"


def test_a_setting_in_place_of_a_method(tiny_wan, wan_inputs):
    transformer, inputs = tiny_wan(3), wan_inputs()
    outputs = []
    setting = Setting.parse("tile:references=1 dense_layers=1")
    for arguments in ({"method": setting}, {"method": setting.text}, {"method": "tile", "references": 1}):
        with dit_accel.accelerate(transformer, dense_layers=1, **arguments) as accel:
            assert accel.setting == setting
            outputs.append(run(transformer, inputs))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    with pytest.raises(dit_accel.DitAccelError, match=names("references")):
        dit_accel.accelerate(transformer, setting, references=2)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("sol:block_q=none", "block_q", None),
        ("sla:block_q=None", "block_q", None),
        ("sparge:similarity=none", "similarity", None),
        ("sparge:tail=none", "tail", "none"),
    ],
)
def test_none_is_typed_as_it_is_shown(text, name, value):
    """Where a setting also takes the word, it stays the word."""
    setting = Setting.parse(text)
    assert getattr(setting.config, name) == value
    assert Setting.parse(setting.text) == setting


def test_a_setting_with_none_has_a_text_that_parses_back():
    setting = Setting.make(
        "sol", {"block_q": None}, cache={"name": "pab", "config": {"cross_attention_block_skip_range": None}}
    )
    assert setting.text == "sol:block_q=none cache=pab:cross_attention_block_skip_range=none"
    assert Setting.parse(setting.text) == setting


def test_none_drops_the_cache_of_a_setting():
    setting = Setting.parse("sol cache=mag:threshold=0.1")
    assert setting.changed(cache="none") == Setting.parse("sol cache=none") == Setting.parse("sol")
    assert setting.changed() == setting and setting.cache is not None
