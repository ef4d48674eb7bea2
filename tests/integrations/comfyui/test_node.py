"""The ComfyUI node in a stand-in of its host: model calls with wrappers, and attention with the override's keywords."""

import copy
import importlib.util
import inspect
import logging
import pathlib
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from dit_accel.errors import DitAccelError
from dit_accel.registry import plan
from dit_accel.tokens import TokenGrid

NODE = pathlib.Path(__file__).parents[3] / "integrations" / "comfyui"
LAYERS, HEADS, DIM = 3, 2, 16
SPARSE, SETTINGS = "gna:window=0.7", {"window": 0.7}
SIGMAS = torch.linspace(1, 0, 11)


def load(name):
    """The folder as ComfyUI loads a custom node: by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, NODE / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODES = load("custom_nodes_dit_accel")
LAYOUTS = sys.modules["custom_nodes_dit_accel.layouts"]


def optimized_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):  # fmt: skip  # noqa: E501
    """ComfyUI's attention with its hook."""
    options = kwargs.get("transformer_options")
    if "_inside_attn_wrapper" not in kwargs and options and "optimized_attention_override" in options:
        keywords = {"mask": mask, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, **kwargs}
        return options["optimized_attention_override"](optimized_attention, q, k, v, heads, **keywords, _inside_attn_wrapper=True)  # fmt: skip  # noqa: E501
    kwargs["transformer_options"]["dense"].append(q.shape)
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Model:
    """A model whose call is self-attention over `tokens` in each layer, and cross-attention over the text."""

    def __init__(self, name, tokens, patch_size, cross=(), joint=False, mask=None):
        self.__class__ = type(name, (Model,), {})
        self.tokens, self.patch_size, self.cross, self.joint, self.mask = tokens, patch_size, cross, joint, mask

    def _forward(self, x, timestep, context, transformer_options, **kwargs):
        outputs = []
        for layer in range(LAYERS):
            for keys in (self.tokens, *self.cross):
                out = self.attend(layer, keys, transformer_options)
                outputs += [out] if keys == self.tokens else []
        return outputs

    def attend(self, layer, keys, options):
        numbers = torch.Generator().manual_seed(layer)
        q, k, v = (torch.randn(1, HEADS, n, DIM, generator=numbers) for n in (self.tokens, keys, keys))
        if self.joint:
            return optimized_attention(q, k, v, HEADS, mask=self.mask, skip_reshape=True, transformer_options=options)
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        return optimized_attention(q, k, v, heads=HEADS, transformer_options=options)


class Patcher:
    """ComfyUI's model patcher: its options are copied deeply, its wrappers are not."""

    def __init__(self, model):
        self.model, self.model_options, self.wrappers = model, {"transformer_options": {}}, {}

    def get_model_object(self, name):
        assert name == "diffusion_model"
        return self.model

    def clone(self):
        other = Patcher(self.model)
        other.model_options, other.wrappers = copy.deepcopy(self.model_options), dict(self.wrappers)
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind, key] = wrapper

    def call(self, sigma=0.5, **inputs):
        """Outputs of self-attention, and the shapes of the queries that ran dense."""
        options = {**self.model_options["transformer_options"], "dense": []}
        options |= {"sigmas": torch.tensor([sigma]), "sample_sigmas": SIGMAS}
        inputs = {"timestep": None, "transformer_options": options} | inputs
        wrapper = self.wrappers.get(("diffusion_model", "dit_accel"))
        if wrapper is None:
            return self.model._forward(**inputs), options["dense"]

        def executor(*args, **kwargs):
            return self.model._forward(*args, **kwargs)

        executor.class_obj = self.model
        outputs = wrapper(executor, inputs.pop("x"), inputs.pop("timestep"), **inputs)
        assert options.keys() <= {"sigmas", "sample_sigmas", "dense", "optimized_attention_override", "dit_accel"}
        return outputs, options["dense"]


def accelerated(model, setting=SPARSE, dense_start=0.0):
    node = NODES.NODE_CLASS_MAPPINGS["DitAccelSparseAttention"]
    (patched,) = getattr(node(), node.FUNCTION)(Patcher(model), setting, dense_start)
    return patched.clone()  # as another node behind it does


def zeros(*shape):
    return torch.zeros(shape)


