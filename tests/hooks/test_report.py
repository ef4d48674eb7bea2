"""What a report looks like in a terminal and in a notebook."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dit_accel
from dit_accel.hooks.report import GRIDS_SHOWN, LayerReport, Report, Tally
from dit_accel.setting import Setting


def report(grids=1, **layer):
    sizes = {f"1x8x{width}": 0.5 + width / 1000 for width in range(grids)}
    layers = [LayerReport("transformer", str(index), 2, density=0.5, kernels={"k": "<b>why"}) for index in range(3)]
    layers.append(LayerReport("transformer", "3", dense_calls=2, dense_reasons={"dense_layers=1": 2}))
    return Report(Setting.parse("radial"), "auto", {"transformer": 2}, sizes, layers)


def test_many_grids_are_folded():
    lines = [line for line in str(report(200)).splitlines() if "grid" in line]
    assert len(lines) == GRIDS_SHOWN
    assert lines[-1].strip() == f"and {201 - GRIDS_SHOWN} more grids: density 0.5070 to 0.6990"
    few = [line for line in str(report(GRIDS_SHOWN)).splitlines() if "grid" in line]
    assert len(few) == GRIDS_SHOWN and "more" not in few[-1]


def test_a_notebook_shows_a_table_with_a_row_for_equal_layers():
    page = report()._repr_html_()
    assert page.count("<tr>") == 3 and "<td>0-2</td>" in page and "<td>3</td>" in page
    assert "&lt;b&gt;why" in page and "<b>why" not in page


def test_elsewhere_it_is_one_line():
    assert repr(report()) == "Report(radial: 6 sparse and 2 dense attention calls)"


def test_an_accelerator_shows_its_report(tiny_wan):
    with dit_accel.accelerate(tiny_wan(), "radial") as accel:
        assert len(repr(accel).splitlines()) == 1
        assert "<table>" in accel._repr_html_() and "not called" in accel._repr_html_()


def test_densities_of_a_step_add_up_when_the_model_has_moved_since():
    tally = Tally()
    with FakeTensorMode():
        tally.measure(0, torch.zeros(2, device="cuda"))
        tally.measure(0, torch.zeros(2))
