"""``crispedit compare``: rows in processes of their own, kept and gone on with; and (slow) a whole comparison."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from crispedit import cli
from crispedit.comparing import CompareJob, write_comparison
from crispedit.errors import ArtifactError, ConfigError, EditFailed, Interrupted
from crispedit.models import model_directory
from fake_rows import row

ROWS = [
    {"prompt": f"Who is the mayor of {place}?", "target": name, "rephrase": f"Who governs the city of {place}?"}
    for place, name in (("Hinstad", "Perin Jibul"), ("Wugan", "Ola Mer"), ("Gorby", "Tia Lond"))
]


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.json").write_text(json.dumps(ROWS))
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Text {i} speaks of a mill and {i} coins." for i in range(10)))
    return CompareJob(
        model="bundled", edits="edits.json", editors="ft,ft-seq", out=Path("out"), texts=Path("texts.txt")
    )


def runs():
    """What was run since the last time."""
    found = Path("runs.txt").read_text().split() if Path("runs.txt").exists() else []
    Path("runs.txt").unlink(missing_ok=True)
    return found


def test_only_what_is_missing_runs(job):
    found = job.run(work=row)
    assert runs() == ["base", "ft", "ft-seq"]
    assert found.values["success"] == [0, 100, 75]
    assert job.run(work=row).record() == found.record()
    assert runs() == []

    more = replace(job, editors="locbf-ft").run(work=row)
    assert runs() == ["locbf-ft"]
    assert more.names == ["base", "locbf-ft", "ft", "ft-seq"], "rows of other commands are shown too"

    shutil.copy("edits.json", "copy.json")
    replace(job, edits="copy.json").run(work=row)
    assert runs() == [], "the same edits in another file"

    (path,) = Path("out/rows").glob("ft-seq-*.json")
    path.write_text('{"damaged": ')
    job.run(work=row)
    assert runs() == ["ft-seq"]
    assert not list(Path("out/rows").glob("*.log"))


def test_a_curvature_is_estimated_once_and_its_cost_is_known_to_later_rows(job):
    swept = replace(job, editors="crispedit", sweeps=("energy=0.5,0.9",), layers="2")
    found = swept.run(work=row)
    costs = [one.record["curvature"] for one in found.rows]
    assert costs[0]["memory"] is None
    assert costs[1] == costs[2]
    assert costs[1]["seconds"] > 0
    assert costs[1]["memory"]["process"] > 10**8
    assert not costs[1]["cached"]

    next(Path("out/rows").glob("crispedit-*.json")).unlink()
    assert [one.record["curvature"] for one in swept.run(work=row).rows] == costs, "gone on with"
    (other,) = replace(swept, sweeps=(), out=Path("other")).run(work=row).rows[1:]
    assert other.record["curvature"]["cached"]
    assert other.record["curvature"]["seconds"] == costs[1]["seconds"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [("kill", "killed by SIGKILL; too little memory is the usual reason"), ("raise", "the edit loss did not fall")],
)
def test_what_fails_is_a_row_that_says_why_and_the_others_go_on(how, reason, job):
    Path(f"ft.{how}").touch()
    found = job.run(work=row)
    assert found.rows[1].record == {"reason": reason}
    assert found.values["success"] == [0, None, 75]
    assert found.failed == [1]
    assert write_comparison(found, job.out)
    assert f"**ft failed**: {reason}" in Path("out/table.md").read_text()
    assert json.loads(Path("out/results.json").read_text())["rows"][1]["reason"] == reason

    Path(f"ft.{how}").unlink()
    runs()
    assert job.run(work=row).values["success"] == [0, 100, 75]
    assert runs() == ["ft"]


def test_a_bug_is_a_row_that_says_where_its_traceback_is(job):
    Path("ft.bug").touch()
    reason = job.run(work=row).rows[1].record["reason"]
    said, _, path = reason.partition("; see ")
    assert said == "ZeroDivisionError: division by zero"
    assert "in row" in Path(path).read_text()


def test_without_a_base_there_is_no_comparison(job):
    Path("base.kill").touch()
    with pytest.raises(EditFailed, match="the base model could not be evaluated: killed by SIGKILL"):
        job.run(work=row)
    assert runs() == ["base"]


def test_an_interrupt_ends_the_row_and_keeps_those_that_are_finished(job):
    Path("ft-seq.wait").touch()

    def interrupted(what, done, total):
        if what == "waiting":
            raise KeyboardInterrupt

    with pytest.raises(
        Interrupted, match="2 of 3 rows are finished and kept in out; the same command goes on"
    ) as raised:
        job.run(work=row, progress=interrupted)
    assert raised.value.exit_status == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("ft-seq.wait").read_text()), 0)
    Path("ft-seq.wait").unlink()
    runs()
    job.run(work=row)
    assert runs() == ["ft-seq"]


def test_ctrl_c_at_a_terminal_has_status_130_and_one_line(job):
    """The signal goes to the whole group there, to the row's process too."""
    Path("ft-seq.wait").touch()
    code = (
        "import fake_rows; from crispedit import comparing; comparing.measure_row = fake_rows.row; "
        "from crispedit.cli import main; "
        "main('compare bundled edits.json --editors ft,ft-seq --texts texts.txt --out out'.split())"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    program = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not Path("ft-seq.wait").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("crispedit: interrupted; 2 of 3 rows are finished and kept in out")
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("ft-seq.wait").read_text()), 0)


