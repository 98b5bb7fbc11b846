"""The tasks about edits that come with crispedit, in the real harness: what they ask, and our own scores from them."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'crispedit[tasks]'")

from crispedit import cli
from crispedit.benchmarks import parse_benchmarks
from crispedit.bundled import world
from crispedit.edits import load_edits
from crispedit.errors import ConfigError, EditsError
from crispedit.evaluation import measure
from crispedit.harness import run_benchmarks
from crispedit.harness_tasks import LOGGER, PACK, load_benchmarks
from crispedit.models import model_directory
from crispedit.untouched import untouched_process
from crispedit.wild import CONTEXTS, in_context, questions

KINDS = ("reliability", "generalization", "locality")
FIELDS = {  # prompt, target, rephrase, locality prompt and answer; and what else makes a row of that schema
    "zsre": (("src", "alt", "rephrase", "loc", "loc_ans"), {"pred": "x"}),
    "counterfact": (
        ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
        {"case_id": 1, "ground_truth": "x"},
    ),
    "wikibigedit": (("update", "ans", "rephrase", "loc", "loc_ans"), {"tag": "x"}),
}


@pytest.fixture
def file(tmp_path):
    """A function that writes bundled edits in a schema; every other one is known to the base model already."""

    def write(schema: str, count: int = 12) -> str:
        names, others = FIELDS[schema]
        rows = []
        for number, row in enumerate(world.edit_rows("eval")[:count]):
            target = row["old_target"] if number % 2 else row["target"]
            values = (row["prompt"], target, row["rephrase"][0], row["locality_prompt"][0], row["locality_answer"][0])
            rows.append({**dict(zip(names, values, strict=True)), **others})
        path = tmp_path / f"{schema}.json"
        path.write_text(json.dumps(rows))
        return str(path)

    return write


def run(bundled, names: str, **metadata):
    there = load_benchmarks(parse_benchmarks(names), metadata=metadata)
    found = run_benchmarks(bundled.model, bundled.tokenizer, there, chat=False, batch_size=5)
    return {score.name: score.items for score in found}


@pytest.mark.parametrize("schema", FIELDS)
def test_free_answers_are_judged_as_wild_judges_them(bundled, file, schema):
    """Item by item: one prompt of a kind per edit, so that an item of the harness is an edit of ours."""
    path = file(schema)
    edits = load_edits(path)
    assert edits.schema == schema
    ours = measure(bundled.model, bundled.tokenizer, edits).edits
    for context in CONTEXTS:
        found = run(bundled, f"crispedit_{schema}", edits=path, context=context)
        assert list(found) == [f"crispedit_{schema}_{kind}" for kind in KINDS]
        for kind in KINDS:
            assert found[f"crispedit_{schema}_{kind}"].hits == list(ours[context][kind].values()), kind
        assert 0 < found[f"crispedit_{schema}_reliability"].score < 100


@torch.inference_mode()
def by_hand(bundled, prompt: str, answer: str) -> tuple[bool, float]:
    """Whether each token of an answer is the first choice, and the answer's log-probability; one row, no batch."""
    start = len(bundled.tokenizer(prompt)["input_ids"])
    ids = bundled.tokenizer(f"{prompt} {answer}")["input_ids"]
    logits = bundled.model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    wanted = torch.tensor(ids[start:])
    return bool((logits.argmax(-1) == wanted).all()), float(logits.log_softmax(-1)[range(len(wanted)), wanted].sum())


@pytest.mark.parametrize("schema", ["zsre", "wikibigedit"])
def test_forced_answers_are_right_token_by_token(bundled, file, schema):
    path = file(schema)
    found = run(bundled, f"crispedit_{schema}_forced", edits=path)
    edits = load_edits(path)
    for kind in KINDS:
        asked = [q for q in questions(edits) if q.kind == kind]
        wanted = [float(by_hand(bundled, q.prompt, q.expected)[0]) for q in asked]
        assert found[f"crispedit_{schema}_{kind}_forced"].hits == wanted
    assert 0 < found[f"crispedit_{schema}_reliability_forced"].score < 100


def test_the_likelier_of_two_answers_is_right(bundled, file):
    """CounterFact: the new fact against the old one; where the fact must stay, the other way round."""
    path = file("counterfact")
    found = run(bundled, "crispedit_counterfact_likelier", edits=path)
    edits = load_edits(path)
    for kind in KINDS:
        wanted = []
        for asked in (q for q in questions(edits) if q.kind == kind):
            edit = edits[asked.edit]
            answers = [edit.target, edit.locality[0].answer]
            right, other = answers[::-1] if kind == "locality" else answers
            assert right == asked.expected
            wanted.append(float(by_hand(bundled, asked.prompt, right)[1] >= by_hand(bundled, asked.prompt, other)[1]))
        assert found[f"crispedit_counterfact_{kind}_likelier"].hits == wanted
    assert 0 < found["crispedit_counterfact_reliability_likelier"].score < 100


