"""Which implementation runs on which GPU, for every setting that presets, documents, the demo or a search can name."""

import dataclasses
import itertools
import pathlib
import re
import warnings

import pytest
import torch
from messages import names

import dit_accel
from dit_accel.errors import DitAccelError, DitAccelWarning
from dit_accel.kernels import impls
from dit_accel.kernels.impls import ROUTER, SLA, TAIL
from dit_accel.plans import ramps
from dit_accel.registry import get_families, get_method, get_methods, make_config, parse_method
from dit_accel.setting import method_text
from dit_accel.tokens import TokenGrid
from dit_accel.tune.space import DENSITIES

ROOT = pathlib.Path(__file__).parents[2]
ARCHS = 80, 89, 90, 100, 120
TRITON, HOPPER = ("triton",) * 5, ("triton", "triton", "gluon_triton", "triton", "triton")
# What attends to the visual keys on each of ARCHS, by kernel and by tokens of a query block and of a key block.
EXPECTED = {
    (impls.BLOCK_SPARSE, 128, 64): HOPPER,
    (impls.BLOCK_SPARSE, 128, 128): HOPPER,
    (impls.BLOCK_SPARSE, 64, 64): TRITON,
    (impls.BLOCK_SPARSE, 128, 32): TRITON,
    (impls.BLOCK_SPARSE, 256, 32): TRITON,
    (SLA, 64, 64): TRITON,
    (SLA, 128, 64): TRITON,
}
SLOW = {"sla:feature_map=hedgehog"}  # plain PyTorch computes their visual queries
VIDEO, IMAGE = TokenGrid(18, 32, 32, text=77), TokenGrid(1, 96, 96, text=77)


