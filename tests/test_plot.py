"""The picture of a curvature: its numbers against brute force, its file, and spectra at the edge of what there is."""

import sys
from itertools import pairwise

import pytest
import torch

from builders import curvature_of
from crispedit import cli, plot
from crispedit.curvature import Curvature
from crispedit.errors import ArtifactError, ConfigError
from crispedit.factors import Factors
from crispedit.plot import Points, _log, boundary, draw_curvature, figure_of
from crispedit.spectrum import Spectrum


def factor(size: int, rank: int, seed: int) -> torch.Tensor:
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows *= torch.arange(1, size + 1, dtype=torch.float64) ** -0.8
    return rows.T @ rows / rank


def drawn_of(**matrices: tuple[torch.Tensor, torch.Tensor]) -> Curvature:
    factors = {name: Factors(A=A, G=G, num_tokens=1234) for name, (A, G) in matrices.items()}
    return curvature_of(factors, model_name="a $model$ of cost")


SMALL = (factor(12, 40, 0), factor(7, 40, 1))
LEADING = Spectrum.of(factor(40, 90, 2), factor(30, 90, 3))
LEADING = Spectrum(
    alpha=LEADING.alpha[:25],
    beta=LEADING.beta[:20],
    input_basis=LEADING.input_basis[:, :25],
    output_basis=LEADING.output_basis[:, :20],
    traces=LEADING.traces,
    residuals=(LEADING.residuals[0][:25], LEADING.residuals[1][:20]),
)
"""A spectrum of which only the top is known."""


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def dots(axes) -> list[tuple[float, float]]:
    found = [line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]


def one(found: dict[str, tuple[list[float], list[float]]], start: str) -> tuple[list[float], list[float]]:
    (line,) = [line for label, line in found.items() if label.startswith(start)]
    return line


def said(axes) -> str:
    return " ".join(text.get_text() for text in axes.texts)


def table(spectrum: Spectrum) -> torch.Tensor:
    """All shares of curvature, (d_out, d_in)."""
    products = torch.outer(spectrum.beta, spectrum.alpha)
    return products / products.sum()


@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.999])
def test_the_staircase_separates_the_largest_pairs_from_the_others(energy):
    spectrum = Spectrum.of(*SMALL)
    shares = table(spectrum)
    ordered = shares.flatten().sort(descending=True).values
    k = int((ordered.cumsum(0) < energy).sum()) + 1
    figure = figure_of(drawn_of(one=SMALL), energy)
    x, y = one(lines(figure.axes[1]), "protected")
    high = torch.zeros_like(shares, dtype=torch.bool)
    for i in range(
        7
    ):  # pair (i, j) is the unit square around (j + 1, i + 1): the edge lies right of row i's high pairs
        crossed = [x[n] for n in range(len(x) - 1) if x[n] == x[n + 1] and y[n] < i + 1 < y[n + 1]]
        assert len(crossed) <= 1
        high[i] = torch.arange(1, 13) < (crossed[0] if crossed else 0)
    assert torch.equal(high, shares >= ordered[k - 1])
    assert len({*x}) * 2 >= len(x) - 1  # corners only


@pytest.mark.parametrize(
    ("counts", "corners"),
    [
        ([3, 3, 1, 0], [(3.5, 0.5), (3.5, 2.5), (1.5, 2.5), (1.5, 3.5), (0.5, 3.5)]),
        ([2, 2], [(2.5, 0.5), (2.5, 2.5), (0.5, 2.5)]),
        ([1, 0], [(1.5, 0.5), (1.5, 1.5), (0.5, 1.5)]),
        ([0, 0], []),
    ],
)
def test_the_corners_of_a_staircase(counts, corners):
    assert list(zip(*boundary(torch.tensor(counts)), strict=True)) == corners


def test_the_energy_curve_is_the_sum_of_the_largest_pairs():
    spectrum = Spectrum.of(*SMALL)
    sums = table(spectrum).flatten().sort(descending=True).values.cumsum(0)
    x, y = one(lines(figure_of(drawn_of(one=SMALL), 0.9).axes[2]), "largest pairs")
    numbers = [round(share / 100 * 84) for share in x]
    assert numbers[0] == 1
    assert numbers == sorted({*numbers})
    assert len(numbers) > 30
    assert x == pytest.approx([100 * k / 84 for k in numbers])
    assert y == pytest.approx([100 * float(sums[k - 1]) for k in numbers], rel=1e-9)
    assert y[-1] >= 99.99