PACKED = types.SimpleNamespace(
    signature=(5, 3, 10, 8, 4), segments=[(0, 5, "text"), (5, 13, "audio"), (13, 73, "video")]
)
TEXT = {"context": zeros(1, 5, 8)}
# Class, its tokens, patch size, key lengths of cross-attention, whether text is joint; arguments; and the grid by hand.
CASES = [
    (("WanModel", 60, (1, 2, 2), (5,)), {"x": zeros(1, 4, 3, 9, 8), **TEXT}, TokenGrid(3, 5, 4)),
    (("HunyuanVideo", 65, [1, 2, 2], (), True), {"x": zeros(1, 4, 3, 10, 8), **TEXT}, TokenGrid(3, 5, 4, text=5)),
    (
        ("Flux", 48, 2, (), True),
        {"x": zeros(1, 4, 10, 14), "ref_latents": [zeros(1, 4, 4, 8)], **TEXT},
        TokenGrid(1, 5, 7, text=5, text_first=True, conditioning=8),
    ),
    (("LTXVModel", 60, None, (5,)), {"x": zeros(1, 4, 3, 5, 4), **TEXT}, TokenGrid(3, 5, 4)),
    (
        ("QwenImageTransformer2DModel", 40, 2, (), True),
        {"x": zeros(1, 4, 1, 10, 14), **TEXT},
        TokenGrid(1, 5, 7, text=5, text_first=True),
    ),
    (
        ("MiniMaxH3Model", 73, (1, 2, 2), (), True),
        {"x": [zeros(1, 4, 3, 10, 8), zeros(1, 4, 2, 4)], "minimax_payload": {"layout": PACKED}, **TEXT},
        TokenGrid(3, 5, 4, text=13, text_first=True),
    ),
]
EACH_MODEL = pytest.mark.parametrize(("model", "call", "grid"), CASES, ids=[case[0][0] for case in CASES])
WAN, WAN_CALL, WAN_GRID = CASES[0]


def by_mask(model, allowed):
    """What masked attention makes of the model's q, k and v; `allowed` [N, N]."""
    outputs = []
    for layer in range(LAYERS):
        numbers = torch.Generator().manual_seed(layer)
        q, k, v = (torch.randn(1, HEADS, model.tokens, DIM, generator=numbers) for _ in range(3))
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))
    return outputs


@EACH_MODEL
def test_self_attention_is_the_methods_and_cross_attention_is_untouched(model, call, grid):
    model = Model(*model)
    plain, _ = Patcher(model).call(**call)
    whole, dense = accelerated(model, "gna:window=full").call(**call)
    torch.testing.assert_close(whole, plain)
    assert len(dense) == LAYERS * len(model.cross)
    sparse, dense = accelerated(model).call(**call)
    mask = plan("gna", grid, **SETTINGS).token_mask()
    assert mask.float().mean() < 0.9
    torch.testing.assert_close(sparse, by_mask(model, mask))
    assert len(dense) == LAYERS * len(model.cross)


@pytest.mark.parametrize(("sigma", "sparse"), [(1.0, False), (0.9, False), (0.85, False), (0.8, True), (0.1, True)])
def test_the_first_steps_stay_dense(sigma, sparse):
    """Two of ten steps; an evaluation between two steps belongs to the earlier one."""
    model = Model(*WAN)
    outputs, dense = accelerated(model, dense_start=0.2).call(sigma, **WAN_CALL)
    assert len(dense) == LAYERS * (1 if sparse else 2)
    assert torch.equal(outputs[0], Patcher(model).call(**WAN_CALL)[0][0]) is not sparse


def test_dense_layers_and_a_setting_with_its_own_start():
    outputs, dense = accelerated(Model(*WAN), f"{SPARSE} dense_layers=1 dense_steps=0", 0.5).call(1.0, **WAN_CALL)
    assert len(dense) == LAYERS + 1
    assert torch.equal(outputs[0], Patcher(Model(*WAN)).call(**WAN_CALL)[0][0])


def test_a_mask_over_the_texts_end_is_honoured_and_another_is_dense(caplog):
    (name, tokens, *more), call, grid = CASES[1]
    mask = torch.zeros(1, 1, 1, tokens)
    mask[..., -2:] = torch.finfo(torch.float32).min
    model = Model(name, tokens, *more, mask=mask)
    sparse, dense = accelerated(model).call(**call)
    pairs = plan("gna", grid, **SETTINGS).token_mask() & (mask[0, 0] == 0)
    torch.testing.assert_close([x[:, :-2] for x in sparse], [x[:, :-2] for x in by_mask(model, pairs)])
    assert not dense
    model.mask = mask.roll(1, -1)
    with caplog.at_level(logging.WARNING):
        outputs, dense = accelerated(model).call(**call)
    assert len(dense) == LAYERS and len(caplog.records) == 1
    torch.testing.assert_close(outputs, Patcher(model).call(**call)[0])


