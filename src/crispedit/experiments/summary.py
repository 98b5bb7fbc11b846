"""What the pieces come to: areas with intervals, the paper's findings, the quality of the approximations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..statistics import Difference
from .area import Point, area, intervals, paired, reach
from .constraints import CONSTRAINTS

LOST = 0.01
"""How much capability accuracy may be lost when edit accuracies are compared in one number: a point."""
DRIFT = 0.01
"""The same of capability drift, in nats an image."""
PLAIN, EXACT = "none", "gnh"
COMPARED = {
    "hessian-none": ("hessian", "none"),
    "gnh-hessian": ("gnh", "hessian"),
    "activation-gnh": ("activation-covariance", "gnh"),
    "kfac-gnh": ("kfac", "gnh"),
    "ekfac-gnh": ("ekfac", "gnh"),
    "activation-kfac": ("activation-covariance", "kfac"),
    "soft-kfac": ("soft-filter", "kfac"),
    "optimal-kfac": ("optimal-kronecker", "kfac"),
    "refreshed-kfac": ("kfac-refreshed", "kfac"),
    "empirical-kfac": ("kfac-empirical", "kfac"),
}
"""Pairs whose areas are compared seed by seed: the first less the second."""


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an experiment.

    Args:
        found: As :meth:`crispedit.experiments.second_order.LenetJob.run` returns it.

    Returns:
        ``pretrain_accuracy`` (mean over seeds, 0 to 1), ``range`` of edit accuracies, ``differences`` of areas,
        ``findings``, ``quality`` against the exact GNH, ``checks`` of the exact curvatures; and per constraint ``auc``
        with ``low`` and ``high``, ``within_a_point`` (the same of the edit accuracy attained while capability loses no
        more than :data:`LOST`), ``within_drift`` (while it drifts by no more than :data:`DRIFT`), ``own_range`` (the
        same of areas, each over the range of its own seed), and the pieces.
    """
    networks, pieces = found["networks"], found["pieces"]
    points = {name: points_of(networks, pieces, name) for name in pieces}
    before = [network["edit_before"] for network in networks]
    after = [max(x for x, _ in one) for one in points.get(PLAIN, next(iter(points.values())))]
    low, high = max(before), min(after)
    areas = {name: [area(one, low, high) for one in of_seeds] for name, of_seeds in points.items()}
    floors = [network["test"] - LOST for network in networks]
    reached = {
        name: [reach(one, floor) for one, floor in zip(of_seeds, floors, strict=True)]
        for name, of_seeds in points.items()
    }
    within = {name: [reach(one, -DRIFT) for one in of_seeds] for name, of_seeds in drifts_of(networks, pieces).items()}
    ends = list(zip(before, after, strict=True))
    own = {
        name: [area(one, *end) for one, end in zip(of_seeds, ends, strict=True)] for name, of_seeds in points.items()
    }
    told = zip(pieces, *(intervals(list(values.values())) for values in (areas, reached, within, own)), strict=True)
    differing = _differences(areas)
    return {
        "pretrain_accuracy": sum(network["test"] for network in networks) / len(networks),
        "range": [low, high],
        "constraints": {
            name: {
                "title": CONSTRAINTS[name].title,
                **dict(zip(("auc", "low", "high"), of_area, strict=True)),
                "within_a_point": dict(zip(("value", "low", "high"), of_reach, strict=True)),
                "within_drift": dict(zip(("value", "low", "high"), of_drift, strict=True)),
                "own_range": dict(zip(("value", "low", "high"), of_own, strict=True)),
                "aucs": areas[name],
                "seeds": [_rounded(one) for one in pieces[name]],
            }
            for name, of_area, of_reach, of_drift, of_own in told
        },
        "differences": {name: asdict(difference) for name, difference in differing.items()},
        "findings": findings(areas, differing),
        "quality": _quality(pieces),
        "checks": {
            name: [{k: v for k, v in one["notes"].items() if k != "quality"} for one in pieces[name]]
            for name in pieces
            if CONSTRAINTS[name].dense
        },
        "networks": networks,
        "settings": found["settings"],
    }


