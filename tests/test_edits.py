"""The readers of edit files: every schema, every format, every message."""

import csv
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from crispedit.edits import Edit, EditSet, Locality, edits_from_rows, load_edits
from crispedit.errors import ConfigError, EditsError

PLAIN: dict[str, Any] = {"prompt": "Where is Ada?", "target": "Rome"}
OTHER = {"prompt": "Where is Bob?", "target": "Oslo"}
PLAIN_EDIT = Edit(prompt="Where is Ada?", target="Rome", row=1)

ZSRE = {
    "subject": "Ada",
    "src": "Where is Ada?",
    "pred": "Paris",
    "rephrase": "In which city is Ada?",
    "alt": " Rome",
    "answers": ["Paris"],
    "loc": "nq question: who wrote Emma",
    "loc_ans": "Jane Austen",
    "cond": "Paris >> Rome || Where is Ada?",
}
WIKIBIGEDIT = {
    "prompt": "Where is Ada?",
    "target_new": "Rome",
    "subject": "Ada",
    "rephrase_prompt": "In which city is Ada?",
    "locality_prompt": "Where is Bob?",
    "locality_ground_truth": "Oslo",
}
WIKIBIGEDIT_FULL = {
    "tag": "new",
    "subject": "Ada",
    "update": "Where is Ada?",
    "rephrase": "In which city is Ada?",
    "ans": "Rome",
    "loc": "Where is Bob?",
    "loc_ans": "Oslo",
    "mhop": "In which country is Ada?",
    "mhop_ans": None,
    "personas": "Arr, where be Ada?",
    "personas_pirate": "Arr!",
}
ROME: dict[str, Any] = {
    "case_id": 1,
    "pararel_idx": 7,
    "requested_rewrite": {
        "prompt": "{} is in the city of",
        "relation_id": "P1",
        "subject": "Ada",
        "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Paris", "id": "Q2"},
    },
    "paraphrase_prompts": ["Ada lives in", "Find Ada in"],
    "neighborhood_prompts": ["Bob is in the city of", "Cem is in the city of"],
    "attribute_prompts": ["Dan is in"],
    "generation_prompts": ["Ada likes"],
}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Where is Ada?"},
        {"role": "assistant", "content": " Rome\n"},
    ]
}
CHAT_TURNS = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello!"), ("user", "Where is Ada?"))

FULL_EDIT = Edit(
    prompt="Where is Ada?",
    target="Rome",
    subject="Ada",
    rephrases=("In which city is Ada?",),
    locality=(Locality(prompt="Where is Bob?", answer="Oslo"),),
    row=1,
)

