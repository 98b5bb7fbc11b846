"""What ``curvature``, ``edit`` and ``train-mend`` print: spectra, the proof, what a budget buys."""

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .console import number, out, percent, print_table

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from .curvature import Curvature
    from .editing import EditResult


def print_curvature(curvature: "Curvature") -> None:
    """The curvature of every matrix in a few numbers, and whether the texts were enough."""
    rows = []
    for layer, name in zip(curvature.layers, curvature.factors, strict=True):
        d = curvature.description[name]
        ranks = " × ".join(f"{rank:.1f}" for rank in reversed(d.effective_rank))
        compared = ["–" if x is None else f"{x:.3f}" for x in (d.overlap, d.transfer)]
        rows.append([str(layer), ranks, f"{d.energy:g}", f"{100 * d.share:.1f}", *compared])
    title = f"{curvature.fisher} Fisher, {curvature.num_tokens:,} tokens, {curvature.kind} factors"
    print_table(title, ["layer", "effective rank, G × A", "γ", "protected, %", "overlap", "transfer"], rows)
    out.print(
        "protected: share of directions in the cross that holds γ of the curvature. Two halves of the texts give two "
        "crosses; overlap: how far they are the same (1 is all); transfer: the curvature of one half that the other "
        "half's cross holds. Where transfer is far below γ, more texts would help.",
        soft_wrap=True,
    )


def print_training(record: dict[str, Any]) -> None:
    """How the training of a hypernetwork went."""
    training = record["training"]
    columns = {
        "first tenth": training["losses"]["first"],
        "last tenth": training["losses"]["last"],
        f"{training['held_out_edits']} edits held out": training["held_out"],
    }
    names = {"edit_loss": "edit loss, nats/token", "divergence": "divergence where answers stay, nats/token"}
    print_table(
        f"hypernetwork: {training['steps']} steps on {training['train_edits']} edits, layers "
        + ", ".join(map(str, record["layers"])),
        ["", *columns],
        [[name, *(number(values.get(key)) for values in columns.values())] for key, name in names.items()],
    )


def print_proof(result: "EditResult") -> None:
    """The proof of an edit: before and after, answers in full, and what changed per matrix."""
    metrics, edits = result.metrics, result.provenance["edits"]
    out.print(f"{edits['count']} edits from {edits['source']}, schema {edits['schema']}", soft_wrap=True)
    for note in result.notes:
        out.print(note, soft_wrap=True)
    before, after, capability = metrics["before"], metrics["after"], metrics["capability"]
    rows = [[f"{kind}, %", percent(before[kind]), percent(after[kind])] for kind in before]
    if capability["drift"] is not None:
        rows.append(["capability loss, nats/token", number(capability["loss_base"]), number(capability["loss"])])
        rows.append(["drift, nats/token", number(0.0), number(capability["drift"])])
    print_table(f"Proof on {metrics['proof_edits']} edits, free greedy decoding", ["", "before", "after"], rows)

    answers = Table(title="Some answers in full", title_justify="left", title_style="bold", header_style="bold")
    for name in ("prompt", "target", "before", "after"):
        answers.add_column(name, overflow="fold")
    for example in result.examples:
        answers.add_row(*(Text(text) for text in (example.prompt, example.target, example.before, example.after)))
    out.print(answers)

    # where every direction has its price there is no subspace to be outside of
    outside = {c.name: f"{c.outside:.1e}" for c in result.changes if c.outside is not None}
    columns = ["", "‖ΔW‖", "‖ΔW‖/‖W‖", *(["share outside the subspace"] if outside else [])]
    cells = [[c.name, f"{c.norm:.3f}", f"{c.relative:.4f}", outside.get(c.name, "–")] for c in result.changes]
    print_table("Changed matrices", columns, [row[: len(columns)] for row in cells])
    if "frontier" in metrics:
        print_frontier(metrics["frontier"])
    if "budget" in metrics:
        print_certificate(metrics["budget"])
    rounding, seconds = metrics["rounding"], metrics["seconds"]
    out.print(
        f"stored in {rounding['dtype']}: {100 * rounding['survived']:.1f} % of the changed entries survive, "
        f"relative error of the change {rounding['relative_error']:.1e}, "
        f"{metrics['answers_changed_by_rounding']} answers changed by it",
        soft_wrap=True,
    )
    settings, training, loss = result.settings, metrics["training"], metrics["edit_loss"]
    rates, tried = training["learning_rates"], [trial["learning_rate"] for trial in training["trials"]]
    said = [f"edit loss {loss['before']:.3f} before, {loss['after']:.3f} after"]
    if settings.get("budget") is not None:
        said.append(f"budget {settings['budget']}")
    elif settings.get("update") == "priced":
        said.append(f"price {settings['price']:g} at energy {settings['energy']:g}")
    elif "energy" in settings:
        said.append(f"energy {settings['energy']}")
    if rates and settings.get("budget") is not None:
        said.append(f"{len(rates)} epochs")
    elif rates:
        falling = f" falling to {rates[-1]:.1e}" if rates[-1] < rates[0] else ""
        up_to = f" (tried up to {max(tried):.1e})" if len(tried) > 1 else ""
        said += [f"learning rate {rates[0]:.1e}{falling}{up_to}", f"{len(rates)} epochs"]
    if len(metrics["rounds"]) > 1:
        said.append(f"{len(metrics['rounds'])} rounds")
    said += [f"{what} {seconds[what]:.1f} s" for what in ("edit", "curvature", "proof")]
    out.print(f"{settings['editor']}: {', '.join(said)}", soft_wrap=True)
    if training["forward"]:
        out.print(_steps(training["forward"]), soft_wrap=True)


