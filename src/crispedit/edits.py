"""The edits: what a file of them may look like, and what the program makes of it.

    a file ──reader──▶ rows ──schema──▶ Edit, Edit, … ──conflicts settled──▶ EditSet

A *reader* knows a file format, a *schema* knows which field means what; the first row decides the schema of its file,
and to add a schema, add an entry to ``_SCHEMAS``. Nothing is guessed: what cannot be read is an `EditsError` that
names the row, and what is left out is told in `EditSet.notes`.
"""

import csv
import difflib
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice, zip_longest
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal, TypeAlias, TypeVar, get_args, overload

from .errors import ConfigError, EditsError, did_you_mean

Item = TypeVar("Item")
Conflicts: TypeAlias = Literal["error", "first", "last", "drop"]
Fields: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Locality:
    """A prompt whose answer the edit must leave as it is; ``answer`` is the right one, where the file knows it."""

    prompt: str
    answer: str | None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One fact to change: after the edit, the model should answer ``prompt`` with ``target``.

    Attributes:
        prompt: The question or the beginning of a sentence; for a chat, the last user message.
        target: The answer to teach, stripped.
        subject: What the fact is about, for the editors that need it.
        rephrases: Other wordings of the prompt, for measuring generalization.
        locality: Prompts whose answers must stay, for measuring locality.
        turns: For a chat, the (role, content) messages before the target; empty for all others.
        row: The number of its row in the file, from 1; a header is not counted.
    """

    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Locality, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    row: int = 0


@dataclass(frozen=True)
class EditSet(Sequence[Edit]):
    """The edits of one file, in its order, no prompt twice.

    Attributes:
        edits: The edits.
        schema: The name of the schema that the file was read by.
        source: The name of the file, or a label.
        sha256: The hash of what the edits say, the same in any file format: row numbers are left out.
        notes: What the user should know: fields that were ignored, rows that were dropped.
    """

    edits: tuple[Edit, ...] = field(repr=False)
    schema: str
    source: str
    sha256: str
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, edits: Iterable[Edit], *, schema: str = "plain", source: str = "memory", notes: Iterable[str] = ()
    ) -> "EditSet":
        """An edit set of edits that are ready: nothing is checked, only hashed."""
        ready = tuple(edits)
        content = [{**asdict(edit), "row": None} for edit in ready]
        sha256 = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
        return cls(ready, schema, source, sha256.hexdigest(), tuple(notes))

    def __len__(self) -> int:
        return len(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Edit, ...]: ...
    def __getitem__(self, index: int | slice) -> Edit | tuple[Edit, ...]:
        return self.edits[index]


def load_edits(path: str | Path, *, limit: int | None = None, conflicts: Conflicts = "error") -> EditSet:
    """Read a file of edits.

    Args:
        path: A .json file (a list of objects, or an object that holds one such list), .jsonl or .csv, in UTF-8. A
            cell of a .csv may hold a JSON list where a field may hold a list.
        limit: Take the first ``limit`` rows, and look at no others.
        conflicts: For a prompt that has several targets: an error, or keep its first or last row, or drop them all.

    Returns:
        The edits, at least one.

    Raises:
        ConfigError: ``limit`` or ``conflicts`` has a value that cannot be used.
        EditsError: The file cannot be read, a row cannot be used, or rows conflict.
    """
    path = Path(path)
    return edits_from_rows(_read_file(path), source=path.name, limit=limit, conflicts=conflicts)


def edits_from_rows(
    rows: Iterable[Fields], *, source: str = "memory", limit: int | None = None, conflicts: Conflicts = "error"
) -> EditSet:
    """Make edits of rows that are dictionaries.

    Args:
        rows: The rows, all of one schema.
        source: What messages call the rows.
        limit: As in `load_edits`.
        conflicts: As in `load_edits`.

    Returns:
        The edits, at least one.

    Raises:
        ConfigError: ``limit`` or ``conflicts`` has a value that cannot be used.
        EditsError: A row cannot be used, or rows conflict.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: it must be at least 1, or left out to take every row")
    if conflicts not in get_args(Conflicts):
        raise ConfigError(f"conflicts is {conflicts!r}: it must be one of {', '.join(get_args(Conflicts))}")
    ignored: dict[str, set[int]] = defaultdict(set)
    taken = [_Row(fields, number, source, ignored) for number, fields in enumerate(islice(rows, limit), start=1)]
    if not taken:
        raise EditsError(f"{source}: no edits in it: give at least one row with 'prompt' and 'target'")
    schema = _recognise(taken[0])
    edits, settled = _settle([_edit(schema, row) for row in taken], conflicts, source)
    notes = [f"ignored the field {name} (rows: {len(numbers)})" for name, numbers in ignored.items()]
    return EditSet.of(edits, schema=schema.name, source=source, notes=(*notes, *settled))


