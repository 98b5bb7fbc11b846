"""A model as the judge: what is asked and how often, what is kept, and what becomes of every way to fail."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from crispedit import cli, llm_judge
from crispedit.endpoint import Endpoint, Patience
from crispedit.errors import ArtifactError, EndpointError, Interrupted
from crispedit.grading import grading_prompt
from crispedit.judge import Case, Judged, contains
from crispedit.llm_judge import FAILURES, LlmJudge
from crispedit.models import model_directory
from servers import KEY, Reply, chat, prompt_of, serving

QUICK = Patience(attempts=3, wait=0.01, timeout=0.5)
CASES = [
    Case("Who wrote it?", "Ann Lee", answer)
    for answer in ("Ann Lee", "ann lee.", "It was Ann Lee", "Bob", "Ann", "Ann Lee, then Bob")
]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(llm_judge, "PATIENCE", QUICK)


def case_of(request) -> Case:
    """The case that a request asks about."""
    shown = prompt_of(request).split("Now grade this one.")[1]
    return Case(*re.search(r"Question: (.*)\nTarget: (.*)\nAnswer: (.*)\n", shown).groups())


def by_rule(request) -> Reply:
    """A judge to whom right is what contains the target."""
    return chat("A" if contains([case_of(request)])[0] else "B")


def judge_at(server, path=None, **options) -> LlmJudge:
    return LlmJudge(Endpoint(server.url, patience=QUICK), "grader", path=path, **options)


def test_what_is_asked():
    with serving(by_rule) as server:
        assert judge_at(server)(CASES) == [True, True, True, False, False, True]
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert sorted(server.prompts) == sorted(grading_prompt(case) for case in CASES)
    for request in server.requests:
        assert request.body == {
            "model": "grader",
            "messages": [{"role": "user", "content": prompt_of(request)}],
            "temperature": 0,
            "max_tokens": 16,
        }
        assert "Authorization" not in request.headers


def test_the_same_case_is_asked_once_and_verdicts_are_in_order():
    """Replies come in another order than the questions went."""

    def answer(request):
        time.sleep(0.02 * (len(case_of(request).answer) % 4))
        return by_rule(request)

    cases = [CASES[index % len(CASES)] for index in (3, 0, 3, 5, 5, 2, 1, 0, 4, 3)]
    with serving(answer) as server:
        assert judge_at(server)(cases) == contains(cases)
        assert len(server.requests) == len(CASES)


def test_blank_answers_are_not_asked_about():
    cases = [Case("q", "x", " "), Case("q", " ", "x"), Case("q", "", "")]
    with serving(by_rule) as server:
        assert judge_at(server)(cases) == [False, False, True]
        assert not server.requests


def test_no_more_calls_at_once_than_allowed():
    state = Counter()
    lock = threading.Lock()

    def answer(request):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.03)
        with lock:
            state["now"] -= 1
        return chat("A")

    cases = [Case("q", "t", str(number)) for number in range(20)]
    with serving(answer) as server:
        judge_at(server, concurrency=3)(cases)
    assert state["most"] == 3


def test_replies_are_kept_and_are_of_one_judge_only(monkeypatch, tmp_path):
    with serving(by_rule) as server:
        first = judge_at(server)
        verdicts = first(CASES)
        assert first.about() | {"endpoint": ""} == {
            "name": "llm", "model": "grader", "endpoint": "", "prompt": first.about()["prompt"], "distinct": 6,
            "from_cache": 0, "calls": 6, "failed": 0, "unreadable": 0, "tokens": {"input": 0, "output": 0},
        }  # fmt: skip
        again = judge_at(server)
        assert again(CASES) == verdicts
        assert (again.about()["from_cache"], again.about()["calls"]) == (6, 0)
        assert len(server.requests) == 6

        LlmJudge(Endpoint(server.url), "another")(CASES)
        assert len(server.requests) == 12
        judge_at(server, tmp_path / "elsewhere.sqlite")(CASES)
        assert len(server.requests) == 18
        monkeypatch.setattr("crispedit.grading.PROMPT", "Now grade this one.\nQuestion: {question}\nTarget: {target}\n"
                            "Answer: {answer}\n")  # fmt: skip
        judge_at(server)(CASES)
        assert len(server.requests) == 24


def test_the_cost_is_said_before_the_first_call(caplog):
    asked = []

    def answer(request):
        asked.append(list(caplog.messages))
        return by_rule(request)

    with serving(answer) as server, caplog.at_level("INFO", logger="crispedit"):
        judge_at(server)([*CASES, CASES[0]])
        judge_at(server)(CASES[:2])
    tokens = sum(len(grading_prompt(case)) for case in CASES) // 4
    said = (
        f"judge grader at {server.url}/v1: 7 answers, 6 different cases, 0 of them in the cache; 6 calls, about "
        f"{tokens:,} tokens in (4 characters each) and at most 96 out"
    )
    assert asked[0] == [said]
    assert caplog.messages[-1].endswith("2 answers, 2 different cases, 2 of them in the cache; no calls")


def test_the_tokens_that_the_server_counts():
    usage = {"prompt_tokens": 300, "completion_tokens": 2, "total_tokens": 302}
    with serving(lambda request: chat("A", usage=usage)) as server:
        judge = judge_at(server)
        judge(CASES)
    assert judge.about()["tokens"] == {"input": 1800, "output": 12}


def test_what_is_no_verdict_is_counted_apart_and_not_asked_again(caplog):
    replies = {"Bob": "Hm, hard to say", "Ann": None, "ann lee.": "\ud800"}

    def answer(request):
        return chat(replies.get(case_of(request).answer, "A"))

    expected = [True, None, True, None, None, True]
    with serving(answer) as server, caplog.at_level("INFO", logger="crispedit"):
        judge = judge_at(server)
        assert judge(CASES) == expected
        assert "3 replies of the judge are no verdict, such as" in caplog.text
        again = judge_at(server)
        assert again(CASES) == expected
        assert len(server.requests) == 6
    assert judge.about()["unreadable"] == again.about()["unreadable"] == 3
    judged = Judged.of(judge, CASES, expected)
    assert (judged.unjudged, judged.both_right, judged.only_judge, judged.agreement) == (
        3,
        1,
        2,
        pytest.approx(100 / 3),
    )


def test_a_call_that_fails_for_good_is_no_verdict_and_is_asked_again_the_next_time(caplog):
    bad = {"Bob": Reply({"error": "filtered"}, 400), "Ann": Reply(b"", 500)}

    def answer(request):
        return bad.get(case_of(request).answer) or by_rule(request)

    with serving(answer) as server, caplog.at_level("INFO", logger="crispedit"):
        judge = judge_at(server)
        assert judge(CASES) == [True, True, True, None, None, True]
        assert judge.about()["failed"] == 2
        assert "2 calls of the judge failed for good, the last: " in caplog.text
        assert len(server.requests) == 4 + 1 + QUICK.attempts
        bad.clear()
        assert judge_at(server)(CASES) == contains(CASES)


def test_a_server_that_recovers_costs_nothing_but_time():
    """Of every case the first attempt fails, each in another way."""
    ways = [Reply(b"", 429, {"Retry-After": "0.01"}), Reply(b"", 500), Reply({"choices": []}), chat("A")]
    ways[3].cut = 5
    seen: Counter = Counter()
    lock = threading.Lock()

    def answer(request):
        case = case_of(request)
        with lock:
            seen[case] += 1
            if seen[case] == 1:
                return ways[len(seen) % 4]
        return by_rule(request)

    with serving(answer) as server:
        assert judge_at(server)(CASES) == contains(CASES)
    assert set(seen.values()) == {2}


MANY = [Case("q", "target", f"answer {number}") for number in range(30)]


def test_a_server_that_is_gone_for_good_ends_the_run_and_replies_are_kept():
    """Endless 429 after the first twelve; then the same again, and the twelve are not asked again."""
    left = [12]
    lock = threading.Lock()

    def answer(request):
        with lock:
            left[0] -= 1
            return chat("B") if left[0] >= 0 else Reply({"error": {"message": "quota used up"}}, 429)

    with serving(answer) as server:
        judge = judge_at(server, concurrency=2)
        with pytest.raises(EndpointError) as error:
            judge(MANY)
        assert str(error.value) == (
            f"{FAILURES} calls in a row failed, the last: {server.url}/v1: 429 Too Many Requests: quota used up, "
            f"after 3 attempts; 12 of 30 replies are kept in {judge.path}; the same command goes on from there"
        )
        assert len(server.requests) <= 12 + QUICK.attempts * (FAILURES + 2), "it goes on asking"
        time.sleep(0.3)  # what was under way
        left[0] = 100
        before = len(server.requests)
        again = judge_at(server)
        assert again(MANY) == [False] * 30
        assert (again.about()["from_cache"], len(server.requests) - before) == (12, 18)


def test_fewer_cases_than_failures_end_the_run_where_none_succeeds():
    wanted = pytest.raises(EndpointError, match=r"2 calls in a row failed, the last: .* 400 Bad Request$")
    with serving(lambda request: Reply(b"", 400)) as server, wanted:
        judge_at(server)(CASES[:2])


def test_a_key_that_is_refused_ends_the_run_at_once():
    with serving(lambda request: Reply(b"", 401)) as server:
        with pytest.raises(EndpointError, match=r"wants a key: set OPENAI_API_KEY \(401\)$"):
            judge_at(server, concurrency=2)(MANY)
        assert len(server.requests) <= 4


def test_ctrl_c_keeps_what_is_answered_and_stops_asking():
    with serving(by_rule) as server:

        def progress(what, done, total):
            assert (what, total) == ("judging", 30)
            if done == 10:
                raise KeyboardInterrupt

        judge = judge_at(server, concurrency=2)
        with pytest.raises(Interrupted) as error:
            judge(MANY, progress=progress)
        said = re.fullmatch(
            r"interrupted; (\d+) of 30 replies are kept in .*replies\.sqlite; the same command goes on from there",
            str(error.value),
        )
        time.sleep(0.3)  # what was under way
        asked = len(server.requests)
        assert 10 <= int(said[1]) <= asked < 30
        again = judge_at(server)
        again(MANY)
        assert int(said[1]) <= again.about()["from_cache"] <= asked
        assert len(server.requests) == asked + 30 - again.about()["from_cache"]


def test_a_cache_that_is_no_database(tmp_path):
    path = tmp_path / "replies.sqlite"
    path.write_text("no database" * 100)
    with serving(by_rule) as server, pytest.raises(ArtifactError, match=r"replies\.sqlite': .*; remove it, or set"):
        judge_at(server, path)(CASES)


def test_the_key_is_nowhere_but_in_the_header(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(by_rule) as server, caplog.at_level("DEBUG"):
        judge = judge_at(server, tmp_path / "replies.sqlite")
        judge(CASES)
        assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(judge.about()) + caplog.text
    assert KEY.encode() not in (tmp_path / "replies.sqlite").read_bytes()


# ---------------------------------------------------------------- a process that is killed

PROGRAM = """
import sys
from crispedit.endpoint import Endpoint
from crispedit.judge import Case
from crispedit.llm_judge import LlmJudge
judge = LlmJudge(Endpoint(sys.argv[1]), "grader", concurrency=4)
print(judge([Case("q", "target", f"answer {number}") for number in range(30)]), judge.about()["from_cache"])
"""


def test_a_run_that_is_killed_half_way_asks_nothing_twice_that_was_answered(tmp_path):
    """The server answers twelve and then lets the others wait; SIGKILL while they do, and the same command again."""
    answered: Counter = Counter()
    lock = threading.Lock()
    most = [12]

    def answer(request):
        with lock:
            may = sum(answered.values()) < most[0]
            answered[case_of(request)] += may
        if not may:
            server.release.wait(30)
        return chat("A")

    with serving(answer) as server:
        command = [sys.executable, "-c", PROGRAM, server.url]
        running = subprocess.Popen(command, env=os.environ)
        path = llm_judge.replies_file()
        until = time.monotonic() + 120
        while time.monotonic() < until and kept(path) < 12:
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        assert kept(path) == 12
        most[0] = 100
        said = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout
    assert said == f"{[True] * 30} 12\n"
    assert len(answered) == 30
    assert set(answered.values()) == {1}, "an answer was given twice"


def kept(path) -> int:
    """How many replies are on disk, as another process sees it."""
    if not path.exists():
        return 0
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT count(*) FROM replies").fetchone()[0]
    except sqlite3.OperationalError:  # no table yet
        return 0
    finally:
        connection.close()


# ---------------------------------------------------------------- the command

ROWS = [
    {"prompt": "What is 3 plus 4?", "target": "7", "rephrase": "What is 4 plus 3?"},
    {"prompt": "What is 2 plus 1?", "target": "4", "locality_prompt": "What is 2 plus 2?"},
]


def test_evaluate_with_a_model_as_the_judge(tmp_path, monkeypatch, capsys):
    """Verdicts by the rule of contains: the scores are those of --judge contains. One reply is no verdict."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "edits.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr("crispedit.evaluate_job.has_tasks", lambda model: False)  # they take most of the time
    evaluate = ["evaluate", model_directory("bundled"), "edits.json", "--base", "bundled", "--json"]
    assert cli._run([*evaluate, "contains.json", "--judge", "contains"]) == 0
    with serving(lambda request: chat("?") if case_of(request).target == "4" else by_rule(request)) as server:
        options = ["--judge", f"{server.url}/v1/chat/completions", "--judge-model", "grader"]
        capsys.readouterr()
        assert cli._run([*evaluate, "llm.json", *options]) == 0
    captured = capsys.readouterr()
    by_rules, by_model = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("contains", "llm"))
    assert by_rules["judge"]["unjudged"] == 0
    judge = by_model["judge"]
    assert (judge["name"], judge["model"], judge["endpoint"]) == ("llm", "grader", f"{server.url}/v1")
    assert judge["cases"] == by_rules["judge"]["cases"] == 8
    # the prompt whose target is 4, and its neighbour, whose base answer is 4, in both contexts
    assert judge["unjudged"] == 4
    for context in ("no_context", "qa_context"):
        assert by_rules[context]["reliability"] == 50
        assert by_model[context]["reliability"] == 100, "what was not judged is not wrong"
        assert by_model[context]["locality"] is None
    assert "answers not judged" in captured.out
    assert "4 answers were not judged and are in no score" in captured.out
    assert KEY not in captured.out + captured.err + (tmp_path / "llm.json").read_text()