@pytest.mark.parametrize("spectrum", [Spectrum.of(*SMALL), LEADING], ids=["all pairs", "leading pairs"])
def test_the_curve_of_crosses_is_what_their_rows_and_columns_hold(spectrum):
    points = Points.of(spectrum, 0.5)
    d_out, d_in = spectrum.shape
    rows = torch.cat([torch.zeros(1), (spectrum.beta / spectrum.traces[1]).cumsum(0)]).double()
    columns = torch.cat([torch.zeros(1), (spectrum.alpha / spectrum.traces[0]).cumsum(0)]).double()
    held = (1 - torch.outer(1 - rows, 1 - columns)).flatten()
    r, c = torch.arange(len(rows))[:, None], torch.arange(len(columns))
    sizes = (r * d_in + c * (d_out - r)).flatten()
    assert len(points.held_by_crosses[0]) > 10
    for x, y in zip(*points.held_by_crosses, strict=True):
        assert float((held[sizes == round(x * d_out * d_in)] - y).abs().min()) < 1e-9


def test_gamma_is_marked_in_every_panel():
    spectrum = Spectrum.of(*SMALL)
    points = Points.of(spectrum, 0.8)
    figure = figure_of(drawn_of(one=SMALL), 0.8)
    spectra, pairs, held = figure.axes
    assert lines(held)["γ = 0.8"][1] == [80, 80]
    shares = table(spectrum).flatten().sort(descending=True).values.cumsum(0)
    k = int((shares < 0.8).sum()) + 1
    assert dots(held)[-1] == pytest.approx((100 * k / 84, 100 * float(shares[k - 1])))
    r, c = points.cross.cross
    x, y = one(lines(pairs), "cross")
    assert set(zip(x, y, strict=True)) <= {(12.5, r + 0.5), (c + 0.5, r + 0.5), (c + 0.5, 7.5)}
    last_input, last_output = int(points.staircase.counts[0]), int((points.staircase.counts > 0).sum())
    assert dots(spectra) == [
        pytest.approx((last_input, float(spectrum.alpha[last_input - 1] / spectrum.alpha.sum()))),
        pytest.approx((last_output, float(spectrum.beta[last_output - 1] / spectrum.beta.sum()))),
    ]


def test_the_spectra_are_shares_of_the_traces():
    spectrum = Spectrum.of(*SMALL)
    found = lines(figure_of(drawn_of(one=SMALL), 0.9).axes[0])
    alphas, betas = one(found, "$\\alpha_j$"), one(found, "$\\beta_i$")
    assert alphas[0] == list(range(1, 13))
    assert alphas[1] == pytest.approx((spectrum.alpha / SMALL[0].trace()).tolist())
    assert betas[1] == pytest.approx((spectrum.beta / SMALL[1].trace()).tolist())


ONE = torch.ones(1, 1)
DEGENERATE = {
    "fewer tokens than inputs": (torch.diag(torch.tensor([4.0, 2, 1, 0, 0, 0])), factor(5, 3, 4)),
    "1 × 1": (ONE, 2 * ONE),
    "1 × n": (factor(9, 20, 5), ONE),
    "n × 1": (ONE, factor(9, 20, 6)),
    "one direction holds all": (torch.diag(torch.tensor([1.0, 0, 0])), torch.diag(torch.tensor([1.0, 0]))),
    "all equal": (torch.eye(6), torch.eye(4)),
    "no curvature": (torch.zeros(3, 3), torch.zeros(2, 2)),
}


@pytest.mark.parametrize("energy", [0, 0.9, 0.999999])
@pytest.mark.parametrize("case", DEGENERATE)
def test_spectra_at_the_edge_are_drawn_without_warnings(case, energy, tmp_path):
    curvature = drawn_of(matrix=DEGENERATE[case])
    draw_curvature(curvature, energy, tmp_path / "plot.svg")
    spectra, pairs, held = figure_of(curvature, energy).axes
    if energy == 0:
        assert "nothing is protected" in said(pairs)
        assert not any("protected" in label or "cross" in label for label in lines(pairs))
        assert not dots(spectra) + dots(held)
    if case == "no curvature":
        assert "all eigenvalues are 0" in said(spectra)
    if case == "1 × 1" and energy:
        assert one(lines(held), "largest pairs") == ([100], [100])
        assert one(lines(pairs), "protected")[0] == [1.5, 1.5, 0.5]