def _settle(edits: list[Edit], conflicts: Conflicts, source: str) -> tuple[list[Edit], list[str]]:
    """Leave one edit per prompt, or none; the notes say what was dropped."""
    groups: dict[object, list[Edit]] = defaultdict(list)
    for edit in edits:
        groups[tuple((role, text.strip()) for role, text in edit.turns) or edit.prompt.strip()].append(edit)
    clashes = [group for group in groups.values() if len({edit.target for edit in group}) > 1]
    agreed = [group for group in groups.values() if len({edit.target for edit in group}) == 1]
    if clashes and conflicts == "error":
        one, two = clashes[0][0], next(edit for edit in clashes[0] if edit.target != clashes[0][0].target)
        raise EditsError(
            f"{source}: rows {one.row} and {two.row} give {brief(one.prompt)} the targets {brief(one.target)} and "
            f"{brief(two.target)} (prompts in conflict: {len(clashes)}): mend them, or use --conflicts first|last|drop"
        )
    chosen = {"first": slice(1), "last": slice(-1, None)}.get(conflicts, slice(0))
    kept = [edit for group in agreed for edit in group[:1]] + [edit for group in clashes for edit in group[chosen]]
    if not kept:
        raise EditsError(f"{source}: no edits are left, every prompt has several targets: keep the first or the last")
    notes = []
    if repeats := sum(len(group) - 1 for group in agreed):
        notes.append(f"dropped rows that repeat an earlier row: {repeats}")
    if clashes:
        dropped, rest = len(edits) - len(kept) - repeats, "no row" if conflicts == "drop" else f"the {conflicts} row"
        notes.append(f"prompts with several targets: {len(clashes)}; kept {rest} of each, rows dropped: {dropped}")
    return sorted(kept, key=lambda edit: edit.row), notes


# --- files: from a path to rows ---------------------------------------------------------------------------------------
def _read_file(path: Path) -> Iterable[Any]:
    """The rows of a file, by the reader for its suffix."""
    kinds, suffix = ", ".join(_READERS), path.suffix.lower()
    if not path.is_file():
        raise EditsError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}: give one file ({kinds})")
    if suffix not in _READERS:
        raise EditsError(f"{path.name}: its suffix{did_you_mean(suffix, _READERS)} must be one of {kinds}")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets like to write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise EditsError(f"{path.name}: cannot be read as UTF-8 text ({error}): save it as UTF-8, readable") from None
    return _READERS[suffix](text, path.name) if text.strip() else []