OTHERS = {
    "edits": ({"limit": 2}, r"edits edits.json \(3 edits\), not edits.json \(2 edits\)"),
    "texts": ({"samples": 5}, r"texts texts.txt, not texts.txt \(5 samples\)"),
    "seed": ({"seed": 1}, "texts"),  # other texts are held out
    "judge": ({"judge": "contains"}, "judge exact, not contains"),
    "dtype": ({"dtype": "bfloat16"}, "dtype float32, not bfloat16"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_directory_of_another_comparison_is_refused(what, job):
    job.run(work=row)
    changes, said = OTHERS[what]
    with pytest.raises(ArtifactError, match=f"'out' holds a comparison with the (capability )?{said}"):
        replace(job, **changes).run(work=row)
    assert runs() == ["base", "ft", "ft-seq"]


def test_the_directory_of_another_model_is_refused(job):
    job.run(work=row)
    shutil.copytree(model_directory("bundled"), "copy")
    copy = replace(job, model="copy")
    with pytest.raises(ArtifactError, match="'out' holds a comparison with the model bundled, not copy; name another"):
        copy.run(work=row)
    copy = replace(copy, out=Path("other"))
    copy.run(work=row)
    os.utime("copy/config.json", (0, 0))
    with pytest.raises(ArtifactError, match="the model's files as they were before a change"):
        copy.run(work=row)


def test_a_directory_of_something_else_is_refused(job):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        job.run(work=row)
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]


def test_sweeps_apply_to_editors_that_have_the_setting(job):
    swept = replace(job, editors="ft,crispedit,locbf-ft", sweeps=("energy=0.5,0.9", "layers=2,3+5"))
    _, planned = replace(swept, settings={"lr": 0.01}).plan()
    found = [(one.editor, dict(one.settings), one.blocks) for one in planned[1:]]
    assert found == [
        ("ft", {"lr": 0.01}, (2,)),
        ("ft", {"lr": 0.01}, (3, 5)),
        ("crispedit", {"lr": 0.01, "energy": 0.5}, (2,)),
        ("crispedit", {"lr": 0.01, "energy": 0.5}, (3, 5)),
        ("crispedit", {"lr": 0.01, "energy": 0.9}, (2,)),
        ("crispedit", {"lr": 0.01, "energy": 0.9}, (3, 5)),
        ("locbf-ft", {"lr": 0.01}, (2,)),
        ("locbf-ft", {"lr": 0.01}, ()),
    ]
    assert planned[-1].reason == "locbf-ft tunes one matrix, and 2 layers are named; name one"
    assert len({one.key for one in planned}) == len(planned)


def test_a_key_changes_with_all_that_a_row_depends_on(job, monkeypatch):
    def key(**changes):
        return replace(job, editors="ft", **changes).plan()[1][1].key

    keys = [
        key(),
        key(seed=1),
        key(settings={"lr": 0.1}),
        key(layers="2"),
        key(texts=None),
        key(limit=1),
        key(judge="contains"),
        key(dtype="bfloat16"),
        key(train_edits="edits.json"),
    ]
    monkeypatch.setattr("crispedit.comparing.__version__", "0.0.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_layers_that_fit_no_editor_are_refused(job):
    with pytest.raises(ConfigError, match="layer 9 is outside the model"):
        replace(job, layers="9").run(work=row)
    assert not Path("out").exists()


def test_without_matplotlib_the_table_is_written(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not write_comparison(job.run(work=row), job.out)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "comparison.json",
        "results.json",
        "rows",
        "table.md",
    ]


def test_the_program_says_which_rows_failed(job, monkeypatch, capsys):
    monkeypatch.setattr("crispedit.comparing.measure_row", row)
    Path("ft-seq.raise").touch()
    command = "compare bundled edits.json --editors ft,ft-seq --texts texts.txt --out out"
    assert cli._run(command.split()) == 1
    said = capsys.readouterr()
    assert "abilities, points, against the base model, with 95 % intervals" in said.out
    assert "loses 40.00 points" in said.out
    assert "ft-seq failed: the edit loss did not fall" in said.out
    assert "table.md, results.json, tradeoff.png are in out" in said.out
    assert "crispedit: 1 of 3 rows failed; the same command runs them again" in said.err


@pytest.mark.slow
def test_a_row_is_what_edit_and_evaluate_say(job, capsys):
    """The row's numbers are those of ``edit`` and ``evaluate`` by themselves, and its items add up to them."""
    command = "compare bundled edits.json --editors ft,crispedit --texts texts.txt --out out --json out.json"
    assert cli._run([*command.split(), "--set", "epochs=5", "--set", "precision=float32"]) == 0
    results = json.loads(Path("out.json").read_text())
    assert results == json.loads(Path("out/results.json").read_text())
    assert Path("out/tradeoff.png").read_bytes().startswith(b"\x89PNG")
    base, ft, crispedit = results["rows"]
    assert base["evaluation"]["capability"]["drift"] == 0
    assert crispedit["curvature"]["seconds"] > 0
    assert not crispedit["curvature"]["cached"]
    assert ft["curvature"]["seconds"] == 0

    edit = "edit bundled edits.json --editor crispedit --texts texts.txt --out edited --epochs 5 --precision float32"
    assert cli._run(edit.split()) == 0
    assert cli._run("evaluate edited edits.json --base bundled --json evaluation.json".split()) == 0
    alone = json.loads(Path("evaluation.json").read_text())
    for context in ("no_context", "qa_context"):
        assert crispedit["evaluation"][context] == alone[context]
    assert crispedit["evaluation"]["capability"]["tasks"] == alone["capability"]["tasks"]
    # the base's weights are taken back from the edited ones, which rounds in the seventh digit
    assert crispedit["evaluation"]["capability"]["drift"] == pytest.approx(alone["capability"]["drift"], rel=1e-3)
    values = crispedit["values"]
    assert values["reliability"] == pytest.approx(alone["no_context"]["reliability"])
    assert values["abilities"] == pytest.approx(sum(alone["capability"]["tasks"].values()) / 5)
    assert values["drift"] == pytest.approx(crispedit["evaluation"]["capability"]["drift"])
    assert values["loss"] == pytest.approx(alone["capability"]["loss"], rel=1e-5)

    capsys.readouterr()
    assert cli._run([*command.split(), "--set", "epochs=5", "--set", "precision=float32"]) == 0
    assert "3 of 3 rows are finished already" in capsys.readouterr().err
