"""The report: its data against sums by hand, and its three forms against what hostile texts would do to them."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from statistics import mean

import pytest

from crispedit.evaluation import evaluate, measure_both
from crispedit.paired import measure_rows
from crispedit.report import report_data
from crispedit.report_html import TEMPLATE, html
from crispedit.report_markdown import escaped, markdown
from evaluated import AFTER, RIGHT, evaluated, evaluation

RECORD = {
    "versions": {"crispedit": "0.1.0"},
    "machine": "x86_64, cpu",
    "model": {"name": "original", "fingerprint": "f" * 64, "dtype": "float32"},
    "edits": {"source": "/home/somebody/edits.json", "schema": "plain", "sha256": "0" * 64, "count": 9},
    "texts": {"source": "/home/somebody/texts.txt", "sha256": "t", "seed": 0, "samples": None},
    "curvature": None,
    "job": {"edits": "/home/somebody/edits.json", "curvature": None},
    "settings": {"editor": "ft|x", "layers": [1, 2], "seed": 0, "lr": 0.1},
    "metrics": {"matrices": [{"name": "w", "norm": 1.0, "relative": 0.1, "outside": None}], "seconds": {"edit": 1.5}},
}


def report_of(found):
    return report_data(found, rows=measure_rows(found, resamples=300))


@pytest.fixture(scope="module")
def report():
    return report_of(evaluated(record=RECORD))


@pytest.fixture(scope="module")
def alone():
    """Of a model without a base."""
    after = replace(evaluated().after, has_base=False)
    return report_of(evaluated(base=None, before=None, after=after))


def row(report, name):
    (found,) = [m for m in report["measures"] if m["name"] == name]
    return found


def test_measures_are_the_means_of_what_was_right(report):
    """By hand, from RIGHT and WAS_RIGHT: three edits, of which two were rephrased and two have neighbours."""
    expected = {
        "reliability": (0, mean([100, 100, 0])),
        "generalization": (mean([0, 100]), mean([50, 0])),
        "locality": (100, mean([50, 100])),
        "abilities": (100, 75),
        "drift": (0, 3 / 30),
        "loss": (16 / 30, 19 / 30),
    }
    for name, (before, after) in expected.items():
        found = row(report, name)
        assert (found["before"], found["after"]) == pytest.approx((before, after))
        assert found["difference"]["value"] == pytest.approx(after - before)
        assert found["interval"][0] <= found["after"] <= found["interval"][1]
    assert [m["name"] for m in report["measures"]][:3] == ["success", "reliability", "qa_context.reliability"]
    assert row(report, "qa_context.locality")["title"] == "locality, QA context"
    assert row(report, "task.adding")["group"] == "damage"


def test_answers_without_a_verdict_are_left_out_of_both_models():
    """The first edit is judged for the base only: it is no item of the difference, and is said to be missing."""
    after = evaluation(AFTER, [None, *RIGHT[1:]], hits=[1] * 4, drift=[0.0, 0.0])
    report = report_of(evaluated(after=after))
    assert row(report, "reliability")["items"] == 2
    assert row(report, "reliability")["after"] == 50
    assert report["verdict"]["held"] == {"after": 1, "before": 0, "judged": 2, "count": 3}
    assert report["verdict"]["sentence"].startswith("1 of 2 edits that were judged hold")
    assert "2 answers were not judged; they count neither as right nor as wrong." in report["verdict"]["caveats"]


def test_a_report_without_a_single_verdict_says_so():
    after = evaluation(AFTER, [None] * len(RIGHT), hits=[1] * 4, drift=[0.0, 0.0])
    report = report_of(evaluated(after=after))
    assert report["verdict"]["sentence"].startswith("No answer was judged;")
    assert not {"reliability", "success"} & {m["name"] for m in report["measures"]}


def test_every_answer_of_both_models_is_in_the_report(report):
    first = report["edits"][0]
    assert [q["kind"] for q in first["questions"]] == ["reliability"] + 2 * ["generalization"] + 2 * ["locality"]
    said = {"before": "Al", "before_right": False, "after": "Ann", "right": True}
    assert first["questions"][0]["answers"] == {"no_context": said, "qa_context": said}
    assert first["questions"][4]["expected"] is None
    given = [q["answers"]["no_context"]["after"] for edit in report["edits"] for q in edit["questions"]]
    assert given == AFTER


def test_without_a_base_nothing_is_compared(alone):
    assert "drift" not in {m["name"] for m in alone["measures"]}
    assert all(m["before"] is m["difference"] is m["change"] is None for m in alone["measures"])
    assert alone["edits"][0]["questions"][0]["answers"]["no_context"]["before"] is None
    assert "cannot be said without the base model" in alone["verdict"]["sentence"]
    assert not {"Drift", "Could have shown"} & {d["term"] for d in alone["definitions"]}


def test_a_record_is_told_without_the_paths_of_a_machine(report):
    assert report["run"]["edits"]["source"] == "/home/somebody/edits.json".rpartition("/")[2]
    assert "somebody" not in json.dumps(report)
    assert any("records another edit set (9 edits)" in caveat for caveat in report["verdict"]["caveats"])


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a page is made of: elements, attributes, and the text of every script and style."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.raw, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, content):
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append(content)


def test_the_page_holds_exactly_the_report(report):
    page = Page(html(report))
    assert page.open == []
    assert page.elements.count("script") == 2
    assert not {"img", "iframe", "object", "link"} & set(page.elements)
    style, data, script = page.raw
    assert json.loads(data) == report
    assert not {"<", ">", "&", "\u2028"} & set(data)
    assert script.strip().startswith('"use strict"')
    assert "{" in style


def test_the_page_asks_for_nothing_from_outside(report):
    page = Page(html(report))
    allowed = {("meta", "content"), ("a", "href")}
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (tag, name) in allowed
            assert value.startswith("#")
    style, _, script = page.raw
    assert not re.search(r"url\(|@import|https?:", style)
    assert set(re.findall(r"https?:[^\"']*", script)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(
        r"\bfetch\(|XMLHttpRequest|import\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script
    )


def test_only_the_templates_script_may_run(report):
    page = html(report)
    (policy,) = [v for _, name, v in Page(page).attributes if name == "content" and "default-src" in v]
    script = Page(page).raw[2]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_template_can_be_opened_by_itself():
    page = Page(files("crispedit").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    assert page.open == []
    assert page.raw[1] == "null"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_page_and_runs_nothing_of_the_texts(report, tmp_path):
    (tmp_path / "report.html").write_text(html(report), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "report.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    body = drawn.partition("<body")[2]
    said = re.search(r"<h1>(.*?)</h1>", body).group(1).replace("&nbsp;", " ")
    assert said == report["verdict"]["sentence"]
    assert body.count('class="edit"') == 3
    assert body.count("<script") == 2
    assert "<img" not in body
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in body


# ---------------------------------------------------------------- Markdown


def test_markdown_says_what_the_page_says(report):
    said = markdown(report)
    assert f"**{escaped(report['verdict']['sentence'])}**" in said
    for line in (
        "| locality, % | 100.0 | 75.0 ",
        "| 1 | reliability | no context | Who? | Ann | Al | Ann | right |",
        "| 1 | locality | QA context | When? | *as the base* | then | then | right |",
        "| 3 | generalization | no context | And? | Bo | Bo | *(empty)* | **wrong** |",
        "| editor | ft\\|x |",
        "Q: {q}\nA:\n```",
    ):
        assert line in said


def test_in_markdown_edits_that_fail_come_first(report):
    order = [int(n) for n in re.findall(r"^\| (\d+) \| reliability \| no context", markdown(report), re.M)]
    assert order == [3, 1, 2]


def test_no_text_can_break_out_of_its_cell(report):
    said = markdown(report)
    tables = [block.splitlines() for block in said.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<" not in said
    assert "![i](" not in said
    assert "`c`" not in said.replace("\\`", "")


def test_markdown_without_a_base_has_no_column_for_it(alone):
    assert "| 1 | reliability | no context | Who? | Ann | Ann | right |" in markdown(alone)


def test_escaping_is_undone_by_any_markdown():
    assert escaped("*a* <b> [c](d) e|f\ng") == "\\*a\\* &lt;b&gt; \\[c\\](d) e\\|f g"
    assert escaped("") == escaped(" \n") == "*(empty)*"
    assert escaped(None) == "–"


# ---------------------------------------------------------------- model and base on the same items

ROWS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "x", "locality_prompt": "What is 2 plus 1?"},
    {"prompt": "What is 3 plus 4?", "target": "7"},
]


def test_a_model_and_its_base_are_measured_as_each_alone(bundled):
    from crispedit.edits import edits_from_rows
    from crispedit.models import load_model

    edits, texts = edits_from_rows(ROWS), ["A mill stands by the river.", "Two coins lay on the table there."]
    base = load_model("bundled")
    weight = bundled.model.get_input_embeddings().weight
    weight.data += 0.01 * weight.data.roll(1, 0)
    after, before = measure_both(bundled.model, bundled.tokenizer, edits, base=base.model, texts=texts)
    assert after.summary() == evaluate(bundled.model, bundled.tokenizer, edits, base=base.model, texts=texts)
    itself = evaluate(base.model, base.tokenizer, edits, base=base.model, texts=texts)
    assert {**before.summary(), "judge": None} == {**itself, "judge": None}  # what it says itself is not judged
    assert before.summary()["no_context"]["locality"] == 100
    assert before.summary()["capability"]["drift"] == 0 < after.summary()["capability"]["drift"]