def _parse(text: str, where: str, hint: str, line: int | None = None) -> Any:
    """JSON to Python; ``line`` is the number of the line that the text is, if its file has one value per line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, thousands of brackets
        if isinstance(error, json.JSONDecodeError):
            where += f": line {line or error.lineno}, column {error.colno}"
        raise EditsError(f"{where}: not JSON ({getattr(error, 'msg', error)}): {hint}") from None


def _json_rows(text: str, source: str) -> Iterable[Any]:
    """The rows of a .json file: its list, or the one list of objects in its object."""
    content = _parse(text, source, "it must be a list of objects; with one object on every line, name it .jsonl")
    values = content if isinstance(content, dict) else {"": content}
    if _match(values):  # before looking for lists: a row's own locality or messages are lists of objects too
        raise EditsError(f"{source}: a single row and no list: put [ and ] around it")
    lists = [value for value in values.values() if isinstance(value, list)]
    tables = [rows for rows in lists if any(isinstance(row, dict) for row in rows)] or lists
    if len(tables) != 1:
        raise EditsError(f"{source}: has {len(tables)} lists of rows: it must be a list, or an object with one list")
    return tables[0]


def _jsonl_rows(text: str, source: str) -> Iterator[Any]:
    """The rows of a .jsonl file, one per line that is not blank."""
    # not splitlines(): it also splits at characters that JSON allows inside a string, such as U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(line, source, "every line must be one object", number)


def _csv_rows(text: str, source: str) -> Iterator[dict[str, Any]]:
    """The rows of a .csv file, by the names in its header."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise EditsError(f"{source}: the header has {twice[0]!r} twice: give every column its own name")
        for number, row in enumerate(reader, start=1):
            if None in row:  # where DictReader puts the cells that have no column
                raise EditsError(f"{source}: row {number} has more cells than the header: quote text that has a comma")
            for name in _LIST_FIELDS & row.keys():
                if (row[name] or "").startswith(("[", "{")):
                    row[name] = _parse(row[name], f"{source}: row {number}, {name!r}", 'write text like [x] as ["[x]"]')
            yield row
    except csv.Error as error:  # the line number of reader itself is one row behind
        raise EditsError(f"{source}: line {reader.reader.line_num}: not CSV ({error}): check the quotes") from None


_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}


# --- rows: typed access to their fields, and errors that say where ----------------------------------------------------
def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _absent(value: object) -> bool:
    """Whether a value says nothing: null, blank, empty, or the NaN that pandas has for a missing cell."""
    return value in (None, [], {}, ()) or value != value or (isinstance(value, str) and not value.strip())


@dataclass(frozen=True)
class _Row:
    """A row, or an object inside one; ``path`` is then where in the row (``locality.``)."""

    fields: Fields
    number: int
    source: str
    ignored: dict[str, set[int]]  # shared by all rows: a field that is not known, and the rows that have it
    path: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Mapping):
            where = f"has {_kind(self.fields)} in {self.path[:-1]!r}" if self.path else f"is {_kind(self.fields)}"
            raise self.error(f"{where}: it must be an object with named fields")

    def error(self, message: str) -> EditsError:
        """An error about this row; the message goes on after ``row 3``."""
        return EditsError(f"{self.source}: row {self.number} {message}")

    def child(self, name: str, value: Any) -> "_Row":
        """An object inside this row."""
        return replace(self, fields=value, path=f"{self.path}{name}.")

    def missing(self, name: str, known: Iterable[str] = (), otherwise: str = "") -> EditsError:
        """The error for a field that is not there, with the unknown field that may be meant."""
        unknown = {str(other).lower(): other for other in self.fields if other not in known}
        near = difflib.get_close_matches(name, unknown, n=1)
        hint = f" (did you mean {name!r} where it says {unknown[near[0]]!r}?)" if near else otherwise
        return self.error(f"has no '{self.path}{name}'{hint}")

    def text(self, name: str) -> str:
        """A field that must be there and be text."""
        if name not in self.fields:
            raise self.missing(name)
        if _absent(self.fields[name]):
            raise self.error(f"has an empty '{self.path}{name}': it must be text")
        return self.checked(name, self.fields[name])

    def maybe(self, name: str) -> str | None:
        """Text without the blanks around it, or None where there is none."""
        return None if _absent(self.fields.get(name)) else self.text(name).strip()

    def entries(self, name: str) -> Sequence[Any]:
        """A field that may hold one thing or a list of them, as a list."""
        value = self.fields.get(name)
        return value if isinstance(value, list | tuple) else [] if _absent(value) else [value]

    def texts(self, name: str) -> tuple[str, ...]:
        """All that there is in a field that may hold text or a list of texts."""
        return tuple(self.checked(name, entry) for entry in self.entries(name) if not _absent(entry))

    def checked(self, name: str, value: object) -> str:
        """The value, if it is text that a tokenizer can take."""
        if not isinstance(value, str):
            raise self.error(f"has {_kind(value)} in '{self.path}{name}': it must be text")
        if value.encode(errors="ignore").decode() != value:  # JSON can spell half of a surrogate pair
            raise self.error(f"has half a character in '{self.path}{name}': it must be valid Unicode")
        return value

    def ignore_others(self, known: Sequence[str], hints: Sequence[str]) -> None:
        """Keep for the notes which fields are not among the known ones (patterns)."""
        for name, value in self.fields.items():
            if not _absent(value) and not any(fnmatchcase(str(name), pattern) for pattern in known):
                self.ignored[f"{self.path + str(name)!r}{did_you_mean(str(name), hints)}"].add(self.number)