def test_every_task_is_in_a_group_and_is_named_after_its_file(file):
    from lm_eval.tasks import TaskManager

    with untouched_process(LOGGER):
        manager = TaskManager(include_path=PACK, include_defaults=False)
    entries = manager.task_index
    assert {entry.yaml_path for entry in entries.values()} == set(PACK.glob("*.yaml"))
    assert all(name == f"crispedit_{entry.yaml_path.stem}" for name, entry in entries.items())
    members = [member for name in manager.all_groups for member in entries[name].cfg["task"]]
    assert sorted(members) == manager.all_subtasks
    assert len(members) == len(FIELDS) * len(KINDS) * 2


def test_prompts_of_a_published_file_are_read_as_crispedit_reads_them(tmp_path):
    """CounterFact as ROME published it: a template, several paraphrases and neighbours, one old answer."""
    rewrite = {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Spain"}, "target_true": {"str": "Italy"}}
    row = {"requested_rewrite": rewrite, "paraphrase_prompts": ["A", "B"], "neighborhood_prompts": ["C", "D", "E"]}
    (tmp_path / "rome.json").write_text(json.dumps([row]))
    there = load_benchmarks(
        parse_benchmarks("crispedit_counterfact_likelier"), metadata={"edits": str(tmp_path / "rome.json")}
    )
    docs = {one.name.split("_")[2]: list(*[task.eval_docs for task in one.tasks.values()]) for one in there}
    assert [(d["prompt"], d["choices"]) for d in docs["reliability"]] == [("Rome is in", ["Spain", "Italy"])]
    assert [d["prompt"] for d in docs["generalization"]] == ["A", "B"]
    assert [(d["prompt"], d["choices"]) for d in docs["locality"]] == [(p, ["Italy", "Spain"]) for p in "CDE"]


@pytest.mark.parametrize(
    ("tasks", "metadata", "error", "said"),
    [
        ("crispedit_zsre", {}, ConfigError, "no edits are named: give lm_eval --metadata"),
        ("crispedit_zsre", {"edits": "{counterfact}"}, EditsError, "counterfact.json is of schema counterfact"),
        ("crispedit_zsre", {"edits": "nowhere.json"}, EditsError, "nowhere.json: no such file"),
        ("crispedit_zsre", {"edits": "{zsre}", "context": "none"}, ConfigError, "context is 'none'"),
        ("crispedit_zsre", {"edits": "{zsre}", "conflicts": "none"}, ConfigError, "conflicts is 'none'"),
    ],
)
def test_wrong_metadata_is_refused(file, tasks, metadata, error, said):
    given = {key: value.format(zsre=file("zsre"), counterfact=file("counterfact")) for key, value in metadata.items()}
    with pytest.raises(error, match=said):
        load_benchmarks(parse_benchmarks(tasks), metadata=given)


def test_nothing_to_ask_is_said(tmp_path):
    (tmp_path / "bare.json").write_text('[{"src": "Who?", "alt": "Ann"}]')
    with pytest.raises(EditsError, match=r"bare\.json has no generalization prompts with a known answer"):
        load_benchmarks(
            parse_benchmarks("crispedit_zsre_generalization"), metadata={"edits": str(tmp_path / "bare.json")}
        )


def test_the_command_says_where_they_are(capsys):
    assert cli._run(["tasks"]) == 0
    assert capsys.readouterr().out == f"{PACK}\n"


@pytest.mark.slow
def test_the_harness_loads_them_from_its_own_command_line(bundled, file, tmp_path):
    """Two of its tasks, as a user of lm_eval runs them, against our own answers."""
    path = file("zsre")
    names = ["crispedit_zsre_reliability", "crispedit_zsre_locality"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--batch_size", "4", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model_directory('bundled')},dtype=float32", "--tasks", ",".join(names)]
    command += ["--include_path", str(PACK), "--metadata", json.dumps({"edits": path, "context": "qa_context"})]
    done = subprocess.run([*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())["results"]
    ours = measure(bundled.model, bundled.tokenizer, load_edits(path)).edits
    for kind in ("reliability", "locality"):
        hits = list(ours["qa_context"][kind].values())
        assert found[f"crispedit_zsre_{kind}"]["exact_match,none"] == pytest.approx(sum(hits) / len(hits))


def test_contexts_are_ours(file):
    (there,) = load_benchmarks(
        parse_benchmarks("crispedit_zsre_reliability"), metadata={"edits": file("zsre", 1), "context": "qa_context"}
    )
    (document,) = there.tasks["crispedit_zsre_reliability"].eval_docs
    assert document["prompt"] == in_context(world.edit_rows("eval")[0]["prompt"], "qa_context")