def _rounded(piece: Mapping[str, Any]) -> dict[str, Any]:
    """A piece for a file that people look at: six digits, but of γ; without its notes."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        if isinstance(value, list):
            return [short(one) for one in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {key: value if key == "energies" else short(value) for key, value in piece.items() if key != "notes"}


def points_of(networks: Sequence[Mapping[str, float]], pieces: Mapping[str, Any], name: str) -> list[list[Point]]:
    """Every seed's points (edit accuracy, capability accuracy) of a constraint, the two ends of all curves among them.

    The ends are the pretrained network and, where it was run, plain fine-tuning at the full rate: γ = 0.
    """
    found = []
    for number, (network, piece) in enumerate(zip(networks, pieces[name], strict=True)):
        one = [(network["edit_before"], network["test"]), *zip(piece["edit"], piece["capability"], strict=True)]
        if PLAIN in pieces:
            plain = pieces[PLAIN][number]
            one.append((plain["edit"][0], plain["capability"][0]))
        found.append(one)
    return found


def drifts_of(networks: Sequence[Mapping[str, float]], pieces: Mapping[str, Any]) -> dict[str, list[list[Point]]]:
    """Per constraint every seed's points (edit accuracy, less its drift), the pretrained network among them."""
    return {
        name: [
            [(network["edit_before"], 0.0), *((x, -y) for x, y in zip(one["edit"], one["drift"], strict=True))]
            for network, one in zip(networks, of_seeds, strict=True)
        ]
        for name, of_seeds in pieces.items()
    }


def _differences(areas: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    return {
        name: paired([areas[one], areas[other]], 1)[0]
        for name, (one, other) in COMPARED.items()
        if one in areas and other in areas
    }


def findings(areas: Mapping[str, Sequence[float]], differing: Mapping[str, Difference]) -> dict[str, dict[str, Any]]:
    """The paper's findings (CrispEdit, section 4.1), each as a statement about areas that can fail.

    (i) Hessian projection is better than no constraint. (ii) The GNH loses at most a tenth of what the Hessian gains
    over no constraint; activation covariance loses more. (iii) K-FAC and EK-FAC lose no more than that either.

    Args:
        areas: Per constraint, of every seed.
        differing: Paired differences, of :data:`COMPARED`.

    Returns:
        Per finding whether it is ``confirmed``, and the numbers it rests on; none whose constraints were not run.
    """
    if not {PLAIN, "hessian", EXACT} <= set(areas):
        return {}
    mean = {name: sum(values) / len(values) for name, values in areas.items()}
    gain = mean["hessian"] - mean[PLAIN]
    lost = {name: (mean[EXACT] - mean[name]) / gain if gain else float("inf") for name in areas}
    found = {
        "i": {"confirmed": differing["hessian-none"].low > 0, "gain_of_hessian": gain},
        "ii": {
            "confirmed": abs(mean["hessian"] - mean[EXACT]) <= gain / 10,
            "gnh_less_hessian": mean[EXACT] - mean["hessian"],
        },
    }
    if "activation-covariance" in areas:
        behind = lost["activation-covariance"]
        found["ii"] |= {"confirmed": found["ii"]["confirmed"] and behind > 0.1, "activation_lost_of_gain": behind}
    if {"kfac", "ekfac"} <= set(areas):
        near = max(lost["kfac"], lost["ekfac"]) <= 0.1
        found["iii"] = {
            "confirmed": near,
            "kfac_lost_of_gain": lost["kfac"],
            "ekfac_lost_of_gain": lost["ekfac"],
        }
    return found


def _quality(pieces: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Means over seeds of every approximation's quality, per γ."""
    of_seeds = [piece["notes"]["quality"] for piece in pieces.get(EXACT, []) if "quality" in piece["notes"]]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in of_seeds[0] if of_seeds else ():
        rows = zip(*(one[name] for one in of_seeds), strict=True)
        found[name] = [
            {key: None if any(r[key] is None for r in row) else sum(r[key] for r in row) / len(row) for key in row[0]}
            for row in rows
        ]
    return found
