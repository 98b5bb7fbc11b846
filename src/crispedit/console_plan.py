"""What ``plan`` prints: what every stage takes, and what would fit."""

from typing import TYPE_CHECKING

from .console import duration, out, print_table, size

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from .costs import Shape
    from .planning import Fit, Plan

TIMES = (
    " Times are an estimate, from flops and two seconds of measuring: of all epochs and answers of full length, where "
    "a run may end early."
)


def tera(flops: int) -> str:
    """Flops in units of 10¹², or a dash."""
    return "–" if not flops else f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


def print_plan(plan: "Plan", title: str) -> None:
    """What an edit will take: its matrices, memory and time by stage, disk, and whether it fits."""
    shapes: dict[Shape, list[str]] = {}
    for layer, (_, shape) in zip(plan.settings.layers, plan.matrices, strict=True):
        shapes.setdefault(shape, []).append(str(layer))
    for (d_out, d_in), layers in shapes.items():
        name = plan.matrices[0][0].split(".", 1)[-1].rpartition(".")[0].split(".")[-1]
        out.print(f"edited: {name} of layers {', '.join(layers)}, {d_out} × {d_in} each", soft_wrap=True)
    flops, moved = (sum(getattr(stage, what) for stage in plan.stages) for what in ("flops", "moved"))
    header = ["stage", "peak memory", "TFLOP", "time"]
    rows = [[stage.name, size(stage.num_bytes), tera(stage.flops), duration(stage.seconds)] for stage in plan.stages]
    rows.append(["in all", size(plan.peak.num_bytes), tera(flops), duration(plan.seconds)])
    if plan.processes.size > 1:
        header.append("moved")
        for row, num_bytes in zip(rows, [*(stage.moved for stage in plan.stages), moved], strict=True):
            row.append(size(num_bytes) if num_bytes else "–")
    print_table(title, header, rows)
    out.print("disk: " + "; ".join(f"{name} {size(taken)}" for name, taken in plan.disk.items()), soft_wrap=True)
    settings = plan.settings
    dtype = str(settings.dtype).removeprefix("torch.")
    out.print(
        f"{dtype}, {settings.kind} factors, update {', '.join(plan.updates)}, at most {plan.steps:,} steps."
        + (TIMES if plan.seconds is not None else ""),
        soft_wrap=True,
    )
    for note in plan.notes:
        out.print(note, soft_wrap=True)
    if plan.fit is not None:
        out.print(_fit_line(plan.fit), soft_wrap=True)
    if plan.compared:
        _print_methods(plan)


def _print_methods(plan: "Plan") -> None:
    """What other methods take, and the devices that they fit."""
    rows = []
    for method in plan.compared:
        flops = tera(sum(stage.flops for stage in method.stages))
        fits = ("yes" if fits else "no" for fits in method.fits.values())
        rows.append([method.name, size(method.peak.num_bytes), method.peak.name, flops, *fits])
    header = ["method", "peak memory", "in stage", "TFLOP", *plan.compared[0].fits]
    print_table("Methods, and the devices that they fit", header, rows)


def _fit_line(fit: "Fit") -> str:
    """Whether a memory is enough, in a line."""
    if fit.fits:
        return f"It fits into {size(fit.memory)}: {size(fit.num_bytes)} at the peak."
    changes = ", ".join(fit.changes)
    if fit.possible:
        return f"It does not fit into {size(fit.memory)}. With {changes} it does: {size(fit.num_bytes)}."
    least = f"the least is {size(fit.num_bytes)}" + (f", with {changes}" if changes else "")
    return f"It does not fit into {size(fit.memory)}, with any settings: {least}."
