"""What ``lenet`` prints: constraints by their areas, and the findings of the paper."""

from typing import Any

from .console import out, percent, print_table


def print_second_order(result: dict[str, Any]) -> None:
    """Constraints by the area under their trade-off, and the paper's findings, as ``crispedit lenet`` finds them."""
    found, networks = result["constraints"], result["networks"]
    low, high = (100 * x for x in result["range"])
    print_table(
        f"{len(networks)} networks, capability {100 * result['pretrain_accuracy']:.2f} %; "
        f"areas over edit accuracies of {low:.1f} to {high:.1f} %; edits with a point of capability lost",
        ["constraint", "area", "95 % interval", "edits, %", "95 % interval"],
        [
            [
                one["title"],
                f"{one['auc']:.4f}",
                f"{one['low']:.4f} to {one['high']:.4f}",
                percent(100 * one["within_a_point"]["value"]),
                f"{100 * one['within_a_point']['low']:.1f} to {100 * one['within_a_point']['high']:.1f}",
            ]
            for one in sorted(found.values(), key=lambda one: -one["auc"])
        ],
    )
    for name, difference in result["differences"].items():
        ends = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
        out.print(f"  {name:<18} {difference['value']:+.4f} ({ends})", soft_wrap=True)
    for name, finding in result["findings"].items():
        numbers = ", ".join(
            f"{key.replace('_', ' ')} {value:+.4f}" for key, value in finding.items() if key != "confirmed"
        )
        said = "confirmed" if finding["confirmed"] else "not confirmed"
        out.print(f"finding ({name}) of the paper: {said}; {numbers}", soft_wrap=True)