# id: (row, schema, edit)
SCHEMAS: dict[str, tuple[dict[str, Any], str, Edit]] = {
    "plain": (PLAIN, "plain", PLAIN_EDIT),
    "chat": (CHAT, "chat", dataclasses.replace(PLAIN_EDIT, turns=CHAT_TURNS)),
    "zsre": (
        ZSRE,
        "zsre",
        dataclasses.replace(FULL_EDIT, locality=(Locality(prompt="who wrote Emma?", answer="Jane Austen"),)),
    ),
    "counterfact": ({**WIKIBIGEDIT, "case_id": 3, "ground_truth": "Paris"}, "counterfact", FULL_EDIT),
    "counterfact without case_id": ({**WIKIBIGEDIT, "ground_truth": "Paris"}, "counterfact", FULL_EDIT),
    "counterfact-rome": (
        ROME,
        "counterfact-rome",
        Edit(
            prompt="Ada is in the city of",
            target="Rome",
            subject="Ada",
            rephrases=("Ada lives in", "Find Ada in"),
            locality=(
                Locality(prompt="Bob is in the city of", answer="Paris"),
                Locality(prompt="Cem is in the city of", answer="Paris"),
            ),
            row=1,
        ),
    ),
    "wikibigedit": (WIKIBIGEDIT, "wikibigedit", FULL_EDIT),
    "wikibigedit full": (WIKIBIGEDIT_FULL, "wikibigedit", FULL_EDIT),
    "qaedit": (
        {
            **PLAIN,
            "id": 1,
            "subject": "Ada",
            "rephrase": "In which city is Ada?",
            "locality": [{"loc": "Where is Bob?", "loc_ans": "Oslo"}],
        },
        "plain",
        FULL_EDIT,
    ),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of the format that the suffix names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                cells = {
                    name: json.dumps(cell) if isinstance(cell, list | dict) else cell for name, cell in row.items()
                }
                writer.writerow(cells)
    return path


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize(("row", "schema", "edit"), SCHEMAS.values(), ids=SCHEMAS)
def test_every_schema_reads_the_same_from_every_format(
    tmp_path: Path, row: dict[str, Any], schema: str, edit: Edit, suffix: str
) -> None:
    edits = load_edits(write(tmp_path / f"edits{suffix}", [row]))
    assert edits.edits == (edit,)
    assert edits.schema == schema
    assert edits.source == f"edits{suffix}"
    assert edits.notes == ()
    assert edits.sha256 == edits_from_rows([row]).sha256


ASKED = [Locality(prompt="L1", answer=None), Locality(prompt="L2", answer=None)]
ANSWERED = [Locality(prompt="L1", answer="A1"), Locality(prompt="L2", answer="A2")]

EXTRAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rephrase text": ({"rephrase": "R1"}, {"rephrases": ("R1",)}),
    "rephrase list": ({"rephrase": ["R1", "", "R2"]}, {"rephrases": ("R1", "R2")}),
    "rephrases": ({"rephrases": ["R1", "R2"]}, {"rephrases": ("R1", "R2")}),
    "both": ({"rephrase": "R1", "rephrases": ["R2"]}, {"rephrases": ("R1", "R2")}),
    "locality text": ({"locality": "L1"}, {"locality": tuple(ASKED[:1])}),
    "locality texts": ({"locality": ["L1", "L2"]}, {"locality": tuple(ASKED)}),
    "locality object": ({"locality": {"prompt": "L1", "answer": " A1 "}}, {"locality": tuple(ANSWERED[:1])}),
    "locality objects": (
        {"locality": [{"prompt": "L1", "answer": "A1"}, {"prompt": "L2", "answer": "A2"}]},
        {"locality": tuple(ANSWERED)},
    ),
    "locality loc": ({"locality": [{"loc": "L1", "loc_ans": "A1"}, "L2"]}, {"locality": (ANSWERED[0], ASKED[1])}),
    "pair": ({"locality_prompt": "L1", "locality_answer": "A1"}, {"locality": tuple(ANSWERED[:1])}),
    "pairs": ({"locality_prompt": ["L1", "L2"], "locality_answer": ["A1", "A2"]}, {"locality": tuple(ANSWERED)}),
    "no answers": ({"locality_prompt": ["L1", "L2"]}, {"locality": tuple(ASKED)}),
    "an answer missing": (
        {"locality_prompt": ["L1", "L2"], "locality_answer": [None, "A2"]},
        {"locality": (ASKED[0], ANSWERED[1])},
    ),
    "locality and pair": ({"locality": "L1", "locality_prompt": "L2"}, {"locality": tuple(ASKED)}),
    "subject": ({"subject": " Ada "}, {"subject": "Ada"}),
    "all empty": (
        {
            "subject": "",
            "rephrase": None,
            "rephrases": [],
            "locality": {},
            "locality_prompt": " ",
            "locality_answer": "",
        },
        {},
    ),
    "pandas": ({"subject": float("nan"), "rephrase": float("nan")}, {}),
    "ignored": ({"id": 7, "old_target": "Paris"}, {}),
}


