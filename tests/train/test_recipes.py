"""Every recipe parses against the settings it is for, says where it comes from, and mistakes are named."""

import pytest

from dit_accel import DitAccelError
from dit_accel.train import request
from dit_accel.train.settings import RECIPES, make, read_recipe
from dit_accel.values import names_in


@pytest.mark.parametrize("name", names_in(RECIPES))
def test_recipe(name):
    recipe = read_recipe(name)
    settings = recipe.settings
    assert vars(settings).keys() >= recipe.train.keys()
    assert "arXiv" in recipe.source or recipe.model == "demo"
    assert request.DataSettings(**recipe.data).source in (request.GENERATED, request.CLIPS, request.FOLDER)


def test_what_the_published_recipes_say():
    """The numbers that their sources state."""
    radial = read_recipe("radial-wan2.1-14b-2x").settings
    assert (radial.rank, radial.dense_layers, radial.steps) == (128, 2, 2500)
    assert read_recipe("radial-hunyuan-video-4x").settings.steps == 1200
    sla = read_recipe("sla-wan2.1-1.3b").settings
    assert (sla.rank, sla.rate, sla.config["topk"], dict(sla.objectives)) == (0, 1e-5, 0.1, {"teacher": 1.0})
    clear = read_recipe("clear-flux").settings
    assert dict(clear.objectives) == {"flow": 1.0, "teacher": 0.5, "attention": 0.5} and clear.attention_every == 4


def test_given_settings_win_over_a_recipe():
    merged = request.merge(read_recipe("sla-demo").train, {"steps": 3, "levels": {"mean": 1.0}})
    assert merged.steps == 3 and merged.levels.mean == 1.0 and merged.levels.uniform == 0.17


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, "no setting 'step'. Did you mean 'steps'"),
        ({"steps": 0}, "steps is at least 1, got 0"),
        ({"rate": 0}, "rate is above 0"),
        ({"rate": float("nan")}, "rate is finite, got nan"),
        ({"rate": "1e-4"}, "rate is a number, got '1e-4'"),
        ({"method_rate": 0}, "method_rate is above 0"),
        ({"alpha": "big"}, "alpha is a number or none, got 'big'"),
        ({"betas": 0.9}, "betas is a list of 2: a number, got 0.9"),
        ({"betas": [0.9, 1]}, "betas is below 1, got"),
        ({"clip": "high"}, "clip is a number"),
        ({"weight_decay": -1}, "weight_decay is at least 0"),
        ({"ema": "x"}, "ema is a number"),
        ({"warmup": 1.5}, "warmup is a whole number"),
        ({"batch": True}, "batch is a whole number, got True"),
        ({"checkpointing": "maybe"}, "checkpointing is true or false"),
        ({"impl": "fast"}, "impl must be one of auto, reference, portable, triton"),
        ({"targets": 3}, "targets is a list, each text or none"),
        ({"config": 3}, "config is settings by name"),
        ({"config": {"window": {}}, "method": "gna"}, "gna needs window as"),
        ({"objectives": 3}, "objectives is settings by name"),
        ({"objectives": {"flow": "x"}}, "objectives is settings by name"),
        ({"levels": 3}, "levels takes settings by name, got 3"),
        ({"levels": {"std": "x"}}, "std is a number, got 'x'"),
        ({"distillation": {"segments": 2.5}}, "segments is a whole number, got 2.5"),
        ({"method": "slaa"}, "Did you mean 'sla'"),
        ({"method": "tile"}, "tile needs a value for references"),
        ({"objectives": {}}, "needs an objective"),
        ({"objectives": {"teachr": 1}}, "Did you mean 'teacher'"),
        ({"objectives": {"flow": -1}}, "above 0"),
        ({"objectives": {"flow": 1, "consistency": 1}}, "Choose one"),
        ({"method": "dense"}, "its own teacher"),
        ({"method": "sparge", "objectives": {"gate": 1}}, "sla or sparge with score=learned"),
        ({"precision": "int8", "method": "sla"}, "precision is one of"),
        ({"levels": {"sigma": 1}, "method": "sla"}, "levels has no setting 'sigma'"),
        ({"levels": {"std": 0}, "method": "sla"}, "std is above 0"),
        ({"distillation": {"segments": 0}, "method": "sla"}, "segments is at least 1"),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(DitAccelError, match=message):
        make(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no recipe"),
        ("{", "is not YAML"),
        ("a: 1", "needs exactly the entries"),
        ("{about: a, source: b, model: c, data: clips, train: {}}", "data is settings by name, got 'clips'"),
    ],
)
def test_files_that_are_no_recipe(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DitAccelError, match=message):
        read_recipe(str(path))
