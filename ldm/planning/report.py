"""A plan as text: tables of plain columns."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ldm.planning.meter import Layer
from ldm.planning.planned import GIB, Plan
from ldm.wording import counted

MIB = 2**20


def report(plan: Plan) -> str:
    """The whole plan: what it is, what it costs, whether it fits, how long it takes."""
    title = [plan.work.title, *(f"note: {note}" for note in plan.work.notes)]
    sections = [title, *(section(plan) for section in (_parameters, _layers, _compute, _memory, _time))]
    return "\n\n".join("\n".join(section) for section in sections)


def _parameters(plan: Plan) -> list[str]:
    trained = {id(p) for p in plan.work.trained}
    counts = {}
    for name, part in plan.work.parts.items():
        sizes = {id(p): p.numel() for p in part.parameters()}
        counts[name] = sum(sizes.values()), sum(sizes[p] for p in sizes.keys() & trained)
    if len(counts) > 1:
        counts["together"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    rows = [[name.replace("_", " "), *map(_millions, both)] for name, both in counts.items()]
    return _table(["parameters", "millions", "trained"], rows)


def _layers(plan: Plan) -> list[str]:
    rows = []
    for name, layer in merged(plan.cost.layers):
        shape = "x".join(map(str, layer.shape[1:])) if layer.shape else ""
        numbers = [_millions(layer.parameters), _giga(layer.flops), _mib(layer.saved)]
        rows.append([name or "(between them)", shape, *numbers])
    rows.append(["together", "", "", _giga(plan.cost.forward), _mib(plan.cost.saved)])
    head = ["forward, one image", "output", "millions", "GFLOPs", "kept MiB"]
    return _table(head, rows, text_columns=2)


def merged(layers: Iterable[Layer]) -> list[tuple[str, Layer]]:
    """(name, sum) with neighbours that differ in their number alone as one row.

    `blocks.0`, `blocks.1`, ... become `blocks.0-27, 28 alike`; a row without a cost is left out.
    """
    rows: list[list[Layer]] = []
    for layer in layers:
        if rows and _alike(rows[-1][-1], layer):
            rows[-1].append(layer)
        elif layer.parameters or layer.flops or layer.saved:
            rows.append([layer])
    return [(_joint_name(row), _sum(row)) for row in rows]


def _alike(a: Layer, b: Layer) -> bool:
    stems = {re.sub(r"\d+$", "", layer.name) for layer in (a, b)}
    # What many layers share is kept by the first of them alone.
    kept = abs(a.saved - b.saved) <= 0.01 * max(a.saved, b.saved)
    same = (a.parameters, a.flops, a.shape) == (b.parameters, b.flops, b.shape)
    return len(stems) == 1 and a.name != b.name and same and kept


def _joint_name(row: list[Layer]) -> str:
    last = re.search(r"\d+$", row[-1].name)
    return row[0].name if len(row) == 1 else f"{row[0].name}-{last[0]}, {len(row)} alike"


def _sum(row: list[Layer]) -> Layer:
    totals = {name: sum(getattr(layer, name) for layer in row) for name in ("parameters", "flops", "saved")}
    return replace(row[0], **totals)


def _compute(plan: Plan) -> list[str]:
    forward, step = plan.cost.forward, plan.cost.flops
    rows = [["forward, one image", _giga(forward)], ["training, one image", _giga(step)]]
    note = "a multiply-add counts as two, attention as matrix products; training is forward and backward"
    return [*_table(["compute", "GFLOPs"], rows), f"({note})"]


def _memory(plan: Plan) -> list[str]:
    memory, size = plan.memory, plan.part_size
    an_image = memory.step(size + 1) - memory.step(size)
    rows = [
        ["weights", _gib(memory.weights)],
        ["AdamW's two moments", _gib(memory.optimizer)],
        ["moving average of the weights", _gib(memory.average)],
        [f"gradients, activations of {counted(size, 'image')}", _gib(memory.step(size))],
        ["  of which another image needs", _gib(an_image)],
        ["context of the driver, gaps (5%)", _gib(memory.total(size) - memory.resident - memory.step(size))],
        [f"together at {counted(size, 'image')} at once", _gib(memory.total(size))],
    ]
    precision = "float32" if plan.work.training.precision == "32" else "bf16 autocast over float32 weights"
    return [*_table([f"memory of a GPU ({precision})", "GiB"], rows), *_fit(plan)]


def _fit(plan: Plan) -> list[str]:
    """What the memory asked about holds, and which accumulation makes the batch fit."""
    most, room = plan.largest, f"{plan.request.memory:g} GiB"
    if most == 0:
        return [f"{room} do not hold a single image"]
    text = f"largest batch at once in {room}: {counted(most, 'image')}"
    share = plan.work.training.batch_size // plan.gpus
    if most >= plan.part_size or share < 1:
        return [text]
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
    return [f"{text}; training.accumulate={parts} fits the batch of {plan.work.training.batch_size} in"]


def _time(plan: Plan) -> list[str]:
    run, request = plan.work.training, plan.request
    return [
        f"time: {run.steps:,} steps x {run.batch_size:,} images x {_giga(plan.cost.flops)} GFLOPs = "
        f"{plan.images * plan.cost.flops / 1e18:,.3g} EFLOPs",
        f"at {request.utilisation:.0%} of {request.tflops:g} TFLOP/s on {counted(plan.gpus, 'GPU')}: "
        f"{_duration(plan.hours)}",
    ]


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} seconds"
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours > 48 else "")


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}"


def _giga(flops: float) -> str:
    value = flops / 1e9
    return f"{value:,.1f}" if value >= 1000 else f"{value:.3f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _mib(size: float) -> str:
    return f"{size / MIB:,.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of columns: the first ones to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    sides = "<" * text_columns + ">" * (len(widths) - text_columns)
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        for row in (head, *rows)
    ]
    rule = "-" * len(lines[0])
    return [line.rstrip() for line in (lines[0], rule, *lines[1:])]