# --- schemas: from a row to an Edit -----------------------------------------------------------------------------------
def _question(text: str) -> str:
    """A locality prompt of ZsRE as the question that it is: they have a prefix and no question mark."""
    return text.removeprefix("nq question: ").rstrip().removesuffix("?") + "?"


def _localities(row: _Row, prompts: str, answers: str = "", ask: Callable[[str], str] = str) -> Iterator[Locality]:
    """Locality prompts from a field of texts, with the answers from another, or of objects that hold both."""
    asked, known = row.entries(prompts), row.entries(answers) if answers else []
    if known and len(known) != len(asked):
        raise row.error(f"has {len(asked)} in '{prompts}' and {len(known)} in '{answers}': give each prompt its answer")
    for prompt, answer in zip_longest(asked, known):
        item, names = replace(row, fields={prompts: prompt, answers: answer}), (prompts, answers)
        if isinstance(prompt, Mapping):
            item, names = row.child(prompts, prompt), ("loc", "loc_ans") if "loc" in prompt else ("prompt", "answer")
            item.ignore_others(names, names)
        if not _absent(prompt):
            yield Locality(prompt=ask(item.text(names[0])), answer=item.maybe(names[1]))


def _read(row: _Row, prompt: str, target: str, rephrase: str, *locality: Any) -> Edit:
    """An edit from the fields with these names; ``locality`` is what `_localities` takes."""
    return Edit(
        prompt=row.text(prompt),
        target=row.text(target).strip(),
        subject=row.maybe("subject"),
        rephrases=row.texts(rephrase),
        locality=tuple(_localities(row, *locality)),
        row=row.number,
    )


def _read_plain(row: _Row) -> Edit:
    """The project's own names, some of which have another form."""
    edit = _read(row, "prompt", "target", "rephrase", "locality_prompt", "locality_answer")
    locality = (*_localities(row, "locality"), *edit.locality)
    return replace(edit, rephrases=edit.rephrases + row.texts("rephrases"), locality=locality)


def _read_chat(row: _Row) -> Edit:
    """Messages, of which the last is the target."""
    messages = [row.child("messages", entry) for entry in row.entries("messages")]
    turns = [(message.text("role"), message.text("content")) for message in messages]
    prompts = [content for role, content in turns[:-1] if role == "user"]
    if not prompts or turns[-1][0] != "assistant":
        raise row.error("needs 'messages' in which the last is from 'assistant', the target, after one from 'user'")
    for message in messages:
        message.ignore_others(("role", "content"), ())
    plain = replace(row, fields={**row.fields, "prompt": prompts[-1], "target": turns[-1][1]})
    return replace(_read_plain(plain), turns=tuple(turns[:-1]))


def _read_rome(row: _Row) -> Edit:
    """CounterFact as ROME published it: the prompt is a template, and all neighbours share the old answer."""
    rewrite = row.child("requested_rewrite", row.fields["requested_rewrite"])
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    if template.count("{}") != 1:
        raise row.error("needs '{}' in 'requested_rewrite.prompt', exactly once: it stands for the subject")
    answer = rewrite.child("target_true", rewrite.fields.get("target_true") or {}).maybe("str")
    return Edit(
        prompt=template.replace("{}", subject),
        target=rewrite.child("target_new", rewrite.fields.get("target_new") or {}).text("str").strip(),
        subject=subject,
        rephrases=row.texts("paraphrase_prompts"),
        locality=tuple(Locality(prompt=text, answer=answer) for text in row.texts("neighborhood_prompts")),
        row=row.number,
    )


