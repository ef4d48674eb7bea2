"""Every recipe parses against the settings it is for, says where it comes from, and mistakes are named."""

import pytest
from messages import names

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
        ({"step": 3}, "'step' 'steps'"),
        ({"steps": 0}, "steps 1 0"),
        ({"rate": 0}, "rate 0"),
        ({"rate": float("nan")}, "rate nan"),
        ({"rate": "1e-4"}, "rate '1e-4'"),
        ({"method_rate": 0}, "method_rate 0"),
        ({"alpha": "big"}, "alpha 'big'"),
        ({"betas": 0.9}, "betas 2 0.9"),
        ({"betas": [0.9, 1]}, "betas 1"),
        ({"clip": "high"}, "clip"),
        ({"weight_decay": -1}, "weight_decay 0"),
        ({"ema": "x"}, "ema"),
        ({"warmup": 1.5}, "warmup"),
        ({"batch": True}, "batch True"),
        ({"checkpointing": "maybe"}, "checkpointing"),
        ({"impl": "fast"}, "impl auto reference portable triton"),
        ({"targets": 3}, "targets"),
        ({"config": 3}, "config"),
        ({"config": {"window": {}}, "method": "gna"}, "gna window"),
        ({"objectives": 3}, "objectives"),
        ({"objectives": {"flow": "x"}}, "objectives"),
        ({"levels": 3}, "levels 3"),
        ({"levels": {"std": "x"}}, "std 'x'"),
        ({"distillation": {"segments": 2.5}}, "segments 2.5"),
        ({"method": "slaa"}, "'sla'"),
        ({"method": "tile"}, "tile"),
        ({"objectives": {}}, "objective teacher=1"),
        ({"objectives": {"teachr": 1}}, "'teacher'"),
        ({"objectives": {"flow": -1}}, "flow -1"),
        ({"objectives": {"flow": 1, "consistency": 1}}, "flow consistency"),
        ({"method": "dense"}, "teacher"),
        ({"method": "sparge", "objectives": {"gate": 1}}, "sla sparge score=learned"),
        ({"precision": "int8", "method": "sla"}, "precision"),
        ({"levels": {"sigma": 1}, "method": "sla"}, "levels 'sigma'"),
        ({"levels": {"std": 0}, "method": "sla"}, "std 0"),
        ({"distillation": {"segments": 0}, "method": "sla"}, "segments 1"),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(DitAccelError, match=names(message)):
        make(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipe"),
        ("{", "YAML"),
        ("a: 1", "about source model data"),
        ("{about: a, source: b, model: c, data: clips, train: {}}", "data 'clips'"),
    ],
)
def test_files_that_are_no_recipe(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DitAccelError, match=names(message)):
        read_recipe(str(path))
