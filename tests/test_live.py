"""A model behind a server is asked as one in memory is; and what it can be measured for."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest

from crispedit import cli
from crispedit.edits import Edit, Locality
from crispedit.endpoint import CallFailed, Endpoint, Patience
from crispedit.errors import EditsError, EndpointError
from crispedit.evaluation import evaluate_live
from crispedit.generation import answers
from crispedit.inputs import read_edits
from crispedit.judge import Case
from crispedit.live import LiveModel
from crispedit.llm_judge import LlmJudge
from crispedit.models import model_directory
from crispedit.rows import Prompter
from crispedit.wild import QA_CONTEXT, in_context, questions
from servers import KEY, Reply, chat, closed_port, completion, prompt_of, serving

QUICK = Patience(attempts=3, wait=0.01, timeout=0.5)
EDITS = [
    Edit(
        prompt="Who?",
        target="Ann",
        rephrases=("Which one?",),
        locality=(Locality(prompt="Where?", answer="Here"), Locality(prompt="When?", answer=None)),
    ),
    Edit(prompt="Why?", target="So", rephrases=("Which one?",)),
]
KNOWN = {"Who?": "Ann", "Which one?": "Ann", "Where?": "Here", "When?": "Now", "Why?": "Because"}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("crispedit.live.PATIENCE", QUICK)


def live_at(server, **options) -> LiveModel:
    return LiveModel(endpoint=Endpoint(server.url, patience=QUICK), name="edited", **options)


def knowing(request) -> Reply:
    """Knows without context; in context it says that it does not."""
    return completion(" " + KNOWN.get(prompt_of(request), "I do not know\nQ: more"))


def test_what_is_asked_and_what_is_scored():
    with serving(knowing) as server:
        live = live_at(server)
        found = evaluate_live(live, EDITS).summary()
    assert {request.path for request in server.requests} == {"/v1/completions"}
    assert sorted(server.prompts) == sorted([*KNOWN, *(QA_CONTEXT.format(q=prompt) for prompt in KNOWN)])
    for request in server.requests:
        prompt = prompt_of(request)
        assert request.body == {"model": "edited", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    # "Which one?" has two targets, and is right for one of them
    assert found["no_context"] == {"reliability": 50.0, "generalization": 50.0, "locality": 100.0}
    assert found["qa_context"] == {"reliability": 0.0, "generalization": 0.0, "locality": 0.0}
    assert found["capability"] == {"drift": None, "loss_base": None, "loss": None, "tasks": None}
    assert found["judge"]["cases"] == 10, "a locality prompt without an answer is in no score without a base"
    assert live.about() == {"url": f"{server.url}/v1", "model": "edited", "api": "completions"}


def test_a_base_says_what_is_right_where_the_edits_do_not():
    base = {"no_context": ["Ann", "Ann", "There", "now", "So", "So"], "qa_context": [""] * 6}
    with serving(knowing) as server:
        found = evaluate_live(live_at(server), EDITS, base_answers=base).summary()
    assert found["no_context"]["locality"] == 100.0
    assert found["judge"]["cases"] == 12


@pytest.mark.parametrize(
    ("text", "whole", "up_to_period"),
    [
        (" Ann", "Ann", "Ann"),
        (" Ann Lee of St. Louis. \nQ: Who else?", "Ann Lee of St. Louis.", "Ann Lee of St"),
        ("\n\n  Ann Lee of St. Louis. \nQ: Who else?", "Ann Lee of St. Louis.", ""),
        ("", "", ""),
        (" \n ", "", ""),
    ],
)
def test_answers_are_cut_as_those_of_a_model_in_memory(text, whole, up_to_period):
    with serving(lambda request: completion(text)) as server:
        assert live_at(server).answers(["Who?"]) == [whole]
        assert live_at(server).answers(["Who?"], stop_at_period=True) == [up_to_period]


def test_chat_completions():
    turns = (("system", "Be brief."), ("user", "Who?"))
    edits = [Edit(prompt="Who?", target="Ann", turns=turns), Edit(prompt="Why?", target="So")]
    with serving(lambda request: chat("Ann" if "Who?" in prompt_of(request) else None)) as server:
        found = evaluate_live(live_at(server, api="chat"), edits).summary()
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    asked = [request.body["messages"] for request in server.requests]
    assert [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}] in asked
    assert [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QA_CONTEXT.format(q="Who?")},
    ] in asked
    assert [{"role": "user", "content": "Why?"}] in asked
    assert len(asked) == 4
    assert found["no_context"]["reliability"] == 50.0


def test_a_conversation_needs_chat_completions():
    edits = [Edit(prompt="Who?", target="Ann", turns=(("system", "Be brief."), ("user", "Who?")))]
    with serving(knowing) as server:
        with pytest.raises(EditsError, match="give --endpoint-api chat"):
            evaluate_live(live_at(server), edits)
        assert not server.requests


def test_a_prompt_that_cannot_be_answered_ends_the_evaluation():
    """Scores are of all prompts: which of them fail is not left to chance."""
    bad = {"Where?": Reply({"error": {"message": "too long"}}, 400)}
    with serving(lambda request: bad.get(prompt_of(request)) or knowing(request)) as server:
        with pytest.raises(CallFailed, match="400 Bad Request: too long"):
            evaluate_live(live_at(server), EDITS)
        bad["Where?"] = Reply(b"", 503)
        with pytest.raises(CallFailed, match="503 Service Unavailable, after 3 attempts"):
            evaluate_live(live_at(server), EDITS)
        bad["Where?"] = Reply({"detail": "no such model"}, 404)
        with pytest.raises(EndpointError, match=r"has no such model, or is no such address \(404 Not Found: no such"):
            evaluate_live(live_at(server), EDITS)


def test_fields_that_are_missing_are_asked_for_again():
    bad = [Reply({"choices": [{"message": {"content": "Ann"}}]}), Reply({"choices": [{"text": None}]})]
    with serving(lambda request: bad.pop() if bad else completion("Ann")) as server:
        assert live_at(server).answers(["Who?"]) == ["Ann"]
        assert len(server.requests) == 3


# ---------------------------------------------------------------- the command


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.json").write_text(json.dumps([{"prompt": "Who?", "target": "Ann"}]))
    return tmp_path


def test_evaluate_a_live_server_with_a_live_judge(work, monkeypatch, capsys):
    """No model is loaded; the two servers have keys of their own."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("THEIR_KEY", KEY[::-1])
    monkeypatch.setattr("crispedit.evaluate_job.load_edited", None)
    with serving(knowing) as model, serving(lambda request: chat("A")) as judge:
        status = cli._run([
            "evaluate", "edited", "edits.json", "--endpoint", model.url, "--endpoint-key-variable", "THEIR_KEY",
            "--judge", judge.url, "--judge-model", "grader", "--json", "found.json",
        ])  # fmt: skip
    assert status == 0
    assert {request.headers["Authorization"] for request in model.requests} == {f"Bearer {KEY[::-1]}"}
    assert {request.headers["Authorization"] for request in judge.requests} == {f"Bearer {KEY}"}
    found = json.loads((work / "found.json").read_text())
    assert found["no_context"] == {"reliability": 100.0, "generalization": None, "locality": None}
    assert found["qa_context"]["reliability"] == 100.0
    assert found["judge"]["beside_exact"] == {"both_right": 1, "only_judge": 1, "only_exact": 0, "both_wrong": 0}
    assert found["judge"]["agreement_with_exact"] == 50.0
    captured = capsys.readouterr()
    assert "edited on edits.json, judge: grader" in captured.out
    assert "right to both the judge and exact match: 1; to the judge alone: 1" in captured.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--endpoint nowhere", "--endpoint is no address of a server: it must look like http://localhost:8000/v1"),
        ("--endpoint http://127.0.0.1:{closed}", "cannot reach http://127.0.0.1:{closed}/v1: Connection refused"),
        ("--endpoint https://models.example", "no key for https://models.example/v1: set the environment variable"),
        ("--endpoint {url} --endpoint-key-variable MINE", "environment variable MINE, or name another with --end"),
        ("--endpoint {url} --endpoint-api chats", "endpoint-api is 'chats'; it must be one of completions, chat (did"),
        ("--endpoint {url} --endpoint-concurrency 0", "--endpoint-concurrency is 0; it must be from 1 to 256"),
        ("--endpoint {url} --texts edits.json", "--texts is for drift"),
        ("--endpoint {url} --chat on", "--chat is 'on'"),
        ("--endpoint-api chat", "--endpoint-api is for a live server: give --endpoint URL"),
        ("--judge {url}", "--judge-model is missing"),
        ("--judge exact --judge-key-variable X", "--judge-key-variable is for a language model as the judge"),
        ("--judge contians --judge-model m", "did you mean 'contains'?"),
        ("--judge localhost:8000 --judge-model m", "judge is 'localhost:8000'; it must be exact, contains, or"),
        ("--judge-model m", "--judge-model is for a language model as the judge: give --judge URL"),
        ("--judge {url} --judge-model m --judge-concurrency 999", "--judge-concurrency is 999"),
        ("--judge http://127.0.0.1:{closed} --judge-model m", "cannot reach http://127.0.0.1:{closed}/v1"),
        ("--judge https://judge.example --judge-model m", "OPENAI_API_KEY, or name another with --judge-key-variable"),
        ("--judge {url}?key=1 --judge-model m", "--judge must have no name, password or query in its address"),
    ],
)  # fmt: skip
def test_one_clear_line_before_anything_is_asked(options, said, work, capsys, monkeypatch):
    monkeypatch.delenv("MINE", raising=False)
    with serving(knowing) as server:
        names = {"url": server.url, "closed": closed_port()}
        assert cli._run(["evaluate", "edited", "edits.json", *options.format(**names).split()]) == 2
        assert not server.requests
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("crispedit: ")
    assert said.format(**names) in captured.err


