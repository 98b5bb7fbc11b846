"""``crispedit lenet`` from end to end on the bundled digits, its networks, its directory of pieces, its refusals."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from crispedit import cli
from crispedit.errors import ConfigError, NumericsError
from crispedit.experiments.constraints import CONSTRAINTS, chosen_constraints
from crispedit.experiments.images import Labelled, digits, normalised
from crispedit.experiments.lenet import Division, Pretraining, accuracy, lenet, pretrained
from crispedit.experiments.picture import figure_of
from crispedit.experiments.second_order import LenetJob, Seed, Settings, parse_energies
from crispedit.experiments.summary import summarise
from reference import relative

FEW = "none,kfac,kfac-refreshed,ekfac,activation-covariance,soft-filter,optimal-kronecker"


@pytest.fixture(scope="module")
def tasks():
    return digits()


def settings(**changed) -> Settings:
    return Settings.of(
        "digits", **({"matrix": "fc2", "activation": "relu", "energies": "0.9,0.5", "lr": None, "epochs": 2} | changed)
    )


# ---------------------------------------------------------------- the network


@torch.no_grad()
@pytest.mark.parametrize("matrix", ["fc1", "fc2"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_divided_network_is_the_network(matrix, activation, tasks):
    torch.manual_seed(0)
    network = lenet(10, activation)
    division = Division.of(network, matrix)
    images = tasks.edit.test.images[:20]
    z = division.above(division.inputs(images) @ division.weight.T + division.bias)
    assert relative(z, network(normalised(images))) < 1e-5  # float32, the same sums
    assert tuple(division.weight.shape) == {"fc1": (120, 256), "fc2": (84, 120)}[matrix]
    assert float(z.min()) < 0, "the logits are not rectified"


def test_the_epoch_that_is_kept_is_the_best_on_images_held_out(tasks):
    """At a rate that falls apart later: what is returned is no reference to weights that were trained on."""
    train = Labelled(tasks.capability.train.images[:200], tasks.capability.train.labels[:200])
    settings = Pretraining(epochs=6, batch_size=16, lr=0.05)
    network, best = pretrained(train, 5, settings=settings, seed=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert accuracy(network, train.take(order[: round(200 / 12)])) == best
    again, _ = pretrained(train, 5, settings=settings, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(NumericsError, match="pretraining diverged"):
        pretrained(train, 5, settings=Pretraining(epochs=3, batch_size=16, lr=1e30), seed=1)


# ---------------------------------------------------------------- end to end


def command(directory: Path, seeds: int = 2, constraints: str = FEW) -> list[str]:
    """As it is given more than once in the same directory."""
    options = f"--seeds {seeds} --constraints {constraints} --energies 4 --epochs 5"
    return ["lenet", "--out", f"{directory}/out", *options.split()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the program on the digits."""
    directory = tmp_path_factory.mktemp("lenet")
    assert cli._run([*command(directory), "--json", f"{directory}/result.json", "--plot", f"{directory}/plot.svg"]) == 0
    return directory


def test_the_program_compares_constraints_on_the_digits(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result["constraints"]) == set(FEW.split(","))
    assert 0.9 < result["pretrain_accuracy"] <= 1
    for one in result["constraints"].values():
        assert 0 < one["low"] <= one["auc"] <= one["high"] <= 1
        assert len(one["seeds"]) == 2
        assert all(len(piece[key]) == 4 for piece in one["seeds"] for key in ("edit", "capability", "drift", "removed"))
    plain, flat = result["constraints"]["none"]["seeds"][0], result["constraints"]["kfac"]["seeds"][0]
    assert flat["drift"][0] < 1e-3 < plain["drift"][0], "γ near 1 keeps what plain fine-tuning does not"
    assert set(result["differences"]) >= {"activation-kfac", "soft-kfac", "optimal-kfac", "refreshed-kfac"}
    assert (finished / "plot.svg").stat().st_size > 10_000


def test_pieces_that_are_there_are_not_made_again(finished):
    kept = {path: path.stat().st_mtime_ns for path in (finished / "out").iterdir() if path.name != "settings.json"}
    lost = finished / "out" / "ekfac-1.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert cli._run(command(finished)) == 0
    assert {p: p.stat().st_mtime_ns for p in kept if p != lost} == {p: t for p, t in kept.items() if p != lost}
    after = json.loads(lost.read_text())
    assert [after[key] for key in ("edit", "capability", "removed")] == [
        before[key] for key in ("edit", "capability", "removed")
    ]


