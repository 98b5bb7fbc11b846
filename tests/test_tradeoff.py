"""What comes out of a comparison: measures, the front, what is claimed, the table and the picture."""

from itertools import combinations

import pytest
from matplotlib.text import Text

from crispedit.scatter import figure_of
from crispedit.statistics import Difference
from crispedit.tradeoff import Comparison, Row, claim, interval, measures, pareto_front
from fake_rows import record

MEMORY = {"process": 2 * 10**9, "gpu": None}
SHARED = {
    "model": "a $model$",
    "dtype": "float32",
    "device": "cpu",
    "edits": {"source": "edits.json", "count": 4, "sha256": "e"},
    "judge": "exact",
    "seed": 0,
}


def row(editor="ft", of="ft", drift=None, **given):
    found = record(of)
    if drift is not None:
        found["items"]["texts"]["drift"] = [5 * drift, 7 * drift]
    curvature = {"seconds": 3.0, "cached": False, "memory": None if editor in ("base", "ft") else {**MEMORY}}
    return Row(editor=editor, given=given, record={**found, "curvature": curvature})


def compared(*rows):
    return Comparison.of([row("base", "base"), *rows], SHARED, resamples=200)


def difference(low, high, detectable=1.25):
    return Difference(value=(low + high) / 2, low=low, high=high, error=0.5, detectable=detectable)


def test_measures_are_the_means_of_their_items():
    items = {
        "edits": {
            "no_context": {
                "reliability": [1.0, 1.0, 0.0, 1.0],
                "generalization": [0.5, None, 0.0, 1.0],
                "locality": [None, None, 1.0, 0.0],
            },
            "qa_context": {"reliability": [1.0] * 4, "generalization": [None] * 4, "locality": [None] * 4},
        },
        "tasks": {"adding": {"hits": [1, 0], "counts": [1, 1]}, "prose": {"hits": [6, 3], "counts": [10, 20]}},
        "texts": {"drift": [1.0, 2.0], "loss": [8.0, 10.0], "loss_base": [7.0, 9.0], "tokens": [10.0, 20.0]},
    }
    found = {name: measure.value for name, measure in measures(items).items()}
    assert found == pytest.approx(
        {
            "reliability": 75,
            "generalization": 50,
            "locality": 50,
            "success": 62.5,
            "qa_context.reliability": 100,
            "task.adding": 50,
            "task.prose": 30,
            "abilities": 40,
            "drift": 0.1,
            "loss": 0.6,
        }
    )


def test_success_is_reliability_where_nothing_is_rephrased():
    found = record("ft-seq")["items"]
    found["edits"]["no_context"]["generalization"] = [None] * 4
    assert measures(found)["success"].value == 75


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_nothing_beats(higher):
    """By hand: 1 is the base model; 2 is beaten by 3 in one and equal in the other; 5 equals 4."""
    kept = [100, 60, 70, 50, 50, None, 40]
    gained = [0, 80, 80, 90, 90, 95, 85]
    if not higher:
        kept = [None if y is None else -y for y in kept]
    assert pareto_front(gained, kept, higher) == {2, 3, 4}


def test_only_an_interval_beyond_0_is_called_a_loss():
    assert claim("abilities", difference(-3, -1)) == "loses 2.00 points"
    assert claim("abilities", difference(1, 3)) == "gains 2.00 points"
    assert claim("abilities", difference(-3, 1)) == "no loss found (could have shown ≥ 1.25 points)"
    assert claim("abilities", difference(-3, 0)) == "no loss found (could have shown ≥ 1.25 points)"
    assert claim("loss", difference(0.1, 0.3)) == "loses 0.2000 nats/token"
    assert claim("loss", difference(-0.1, 0.3, 0.3)) == "no loss found (could have shown ≥ 0.3000 nats/token)"
    assert claim("loss", None) == "–"


def test_intervals_beyond_0_are_bold():
    assert interval("success", difference(1, 3)) == "**+2.0 [+1.0, +3.0]**"
    assert interval("drift", difference(-0.5, 0.5)) == "+0.0000 [-0.5000, +0.5000]"