def print_frontier(found: dict[str, Any]) -> None:
    """What every budget bought, and where more of it begins to buy little."""
    from .frontier import success

    def row(name: str, point: dict[str, Any]) -> list[str]:
        scores = (percent(point[name]) for name in ("reliability", "generalization", "locality"))
        return [name, number(point["drift"]), *scores]

    rows = [row(f"budget {point['budget']:.2g}", point) for point in found["points"]]
    rows.append(row("plain fine-tuning", found["fine_tuning"]))
    header = ("", "drift", "reliability", "generalization", "locality")
    print_table("What a damage budget buys; asked of the edits of the proof, in %", header, rows)
    out.print(f"beyond a budget of {found['knee']:.2g} more drift buys little (the knee)", soft_wrap=True)
    *smaller, kept = found["points"]
    better = max(smaller, key=success, default=kept)
    if success(better) > success(kept) and better["preference"] == kept["preference"]:
        out.print(
            f"the edit that is kept, within {kept['budget']:.2g}, says less than that within {better['budget']:.2g}, "
            "which went on from it: it was trained too briefly; give it more --epochs",
            soft_wrap=True,
        )


def print_certificate(found: dict[str, Any]) -> None:
    """What an edit within a budget spent of it, in a line or two."""
    interval = f"95 % interval {number(found['low'])} to {number(found['high'])} over {found['texts']} held-out texts"
    share = 100 * found["drift"] / found["budget"]
    out.print(
        f"budget {number(found['budget'])} nats/token ({found['said']}): drift {number(found['drift'])}, "
        f"{share:.0f} % of it ({interval})",
        soft_wrap=True,
    )
    if found["preference"] > 0:
        out.print(
            f"the edits were estimated to need {number(found['needed'])}: where there is not room for all, those come "
            "first that take the least",
            soft_wrap=True,
        )
    if found["unseen"] > 0:
        out.print(
            f"inputs that the texts do not have, in all directions alike, counted {found['unseen']:.2f} times theirs",
            soft_wrap=True,
        )
    if found["ratio"] is not None:
        out.print(
            f"the curvature predicted {found['predicted']:.2g}, which is {found['ratio']:.1f} times too little",
            soft_wrap=True,
        )
    if not found["met"]:
        out.print("the budget is not met: this is the nearest to it that the edits could be made", soft_wrap=True)


def _steps(forward: dict[str, Any]) -> str:
    """From where the steps of an edit were computed, and in which precision."""
    where = {
        "matrix": "replayed from the input of the first edited matrix",
        "block": "replayed from the input of the first edited block",
        "targets": "the whole model, logits at target tokens only (no replay)",
        "whole": "the whole model (no replay)",
    }[forward["start"]]
    kept = {"memory": "memory", "cpu memory": "the CPU's memory", "file": "a mapped file"}.get(forward["kept"])
    record = f", {forward['num_bytes'] / 1e6:.1f} MB recorded in {kept}" if kept else ""
    packed = ", shared beginnings run once" if forward["packed"] else ""
    return f"steps: {where}{record}{packed}; {forward['precision']}"