# ---------------------------------------------------------------- a real server


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("fastapi", "uvicorn", "openai"))),
    reason="transformers serve needs fastapi, uvicorn and openai: pip install 'transformers[serving]'",
)
def test_transformers_serve_answers_as_the_model_in_memory_does(bundled, tmp_path):
    """The same answers to the same prompts, over both routes, at a server that others have written and that refuses
    fields which it does not know; the model in memory is asked one thing at a time, without drafts."""
    directory, log = str(tmp_path / "served"), tmp_path / "serve.log"
    shutil.copytree(model_directory("bundled"), directory)
    about = json.loads((tmp_path / "served" / "tokenizer_config.json").read_text())
    about["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"  # the prompt as it is
    (tmp_path / "served" / "tokenizer_config.json").write_text(json.dumps(about))
    port = closed_port()
    command = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", directory, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=file, stderr=file, env=os.environ)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            endpoint = Endpoint(f"http://127.0.0.1:{port}", patience=Patience(timeout=300))
            asked = questions(read_edits("bundled:demo", limit=6))
            given = LiveModel(endpoint=endpoint, name=directory).answer_questions(asked)
            in_chat = LiveModel(endpoint=endpoint, name=directory, api="chat").answer_questions(asked)
            judge = LlmJudge(endpoint, directory)
            verdicts = judge([Case("Who?", "Ann", "Ann")])
        finally:
            server.terminate()
            server.wait()
    prompter = Prompter.of(bundled.model, bundled.tokenizer)
    for context, found in given.items():
        prompts = [in_context(question.prompt, context) for question in asked]
        assert found == [answers(bundled.model, prompter, [prompt])[0].text for prompt in prompts]
        assert all(found), "an answer is empty"
    assert in_chat == given
    assert verdicts == [None], "the bundled model does not know how to judge"
    assert judge.about() | {"prompt": ""} == {
        "name": "llm", "model": directory, "endpoint": endpoint.url, "prompt": "", "distinct": 1, "from_cache": 0,
        "calls": 1, "failed": 0, "unreadable": 1, "tokens": judge.about()["tokens"],
    }  # fmt: skip
    assert judge.about()["tokens"]["output"] <= 16 < judge.about()["tokens"]["input"]


def wait_for(url: str, server: subprocess.Popen, log) -> None:
    """Until a server is there."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())