def test_rows_are_called_by_what_they_differ_in():
    found = compared(
        row("ft", lr=0.1),
        row("crispedit", energy=0.5, lr=0.1),
        row("crispedit", energy=0.9, lr=0.1, layers="2-6"),
        row("crispedit:published", energy=0.5),
    )
    assert found.names == [
        "base",
        "ft",
        "crispedit energy=0.5",
        "crispedit energy=0.9 layers=2-6",
        "crispedit:published",
    ]


def test_plain_fine_tuning_is_the_row_with_the_fewest_settings():
    assert compared(row("crispedit")).plain is None
    assert compared(row("ft:published"), row("ft", lr=0.1), row("ft")).plain == 3
    assert compared(row("ft:published")).plain == 1


def test_differences_are_paired_and_to_the_right_row():
    found = compared(row("ft"), row("ft-seq", "ft-seq"))
    assert found.against["base"]["abilities"][1].value == pytest.approx(-40)
    assert found.against["ft"]["abilities"][2].value == pytest.approx(20)
    assert found.against["ft"]["success"][2].value == pytest.approx(-25)
    assert found.against["base"]["drift"][2].low > 0
    assert found.claims()[1][0][::2] == ("ft", "loses 40.00 points")


def test_the_table_says_what_was_measured():
    found = compared(row("ft"), row("ft-seq", "ft-seq"), Row(editor="lora", given={}, record={"reason": "no memory"}))
    said = found.markdown()
    for line in (
        "| base | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 100.00 | 0.0000 | – | – | 1.00 GB |",
        "| ft | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 60.00 ◆ | 0.1250 ◆ | – | 1.0 s | 1.00 GB |",
        "| ft-seq | 75.0 | 75.0 | 75.0 | 75.0 | 75.0 | 80.00 ◆ | 0.0750 ◆ | 3.0 s, 2.00 GB | 1.0 s | 1.00 GB |",
        "- **lora failed**: no memory",
        "## Differences to the base model",
        "## Differences to plain fine-tuning",
        "Plain fine-tuning is the row ft.",
    ):
        assert line in said
    widths = {line.count("|") for line in said.split("\n\n")[2].splitlines()}
    assert len(widths) == 1


def test_a_base_alone_has_a_table():
    found = compared()
    assert "| base |" in found.markdown()
    assert found.claims()[1] == []


def labels(axes):
    return [text for text in axes.texts if text.get_text().startswith(("energy", "layers"))]


@pytest.mark.parametrize("count", [3, 12])
def test_labels_touch_neither_each_other_nor_points(count):
    """The worst case: a sweep whose rows lie almost on one another."""
    rows = [row("crispedit", "ft-seq", drift=0.2 + 0.001 * i, energy=round(0.5 + 0.01 * i, 3)) for i in range(count)]
    figure = figure_of(compared(row("ft"), *rows))
    figure.draw_without_rendering()
    assert len(figure.axes) == 2
    for axes in figure.axes:
        shown = labels(axes)
        assert len(shown) == count
        boxes = [Text.get_window_extent(text) for text in shown]  # an annotation's own includes the line to its point
        inside = axes.get_window_extent()
        for box in boxes:
            assert inside.x0 - 1 <= box.x0
            assert box.x1 <= inside.x1 + 1
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        points = [axes.transData.transform(point) for line in axes.lines[-4:] for point in line.get_xydata()]
        assert not any(box.contains(x, y) for box in boxes for x, y in points)


def test_the_picture_has_a_panel_per_measure_and_marks_the_front():
    found = compared(row("ft"), row("ft-seq", "ft-seq"), row("crispedit-seq:published", "locbf-ft"))
    figure = figure_of(found)
    assert [axes.get_ylabel().split(":")[0] for axes in figure.axes] == [
        "capability kept",
        "drift on held-out texts, nats/token (less is better)",
    ]
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["base model: 100.0", "Pareto front", "ft", "ft-seq", "crispedit-seq:published"]
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1
    colours = {line.get_color() for line in figure.axes[0].lines if line.get_label() in legend[2:]}
    assert len(colours) == 3
    low, high = figure.axes[1].get_ylim()
    assert low > high, "less drift is further up"