def test_zeros_are_left_out_of_the_spectra():
    A, G = DEGENERATE["fewer tokens than inputs"]
    found = lines(figure_of(drawn_of(matrix=(A, G)), 0.9).axes[0])
    assert one(found, "$\\alpha_j$") == ([1, 2, 3], pytest.approx([4 / 7, 2 / 7, 1 / 7]))


@pytest.mark.parametrize(("energy", "remark"), [(0.5, "no staircase"), (0.999999, "neither staircase nor cross")])
def test_of_leading_eigenpairs_the_cross_is_drawn_and_no_staircase(energy, remark, tmp_path, monkeypatch):
    curvature = drawn_of(matrix=SMALL)
    monkeypatch.setattr(plot, "known_spectrum", lambda factors: LEADING)
    draw_curvature(curvature, energy, tmp_path / "plot.pdf")
    spectra, pairs, held = figure_of(curvature, energy).axes
    assert remark in said(pairs)
    assert not any("protected" in label for label in lines(pairs))
    assert any("cross" in label for label in lines(pairs)) == (energy == 0.5)
    assert "largest pairs" not in lines(held)
    assert len(lines(held)["crosses"][0]) > 10
    assert len(one(lines(spectra), "$\\alpha_j$")[0]) == 25


BEGINS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-", ".PNG": b"\x89PNG"}


@pytest.mark.parametrize("suffix", BEGINS)
def test_the_file_is_what_its_name_says(suffix, tmp_path):
    path = tmp_path / "new" / f"plot{suffix}"
    draw_curvature(drawn_of(first=SMALL, second=SMALL), 0.9, path)
    assert path.read_bytes().startswith(BEGINS[suffix])
    assert list(path.parent.iterdir()) == [path]


def test_a_picture_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*No space left"):
        draw_curvature(drawn_of(matrix=SMALL), 0.9, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_one_row_of_three_panels_per_matrix_with_its_title():
    figure = figure_of(drawn_of(first=SMALL, second=SMALL), 0.9)
    assert len(figure.axes) == 6
    titles = " ".join(text.get_text() for text in figure.texts)
    for part in ("a $model$ of cost", "γ = 0.9", "first", "second", "7 outputs × 12 inputs", "1,234 tokens"):
        assert part in titles
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_headings_stay_within_their_panels():
    """With the longest labels there may be; a heading that is too long would run into the next one."""
    figure = figure_of(drawn_of(matrix=SMALL), 0.9)
    labels = (
        ["$\\alpha_j$, inputs", "$\\beta_i$, outputs", "all free beyond"],
        ["protected, $\\beta_i\\alpha_j\\geq\\tau$: 0.0123 %", "cross: 0.0234 %"],
        ["largest pairs", "crosses", "γ = 0.999"],
    )
    for axes, texts in zip(figure.axes, labels, strict=True):
        legend = axes.get_legend()
        assert len(legend.texts) == len(texts)
        for text, longest in zip(legend.texts, texts, strict=True):
            text.set_text(longest)
        figure.draw_without_rendering()
        assert (
            legend.get_window_extent().x1 <= axes.get_window_extent().x1 + 0.3 * figure.dpi
        )  # the next is 0.9 inches off


def test_labels_of_the_largest_matrices_do_not_touch():
    figure = figure_of(drawn_of(matrix=SMALL), 0.9)
    _log(figure.axes[1], "x", 0.5, 53_248.5)
    _log(figure.axes[2], "x", 100 / (16_384 * 53_248) / 1.5, 150)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        low, high = axes.get_window_extent().x0, axes.get_window_extent().x1
        boxes = [box for box in boxes if low <= (box.x0 + box.x1) / 2 <= high]
        assert boxes
        for left, right in pairwise(boxes):
            assert left.x1 + 2 < right.x0


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'crispedit\[plot\]'"):
        draw_curvature(drawn_of(matrix=SMALL), 0.9, tmp_path / "plot.png")


def test_the_program_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Text {i} speaks of a mill and {i} coins." for i in range(10)))
    command = "curvature bundled --out curv --texts texts.txt --layers 2 --plot new/plot.svg --energy 0.7"
    assert cli._run(command.split()) == 0
    said = capsys.readouterr().out
    assert "0.7" in said
    assert "its picture in new/plot.svg" in said
    assert (tmp_path / "new" / "plot.svg").stat().st_size > 10_000
    assert (tmp_path / "curv" / "curvature.json").is_file()