def named_settings():
    """Every setting, as it is typed."""
    texts = {name for name, method in get_methods().items() if not required(method.config)}
    for family in get_families().values():
        presets = (*family.recommended.items(), *family.recommended_pair.items())
        texts |= {method_text(name, preset.config) for name, preset in presets}
    for name, method in get_methods().items():
        if method.at_density is not None:
            grid = IMAGE if name in ("clear", "scaledit") else TokenGrid(8, 32, 32, text=77)
            texts |= {method_text(name, method.at_density(grid, density)) for density in (*DENSITIES, 0.9)}
    files = (ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md"))
    words = "\n".join(path.read_text(encoding="utf-8") for path in files)
    setting = rf"(?:{'|'.join(get_methods())}):[\w=.,+-]+"
    typed = {setting_text.rstrip(".,") for setting_text in re.findall(rf"(?<![\w:/]){setting}", words)}
    rest = {"sparge:score=error": "sparge:score=error,tail=mean", "gna:share=residual": "gna:share=residual,window=4"}
    texts |= {rest.get(text, text) for text in typed}  # a table names a part of a setting
    whole = [text for text in texts if all("=" in part for part in text.partition(":")[2].split(",") if part)]
    return {end for text in whole for end in (ends_of(text) if ".." in text else [text])}


def ends_of(text):
    """The settings of the first and the last sparse step of a ramp."""
    name, config = parse_method(text)
    ends = ramps.ends(make_config(name, config))
    return [method_text(name, {key: getattr(end, key) for key in config}) for end in ends]


def required(config):
    """Whether a method's settings have one without a default."""
    fields = dataclasses.fields(config)
    return any(field.default is field.default_factory is dataclasses.MISSING for field in fields)


def planned(text):
    name, config = parse_method(text)
    error = None
    for grid in (VIDEO, IMAGE):
        try:
            return dit_accel.plan(name, grid, **config), get_method(name)
        except DitAccelError as refused:
            error = error or refused
    return pytest.fail(f"{text}: {error}")


def test_every_named_setting_reaches_its_kernel_on_every_gpu():
    used, settings = set(), named_settings()
    assert {"sol:order=morton,block_q=256,block=32,tail=hybrid,variance=exact,tau=1.5", "sol"} <= settings
    for text in sorted(text for text in settings if "budgets=" not in text):
        plan, method = planned(text)
        learned = method.learned(plan.config) is not None
        for arch, place in zip(ARCHS, itertools.count(), strict=False):
            attention, *others = plan.implementation(f"sm_{arch}", learned=learned)
            assert attention.part == "attention", text
            if not attention.kernel:
                assert attention.name == "scaled_dot_product_attention", text
                continue
            blocks = plan.calls(learned)["attention"][1]
            key = attention.kernel, blocks["block_q"], blocks["block_k"]
            used.add(key)
            if text in SLOW:
                assert attention.plain and "softmax" in attention.faster, text
            else:
                assert attention.name == EXPECTED[key][place], (text, arch, attention)
            for choice in others:
                fast = (
                    {"triton"}
                    if choice.kernel in (ROUTER, TAIL) or attention.name != "gluon_triton"
                    else {"gluon_triton"}
                )
                assert choice.name in (fast if text not in SLOW or choice.part == "router" else {"portable"}), (
                    text,
                    arch,
                    choice,
                )
    assert used == set(EXPECTED)


@pytest.mark.parametrize(
    ("method", "changes", "names", "words"),
    [
        ("sol", {"block": 100}, ("portable",) * 5, "block_q=128, block=128 triton runs"),
        ("sol", {"block": 8, "block_q": 64}, ("portable",) * 5, "block_q=64, block=16 triton runs"),
        ("sol", {}, HOPPER, None),
        ("rectified", {}, HOPPER, None),
        ("sol", {"block_q": 64}, TRITON, None),
        ("gna", {"window": 8, "head_dim": 96}, TRITON, None),
        ("gna", {"window": 8, "head_dim": 300}, ("portable",) * 5, "head dimensions up to 256, not 300"),
        ("gna", {"window": 8, "dtype": torch.float64}, ("portable",) * 5, "float64"),
        ("radial", {"rule": "released", "block": 256}, HOPPER, None),
        ("radial", {"rule": "released", "block": 96}, ("portable",) * 5, "; with block=128 triton runs"),
        ("proxy", {"block": 512}, HOPPER, None),
    ],
)
def test_what_is_slower_says_what_is_faster(method, changes, names, words):
    tensors = {name: changes.pop(name) for name in ("head_dim", "dtype") if name in changes}
    plan = dit_accel.plan(method, TokenGrid(8, 32, 32), **changes)
    for arch, name in zip(ARCHS, names, strict=True):
        attention = plan.implementation(f"sm_{arch}", **tensors)[0]
        assert (attention.name, attention.plain) == (name, name == "portable")
        if words is not None:
            faster = words.replace("block=128 triton", "block=128 gluon_triton") if arch == 90 else words
            assert arch == 90 or faster in attention.faster
    hopper = plan.implementation("sm_90", **tensors)[0]
    assert (hopper.faster is None) == (hopper.name == "gluon_triton")


def test_rows_of_too_many_blocks_are_said():
    choices = dit_accel.plan("sol", TokenGrid(40, 64, 64), block=32, block_q=32).implementation("sm_90")
    router = next(choice for choice in choices if choice.part == "router")
    assert router.name == "portable" and router.plain
    assert "at most 4096 visual key blocks by this rule, not 5120; with block_q=32, block=64" in router.faster


def test_a_gpu_without_kernels_and_a_named_implementation_are_refused():
    plan = dit_accel.plan("gna", TokenGrid(8, 32, 32), window=8)
    with pytest.raises(DitAccelError, match=names("h200 sm_90")):
        plan.implementation("h200")
    with pytest.raises(DitAccelError, match=names("impl='gluon' sm_80")):
        plan.implementation("sm_80", impl="gluon")
    assert plan.implementation("sm_90", impl="gluon")[0].name == "gluon"


def test_a_part_without_such_an_implementation_takes_its_own():
    plan = dit_accel.plan("sol", TokenGrid(8, 32, 32, text=77))
    names = {choice.part: choice.name for choice in plan.implementation("sm_90", impl="gluon")}
    assert names == {"attention": "gluon", "text": "gluon", "router": "triton", "tail": "gluon"}


def test_shared_memory_of_a_small_gpu_counts():
    """Gradients in fp32 at D = 128 need more than the 99 KB of a consumer card; half precision does not."""
    facts = impls.Facts(torch.device("cuda"), torch.float32, 128, 128, 64, gradients=True, capability=89)
    row, why = impls.choose(facts)
    assert row.name == "portable" and "more shared memory than sm_89" in why
    half = impls.Facts(torch.device("cuda"), torch.bfloat16, 128, 128, 64, gradients=True, capability=89)
    assert impls.choose(half)[0].name == impls.choose(facts.__class__(**{**vars(facts), "capability": 90}))[0].name


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("gna:window=8", "portable"),
        ("sla:block_q=128", "portable"),
        ("clear:radius=4,pool=4", "portable"),
        ("sla", "triton"),
    ],
)
def test_training_asks_whether_the_gradients_fit(monkeypatch, setting, expected):
    """In fp32 at D = 128 the forward kernels fit a consumer card, and the gradients of 128 queries do not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    plan = dit_accel.plan(setting, TokenGrid(8, 32, 32))
    call = torch.device("cuda"), torch.float32, 128
    with torch.no_grad():
        assert plan.start(*call, "auto", learned=True)[0] == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitAccelWarning)
        assert plan.start(*call, "auto", learned=True)[0] == expected
    assert plan.start(*call, "triton", learned=True)[0] == "triton"  # a named one is asked in the call


def test_text_runs_elsewhere_where_its_blocks_do_not_fit():
    plan = dit_accel.plan("sol:block=64,block_q=64", TokenGrid(8, 32, 32, text=77))
    facts = impls.Facts(torch.device("cuda"), torch.float32, 128, gradients=True, capability=89)
    names = {choice.part: choice.name for choice in plan.choices(facts)}
    assert (names["attention"], names["text"]) == ("triton", "portable")
    names = {choice.part: choice.name for choice in plan.choices(dataclasses.replace(facts, gradients=False))}
    assert (names["attention"], names["text"]) == ("triton", "triton")


def test_what_is_slow_is_said_once(monkeypatch):
    """The warning names the method, the part and the nearest fast blocks; on a CPU nothing is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    plan = dit_accel.plan("sol", TokenGrid(8, 32, 32), block=100, tail="none")
    monkeypatch.setattr(plan, "build", lambda device: None)
    with pytest.warns(DitAccelWarning) as warned:
        assert plan.prepare(torch.device("cuda"), torch.bfloat16, 128)[0] == "portable"
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2 and all("sol" in message and "many times slower" in message for message in messages)
    assert "block_q=128, block=128 gluon_triton runs" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.prepare(torch.device("cuda"), torch.bfloat16, 128)
        dit_accel.plan("sol", TokenGrid(8, 32, 32), block=20).prepare(torch.device("cpu"), torch.float32, 64)