def test_an_interrupted_run_keeps_what_is_done(finished, tmp_path, monkeypatch, capsys):
    def interrupted(known, energies):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    for name in ("settings.json", "network-0.safetensors"):
        shutil.copy(finished / "out" / name, tmp_path / "out")
    again = command(tmp_path, 1, "none,kfac")
    with monkeypatch.context() as patched:
        patched.setitem(CONSTRAINTS, "kfac", type(CONSTRAINTS["kfac"])("kfac", "K-FAC", interrupted))
        assert cli._run(again) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "network-0.safetensors", "none-0.json", "settings.json",
    ]  # fmt: skip
    assert cli._run(again) == 0


def test_the_picture_has_a_curve_and_a_place_in_the_legend_for_each(finished):
    figure = figure_of(json.loads((finished / "result.json").read_text()))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(FEW.split(","))
    assert [float(label.rsplit(" ", 1)[1]) for label in labels] == sorted(
        (float(label.rsplit(" ", 1)[1]) for label in labels), reverse=True
    )
    for axes in figure.axes:
        styles = [(line.get_color(), line.get_marker()) for line in axes.get_lines()]
        assert len(set(styles)) == len(labels)
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(("matrix", "activation"), [("fc1", "relu"), ("fc2", "tanh")])
def test_other_matrices_and_activations_run_through_the_same_code(matrix, activation, tasks):
    torch.manual_seed(0)
    network = lenet(tasks.classes, activation).requires_grad_(False)
    seed = Seed(network, tasks, settings(matrix=matrix, activation=activation, epochs=1), 0)
    free = seed.piece(CONSTRAINTS["none"], [0.9])
    for name in ("kfac", "ekfac", "optimal-kronecker"):
        piece = seed.piece(CONSTRAINTS[name], [0.9])
        assert 0 < piece.removed[0] < seed.division.weight.numel()
        assert piece.drift[0] < free.drift[0], "what is curved is left alone"
        assert 0 < piece.moved[0] < free.moved[0]


# ---------------------------------------------------------------- findings


def made_up(**areas: list[tuple[float, float]]) -> dict:
    """What a run would have found: per constraint (edit, capability) of one γ, the same for two seeds."""

    def piece(points):
        edit, capability = zip(*points, strict=True)
        drift = [1 - y for y in capability]
        return {
            "edit": list(edit),
            "capability": list(capability),
            "drift": drift,
            "notes": {"difference_from_gnh": 0.0},
        }

    return {
        "settings": {},
        "networks": [{"test": 1.0, "validation": 1.0, "edit_before": 0.1}] * 2,
        "pieces": {name.replace("_", "-"): [piece(points), piece(points)] for name, points in areas.items()},
    }


GOOD = {"hessian": [(0.5, 0.98)], "gnh": [(0.5, 0.98)], "kfac": [(0.5, 0.97)], "ekfac": [(0.5, 0.97)]}


@pytest.mark.parametrize(
    ("changed", "confirmed"),
    [
        ({}, {"i": True, "ii": True, "iii": True}),
        ({"hessian": [(0.2, 0.6)], "gnh": [(0.2, 0.6)]}, {"i": False}),
        ({"gnh": [(0.5, 0.8)]}, {"ii": False}),
        ({"activation_covariance": [(0.5, 0.98)]}, {"ii": False}),
        ({"kfac": [(0.5, 0.8)]}, {"iii": False}),
        ({"ekfac": [(0.5, 0.8)]}, {"iii": False}),
    ],
)
def test_findings_can_fail(changed, confirmed):
    areas = {"none": [(0.9, 0.5), (0.5, 0.7)], "activation_covariance": [(0.5, 0.85)]} | GOOD | changed
    found = summarise(made_up(**areas))["findings"]
    assert {name: found[name]["confirmed"] for name in confirmed} == confirmed


