"""What ``session`` and ``patch`` print."""

from math import prod
from typing import Any

from .console import number, out, percent, print_table, size


def print_patch(name: str, manifest: dict[str, Any]) -> None:
    """What a patch is for, and what it changes; ``manifest`` as :func:`crispedit.patch.read_manifest` gives it."""
    parts = manifest["about"].get("stacked", [manifest["about"]])
    print_table(
        f"{name}: {len(parts)} patches in one" if len(parts) > 1 else name,
        ["model", "editor", "edits", "from"],
        [
            [
                part.get("model", "–"),
                part.get("editor", f"the difference to {part['result']}" if "result" in part else "–"),
                str(part.get("edits", {}).get("count", "–")),
                part.get("edits", {}).get("source", "–"),
            ]
            for part in parts
        ],
    )
    entries = {tensor: prod(shape) for tensor, shape in manifest["shapes"].items()}
    print_table(
        f"{len(entries)} of {len(manifest['base'])} tensors, {sum(entries.values()):,} weights",
        ["changed", "shape", "stored as"],
        [[tensor, " × ".join(map(str, manifest["shapes"][tensor])), manifest["dtypes"][tensor]] for tensor in entries],
    )


def print_session(found: dict[str, Any]) -> None:
    """What a session is and how its rounds went, as ``crispedit session status`` finds it."""
    rounds = found["rounds"]
    print_table(
        f"{found['directory']}: {found['model']}, {found['editor']}, blocks "
        f"{', '.join(map(str, found['edited_layers']))}; {size(found['bytes'])}",
        ["round", "reliability, %", "today, %", "drift, nats/token"],
        [
            [
                f"{record['number']}: {record['edits']['count']} edits from {record['edits']['source']}"
                + (" (kept)" if record["kept"] else ""),
                percent(record["metrics"]["after"]["reliability"]),
                percent(rounds[-1]["past"].get(str(record["number"]), {}).get("reliability")),
                number(record["drift"]["drift"] if record["drift"] else None),
            ]
            for record in rounds
        ],
    )
    if not rounds:
        out.print(f"no rounds yet: crispedit session edit {found['directory']} EDITS", soft_wrap=True)
    if found["pending"]:
        out.print(
            f"{found['pending']} rounds are still to be made again; the next edit begins with them", soft_wrap=True
        )
    for line in found.get("damaged", []):
        out.print(line, soft_wrap=True)


def print_session_evaluation(directory: str, found: dict[str, Any]) -> None:
    """What the model says of every round's edits, as ``crispedit session evaluate`` finds it."""
    from .tradeoff import KINDS

    for context, said in (("no_context", ""), ("qa_context", ", in a question")):
        print_table(
            f"{directory} after round {found['round']}{said}, %, judge: {found['judge']['name']}",
            ["round", *KINDS],
            [
                [
                    f"{of_round['number']}: {of_round['count']} edits from {of_round['source']}",
                    *(percent((of_round[context] or {}).get(kind)) for kind in KINDS),
                ]
                for of_round in found["rounds"]
            ],
        )
    missing = [str(of_round["number"]) for of_round in found["rounds"] if of_round["no_context"] is None]
    if missing:
        out.print(f"edits of rounds {', '.join(missing)} were not kept: give their files by --edits", soft_wrap=True)
    capability = found["capability"]
    rows = [
        [f"{name}, nats/token", number(capability[key])]
        for name, key in (("drift from the base", "drift"), ("drift that its curvature predicts", "predicted"))
        if capability.get(key) is not None
    ]
    rows += [[f"{task.replace('_', ' ')}, %", percent(score)] for task, score in (capability["tasks"] or {}).items()]
    if rows:
        print_table("What all rounds cost", ["", ""], rows)


def print_adapter(record: dict[str, Any]) -> None:
    """What an adapter holds of a change, and what is lost with it, as ``crispedit session export`` finds it."""
    print_table(
        "The adapter",
        ["matrix", "rank", "share of ‖ΔW‖²"],
        [[name, str(rank), f"{record['energy'][name]:.3f}"] for name, rank in record["ranks"].items()],
    )
    both = record["exact"], record["adapter"]
    rows = [
        [f"reliability of round {key}, %", *(percent(one["past"][key]["reliability"]) for one in both)]
        for key in both[0]["past"]
    ]
    if both[0]["drift"] is not None:
        rows.append(["drift from the base, nats/token", *(number(one["drift"]["drift"]) for one in both)])
    if rows:
        print_table("What it loses", ["", "exact", "adapter"], rows)