def test_a_level_takes_its_sparse_part_and_says_what_it_leaves_out(caplog):
    """Levels of short sequences are step caches alone, so the model runs dense and the node says so."""
    x = zeros(1, 4, 9, 60, 60)  # 8,100 tokens
    with caplog.at_level(logging.INFO):
        _, dense = accelerated(Model("WanModel", 8100, (1, 2, 2), (5,)), "balanced").call(x=x, **TEXT)
        assert len(dense) == LAYERS + 1 and "dense_layers=1" in caplog.text  # the level keeps a layer dense
        caplog.clear()
        _, dense = accelerated(Model(*WAN), "balanced").call(**WAN_CALL)
    assert len(dense) == 2 * LAYERS and [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("WanModel_S2V", SPARSE),
        ("SomethingElse", SPARSE),
        ("WanModel", "sla:topk=0.1"),  # learned weights
        ("WanModel", "gna:window=0.5,share=output,refresh=2"),
        ("WanModel", f"{SPARSE} dense_layers=0.5"),
        ("WanModel", f"{SPARSE} cache=mag:threshold=0.1"),
        ("WanModel", "nothing:known=1"),
    ],
)
def test_what_the_node_cannot_run_is_refused_in_one_line(name, setting):
    with pytest.raises(DitAccelError) as refused:
        accelerated(Model(name, *WAN[1:]), setting)
    assert "\n" not in str(refused.value)


def test_calls_that_the_node_cannot_read_are_refused_or_dense(caplog):
    with pytest.raises(DitAccelError):
        accelerated(Model(*CASES[3][0])).call(**CASES[3][1], keyframe_idxs=zeros(1))
    with pytest.raises(DitAccelError):
        accelerated(Model(*CASES[5][0])).call(**{**CASES[5][1], "minimax_payload": {}})
    with caplog.at_level(logging.WARNING):
        _, dense = accelerated(Model("WanModel", 61, *WAN[2:])).call(**WAN_CALL)  # one token more than the grid
        _, other = accelerated(Model("WanModel", 60, (1, 2, 2), ())).call(**{**WAN_CALL, "context": zeros(1, 60, 8)})
    assert len(dense) == 2 * LAYERS and len(other) == LAYERS and len(caplog.records) == 2


def test_an_override_that_was_there_gets_what_stays_dense():
    model, seen = Model(*WAN), []
    patcher = Patcher(model)

    def earlier(func, q, *args, **kwargs):
        seen.append(q.shape)
        return func(q, *args, **kwargs)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = earlier
    node = NODES.NODE_CLASS_MAPPINGS["DitAccelSparseAttention"]()
    (patched,) = node.apply(patcher, SPARSE, 0.0)
    patched.call(**WAN_CALL)
    assert len(seen) == LAYERS
    with pytest.raises(DitAccelError):
        node.apply(patched, SPARSE, 0.0)


def test_layouts_of_references_and_further_texts():
    wan = types.SimpleNamespace(patch_size=(1, 2, 2), ref_conv=object())
    call = {"x": zeros(1, 4, 3, 10, 8), "reference_latent": zeros(1, 4, 10, 8), "clip_fea": zeros(1, 9, 4), **TEXT}
    layout = LAYOUTS.wan(wan, call)
    assert layout == LAYOUTS.Layout(TokenGrid(3, 5, 4, text=20, text_first=True), (5, 9))
    model = types.SimpleNamespace(patch_size=(1, 2, 2), byt5_in=object())
    call = {"x": zeros(1, 4, 3, 10, 8), "txt_byt5": zeros(1, 6, 4), "ref_latent": zeros(1, 4, 1, 10, 8), **TEXT}
    assert LAYOUTS.hunyuan_video(model, call).grid == TokenGrid(3, 5, 4, text=20, text_first=True, conditioning=11)


def test_the_inputs_are_those_of_the_function_and_nothing_of_comfyui_is_imported(tmp_path):
    node = NODES.NODE_CLASS_MAPPINGS["DitAccelSparseAttention"]
    assert list(node.INPUT_TYPES()["required"]) == list(inspect.signature(node.apply).parameters)[1:]
    assert NODES.NODE_DISPLAY_NAME_MAPPINGS.keys() == NODES.NODE_CLASS_MAPPINGS.keys()
    program = (
        "import importlib.util, sys; sys.modules.update(comfy=None, nodes=None, folder_paths=None, dit_accel=None)\n"
        f"spec = importlib.util.spec_from_file_location('alone', {str(NODE / '__init__.py')!r})\n"
        "module = sys.modules['alone'] = importlib.util.module_from_spec(spec)\n"
        "try:\n    spec.loader.exec_module(module)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pip install dit_accel" in done.stdout and len(done.stdout.splitlines()) == 1
