"""What processes that hold ranges of a sequence find, as cases of `context_parallel_worker`."""

import tiny_models
from accelerated_runs import IMAGE, ROUTED, VIDEO, accelerated

import dit_accel
from dit_accel.pipelines.sharding import shared_of
from dit_accel.plans.several_gpus import forecast
from dit_accel.registry import get_families, settings_of

# Without text, with masked text last, with text first, and an image with text first; the second in four processes too.
MODELS = ("wan:t2v", "hunyuan_video:t2v", "cogvideox:1.0", "flux:t2i")


def ring_cases(rank, ranks, in_turn, gradient, cached):
    """Outputs, gradients, a step cache and traffic. A ring of all processes, and of four also two groups of two."""
    for ring in (2,) if ranks == 2 else (4, 2):
        for name in MODELS if ranks == 2 else MODELS[:2]:
            tiny = tiny_models.get(*name.split(":"))
            yield from outputs(f"ring {ring}/{name}", tiny, ring, rank, ranks, in_turn)
    wan = tiny_models.get("wan", "t2v")
    single, shared, double = wan.build(), shared_out(wan, ranks), wan.build().double()
    yield (
        "ring/gradients",
        in_turn(
            gradient(shared, wan.call()),
            lambda: (gradient(single, wan.call()), gradient(double, wan.double_call())),
        ),
    )
    cache = "first-block:threshold=0.05"
    output, steps = cached(shared, wan.call(), cache)
    plain, alone = cached(single, wan.call(), cache)
    yield "ring/cached", in_turn(output, lambda: (plain, cached(double, wan.double_call(), cache)[0]))
    yield "ring/skipped", {"identical": steps == alone and min(alone.values()) < 1}
    for method, config in ROUTED[:1]:
        try:
            accelerated(shared, wan.call(), method, config)
        except dit_accel.DitAccelError as error:
            yield f"ring/refused {method}", {"identical": "in a ring" in str(error)}


def outputs(name, tiny, ring, rank, ranks, in_turn):
    """Static methods, dense steps and layers, and the traffic of the first method."""
    single, shared = tiny.build(), shared_out(tiny, ring)
    double = tiny.build().double()
    runs = [(method, config, {}) for method, config in (VIDEO[:3] if tiny.video else IMAGE[:1])]
    runs.append(("dense", {}, {}))
    runs.append((*runs[0][:2], {"dense_layers": 1}))
    for method, config, schedule in runs:
        output, report = accelerated(shared, tiny.call(), method, config, **schedule)
        references = ((single, tiny.call()), (double, tiny.double_call()))
        yield (
            f"{name}/{method}{'/dense layer' if schedule else ''}",
            in_turn(
                output,
                lambda method=method, config=config, schedule=schedule, references=references: (
                    accelerated(*case, method, config, **schedule)[0] for case in references
                ),
            ),
        )
        if report.dense_calls == 0 and method in ("gna", "tile"):
            if ring == 4 and method == "gna":
                (traffic,) = report.traffic.values()
                yield f"{name}/skipped ranges", {"identical": 0 < traffic.transfers < traffic.possible}
            yield f"{name}/traffic of {method}", {"identical": as_predicted(shared, tiny, report, ring, rank, ranks)}


def as_predicted(transformer, tiny, report, ring, rank, ranks):
    """Whether a run of sparse calls alone exchanged what `plan --gpus` predicts for this process."""
    family, (traffic,), samples = (
        get_families()[tiny.family],
        report.traffic.values(),
        len(tiny.call()["hidden_states"]),
    )
    _, attention = next(iter(family.attentions(transformer)))
    plan = dit_accel.plan(report.setting.method, grid=tiny.grid, **settings_of(report.setting.config))
    several = forecast(
        plan, ranks, "ring" if ring == ranks else "unified", family.heads(attention), family.head_dim(attention),
        separate=shared_of(transformer).sharding.separate,
    )  # fmt: skip
    work, calls = several.work[rank], traffic.calls
    moved = traffic.exchanged, traffic.fetched, traffic.transfers, traffic.possible
    predicted = samples * work.exchanged, samples * work.fetched, several.fetches, several.possible
    return calls == report.sparse_calls > 0 and several.ring == ring and moved == tuple(calls * x for x in predicted)


def shared_out(tiny, ring):
    transformer = tiny.build()
    dit_accel.parallelize(transformer, ring=ring)
    return transformer
