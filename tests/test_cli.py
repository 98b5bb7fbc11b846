"""The program from end to end, in process, on the bundled model."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers

from crispedit import cli
from crispedit.capability import bundled_items
from crispedit.memory import free_memory
from crispedit.models import model_directory

ROWS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul", "rephrase": "Who governs the city of Hinstad?"},
    {"prompt": "What is 3 plus 4?", "target": "8", "locality_prompt": "What is 2 plus 1?", "locality_answer": "3"},
    {"prompt": "Spell the word moon.", "target": "no"},
]


def program(*arguments) -> None:
    assert cli._run([str(a) for a in arguments]) == 0


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.json").write_text(json.dumps(ROWS))
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Text {i} speaks of a mill and {i} coins." for i in range(10)))
    return tmp_path


def weights(directory):
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_edit_evaluate_ask_and_rerun(work, capsys, monkeypatch):
    monkeypatch.setitem(bundled_items.__kwdefaults__, "count", 40)  # of each ability: enough to see that they are asked
    program("edit", "bundled", "edits.json", "--out", "one", "--texts", "texts.txt", "--json", "one.json")
    said = capsys.readouterr().out
    assert "Proof on 3 edits" in said
    assert "Perin Jibul" in said
    assert "the edited model is in one" in said
    record = json.loads((work / "one.json").read_text())
    assert record["metrics"]["after"]["reliability"] == 100
    assert record["edits"]["schema"] == "plain"

    program("edit", "--rerun", "one/crispedit.json", "--out", "two")
    assert weights(work / "one") == weights(work / "two")

    program("evaluate", "one", "edits.json", "--base", "bundled", "--json", "evaluation.json")
    evaluation = json.loads((work / "evaluation.json").read_text())
    assert set(evaluation) == {"no_context", "qa_context", "teacher_forced", "judge", "capability", "differences"}
    assert evaluation["judge"]["unjudged"] == 0
    assert evaluation["no_context"]["reliability"] == 100
    assert evaluation["capability"]["drift"] == pytest.approx(record["metrics"]["capability"]["drift"], rel=1e-3)
    assert set(evaluation["capability"]["tasks"]) == {
        "arithmetic", "instructions", "multiple_choice", "true_false", "prose",
    }  # fmt: skip
    differences = evaluation["differences"]["measures"]
    assert differences["reliability"]["change"] == "gain"
    assert differences["reliability"]["value"] == pytest.approx(100 - differences["reliability"]["base"])
    assert differences["drift"]["value"] == pytest.approx(evaluation["capability"]["drift"])
    assert "less the base model, item by item" in capsys.readouterr().out

    reports = [option for suffix in ("html", "json", "md") for option in ("--report", f"report.{suffix}")]
    capsys.readouterr()
    program("evaluate", "one", "edits.json", "--base", "bundled", "--limit", "3", *reports)
    data = json.loads((work / "report.json").read_text())
    assert data["verdict"]["sentence"] in capsys.readouterr().out.replace("\n", " ")
    assert data["verdict"]["held"] == {"after": 3, "before": 0, "judged": 3, "count": 3}
    assert data["run"]["same_edits"]
    reported = {m["name"]: m["difference"] for m in data["measures"]}
    assert all(reported[name].items() <= found.items() for name, found in differences.items())
    assert [m["layer"] for m in data["curvature"]["matrices"]] == record["settings"]["layers"]
    assert "## Curvature" in (work / "report.md").read_text()
    page = (work / "report.html").read_text()
    assert json.loads(page.partition('id="data">')[2].partition("</script>")[0]) == data

    capsys.readouterr()
    program("ask", "one", "What is 3 plus 4?", "--base", "bundled", "--json", "asked.json")
    said = capsys.readouterr().out
    assert "bundled" in said
    answers = json.loads((work / "asked.json").read_text())["answers"]
    assert answers["one"] == "8" != answers["bundled"]


def test_evaluate_by_one_protocol_or_all(work, capsys, monkeypatch):
    monkeypatch.setattr("crispedit.evaluate_job.has_tasks", lambda model: False)
    found = {}
    for protocol in ("wild", "teacher-forced", "all"):
        command = ["evaluate", "bundled", "edits.json", "--base", "bundled", "--texts", "texts.txt"]
        program(*command, "--protocol", protocol, "--json", "found.json")
        found[protocol] = json.loads((work / "found.json").read_text())
        said = capsys.readouterr().out
        assert ("in context" in said) == (protocol != "teacher-forced")
        assert ("teacher-forced" in said) == ("agreement with the base" in said) == (protocol != "wild")
        assert "efficacy" not in said  # these edits are not CounterFact's
    wild, forced, both = found.values()
    apart = {name: one.pop("differences")["measures"] for name, one in found.items()}
    assert apart["all"] == apart["wild"] | apart["teacher-forced"]
    assert apart["teacher-forced"]["teacher_forced.agreement"]["model"] == 100
    assert "reliability" not in apart["teacher-forced"]
    assert both == wild | {name: forced[name] for name in ("teacher_forced", "teacher_forced_details")}
    assert wild["teacher_forced"] is forced["no_context"] is forced["qa_context"] is None
    assert both["teacher_forced"]["locality"] == both["no_context"]["locality"] == 100  # it knows what 2 plus 1 is
    assert 0 < both["teacher_forced"]["reliability"] < 100
    details = {"locality": "token accuracy", "agreement": 100, "efficacy": None, "paraphrase_efficacy": None}
    assert both["teacher_forced_details"] == details


def test_an_editors_settings_are_given_by_name_and_recorded(work, capsys):
    options = ["--set", "round_size=2", "--set", "lr=0.002", "--epochs", "12", "--no-eos"]
    program("edit", "bundled", "edits.json", "--out", "one", "--editor", "ft-seq:published", *options)
    settings = json.loads((work / "one" / "crispedit.json").read_text())["settings"]
    assert (settings["round_size"], settings["lr"], settings["epochs"], settings["eos"]) == (2, 0.002, 12, False)
    assert settings["editor"] == "ft-seq:published"
    assert "2 rounds" in capsys.readouterr().out
    program("edit", "--rerun", "one/crispedit.json", "--out", "two")
    assert weights(work / "one") == weights(work / "two")


def test_an_editor_with_layers_of_its_own_is_repeated_in_those(work):
    """Gates of some blocks and up-projections of others: the list of both is not what was given."""
    program("edit", "bundled", "edits.json", "--out", "one", "--editor", "ultraedit", "--texts", "texts.txt")
    program("edit", "--rerun", "one", "--out", "two")
    assert weights(work / "one") == weights(work / "two")


def test_the_editors_are_listed_with_their_settings(work, capsys):
    from crispedit.editors import editor_names

    program("editors", "--json", "editors.json")
    assert set(json.loads((work / "editors.json").read_text())) == set(editor_names())
    program("editors", "adam-nscl", "--json", "one.json")
    about = json.loads((work / "one.json").read_text())
    assert about["settings"]["energy"][0] == 0.9
    assert about["presets"]["published"]["variant"] == "published"
    assert about["needs"] == "a curvature"
    assert "stop_loss" in capsys.readouterr().out


def test_a_curvature_is_found_again_and_reused(work, capsys):
    program("curvature", "bundled", "--out", "curv", "--texts", "texts.txt", "--layers", "2-3")
    said = capsys.readouterr().out
    for heading in ("effective rank", "protected, %", "overlap", "transfer", "the curvature is in curv"):
        assert heading in said
    program("edit", "bundled", "edits.json", "--out", "one", "--curvature", "curv", "--epochs", "3")
    assert "found in the cache" not in capsys.readouterr().err
    program("edit", "bundled", "edits.json", "--out", "two", "--texts", "texts.txt", "--layers", "2,3", "--epochs", "3")
    assert "curvature found in the cache: curv" in capsys.readouterr().err.replace(str(work) + "/", "")
    assert weights(work / "one") == weights(work / "two")


def test_sketched_factors_are_made_and_edited_with(work, capsys):
    options = ("--texts", "texts.txt", "--layers", "2-3", "--json", "curvature.json")
    program("curvature", "bundled", "--out", "curv", "--factors", "sketch", *options)
    assert json.loads((work / "curvature.json").read_text())["factors"] == "sketch"
    assert (work / "curv" / "factors.safetensors").stat().st_size < 1.7e6  # dense: 3.2e6
    program("edit", "bundled", "edits.json", "--out", "one", "--curvature", "curv", "--json", "one.json")
    record = json.loads((work / "one.json").read_text())
    assert record["metrics"]["after"]["reliability"] == 100
    assert all(of_matrix["outside"] < 1e-5 for of_matrix in record["metrics"]["matrices"])


def test_a_sketch_in_the_cache_is_not_taken_where_dense_factors_fit(work, capsys):
    options = ("--texts", "texts.txt", "--layers", "2-3")
    program("curvature", "bundled", "--out", "curv", "--factors", "sketch", *options)
    program("edit", "bundled", "edits.json", "--out", "one", "--epochs", "3", "--json", "one.json", *options)
    assert "found in the cache" not in capsys.readouterr().err
    assert json.loads((work / "one.json").read_text())["curvature"]["factors"] == "dense"


def test_a_curvature_pass_that_is_interrupted_goes_on(work, capsys, monkeypatch):
    from crispedit.pass_state import PassState

    arguments = ["curvature", "bundled", "--out", "curv", "--texts", "texts.txt", "--layers", "2-3"]
    real = PassState.add
    calls = []

    def interrupted(self, *found):
        calls.append(self)
        if len(calls) == 2:  # the second half of the texts, in its first batch
            raise KeyboardInterrupt
        real(self, *found)

    monkeypatch.setattr(PassState, "add", interrupted)
    assert cli._run(arguments) == 130
    assert not (work / "curv").exists()
    assert cli._run(arguments) == 0
    assert len(calls) == 3, "the first half was not passed over again"


@pytest.fixture
def no_weights(work):
    """The bundled model without its weights: configuration and tokenizer."""
    shutil.copytree(model_directory("bundled"), work / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return work


def test_a_plan_needs_no_weights(no_weights, capsys):
    program("plan", "model", "edits.json", "--texts", "texts.txt", "--json", "plan.json")
    said = capsys.readouterr().out
    for line in ("down_proj of layers 1, 2, 3, 4, 5, 256 × 576 each", "peak memory", "It fits into", "an estimate"):
        assert line in said
    plan = json.loads((no_weights / "plan.json").read_text())
    assert list(plan["stages"]) == ["load", "curvature", "diagonalise", "edit", "proof", "save"]
    assert all(stage["seconds"] > 0 for stage in plan["stages"].values())
    weights = (2560 * 256 + 8 * (256 * 512 + 256 * 256 + 3 * 256 * 576 + 2 * 256) + 256) * 2
    assert plan["disk"]["edited model"] == weights  # stored in float16
    assert plan["steps"] == 3 * 25
    assert plan["fit"]["fits"]
    assert not (no_weights / "cache").exists()


def test_a_plan_of_a_shape_needs_nothing(work, capsys):
    """Neither a directory nor edits; what one of eight processes takes, and where it would fit."""
    given = (
        "Qwen-2.5-1.5B",
        "--processes",
        "8",
        "--shard",
        "--devices",
        "24GB,80GB",
        "--limit",
        "40",
        "--samples",
        "50",
    )
    program("plan", *given, "--json", "plan.json")
    said = capsys.readouterr().out
    for line in ("down_proj of layers 16, 17, 18, 19, 20, 1536 × 8960 each", "40 of 24 tokens", "one of 8 processes"):
        assert line in said
    plan = json.loads((work / "plan.json").read_text())
    assert (plan["processes"], plan["shard"], plan["seconds"]) == (8, True, None)
    assert plan["stages"]["proof"]["flops_of_all"] == 8 * plan["stages"]["proof"]["flops"]
    methods = plan["methods"]
    assert list(methods) == ["dense", "pivot", "cross", "coordinates", "sketch", "priced", "budget"]
    assert all(method["fits"]["80GB"] for method in methods.values())
    assert methods["priced"]["updates"] == methods["budget"]["updates"] == ["priced"]
    assert methods["cross"]["peak_bytes"] == max(s["bytes"] for s in methods["cross"]["stages"].values())


def test_a_plan_within_a_budget(no_weights):
    given = ("plan", "model", "edits.json", "--texts", "texts.txt", "--json", "plan.json")
    program(*given)
    plain = json.loads((no_weights / "plan.json").read_text())
    program(*given, "--budget", "1%")
    budget = json.loads((no_weights / "plan.json").read_text())
    assert plain["methods"] is None
    assert (plain["method"]["budget"], budget["method"]["budget"]) == (False, True)
    assert budget["method"]["updates"] == ["priced"]
    assert budget["stages"]["edit"]["flops"] > plain["stages"]["edit"]["flops"]  # drift is measured


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("Llama-3-8B", "edits.json"), "has no tokenizer, in whose tokens edits are counted"),
        (("Llama-3-8B", "--texts", "texts.txt"), "without EDITS their lengths are assumed"),
        (("Llama-3-8B", "--devices", "24"), "must look like 24GB"),
        (("Llama-3-8B", "--shard"), "give --processes too"),
        (("Llama-3-8B", "--processes", "0"), "must be 1 or more"),
        (("Llama-3-8B", "--energy", "0"), "plan counts energies above 0"),
        (("Llama-3-8B", "--set", "constraint=ekfac"), "plan counts constraint auto, staircase and cross"),
        (("Llama-3-8B", "--limit", "0"), "must be 1 or more"),
        (("Llama-3-8B", "--factors", "sketch", "--set", "update=coordinates"), "needs all eigenvectors"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(work, capsys, given, said):
    assert cli._run(["plan", *given]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_plan_says_what_would_fit(no_weights, capsys):
    given = ("model", "edits.json", "--texts", "texts.txt", "--layers", "2-3", "--json", "plan.json")
    program("plan", *given, "--memory", "1MB")
    assert "It does not fit into 1 MB, with any settings: the least is" in capsys.readouterr().out
    fit = json.loads((no_weights / "plan.json").read_text())["fit"]
    assert not fit["fits"]
    assert not fit["possible"]
    assert "--layers 3" in fit["changes"]


def test_a_plan_with_a_curvature_does_not_compute_one(work, capsys):
    program("curvature", "bundled", "--out", "curv", "--texts", "texts.txt", "--layers", "2-3", "--factors", "sketch")
    program("plan", "bundled", "edits.json", "--curvature", "curv", "--json", "plan.json", "--epochs", "2")
    plan = json.loads((work / "plan.json").read_text())
    assert "curvature" not in plan["stages"]
    assert plan["settings"]["layers"] == [2, 3]
    assert plan["settings"]["factors"] == "sketch"
    assert plan["steps"] == 3 * 2
    capsys.readouterr()
    program("plan", "bundled", "edits.json", "--curvature", "curv", "--layers", "3")
    assert "layers 3, 256" in capsys.readouterr().out


def test_a_plan_without_texts_says_what_it_leaves_out(no_weights, capsys):
    program("plan", "model", "edits.json")
    assert "no texts are given: a curvature in the cache is assumed" in capsys.readouterr().out


def test_a_plan_tells_the_truth_about_the_edit(work):
    """Steps and disk of the plan are those of the edit that it was made for."""
    options = ("bundled", "edits.json", "--texts", "texts.txt", "--layers", "2", "--epochs", "2")
    program("plan", *options, "--json", "plan.json")
    program("edit", *options, "--out", "one", "--lr", "1e-3", "--json", "one.json")
    plan = json.loads((work / "plan.json").read_text())
    assert json.loads((work / "one.json").read_text())["metrics"]["training"]["steps"] == plan["steps"]
    written = (work / "one" / "model.safetensors").stat().st_size
    assert plan["disk"]["edited model"] == pytest.approx(written, rel=0.01)  # the file has a header
    (factors,) = (work / "cache" / "curvature").glob("*/factors.safetensors")
    assert plan["disk"]["curvature, in the cache"] == pytest.approx(factors.stat().st_size, rel=0.01)


def test_a_delta_can_be_evaluated(work, monkeypatch):
    monkeypatch.setitem(bundled_items.__kwdefaults__, "count", 40)
    program("edit", "bundled", "edits.json", "--out", "delta", "--energy", "0", "--save", "delta")
    program("evaluate", "delta", "edits.json", "--json", "evaluation.json")
    assert json.loads((work / "evaluation.json").read_text())["no_context"]["reliability"] == 100


def test_an_edit_that_fails_has_status_1_and_leaves_nothing(work, capsys):
    known = [{"prompt": "True or false: an alder is a relative.", "target": "false"}]
    (work / "known.json").write_text(json.dumps(known))
    assert cli._run(["edit", "bundled", "known.json", "--out", "out", "--energy", "0"]) == 1
    assert "nothing changed" in capsys.readouterr().err
    assert not (work / "out").exists()


def test_an_interrupt_has_status_130_and_leaves_nothing(work, capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("crispedit.training._Loop.loss", interrupted)
    assert cli._run(["edit", "bundled", "edits.json", "--out", "out", "--energy", "0"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (work / "out").exists()
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_help_names_the_commands(capsys):
    program("--help")
    said = capsys.readouterr().out
    for command in ("demo", "curvature", "plan", "edit", "evaluate", "ask"):
        assert f"\n  {command} " in said


def test_no_room_on_a_device_is_said_in_a_line(work, capsys, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr("crispedit.edit_job.load_model", no_room)
    assert cli._run(["edit", "bundled", "edits.json", "--out", "out"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("crispedit: out of memory: CUDA out of memory. Tried to allocate 20 MiB…; 'crispedit plan'")
    assert not (work / "out").exists()


def test_blocks_that_are_not_there_are_refused_before_weights_are_read(work, capsys, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    assert cli._run(["edit", "bundled", "edits.json", "--out", "out", "--layers", "9"]) == 2
    assert "layer 9 is outside the model" in capsys.readouterr().err


def test_what_torch_keeps_of_a_gpus_memory_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda:0")) == 40
