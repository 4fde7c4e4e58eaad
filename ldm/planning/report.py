"""A plan as text: tables of plain columns."""

import re
from collections.abc import Iterable, Sequence

from ldm.planning.meter import Layer
from ldm.planning.planned import GIB, Plan

MIB = 2**20


def report(plan: Plan) -> str:
    """The whole plan: what it is, what it costs, whether it fits, how long it takes."""
    sections = [
        [f"{plan.run.task} {plan.run.name!r}: {plan.work.shape}", *(f"note: {n}" for n in plan.work.notes)],
        _parameters(plan),
        _layers(plan),
        _compute(plan),
        _memory(plan),
        _time(plan),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _parameters(plan: Plan) -> list[str]:
    trained = {id(p) for p in plan.work.trained}
    rows, together = [], [0, 0]
    for name, part in plan.work.parts.items():
        counts = [sum(p.numel() for p in part.parameters())]
        counts.append(sum(p.numel() for p in part.parameters() if id(p) in trained))
        together = [a + b for a, b in zip(together, counts, strict=True)]
        rows.append([name.replace("_", " "), *map(_millions, counts)])
    if len(rows) > 1:
        rows.append(["together", *map(_millions, together)])
    return _table(["parameters", "millions", "trained"], rows)


def _layers(plan: Plan) -> list[str]:
    rows = []
    for name, count, layer in merged(plan.cost.layers):
        shape = "x".join(map(str, layer.shape[1:])) if layer.shape else ""
        rows.append(
            [
                f"{name}, {count} alike" if count > 1 else name or "(between them)",
                shape,
                _millions(layer.parameters),
                _giga(layer.flops),
                f"{layer.saved / MIB:,.2f}",
            ]
        )
    rows.append(["together", "", "", _giga(plan.cost.forward), f"{plan.cost.saved / MIB:,.2f}"])
    head = ["forward, one image", "output", "millions", "GFLOPs", "kept MiB"]
    return _table(head, rows, text_columns=2)


def merged(layers: Iterable[Layer]) -> list[tuple[str, int, Layer]]:
    """(name, how many, their sum) with neighbours that differ in their number alone as one row.

    `blocks.0`, `blocks.1`, ... become `blocks.0-27`; a row without a cost is left out.
    """
    rows: list[list[Layer]] = []
    for layer in layers:
        if not (layer.flops or layer.saved or layer.parameters):
            continue
        if rows and _alike(rows[-1][-1], layer):
            rows[-1].append(layer)
        else:
            rows.append([layer])
    return [(_joint_name(row), len(row), _sum(row)) for row in rows]


def _alike(a: Layer, b: Layer) -> bool:
    stems = {re.sub(r"\d+$", "", layer.name) for layer in (a, b)}
    # What many layers share is kept by the first of them alone.
    kept = abs(a.saved - b.saved) <= 0.01 * max(a.saved, b.saved)
    same = (a.parameters, a.flops, a.shape) == (b.parameters, b.flops, b.shape)
    return len(stems) == 1 and a.name != b.name and same and kept


def _joint_name(row: list[Layer]) -> str:
    last = re.search(r"\d+$", row[-1].name)
    return row[0].name if len(row) == 1 else f"{row[0].name}-{last[0]}"


def _sum(row: list[Layer]) -> Layer:
    first = row[0]
    totals = {name: sum(getattr(layer, name) for layer in row) for name in ("parameters", "flops", "saved")}
    return Layer(first.name, **totals, shape=first.shape)


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
        [f"gradients, activations of {_count(size, 'image')}", _gib(memory.step(size))],
        ["  of which another image needs", _gib(an_image)],
        ["context of the driver, gaps (5%)", _gib(memory.total(size) - memory.resident - memory.step(size))],
        [f"together at {_count(size, 'image')} at once", _gib(memory.total(size))],
    ]
    precision = "bf16 autocast over float32 weights" if plan.half else "float32"
    return [*_table([f"memory of a GPU ({precision})", "GiB"], rows), *_fit(plan)]


def _fit(plan: Plan) -> list[str]:
    """What the memory asked about holds, and which accumulation makes the batch fit."""
    most, room = plan.largest, f"{plan.request.memory:g} GiB"
    if most == 0:
        return [f"{room} do not hold a single image"]
    text = f"largest batch at once in {room}: {_count(most, 'image')}"
    share = plan.run.training.batch_size // plan.gpus
    if most >= plan.part_size or share < 1:
        return [text]
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
    return [f"{text}; training.accumulate={parts} fits the batch of {plan.run.training.batch_size} in"]


def _time(plan: Plan) -> list[str]:
    run, request = plan.run.training, plan.request
    return [
        f"time: {run.steps:,} steps x {run.batch_size:,} images x {_giga(plan.cost.flops)} GFLOPs = "
        f"{plan.images * plan.cost.flops / 1e18:,.3g} EFLOPs",
        f"at {request.utilisation:.0%} of {request.tflops:g} TFLOP/s on {_count(plan.gpus, 'GPU')}: "
        f"{_duration(plan.hours)}",
    ]


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} seconds"
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours > 48 else "")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}"


def _giga(flops: float) -> str:
    value = flops / 1e9
    return f"{value:,.1f}" if value >= 1000 else f"{value:.3f}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of columns: the first ones to the left, numbers to the right."""
    every = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * len(line([w * "-" for w in widths]))
    return [line(head), rule, *map(line, rows)]
