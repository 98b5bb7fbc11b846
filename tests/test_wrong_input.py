"""Wrong input of every kind ends with one clear line, status 2, and nothing written."""

import json
import shutil
import sys
from collections import namedtuple

import pytest

from crispedit import cli
from crispedit.models import model_directory

GOOD = [{"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul"}]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory with good and bad files in it; the current directory."""
    monkeypatch.chdir(tmp_path)
    files = {
        "good.json": json.dumps(GOOD),
        "empty.json": "",
        "empty_list.json": "[]",
        "broken.json": '[\n{"prompt": "a",\n "target" "b"}]',
        "broken.jsonl": '{"prompt": "a", "target": "b"}\n{"prompt": ',
        "schema.json": '[{"question": "a", "reply": "b"}]',
        "misspelt.json": '[{"prompt": "a", "target": "b"}, {"prompt": "c", "taget": "d"}]',
        "no_target.json": '[{"prompt": "a", "target": "  "}]',
        "conflict.json": '[{"prompt": "a", "target": "b"}, {"prompt": "a", "target": "c"}]',
        "long.json": json.dumps([{"prompt": "word " * 2000, "target": "b"}]),
        "edits.xml": "<a/>",
        "texts.txt": "One text about a mill.\n\nAnother text about a river.",
        "blank.txt": "\n\n \n",
        "one.txt": "Only one text.",
        "texts.jsonl": '{"txt": "a"}',
        "record.json": '{"a": 1}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.json").write_bytes('[{"prompt": "é", "target": "b"}]'.encode("latin-1"))
    (tmp_path / "notamodel").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("mine")
    (tmp_path / "full.png").mkdir()
    (tmp_path / "full.html").mkdir()
    shutil.copytree(model_directory("bundled"), tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    shutil.copytree(model_directory("bundled"), tmp_path / "experts", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"num_local_experts": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = {"model_type": "mixtral", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2560, **sizes}
    (tmp_path / "experts" / "config.json").write_text(json.dumps(config))
    return tmp_path


EDIT = "edit bundled good.json --out out "
COMPARE = "compare bundled good.json --out out --editors "
CASES = {
    "missing edits": ("edit bundled nowhere.json --out out", "nowhere.json"),
    "empty edits": ("edit bundled empty.json --out out", "no edits"),
    "empty list of edits": ("edit bundled empty_list.json --out out", "no edits"),
    "broken JSON, with its line": ("edit bundled broken.json --out out", "line 3"),
    "broken JSON lines, with the line": ("edit bundled broken.jsonl --out out", "line 2"),
    "wrong schema": ("edit bundled schema.json --out out", "'prompt'"),
    "misspelt field": ("edit bundled misspelt.json --out out", "row 2 has no 'target' (did you mean"),
    "empty target": ("edit bundled no_target.json --out out", "row 1 has an empty 'target'"),
    "conflicting targets": ("edit bundled conflict.json --out out", "rows 1 and 2"),
    "row beyond the context": ("edit bundled long.json --out out", "row 1 has"),
    "not UTF-8": ("edit bundled latin.json --out out", "UTF-8"),
    "unknown kind of file": ("edit bundled edits.xml --out out", ".json"),
    "unknown bundled split": ("edit bundled bundled:tset --out out", "bundled edits 'tset'"),
    "unknown model": ("edit nobody/nothing good.json --out out", "cannot load the model 'nobody/nothing'"),
    "no such directory": ("edit ./nowhere good.json --out out", "there is no directory './nowhere'"),
    "not a model directory": ("edit notamodel good.json --out out", "no config.json"),
    "quantised model": ("edit quantised good.json --out out", "quantised"),
    "layer outside the model": (EDIT + "--layers 7-8", "layer 8 is outside the model: it has layers 0 to 7"),
    "malformed layers": (EDIT + "--layers five", "layers is 'five'"),
    "backward layers": (EDIT + "--layers 5-3", "runs backwards"),
    "energy of 1": (EDIT + "--energy 1", "energy is 1"),
    "negative energy": (EDIT + "--energy -0.1", "energy is -0.1"),
    "lr that is no number": (EDIT + "--lr fast", "lr is 'fast'"),
    "lr without end": (EDIT + "--lr inf", "lr is inf: input should be a finite number"),
    "lr of 0": (EDIT + "--lr 0", "lr is 0"),
    "no epochs": (EDIT + "--epochs 0", "epochs is 0"),
    "empty batches": (EDIT + "--batch-size 0", "batch_size is 0"),
    "limit of 0": (EDIT + "--limit 0", "limit is 0"),
    "unknown editor": (EDIT + "--editor crispedt", "did you mean 'crispedit'?"),
    "unknown preset": (EDIT + "--editor crispedit:publisht", "no preset 'publisht' (did you mean 'published'?)"),
    "preset of an editor that has none like it": (EDIT + "--editor ft:rank8", "it has published"),
    "rounds without a subspace": (EDIT + "--editor crispedit-seq --energy 0", "energy is 0"),
    "setting without a value": (EDIT + "--set lr", "--set is 'lr'; it must be NAME=VALUE"),
    "setting of no name": (EDIT + "--set 3=4", "--set is '3=4'"),
    "setting that does not fit": (EDIT + "--set update=sideways", "update is 'sideways'"),
    "option that the editor has no setting for": (EDIT + "--editor ft --energy 0.5", "no setting 'energy'"),
    "two layers for an editor of one": (EDIT + "--editor locbf-ft --layers 2,3", "name one"),
    "missing train edits": (EDIT + "--train-edits nowhere.json", "nowhere.json"),
    "settings of an unknown editor": ("editors crispedt", "did you mean 'crispedit'?"),
    "unknown way to save": (EDIT + "--save all", "save is 'all'"),
    "unknown way with conflicts": (EDIT + "--conflicts second", "conflicts is 'second'"),
    "chat without a template": (EDIT + "--chat on", "no chat template"),
    "unknown chat": (EDIT + "--chat maybe", "chat is 'maybe'"),
    "unknown dtype": (EDIT + "--dtype float8", "dtype is 'float8'"),
    "unknown device": (EDIT + "--device gpu", "device 'gpu' cannot be used here; it must be auto, cpu, cuda"),
    "device without float64": (EDIT + "--device mps", "device 'mps' has no float64"),
    "budget above the whole loss": (EDIT + "--budget 101%", "up to 100%, such as 1%"),
    "budget beside the default energy": (
        EDIT + "--budget 1% --energy 0.9",
        "--budget takes the place of --energy:",
    ),
    "missing texts": (EDIT + "--texts nowhere.txt", "no file of texts 'nowhere.txt'"),
    "blank texts": (EDIT + "--texts blank.txt", "no text"),
    "a single text": (EDIT + "--texts one.txt", "at least 2"),
    "texts without 'text'": (EDIT + "--texts texts.jsonl", "row 1 has no string 'text'"),
    "no curvature directory": (EDIT + "--curvature full", "not a curvature directory"),
    "output not empty": ("edit bundled good.json --out full", "not empty"),
    "output is a file": ("edit bundled good.json --out good.json", "is a file"),
    "no output": ("edit bundled good.json", "--out is missing"),
    "no edits named": ("edit bundled --out out", "EDITS is missing"),
    "other settings of a run that is repeated": (
        "edit --rerun record.json --out out --budget 2%",
        "--rerun repeats a run with its own settings: leave out --budget, or --rerun",
    ),
    "not a record": ("edit --rerun record.json --out out", "not a record"),
    "unknown option": (EDIT + "--enrgy 0.5", "--enrgy"),
    "unknown command": ("edti bundled good.json", "edti"),
    "curvature without texts": ("curvature quantised --out out", "--texts"),
    "unknown Fisher": ("curvature bundled --out out --fisher exact", "fisher is 'exact'"),
    "plot of an unknown kind": ("curvature bundled --out out --plot plot.jpg", "must end in .png, .svg or .pdf"),
    "plot without a suffix": ("curvature bundled --out out --plot plot", "must end in .png, .svg or .pdf"),
    "plot onto a directory": ("curvature bundled --out out --plot full.png", "is a directory"),
    "plot below a file": ("curvature bundled --out out --plot good.json/plot.png", "is a file"),
    "energy of 1 to plot": ("curvature bundled --out out --plot plot.png --energy 1", "energy is 1"),
    "unknown kind of factors": ("curvature bundled --out out --factors thin", "factors is 'thin'"),
    "too few samples": ("curvature bundled --out out --samples 1", "samples is 1"),
    "memory without a unit": ("plan bundled good.json --memory 24", "memory is '24'; it must look like 24GB"),
    "memory of 0": ("plan bundled good.json --memory 0GB", "memory is '0GB'"),
    "plan of missing edits": ("plan bundled nowhere.json", "nowhere.json"),
    "plan of a row beyond the context": ("plan bundled long.json", "row 1 has"),
    "plan of an unknown model": ("plan nobody/nothing good.json", "cannot load the model 'nobody/nothing'"),
    "plan of no model directory": ("plan notamodel good.json", "no config.json"),
    "plan of a quantised model": ("plan quantised good.json", "quantised"),
    "plan of a mixture of experts": ("plan experts good.json", "mixture of experts"),
    "plan of a layer outside the model": ("plan bundled good.json --layers 8", "layer 8 is outside the model"),
    "plan of no epochs": ("plan bundled good.json --epochs 0", "epochs is 0"),
    "plan of no curvature directory": ("plan bundled good.json --curvature full", "not a curvature directory"),
    "plan of a frontier": (
        "plan bundled good.json --budget auto --set frontier=6",
        "within one budget: leave frontier",
    ),
    "plan of a single text": ("plan Llama-3-8B --samples 1", "--samples is 1; it must be 2 or more"),
    "plan with missing texts": ("plan bundled good.json --texts nowhere.txt", "no file of texts 'nowhere.txt'"),
    "plan in an unknown dtype": ("plan bundled good.json --dtype float8", "dtype is 'float8'"),
    "plan with unknown conflicts": ("plan bundled good.json --conflicts second", "conflicts is 'second'"),
    "plan with a chat template that is missing": ("plan bundled good.json --chat on", "no chat template"),
    "unknown protocol": (
        "evaluate bundled good.json --protocol tame",
        "protocol is 'tame'; it must be wild, teacher-forced or all",
    ),
    "misspelt protocol": ("evaluate bundled good.json --protocol teacher_forced", "did you mean 'teacher-forced'?"),
    "unknown judge": ("evaluate bundled good.json --judge exakt", "did you mean 'exact'?"),
    "tasks of no name": ("evaluate bundled good.json --tasks ,", "name tasks of lm-evaluation-harness, or paper"),
    "tasks with a wrong number of examples": ("evaluate bundled good.json --tasks mmlu:five", "as in mmlu:5"),
    "no documents of tasks": ("evaluate bundled good.json --tasks mmlu --task-limit 0", "task limit is 0"),
    "empty batches of tasks": (
        "evaluate bundled good.json --tasks mmlu --task-batch-size 0",
        "task batch size is 0",
    ),
    "a limit for no tasks": ("evaluate bundled good.json --task-limit 5", "name some by --tasks"),
    "tasks from no directory": (
        "evaluate bundled good.json --tasks mmlu --include-path nowhere",
        "include path 'nowhere' is no directory",
    ),
    "JSON into a directory": ("evaluate bundled good.json --json full", "is a directory"),
    "report of an unknown kind": ("evaluate bundled good.json --report report.pdf", "must end in .html, .md or .json"),
    "report into a directory": ("evaluate bundled good.json --report full.html", "is a directory"),
    "report below a file": ("evaluate bundled good.json --report good.json/report.md", "is a file"),
    "curvature without a report": ("evaluate bundled good.json --curvature full", "give --report"),
    "no curvature to report": (
        "evaluate bundled good.json --report r.html --curvature full",
        "not a curvature directory",
    ),
    "comparison of an unknown editor": (COMPARE + "ft,crispedt", "did you mean 'crispedit'?"),
    "comparison of an unknown preset": (COMPARE + "ft,ft:publishd", "did you mean 'published'?"),
    "comparison of nothing": (COMPARE + ",", "no editors are named"),
    "comparison without editors": ("compare bundled good.json --out out", "--editors"),
    "comparison without a directory": ("compare bundled good.json --editors ft", "--out"),
    "comparison in a foreign directory": ("compare bundled good.json --editors ft --out full", "not empty"),
    "comparison on a file": ("compare bundled good.json --editors ft --out good.json", "is a file"),
    "sweep without values": (COMPARE + "ft --sweep energy", "--sweep is 'energy'; it must be NAME=VALUE,VALUE"),
    "sweep with an empty value": (COMPARE + "ft --sweep lr=0.1,", "--sweep is 'lr=0.1,'"),
    "sweep of an unknown setting": (COMPARE + "crispedit --sweep enrgy=0.5", "did you mean 'energy'?"),
    "sweep of what no editor here has": (COMPARE + "ft --sweep energy=0.5", "setting 'energy'"),
    "sweep over a wrong value": (COMPARE + "ft,crispedit --sweep energy=0.5,1", "energy is 1"),
    "sweep given twice": (COMPARE + "ft --sweep lr=0.1 --sweep lr=0.2", "lr is swept twice"),
    "swept and set": (COMPARE + "ft --sweep lr=0.1 --set lr=0.2", "lr is given twice"),
    "sweep over malformed layers": (COMPARE + "ft --sweep layers=2,5-3", "runs backwards"),
    "unknown setting for all": (COMPARE + "ft --set enrgy=0.5", "setting 'enrgy'"),
    "layers as a setting": (COMPARE + "ft --set layers=2", "give --layers"),
    "comparison on a layer outside the model": (COMPARE + "ft,crispedit --layers 8", "layer 8 is outside the model"),
    "comparison by an unknown judge": (COMPARE + "ft --judge exakt", "did you mean 'exact'?"),
    "comparison of no edits": (COMPARE + "ft --limit 0", "limit is 0"),
    "comparison without texts": ("compare quantised good.json --editors ft --out out", "give --texts FILE"),
    "comparison with missing texts": (COMPARE + "ft --texts nowhere.txt", "no file of texts 'nowhere.txt'"),
    "comparison with missing train edits": (COMPARE + "ft --train-edits nowhere.json", "nowhere.json"),
    "comparison of a row beyond the context": ("compare bundled long.json --editors ft --out out", "row 1 has"),
    "comparison with a chat template that is missing": (COMPARE + "ft --chat on", "no chat template"),
    "comparison in an unknown dtype": (COMPARE + "ft --dtype float8", "dtype is 'float8'"),
    "comparison on an unknown device": (COMPARE + "ft --device gpu", "device 'gpu'"),
    "comparison of an unknown model": (
        "compare nobody/nothing good.json --editors ft --out out --texts texts.txt",
        "cannot load the model 'nobody/nothing'",
    ),
    "empty question": ("ask bundled ''", "prompt is empty"),
    "demo into a foreign directory": ("demo --out full", "not empty"),
    "session into a foreign directory": ("session init bundled full", "'full' is not empty; name another one"),
    "session of an editor that has yet to learn": ("session init bundled s --editor mend", "give --set network=DIR"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_status_2_nothing_written(case, work, capsys):
    command, said = CASES[case]
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if "cache" not in path.parts}
    arguments = [part.strip("'") for part in command.split()]
    assert cli._run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("crispedit: ")
    assert said in captured.err
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if "cache" not in path.parts} == before


def test_no_disk_space_is_noticed_before_editing(work, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 100, 1000))
    assert cli._run(["edit", "bundled", "good.json", "--out", "out"]) == 2
    assert "no space for 'out'" in capsys.readouterr().err
    assert not (work / "out").exists()


def test_a_plot_without_matplotlib_is_refused_before_any_work(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli._run(["curvature", "bundled", "--out", "out", "--plot", "plot.png"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "crispedit: drawing needs matplotlib; install it with pip install 'crispedit[plot]'"
    ]
    assert not (work / "out").exists()
    assert not (work / "plot.png").exists()


def test_tasks_without_the_harness_are_refused_before_any_work(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert cli._run(["evaluate", "bundled", "good.json", "--tasks", "mmlu", "--json", "out.json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("crispedit: --tasks needs lm-evaluation-harness (")
    assert captured.err.endswith("): pip install 'crispedit[tasks]'\n")
    assert not (work / "out.json").exists()


def test_a_plan_with_a_curvature_of_other_matrices_is_refused(work, capsys):
    manifest = {"format": 2, "model": "other", "layers": [1], "factors": "dense", "held_out": []}
    name = "model.layers.1.mlp.down_proj.weight"
    (work / "other").mkdir()
    (work / "other" / "curvature.json").write_text(
        json.dumps({**manifest, "matrices": {name: {"d_out": 256, "d_in": 64}}})
    )
    assert cli._run(["plan", "bundled", "good.json", "--curvature", "other"]) == 2
    assert "computed for 'other', whose model.layers.1.mlp.down_proj.weight is 256 × 64" in capsys.readouterr().err
    assert cli._run(["plan", "bundled", "good.json", "--curvature", "other", "--layers", "2"]) == 2
    assert "no factors for layer 2; it has layers 1" in capsys.readouterr().err


def test_a_curvature_of_another_model_is_refused_with_both_named(work, capsys):
    from crispedit.bundled import train
    from crispedit.curvature import Curvature
    from crispedit.models import load_model

    tokenizer = load_model("bundled").tokenizer
    other = train.build_model(len(tokenizer), seed=1).eval()
    Curvature.estimate(other, tokenizer, ["a mill by a river", "two coins"], layers=[1], model_name="other").save(
        "curv"
    )
    assert cli._run(["edit", "bundled", "good.json", "--out", "out", "--layers", "1", "--curvature", "curv"]) == 2
    assert "computed for 'other' with other weights" in capsys.readouterr().err
    assert not (work / "out").exists()