@pytest.mark.parametrize(("extra", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_optional_fields_of_plain_rows_and_chats(extra: dict[str, Any], expected: dict[str, Any]) -> None:
    plain = edits_from_rows([{**PLAIN, **extra}])
    assert plain.edits == (dataclasses.replace(PLAIN_EDIT, **expected),)
    assert plain.notes == ()
    chat = edits_from_rows([{**CHAT, **{name: value for name, value in extra.items() if name != "old_target"}}])
    assert chat.edits == (dataclasses.replace(PLAIN_EDIT, turns=CHAT_TURNS, **expected),)


@pytest.mark.parametrize(
    ("loc", "question"),
    [
        ("nq question: who is NASA", "who is NASA?"),
        ("nq question: who is NASA? ", "who is NASA?"),
        ("Who is it?", "Who is it?"),
    ],
)
def test_zsre_locality_prompts_become_questions_and_keep_their_case(loc: str, question: str) -> None:
    assert edits_from_rows([{**ZSRE, "loc": loc}])[0].locality[0].prompt == question


def test_a_template_may_have_other_braces_than_those_of_the_subject() -> None:
    rewrite = {**ROME["requested_rewrite"], "prompt": "{x} {} {y}"}
    assert edits_from_rows([{**ROME, "requested_rewrite": rewrite}])[0].prompt == "{x} Ada {y}"


def test_rome_rows_need_no_old_answer() -> None:
    rewrite = {name: value for name, value in ROME["requested_rewrite"].items() if name != "target_true"}
    locality = edits_from_rows([{**ROME, "requested_rewrite": rewrite}])[0].locality
    assert [item.answer for item in locality] == [None, None]


def test_empty_columns_of_another_schema_do_not_decide() -> None:
    assert edits_from_rows([{"messages": None, "src": "", "alt": None, **PLAIN}]).schema == "plain"


def test_the_first_row_decides_the_schema() -> None:
    edits = edits_from_rows([WIKIBIGEDIT, {**WIKIBIGEDIT, "prompt": "Where is Bob?", "case_id": 1}])
    assert edits.schema == "wikibigedit"
    assert edits.notes == ("ignored the field 'case_id' (rows: 1)",)


# --- EditSet ----------------------------------------------------------------------------------------------------------


def test_an_edit_set_is_a_sequence() -> None:
    edits = edits_from_rows([PLAIN, OTHER])
    assert isinstance(edits, EditSet)
    assert len(edits) == 2
    assert [edit.target for edit in edits] == ["Rome", "Oslo"]
    assert edits[-1].row == 2
    assert edits[:1] == (PLAIN_EDIT,)
    assert edits.source == "memory"
    assert "Rome" not in repr(edits)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edits.schema = "other"  # type: ignore[misc]


def test_the_hash_is_of_the_edits_that_are_in_it() -> None:
    def digest(*rows: dict[str, Any], **settings: Any) -> str:
        return edits_from_rows(rows, **settings).sha256

    same = digest(PLAIN)
    assert re.fullmatch("[0-9a-f]{64}", same)
    assert digest({**PLAIN, "unknown": "x", "target": " Rome "}, source="elsewhere") == same
    assert digest(PLAIN, OTHER, limit=1) == same
    assert digest({**OTHER, "target": "Riga"}, OTHER, PLAIN, conflicts="drop") == same, "row numbers are not hashed"
    assert digest({**PLAIN, "subject": "Ada"}) != same
    assert digest(PLAIN, OTHER) != digest(OTHER, PLAIN)
    canonical = (
        '[{"locality":[],"prompt":"Where is Ada?","rephrases":[],"row":null,"subject":null,"target":"Rome","turns":[]}]'
    )
    assert same == hashlib.sha256(canonical.encode()).hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------

PLAIN_JSON = json.dumps(PLAIN)

GOOD_FILES: dict[str, tuple[str, bytes]] = {
    "list": ("e.json", f"[{PLAIN_JSON}]".encode()),
    "byte order mark": ("e.json", b"\xef\xbb\xbf" + f"[{PLAIN_JSON}]".encode()),
    "object with a list": ("e.json", json.dumps({"version": 1, "tags": ["a"], "edits": [PLAIN]}).encode()),
    "suffix in capitals": ("e.JSON", f"[{PLAIN_JSON}]".encode()),
    "blank lines": ("e.jsonl", f"\n  \n{PLAIN_JSON}\n\n".encode()),
    "crlf lines": ("e.jsonl", f"{PLAIN_JSON}\r\n\r\n".encode()),
    "csv": ("e.csv", b"prompt,target\nWhere is Ada?,Rome\n"),
    "csv of a spreadsheet": ("e.csv", b"\xef\xbb\xbfprompt,target,,\r\nWhere is Ada?,Rome,,\r\n\r\n"),
    "csv with blanks": ("e.csv", b'prompt , target\n"Where is Ada?", "Rome"\n'),
    "csv without the last cell": ("e.csv", b"prompt,target,subject\nWhere is Ada?,Rome\n"),
}


@pytest.mark.parametrize(("name", "content"), GOOD_FILES.values(), ids=GOOD_FILES)
def test_files_that_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    edits = load_edits(str(tmp_path / name))
    assert edits.edits == (PLAIN_EDIT,)
    assert edits.notes == ()


def test_line_separators_inside_json_strings_end_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", [{"prompt": "one\u2028two\x85three", "target": "x"}])
    assert load_edits(path)[0].prompt == "one\u2028two\x85three"


def test_csv_keeps_commas_quotes_line_ends_and_lists(tmp_path: Path) -> None:
    row = {"prompt": 'a, "b"\nc', "target": "[1]", "rephrase": ["[x]", "y"], "locality": {"prompt": "L", "answer": "A"}}
    (edit,) = load_edits(write(tmp_path / "e.csv", [row]))
    assert edit.prompt == 'a, "b"\nc'
    assert edit.target == "[1]", "only fields that may be lists are read as JSON"
    assert edit.rephrases == ("[x]", "y")
    assert edit.locality == (Locality(prompt="L", answer="A"),)


TWICE = f"[{PLAIN_JSON}, {PLAIN_JSON}"

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "suffix": ("e.txt", b"x", "e.txt: its suffix must be one of .json, .jsonl, .csv"),
    "suffix misspelt": (
        "e.jsnl",
        b"x",
        "e.jsnl: its suffix (did you mean '.jsonl'?) must be one of .json, .jsonl, .csv",
    ),
    "empty json": ("e.json", b" \n", "e.json: no edits in it: give at least one row with 'prompt' and 'target'"),
    "empty jsonl": ("e.jsonl", b"", "e.jsonl: no edits in it: give at least one row with 'prompt' and 'target'"),
    "empty csv": ("e.csv", b"", "e.csv: no edits in it: give at least one row with 'prompt' and 'target'"),
    "only a header": ("e.csv", b"prompt,target\n", "e.csv: no edits in it: give at least one row"),
    "empty list": ("e.json", b"[]", "e.json: no edits in it: give at least one row with 'prompt' and 'target'"),
    "empty inner list": ("e.json", b'{"edits": []}', "e.json: no edits in it: give at least one row"),
    "broken json": (
        "e.json",
        b'[\n {"prompt": "a" "target": "b"}\n]',
        "e.json: line 2, column 17: not JSON (Expecting ',' delimiter): it must be a list of objects",
    ),
    "json lines as json": (
        "e.json",
        f"{PLAIN_JSON}\n{PLAIN_JSON}".encode(),
        "e.json: line 2, column 1: not JSON (Extra data): it must be a list of objects; "
        "with one object on every line, name it .jsonl",
    ),
    "broken jsonl": (
        "e.jsonl",
        f'{PLAIN_JSON}\n\n{{"prompt": }}'.encode(),
        "e.jsonl: line 3, column 12: not JSON (Expecting value): every line must be one object",
    ),
    "deep json": ("e.json", b"[" * 100_000, "e.json: not JSON (maximum recursion depth exceeded"),
    "huge number": ("e.json", b"[" + b"1" * 5000 + b"]", "e.json: not JSON (Exceeds the limit"),
    "not utf-8": ("e.json", b'["\xff"]', "e.json: cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xff"),
    "utf-16": ("e.csv", "prompt,target".encode("utf-16"), "e.csv: cannot be read as UTF-8 text"),
    "no list": ("e.json", b'{"a": 1}', "e.json: has 0 lists of rows: it must be a list, or an object with one list"),
    "a number": ("e.json", b"3", "e.json: has 0 lists of rows: it must be a list, or an object with one list"),
    "two lists": ("e.json", b'{"a": [{}], "b": [{}]}', "e.json: has 2 lists of rows: it must be a list, or an object"),
    "one row": ("e.json", PLAIN_JSON.encode(), "e.json: a single row and no list: put [ and ] around it"),
    "one chat": ("e.json", json.dumps(CHAT).encode(), "e.json: a single row and no list: put [ and ] around it"),
    "text as row": ("e.json", b'["x"]', "e.json: row 1 is text: it must be an object with named fields"),
    "list as row": ("e.jsonl", f"{PLAIN_JSON}\n[]".encode(), "e.jsonl: row 2 is a list: it must be an object"),
    "null as row": ("e.jsonl", b"null", "e.jsonl: row 1 is null: it must be an object with named fields"),
    "column twice": (
        "e.csv",
        b"prompt,target,target\na,b,c",
        "e.csv: the header has 'target' twice: give every column",
    ),
    "too many cells": (
        "e.csv",
        b"prompt,target\na,b\nWhere, o where?,Rome\n",
        "e.csv: row 2 has more cells than the header: quote text that has a comma",
    ),
    "too few cells": ("e.csv", b"prompt,target\na\n", "e.csv: row 1 has an empty 'target': it must be text"),
    "open quote": (
        "e.csv",
        b'prompt,target\n"a,b\n',
        "e.csv: line 2: not CSV (unexpected end of data): check the quotes",
    ),
    "broken cell": (
        "e.csv",
        b"prompt,target,rephrase\na,b,[x]\n",
        "e.csv: row 1, 'rephrase': line 1, column 2: not JSON (Expecting value): write text like [x] as [\"[x]\"]",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EditsError) as caught:
        load_edits(tmp_path / name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(EditsError, match=r"edits\.json: no such file: give one file \(\.json, \.jsonl, \.csv\)$"):
        load_edits(tmp_path / "edits.json")
    with pytest.raises(EditsError, match=r": a directory: give one file \(\.json, \.jsonl, \.csv\)$"):
        load_edits(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", [PLAIN])
    path.chmod(0)
    with pytest.raises(EditsError, match=r"^e\.json: cannot be read as UTF-8 text .*Permission denied"):
        load_edits(path)


# --- rows that are refused --------------------------------------------------------------------------------------------

READS = (
    "a row needs 'prompt' and 'target'; crispedit also reads zsre (src, alt), wikibigedit (update, ans), "
    "wikibigedit (prompt, target_new), counterfact (prompt, target_new), counterfact-rome (requested_rewrite), "
    "chat (messages)"
)


def rome(**rewrite: Any) -> dict[str, Any]:
    """A ROME row with a changed rewrite."""
    return {**ROME, "requested_rewrite": {**ROME["requested_rewrite"], **rewrite}}


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    """A chat row."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


LAST = "row 1 needs 'messages' in which the last is from 'assistant', the target, after one from 'user'"

BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "no schema": ([{"question": "a", "answer": "b"}], f"row 1 has 'question', 'answer': {READS}"),
    "no fields": ([{}], f"row 1 has no fields: {READS}"),
    "near miss": (
        [{"prompt": "a", "taget": "b"}],
        f"row 1 has 'prompt', 'taget' (did you mean 'target' where it says 'taget'?): {READS}",
    ),
    "two near misses": (
        [{"Prompt": "a", "TARGET": "b"}],
        "row 1 has 'Prompt', 'TARGET' (did you mean 'prompt' where it says 'Prompt', 'target' where it says 'TARGET'?)",
    ),
    "near miss of another schema": (
        [{"prompt": "a", "target_nw": "b"}],
        "row 1 has 'prompt', 'target_nw' (did you mean 'target_new' where it says 'target_nw'?)",
    ),
    "missing, near": (
        [PLAIN, OTHER, {"prompt": "c", "taget": "d"}],
        "row 3 has no 'target' (did you mean 'target' where it says 'taget'?)",
    ),
    "missing": ([PLAIN, {"prompt": "c"}], "row 2 has no 'target': row 1 is plain, so every row must have it"),
    "missing, a known field near": (
        [WIKIBIGEDIT, {"prompt": "c", "target_now": "d"}],
        "row 2 has no 'target_new' (did you mean 'target_new' where it says 'target_now'?)",
    ),
    "another schema": ([PLAIN, ZSRE], "row 2 has no 'prompt': row 1 is plain, so every row must have it"),
    "null target": ([{**PLAIN, "target": None}], "row 1 has an empty 'target': it must be text"),
    "blank target": ([PLAIN, {**OTHER, "target": " \n"}], "row 2 has an empty 'target': it must be text"),
    "empty prompt": ([{**PLAIN, "prompt": ""}], "row 1 has an empty 'prompt': it must be text"),
    "number": ([{**PLAIN, "target": 7}], "row 1 has a number in 'target': it must be text"),
    "bool": ([{**PLAIN, "prompt": True}], "row 1 has a bool in 'prompt': it must be text"),
    "list": ([{**PLAIN, "target": ["x"]}], "row 1 has a list in 'target': it must be text"),
    "object": ([{**PLAIN, "subject": {"a": 1}}], "row 1 has an object in 'subject': it must be text"),
    "rephrase": ([{**PLAIN, "rephrase": ["x", 1]}], "row 1 has a number in 'rephrase': it must be text"),
    "surrogate": ([{**PLAIN, "target": "\ud83d"}], "row 1 has half a character in 'target': it must be valid Unicode"),
    "lengths": (
        [{**PLAIN, "locality_prompt": ["a", "b"], "locality_answer": "c"}],
        "row 1 has 2 in 'locality_prompt' and 1 in 'locality_answer': give each prompt its answer",
    ),
    "answer alone": (
        [{**WIKIBIGEDIT, "locality_prompt": None}],
        "row 1 has 0 in 'locality_prompt' and 1 in 'locality_ground_truth': give each prompt its answer",
    ),
    "locality number": ([{**PLAIN, "locality": [3]}], "row 1 has a number in 'locality': it must be text"),
    "locality without prompt": (
        [{**PLAIN, "locality": {"promt": "a"}}],
        "row 1 has no 'locality.prompt' (did you mean 'prompt' where it says 'promt'?)",
    ),
    "locality answer": (
        [{**PLAIN, "locality": {"prompt": "a", "answer": 12}}],
        "row 1 has a number in 'locality.answer': it must be text",
    ),
    "rewrite": ([{"requested_rewrite": "x"}], "row 1 has text in 'requested_rewrite': it must be an object with named"),
    "rewrite prompt": ([{"requested_rewrite": {"a": 1}}], "row 1 has no 'requested_rewrite.prompt'"),
    "rewrite subject": ([rome(subject="")], "row 1 has an empty 'requested_rewrite.subject': it must be text"),
    "no braces": (
        [rome(prompt="Ada is in")],
        "row 1 needs '{}' in 'requested_rewrite.prompt', exactly once: it stands for the subject",
    ),
    "braces twice": ([rome(prompt="{} and {}")], "row 1 needs '{}' in 'requested_rewrite.prompt', exactly once"),
    "no new": ([rome(target_new=None)], "row 1 has no 'requested_rewrite.target_new.str'"),
    "new text": ([rome(target_new="x")], "row 1 has text in 'requested_rewrite.target_new': it must be an object"),
    "new blank": (
        [rome(target_new={"str": " "})],
        "row 1 has an empty 'requested_rewrite.target_new.str': it must be text",
    ),
    "no messages": ([{"messages": []}], LAST),
    "messages text": ([{"messages": "Hi"}], "row 1 has text in 'messages': it must be an object with named fields"),
    "only an answer": ([chat(("assistant", "b"))], LAST),
    "no answer": ([chat(("user", "a"))], LAST),
    "answer first": ([chat(("assistant", "b"), ("user", "a"))], LAST),
    "no user": ([chat(("system", "a"), ("assistant", "b"))], LAST),
    "empty answer": (
        [chat(("user", "a"), ("assistant", " "))],
        "row 1 has an empty 'messages.content': it must be text",
    ),
    "null content": (
        [chat(("user", None), ("assistant", "b"))],
        "row 1 has an empty 'messages.content': it must be text",
    ),
    "parts": (
        [chat(("user", [{"type": "text"}]), ("assistant", "b"))],
        "row 1 has a list in 'messages.content': it must",
    ),
    "sharegpt": ([{"messages": [{"from": "human", "value": "a"}]}], "row 1 has no 'messages.role'"),
    "content misspelt": (
        [{"messages": [{"role": "user", "contents": "a"}]}],
        "row 1 has no 'messages.content' (did you mean 'content' where it says 'contents'?)",
    ),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises(EditsError) as caught:
        edits_from_rows(rows, source="edits.json")
    assert str(caught.value).startswith(f"edits.json: {message}")
    assert "\n" not in str(caught.value)


def test_names_in_messages_stay_on_one_line() -> None:
    with pytest.raises(EditsError, match=r"row 1 has 'a\\nb':"):
        edits_from_rows([{"a\nb": "c"}])


def test_no_rows() -> None:
    with pytest.raises(EditsError, match=r"^memory: no edits in it: give at least one row with 'prompt' and 'target'$"):
        edits_from_rows([])


# --- notes ------------------------------------------------------------------------------------------------------------

NOTES: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "unknown": (
        [{**PLAIN, "colour": "red"}, {**OTHER, "colour": "blue", "size": 3}],
        ("ignored the field 'colour' (rows: 2)", "ignored the field 'size' (rows: 1)"),
    ),
    "near an optional field": (
        [{**WIKIBIGEDIT, "rephrase_prompts": "x"}],
        ("ignored the field 'rephrase_prompts' (did you mean 'rephrase_prompt'?) (rows: 1)",),
    ),
    "plain, the name of another schema": (
        [{**PLAIN, "rephrase_prompt": "x"}],
        ("ignored the field 'rephrase_prompt' (did you mean 'rephrase'?) (rows: 1)",),
    ),
    "empty": ([{**PLAIN, "colour": "", "size": None}], ()),
    "inside locality": (
        [{**PLAIN, "locality": [{"prompt": "a", "anwser": "b"}, {"prompt": "c", "anwser": "d"}]}],
        ("ignored the field 'locality.anwser' (did you mean 'answer'?) (rows: 1)",),
    ),
    "inside messages": (
        [{"messages": [{"role": "user", "content": "a", "name": "Ada"}, {"role": "assistant", "content": "b"}]}],
        ("ignored the field 'messages.name' (rows: 1)",),
    ),
    "a name of two lines": ([{**PLAIN, "a\nb": "x"}], (r"ignored the field 'a\nb' (rows: 1)",)),
    "a name that is no text": ([{**PLAIN, 3: "x"}], ("ignored the field '3' (rows: 1)",)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("rows", "notes"), NOTES.values(), ids=NOTES)
def test_fields_that_are_ignored_are_told(rows: list[dict[str, Any]], notes: tuple[str, ...]) -> None:
    assert edits_from_rows(rows).notes == notes


# --- limit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_rows_beyond_the_limit_are_not_looked_at(tmp_path: Path, suffix: str) -> None:
    bad = [{**PLAIN, "target": "Oslo"}, {**OTHER, "target": ""}]
    path = write(tmp_path / f"e{suffix}", [PLAIN, *bad])
    assert load_edits(path, limit=1).edits == (PLAIN_EDIT,)
    with pytest.raises(EditsError, match="row 3 has an empty 'target': it must be text"):
        load_edits(path)


def test_lines_beyond_the_limit_are_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(f"{PLAIN_JSON}\nnot JSON")
    (tmp_path / "e.csv").write_text('prompt,target\nWhere is Ada?,Rome\na,b,c\n"open')
    assert len(load_edits(tmp_path / "e.jsonl", limit=1)) == len(load_edits(tmp_path / "e.csv", limit=1)) == 1


def test_a_limit_above_the_number_of_rows_takes_all() -> None:
    assert len(edits_from_rows([PLAIN, OTHER], limit=5)) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    message = f"^limit is {limit}: it must be at least 1, or left out to take every row$"
    with pytest.raises(ConfigError, match=message):
        edits_from_rows([PLAIN], limit=limit)


# --- conflicts --------------------------------------------------------------------------------------------------------


def rows_of(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Plain rows."""
    return [{"prompt": prompt, "target": target} for prompt, target in pairs]


CLASHES = rows_of(("p", "A"), ("q", "B"), ("p ", "A "), ("r", "C"), ("r", "D"), ("p", "E"), ("s", "F"), ("s", "F"))


def test_conflicts_are_an_error_that_names_both_rows() -> None:
    message = (
        "e.json: rows 1 and 6 give 'p' the targets 'A' and 'E' (prompts in conflict: 2): "
        "mend them, or use --conflicts first|last|drop"
    )
    with pytest.raises(EditsError, match=f"^{re.escape(message)}$"):
        edits_from_rows(CLASHES, source="e.json")


@pytest.mark.parametrize(
    ("conflicts", "rows", "note"),
    [
        ("first", [1, 2, 4, 7], "prompts with several targets: 2; kept the first row of each, rows dropped: 3"),
        ("last", [2, 5, 6, 7], "prompts with several targets: 2; kept the last row of each, rows dropped: 3"),
        ("drop", [2, 7], "prompts with several targets: 2; kept no row of each, rows dropped: 5"),
    ],
)
def test_conflicts_are_settled_as_told(conflicts: Any, rows: list[int], note: str) -> None:
    edits = edits_from_rows(CLASHES, conflicts=conflicts)
    assert [edit.row for edit in edits] == rows
    assert edits.notes == ("dropped rows that repeat an earlier row: 1", note)


def test_equal_rows_are_no_conflict() -> None:
    edits = edits_from_rows([PLAIN, {"prompt": "Where is Ada? ", "target": " Rome"}])
    assert edits.edits == (PLAIN_EDIT,)
    assert edits.notes == ("dropped rows that repeat an earlier row: 1",)


def test_chats_conflict_when_all_their_turns_are_the_same() -> None:
    one, two = chat(("user", "a"), ("assistant", "b")), chat(("user", " a"), ("assistant", "c"))
    with pytest.raises(EditsError, match="rows 1 and 2 give 'a' the targets 'b' and 'c'"):
        edits_from_rows([one, two])
    other = chat(("system", "s"), ("user", "a"), ("assistant", "c"))
    assert len(edits_from_rows([one, other])) == 2


def test_nothing_left() -> None:
    message = "^memory: no edits are left, every prompt has several targets: keep the first or the last$"
    with pytest.raises(EditsError, match=message):
        edits_from_rows(rows_of(("p", "A"), ("p", "B")), conflicts="drop")


def test_conflicts_has_four_values() -> None:
    message = "^conflicts is 'firts': it must be one of error, first, last, drop$"
    with pytest.raises(ConfigError, match=message):
        edits_from_rows([PLAIN], conflicts="firts")  # type: ignore[arg-type]


# --- the real files ---------------------------------------------------------------------------------------------------


def real(name: str) -> Path:
    """A data set of the paper, which is no part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("CRISPEDIT_SHARED_DATA", default)) / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: set CRISPEDIT_SHARED_DATA to the directory that holds it")
    return path


@pytest.mark.parametrize("name", ["zsre", "wikibigedit"])
def test_real_files_load_whole(name: str) -> None:
    edits = load_edits(real(f"{name}_3k.json"))
    assert (len(edits), edits.schema, edits.notes) == (3000, name, ())
    assert all(edit.subject and edit.subject in edit.prompt and edit.target == edit.target.strip() for edit in edits)
    assert all(len(edit.rephrases) == 1 and len(edit.locality) == 1 and edit.locality[0].answer for edit in edits)


def test_real_zsre_locality_prompts_are_questions() -> None:
    prompts = [edit.locality[0].prompt for edit in load_edits(real("zsre_3k.json"))]
    assert all(prompt.endswith("?") and not prompt.startswith("nq question") for prompt in prompts)
    assert prompts[0] == "how many series of diary of a wimpy kid are there?"


@pytest.mark.parametrize(("conflicts", "kept"), [("first", 2993), ("last", 2993), ("drop", 2988)])
def test_real_counterfact_has_five_prompts_in_conflict(conflicts: Any, kept: int) -> None:
    edits = load_edits(real("counterfact_3k.json"), conflicts=conflicts)
    assert (len(edits), edits.schema) == (kept, "counterfact")
    assert [note.split(";")[0] for note in edits.notes] == ["prompts with several targets: 5"]


def test_real_counterfact_conflicts_are_an_error_unless_beyond_the_limit() -> None:
    path = real("counterfact_3k.json")
    with pytest.raises(EditsError, match=r"rows 463 and 564 give 'Frank Lampard, the' .*\(prompts in conflict: 5\)"):
        load_edits(path)
    assert len(load_edits(path, limit=500)) == 500