def test_without_the_exact_constraints_nothing_is_claimed():
    result = summarise(made_up(none=[(0.9, 0.5)], kfac=[(0.5, 0.97)]))
    assert result["findings"] == {}
    assert result["quality"] == {}
    assert result["constraints"]["kfac"]["within_drift"]["value"] == pytest.approx(0.1 + 0.4 * 0.01 / 0.03)
    assert result["constraints"]["kfac"]["within_a_point"]["value"] == pytest.approx(0.1 + 0.4 * 0.01 / 0.03)
    assert result["constraints"]["kfac"]["own_range"]["value"] == result["constraints"]["kfac"]["auc"]
    assert result["constraints"]["kfac"]["auc"] == pytest.approx(0.4 / 0.8 * 0.985 + 0.4 / 0.8 * 0.735)


def test_the_committed_result_is_a_whole_one():
    """Of the real data, which tests have no time for; the document and its picture are made from it."""
    result = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "second-order.json").read_text())
    assert set(result["constraints"]) == set(CONSTRAINTS)
    assert all(network["test"] >= 0.99 for network in result["networks"])
    assert all(0 < one["low"] <= one["auc"] <= one["high"] <= 1 for one in result["constraints"].values())
    assert set(result["findings"]) == {"i", "ii", "iii"}
    for checks in result["checks"].values():
        assert all(check["products_against_curvlinops"] < 1e-12 for check in checks)
    assert all(check["difference_from_gnh"] < 1e-12 for check in result["checks"]["hessian"])


# ---------------------------------------------------------------- refusals


def test_energies_are_a_number_or_a_list():
    grid = parse_energies("20")
    assert len(grid) == 20
    assert (grid[0], grid[-1]) == pytest.approx((1 - 1e-7, 1 - 10**-0.1))
    assert parse_energies("0.5, 0.9") == [0.9, 0.5]


WRONG = {
    "--data nowhere": "'nowhere' is no directory",
    "--data nowhere --download": "--data or --download, not both",
    "--constraints kfc": "did you mean 'kfac'",
    "--matrix fc3": "matrix is 'fc3'",
    "--matrix fc1 --constraints gnh": "leave out gnh",
    "--activation gelu": "activation is 'gelu'",
    "--seeds 0": "seeds is 0",
    "--energies none": "energies is 'none'",
    "--energies 0": "energies is '0'",
    "--energies 0.5,1.0": "energy is 1.0",
    "--epochs 0": "epochs is 0",
    "--lr -1": "lr is -1",
    "--plot picture.gif": ".png",
    "--json taken": "taken",
    "--out file": "is a file",
    "--out taken": "is not empty",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_input_is_one_line_and_status_2(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("mine")
    (tmp_path / "file").write_text("mine")
    there = sorted(tmp_path.rglob("*"))
    assert cli._run(["lenet", *options.split()]) == 2
    said = capsys.readouterr().err
    assert WRONG[options] in said
    assert said.startswith("crispedit: ")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there, "nothing is written"


def test_a_directory_begun_with_other_settings_is_refused(finished, capsys):
    assert cli._run(f"lenet --out {finished}/out --lr 0.5 --constraints none".split()) == 2
    assert "begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["network-0.safetensors", "none-0.json"])
def test_a_broken_piece_is_named(name, finished, tmp_path, capsys):
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "out" / name).write_text('{"a": 1}')
    capsys.readouterr()
    assert cli._run(command(tmp_path, 1, "none")) == 2
    assert f"{name}' is no" in capsys.readouterr().err


def test_missing_extras_are_named(tmp_path, monkeypatch, capsys):
    for module, options in (("sklearn.datasets", ""), ("matplotlib", "--plot a.png")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            patched.chdir(tmp_path)
            assert cli._run(["lenet", *options.split()]) == 2
        assert re.search(r"pip install 'crispedit\[(experiments|plot)\]'", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_exact_constraints_leave_out_what_takes_minutes():
    (gnh,) = chosen_constraints("gnh", dense=True)
    job = LenetJob(out=Path("unused"), settings=settings(energies="20"), constraints=[gnh], seeds=1)
    assert len(job.energies(gnh)) == 8
    assert len(job.energies(CONSTRAINTS["kfac"])) == 20
    with pytest.raises(ConfigError, match="seeds is 0"):
        LenetJob(out=Path("unused"), settings=settings(), constraints=[gnh], seeds=0)