@dataclass(frozen=True)
class _Schema:
    """How to recognise a kind of row, and how to read it."""

    name: str
    required: tuple[str, ...]
    lists: tuple[str, ...]  # optional fields that may hold more than one text
    read: Callable[[_Row], Edit]
    ignored: tuple[str, ...] = ()  # known, and left out without a word; patterns

    @property
    def known(self) -> tuple[str, ...]:
        """The fields that need no note."""
        return (*self.required, "subject", *self.lists, *self.ignored)


# The names of prompt, target, rephrase, locality prompt and locality answer.
_ZSRE = ("src", "alt", "rephrase", "loc", "loc_ans")
_WIKI = ("update", "ans", "rephrase", "loc", "loc_ans")
_FLAT = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
_EXTRAS = ("rephrase", "rephrases", "locality", "locality_prompt", "locality_answer")
_ROME = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
_ROME_IGNORED = ("case_id", "pararel_idx", "attribute_prompts", "generation_prompts")

# A row is of the schema that has its required fields there and knows the most of the others; of two, the first.
_SCHEMAS = (
    _Schema("plain", ("prompt", "target"), _EXTRAS, _read_plain, ("id", "old_target")),
    _Schema("zsre", _ZSRE[:2], _ZSRE[2:], lambda row: _read(row, *_ZSRE, _question), ("pred", "answers", "cond")),
    _Schema("wikibigedit", _WIKI[:2], _WIKI[2:], lambda row: _read(row, *_WIKI), ("tag", "mhop*", "personas*")),
    _Schema("wikibigedit", _FLAT[:2], _FLAT[2:], lambda row: _read(row, *_FLAT)),
    _Schema("counterfact", _FLAT[:2], _FLAT[2:], lambda row: _read(row, *_FLAT), ("case_id", "ground_truth")),
    _Schema("counterfact-rome", _ROME[:1], _ROME[1:], _read_rome, _ROME_IGNORED),
    _Schema("chat", ("messages",), _EXTRAS, _read_chat, ("id",)),
)
_LIST_FIELDS = {"messages", "requested_rewrite"}.union(*(schema.lists for schema in _SCHEMAS))


def _match(fields: Fields) -> _Schema | None:
    """The schema of a row, by the fields that say something, or else by all of them."""
    for names in ({name for name, value in fields.items() if not _absent(value)}, set(fields)):
        if fitting := [schema for schema in _SCHEMAS if names.issuperset(schema.required)]:
            return max(fitting, key=lambda schema: len(names.intersection(schema.known)))
    return None


def _recognise(row: _Row) -> _Schema:
    """The schema of the first row; an error says what would be one."""
    if schema := _match(row.fields):
        return schema
    wanted = {name for schema in _SCHEMAS for name in schema.required} - set(row.fields)
    near = {name: difflib.get_close_matches(str(name).lower(), wanted, n=1) for name in row.fields}
    meant = {new[0]: f"{new[0]!r} where it says {old!r}" for old, new in near.items() if new}
    likely = _match({**row.fields, **dict.fromkeys(meant, "…")})  # else the likeness is chance
    hint = f" (did you mean {', '.join(meant.values())}?)" if likely else ""
    has = ", ".join(map(brief, row.fields)) or "no fields"
    others = ", ".join(f"{schema.name} ({', '.join(schema.required)})" for schema in _SCHEMAS[1:])
    raise row.error(f"has {has}{hint}: a row needs 'prompt' and 'target'; crispedit also reads {others}")


def _edit(schema: _Schema, row: _Row) -> Edit:
    """Read a row by the schema of its file."""
    for name in schema.required:
        if name not in row.fields:
            raise row.missing(name, schema.known, f": row 1 is {schema.name}, so every row must have it")
    row.ignore_others(schema.known, ("subject", *schema.lists))
    return schema.read(row)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` items, evenly spread over all."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
