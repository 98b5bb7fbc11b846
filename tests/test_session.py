"""Sessions: rounds, undo, and what is kept, on a tiny model."""

import json

import pytest
import torch

from builders import long_texts
from crispedit.curvature import Curvature
from crispedit.editors._gradient import ROUNDS_START
from crispedit.edits import edits_from_rows
from crispedit.errors import ArtifactError, ConfigError, EditFailed, ModelError
from crispedit.evaluation import evaluate
from crispedit.models import edit_matrices, fingerprint, load_model
from crispedit.session import EDITS, PATCH, Session, edits_as_json, edits_from_json
from crispedit.session_evaluation import evaluate_session
from families import tiny_model, tiny_tokenizer
from reference import relative

SETTINGS = {"lr": 0.02, "epochs": 8, "energy": 0.5}


def round_of(number, count=3):
    rows = [
        {"prompt": f"Number {number}{index} is", "target": f"{number}{index}x", "rephrase": f"{number}{index} is"}
        for index in range(count)
    ]
    return edits_from_rows(rows, source=f"round{number}.json")


@pytest.fixture
def base(tmp_path):
    """The name of a tiny model in bfloat16."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def create(base, directory, **options):
    loaded = load_model(base)
    curvature = Curvature.estimate(loaded.model, loaded.tokenizer, long_texts(), layers=[1, 2], model_name=base)
    Session.create(directory, loaded, curvature, **{"settings": SETTINGS, "layers": [1, 2], **options})


@pytest.fixture
def directory(base, tmp_path):
    create(base, tmp_path / "session")
    return tmp_path / "session"


def weights(loaded):
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_round_can_be_loaded_again_and_taken_back(directory, base):
    with Session.writing(directory) as session:
        states = [weights(session.load())]
        for number in (1, 2, 3):
            result = session.edit(round_of(number), keep_edits=True)
            states.append({name: tensor.clone() for name, tensor in result.model.state_dict().items()})
        assert not same(states[2], states[3])
    with Session.reading(directory) as session:
        for number, state in enumerate(states):
            assert same(weights(session.load(number)), state)
        assert same(weights(session.load()), states[3])
        with pytest.raises(ArtifactError, match="there is no round 4; the session has 3"):
            session.load(4)
    with Session.writing(directory) as session:
        session.revert(1)
        assert [record["number"] for record in session.rounds] == [1]
        assert same(weights(session.load()), states[1])
        session.edit(round_of(2), keep_edits=True)
        assert same(weights(session.load()), states[2])  # the same edits give the same model
        session.revert(0)
        assert same(weights(session.load()), states[0])
    assert same(weights(load_model(base)), states[0])


@pytest.mark.parametrize("weight", [1.0, 30.0, "equal-trace"])
def test_the_curvature_is_that_of_algorithm_2(base, tmp_path, weight):
    """By hand: factors of each round's rows at its weights, summed by tokens, and then weighted with the base's."""
    create(base, tmp_path / "session", history_weight=weight)
    with Session.writing(tmp_path / "session") as session:
        capabilities = session.curvature()
        parts = []
        for number in (1, 2):
            result = session.edit(round_of(number))
            matrices = edit_matrices(result.model, [1, 2])
            rows = [row.ids for row in _rows(result, round_of(number))]
            parts.append(capabilities.of_rows(result.model, matrices, rows, seed=number))
            found = session.curvature()
            tokens = [part.num_tokens for part in parts]
            assert found.num_tokens == capabilities.num_tokens + sum(tokens)
            assert found.model_fingerprint == fingerprint(result.model)
            assert found.held_out == session.curvature(0).held_out

            def mean(name, side, tokens=tokens):
                every = zip(parts, tokens, strict=True)
                return sum(n * getattr(part.factors[name], side) for part, n in every) / sum(tokens)

            names = list(found.factors)
            ratio = (
                weight * sum(tokens) / capabilities.num_tokens
                if weight != "equal-trace"
                else (
                    sum(float(f.A.trace() * f.G.trace()) for f in capabilities.factors.values())
                    / sum(float(mean(name, "A").trace() * mean(name, "G").trace()) for name in names)
                )
                ** 0.5
            )
            for name in names:
                for side in "AG":
                    expected = (getattr(capabilities.factors[name], side) + ratio * mean(name, side)) / (1 + ratio)
                    # sums in another order, in float32
                    assert relative(getattr(found.factors[name], side), expected) < 1e-5


def _rows(result, edits):
    from crispedit.rows import Prompter

    return Prompter.of(result.model, result.tokenizer).rows(edits)


def test_what_is_kept_and_what_is_not(directory):
    with Session.writing(directory) as session:
        session.edit(round_of(1), keep_edits=True)
        session.edit(round_of(2))
        kept, private = session.rounds
        assert session.kept_edits(1) == round_of(1)
        assert kept["past"].keys() == {"1"}
        assert private["past"].keys() == {"1", "2"}  # the newest are at hand
        session.edit(round_of(3))
        session.edit(round_of(4), given=[round_of(3)])
        third, fourth = session.rounds[2:]
        assert third["past"].keys() == {"1", "3"}  # the second round's are not there to be asked about again
        assert fourth["past"].keys() == {"1", "3", "4"}
        with pytest.raises(ConfigError, match=r"round5.json \(3 edits\) is of none of the 4 rounds"):
            session.edit(round_of(6), given=[round_of(5)])
        assert private["drift"]["drift"] > 0
        assert private["metrics"]["after"]["reliability"] is not None
    words = [row["target"] for row in edits_as_json(round_of(2))["edits"]]
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(word.encode() in content for word in words), path


def test_many_rounds_are_asked_about_no_more_than_few(directory, monkeypatch):
    monkeypatch.setattr("crispedit.session.ASKED", 3 * 2)  # of two edits, then
    with Session.writing(directory) as session:
        for number in range(1, 5):
            session.edit(round_of(number), keep_edits=True)
        asked = [{of: found["asked_edits"] for of, found in record["past"].items()} for record in session.rounds]
    assert asked == [{"1": 2}, {"1": 1, "2": 1}, {"1": 1, "3": 1}, {"1": 1, "4": 1}]


def test_a_rate_is_looked_for_as_in_rounds(base, tmp_path):
    create(base, tmp_path / "s", settings={"epochs": 8, "energy": 0.5})
    create(base, tmp_path / "faster", settings={"epochs": 8, "energy": 0.5, "first_lr": 4.0})
    for name, first in (("s", ROUNDS_START), ("faster", 4.0)):
        with Session.writing(tmp_path / name) as session:
            training = session.edit(round_of(1)).metrics["training"]
            assert training["trials"][0]["learning_rate"] == pytest.approx(first / 48)


def test_rounds_have_defaults_of_their_own_but_where_a_preset_or_the_user_says_otherwise(base, tmp_path):
    for number, (editor, settings, expected) in enumerate((
        ("crispedit", {}, {"first_lr": ROUNDS_START, "update": "priced"}),
        ("crispedit", {"update": "auto"}, {"first_lr": ROUNDS_START, "update": "auto"}),
        ("crispedit:published", {}, {"first_lr": ROUNDS_START}),  # it names its update
        ("ft", {"first_lr": 1.0}, {"first_lr": 1.0}),
        ("ultraedit", {}, {}),
    )):  # fmt: skip
        create(base, tmp_path / str(number), editor=editor, settings=settings)
        with Session.reading(tmp_path / str(number)) as session:
            assert session.about["settings"] == expected


def test_a_round_can_be_taken_out_of_the_middle(directory, base, tmp_path):
    create(base, tmp_path / "without")
    with Session.writing(tmp_path / "without") as session:
        session.edit(round_of(1))
        session.edit(round_of(3))
        wanted = weights(session.load())
    with Session.writing(directory) as session:
        session.edit(round_of(1))
        session.edit(round_of(2))
        session.edit(round_of(3))
        before = weights(session.load())
        with pytest.raises(
            ArtifactError, match=r"round 3 has to be made again.*give the file \(round3.json, 3 edits\)"
        ):
            session.remove(2, [round_of(1)])
        assert same(weights(session.load()), before)
        assert session.remove(2, [round_of(1), round_of(3)]) == 1
        assert len(session.rounds) == 2
        assert same(weights(session.load()), wanted)
        assert session.pending == []


def test_rounds_that_were_to_be_made_again_are_not_forgotten(directory, monkeypatch):
    with Session.writing(directory) as session:
        for number in (1, 2, 3):
            session.edit(round_of(number), keep_edits=True)
        with monkeypatch.context() as patched:
            patched.setattr("crispedit.session.edit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.remove(1)
    with Session.writing(directory) as session:
        assert session.rounds == []
        assert len(session.pending) == 2
        assert session.go_on() == 2
        assert [record["edits"]["sha256"] for record in session.rounds] == [round_of(2).sha256, round_of(3).sha256]
        assert session.pending == []


def test_an_edit_that_fails_leaves_the_session_as_it_was(directory, monkeypatch):
    with Session.writing(directory) as session:
        session.edit(round_of(1))
        state, log = weights(session.load()), session.store.entries()
        monkeypatch.setattr("crispedit.editing.check_edited", lambda *_, **__: (_ for _ in ()).throw(EditFailed("no")))
        with pytest.raises(EditFailed):
            session.edit(round_of(2))
        assert len(session.rounds) == 1
        assert same(weights(session.load()), state)
        assert session.store.entries() == log


def test_another_base_is_refused(directory, base):
    other = tiny_model("llama", seed=1).to(torch.bfloat16)
    other.save_pretrained(base)
    with Session.reading(directory) as session, pytest.raises(ModelError, match="has other weights now"):
        session.load()


def test_damaged_files_are_named(directory):
    with Session.writing(directory) as session:
        session.edit(round_of(1), keep_edits=True)
        for name in (PATCH, EDITS, "curvature/factors.safetensors"):
            path = session.store.path(1, name)
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(ArtifactError, match=rf"{path.name}' is damaged"):
                {PATCH: session.patch, EDITS: session.kept_edits}.get(name, session.curvature)(1)
            path.write_bytes(content)
        assert session.store.damaged() == []


def test_edits_survive_json():
    rows = [
        {"prompt": "a", "target": "b", "rephrases": ["c", "d"], "locality": [{"prompt": "e", "answer": None}]},
        {"prompt": "f", "target": "g", "subject": "h", "locality_prompt": "i", "locality_answer": "j"},
    ]
    edits = edits_from_rows(rows)
    value = json.loads(json.dumps(edits_as_json(edits)))
    assert edits_from_json(value) == edits_from_rows(rows)
    value["edits"][0]["target"] = "x"
    with pytest.raises(ArtifactError, match="are damaged"):
        edits_from_json(value)


def test_every_round_is_scored_as_if_it_were_asked_about_alone(directory):
    with Session.writing(directory) as session:
        for number in (1, 2, 3):
            session.edit(round_of(number), keep_edits=number != 2)
    with Session.reading(directory) as session:
        found = evaluate_session(session, [round_of(2)])
        some = evaluate_session(session)
        first = evaluate_session(session, number=1)
        after, before = session.load(), session.load(0)
        held_out, curvature = session.curvature(0).held_out, session.curvature(0)
    assert [of_round["no_context"] is None for of_round in some["rounds"]] == [False, True, False]
    for number, of_round in enumerate(found["rounds"], 1):
        alone = evaluate(after.model, after.tokenizer, round_of(number), base=before.model, texts=held_out)
        assert (of_round["number"], of_round["source"], of_round["count"]) == (number, f"round{number}.json", 3)
        for context in ("no_context", "qa_context"):
            assert of_round[context] == alone[context]
    drift = found["capability"]["drift"]
    assert drift == pytest.approx(alone["capability"]["drift"], rel=1e-3)  # computed in other batches
    changes = {
        new.name: new.weight.float() - old.weight.float()
        for new, old in zip(edit_matrices(after.model, [1, 2]), edit_matrices(before.model, [1, 2]), strict=True)
    }
    assert found["capability"]["predicted"] == pytest.approx(curvature.predicted_drift(changes), rel=1e-4)
    assert [of_round["number"] for of_round in first["rounds"]] == [1]
    assert first["capability"]["drift"] != drift


def test_what_is_of_no_round_is_refused(directory):
    with Session.reading(directory) as session:
        with pytest.raises(ConfigError, match=r"round4.json \(3 edits\) is of none of the 0 rounds"):
            evaluate_session(session, [round_of(4)])
        with pytest.raises(ArtifactError, match="there is no round 4; the session has 0"):
            evaluate_session(session, number=4)
