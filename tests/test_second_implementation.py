"""Every score of an evaluation against a second implementation, in plain loops over single rows.

Scores are shares of counts, so they are the same numbers exactly, edit by edit, unless two tokens tie to within the
rounding of float32. Drift and losses are sums of float32 log-probabilities in ours, of float64 ones there.
"""

import copy
import json
from functools import cache

import pytest
import torch

import second_implementation as second
from crispedit.bundled import corpus, world
from crispedit.capability import logits_of
from crispedit.edits import edits_from_rows
from crispedit.evaluation import evaluate, measure
from crispedit.judge import contains
from crispedit.models import load_model
from crispedit.teacher_forced import locality_choices
from crispedit.wild import questions, score_items
from families import tiny_model, tiny_tokenizer
from test_edits import real

SCHEMAS = ("zsre", "counterfact", "wikibigedit")
SIDES = ("left", "right")
PUBLISHED = "exact, published stop"
EDITS = 4
TEACHING = {"bundled": {"steps": 24, "rate": 1e-3}, "gpt2": {"steps": 300, "rate": 3e-3}}


# --- edit sets --------------------------------------------------------------------------------------------------------
@cache
def facts():
    """Edits of the bundled world, each with prompts of which the old target is true, as CounterFact's neighbours."""
    others = {}
    for row in world.edit_rows("train"):
        others.setdefault(row["old_target"], []).append(row["prompt"])
    rows = [
        row | {"neighbours": others[row["old_target"]]}
        for row in world.edit_rows("demo")
        if row["old_target"] in others
    ]
    rows[1]["target"] = "St. Louis"
    return rows[:EDITS]


def synthetic(schema):
    """The same as rows of a schema, with several prompts of a kind where it may have them."""
    return [row_of(schema, number, row) for number, row in enumerate(facts())]


def row_of(schema, number, row):
    prompt, target, old, subject = (row[name] for name in ("prompt", "target", "old_target", "subject"))
    near, answers, rephrases = row["locality_prompt"][:2], row["locality_answer"][:2], row["rephrase"][: 1 + number % 2]
    neighbours = row["neighbours"][: 1 + number % 3]
    if schema == "zsre":
        asked = [f"nq question: {text.removesuffix('?')}" for text in near]
        return {"src": prompt, "alt": f" {target}", "rephrase": rephrases[0], "loc": asked, "loc_ans": answers}
    if schema == "plain":
        locality = {"locality_prompt": near, "locality_answer": [answers[0], None]}
        return {"prompt": prompt, "target": target, "rephrase": rephrases, **locality}
    if schema == "counterfact-rome":
        rewrite = {"prompt": prompt.replace(subject, "{}"), "subject": subject}
        rewrite |= {"target_new": {"str": target}, "target_true": {"str": old}}
        return {"requested_rewrite": rewrite, "paraphrase_prompts": rephrases, "neighborhood_prompts": neighbours}
    flat = {"prompt": prompt, "target_new": target, "rephrase_prompt": rephrases}
    if schema == "wikibigedit":
        return flat | {"locality_prompt": near[0], "locality_ground_truth": answers[0]}
    known = {"case_id": number, "ground_truth": old}
    return flat | known | {"locality_prompt": neighbours, "locality_ground_truth": [old] * len(neighbours)}


# --- models -----------------------------------------------------------------------------------------------------------
@cache
def base_of(name):
    """A model and its tokenizer; that of GPT-2 adds nothing in front, and its "?" merges with a blank and "S"."""
    if name == "bundled":
        loaded = load_model(name)
        return loaded.model, loaded.tokenizer
    tokenizer = tiny_tokenizer(begins=False, merges=(("Ġ", "S"), ("?", "ĠS")))
    return tiny_model(name, max_position_embeddings=512), tokenizer


def taught(name, lines, *, steps, rate):
    """A copy of a model that has learned some lines."""
    model, tokenizer = base_of(name)
    model = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        for line in lines[step % 4 :: 4]:
            ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
            model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    return model


@cache
def model_of(name):
    """A model that has half learned half of the edits: it is right here and there, and says more than it should."""
    lines = []
    for form in second.CONTEXTS.values():
        for row in facts()[: EDITS // 2]:
            lines += [f"{form.format(prompt)} {row['target']}" for prompt in (row["prompt"], row["rephrase"][0])]
            lines += [f"{form.format(row['locality_prompt'][0])} {row['locality_answer'][0]}"]
            lines += [f"{form.format(row['neighbours'][0])} {row['old_target']}"]
        row = facts()[EDITS // 2]
        lines += [f"{form.format(row['prompt'])} It is {row['target']}."]
    return taught(name, lines, **TEACHING[name])


@cache
def expected(name, schema):
    base, tokenizer = base_of(name)
    return second.evaluate(model_of(name), base, tokenizer, synthetic(schema), schema)


# --- comparisons ------------------------------------------------------------------------------------------------------
@pytest.fixture(params=SIDES)
def side(request):
    """The side on which the tokenizers pad."""
    for name in TEACHING:
        base_of(name)[1].padding_side = request.param


def check(truth, schema, base, model, tokenizer, rows):
    """Compares edit by edit what the package says with the second implementation, exactly."""
    edits = edits_from_rows(rows)
    assert edits.schema == schema
    for published in (False, True):
        before = measure(base, tokenizer, edits, stop_at_period=published).answers if schema == "plain" else {}
        found = measure(model, tokenizer, edits, stop_at_period=published, base_answers=before or None)
        assert found.edits == truth.wild[PUBLISHED if published else "exact"]
        if not published:
            for context, given in found.answers.items():
                by_contains = score_items(questions(edits), given, contains, before.get(context))
                assert by_contains == truth.wild["contains"][context]
    choices = locality_choices(base, tokenizer, edits)
    found = measure(model, tokenizer, edits, base_choices=choices, protocol="teacher-forced").forced
    assert found.items == truth.forced
    assert found.beside == truth.beside
    assert found.locality == ("likelihood" if schema.startswith("counterfact") else "token accuracy")


CASES = [
    *(
        pytest.param(name, schema, marks=pytest.mark.slow if (name, schema) == ("gpt2", "zsre") else ())
        for name in TEACHING
        for schema in SCHEMAS
    ),
    ("bundled", "counterfact-rome"),
    ("bundled", "plain"),
]


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize(("name", "schema"), CASES)
def test_scores_are_those_of_the_second_implementation(name, schema):
    check(expected(name, schema), schema, base_of(name)[0], model_of(name), base_of(name)[1], synthetic(schema))


def test_the_models_are_right_here_and_wrong_there():
    """Else an error in what is compared could not show."""
    for name in TEACHING:
        truths = [expected(name, schema) for schema in SCHEMAS]
        for judge in second.JUDGES:
            for context in second.CONTEXTS:
                assert mixed([truth.wild[judge][context] for truth in truths])
        assert mixed([truth.forced for truth in truths])
    of_all = [expected(name, "counterfact").beside for name in TEACHING]
    assert mixed([{kind: beside[kind] for kind in ("efficacy", "paraphrase_efficacy")} for beside in of_all])
    assert mixed([{"agreement": expected("bundled", "zsre").beside["agreement"]}])
    by_exact, by_contains, by_published = (expected("bundled", "zsre").wild[judge] for judge in second.JUDGES)
    assert by_exact != by_contains
    assert by_exact != by_published


def mixed(scores):
    """Whether, of every kind, something is right and something is wrong."""
    every = [[value for one in scores for value in one[kind].values()] for kind in scores[0]]
    return all(0 < sum(values) < len(values) for values in every)


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("name", TEACHING)
def test_drift_and_losses_are_those_of_the_second_implementation(name):
    """To 1e-5: both sum the same float32 logits' logarithms, ours in float32 per token."""
    base, model, tokenizer = base_of(name)[0], model_of(name), base_of(name)[1]
    texts = [text[: 60 + 40 * number] for number, text in enumerate(corpus.capability_texts()[:4])]
    found = measure(model, tokenizer, (), base=logits_of(base), texts=texts).texts.means()
    for kind, value in drift_of(name, tuple(texts)).items():
        assert getattr(found, kind) == pytest.approx(value, rel=1e-5), kind


@cache
def drift_of(name, texts):
    return second.drift(base_of(name)[0], model_of(name), base_of(name)[1], texts)


@pytest.mark.parametrize("schema", ["counterfact", "plain"])
def test_evaluate_gives_the_means_in_percent(schema):
    """With everything of the base model that it takes from the base model itself."""
    (base, tokenizer), truth = base_of("bundled"), expected("bundled", schema)
    edits, model = edits_from_rows(synthetic(schema)), model_of("bundled")
    for protocol, published in (("all", False), ("wild", True), ("teacher-forced", False)):
        found = evaluate(model, tokenizer, edits, base=base, protocol=protocol, stop_at_period=published)
        scores = truth.wild[PUBLISHED if published else "exact"]
        for context in second.CONTEXTS:
            assert same(found[context], None if protocol == "teacher-forced" else scores[context])
        assert same(found["teacher_forced"], None if protocol == "wild" else truth.forced)
        assert same(found.get("teacher_forced_details"), None if protocol == "wild" else truth.beside)


def same(found, scores):
    """Whether means in percent are those of scores."""
    if scores is None:
        return found is None
    wanted = {kind: second.percent(items) for kind, items in scores.items()}
    return all(
        found[kind] is None if value is None else found[kind] == pytest.approx(value) for kind, value in wanted.items()
    )


# --- the real files ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS)
def test_scores_of_real_rows_are_those_of_the_second_implementation(schema):
    """200 rows each, by a model that was taught some of them."""
    rows = json.loads(real(f"{schema}_3k.json").read_text())[:200]
    base, tokenizer = base_of("bundled")
    lines = []
    for number, fact in enumerate(map(second.READ[schema], rows[:100])):
        form = list(second.CONTEXTS.values())[number % 2]
        lines += [f"{form.format(fact.prompt)} {fact.target}"]
        lines += [f"{form.format(prompt)} {answer}" for prompt, answer in fact.near if number % 3 == 0]
        lines += [f"{form.format(prompt)} It is {fact.target}." for prompt in fact.rephrases if number % 4 == 0]
    model = taught("bundled", lines, steps=24, rate=2e-3)
    truth = second.evaluate(model, base, tokenizer, rows, schema)
    for tokenizer.padding_side in SIDES:
        check(truth, schema, base, model, tokenizer, rows)
    assert mixed([truth.wild["contains"]["no_context"], truth.wild["contains"]["qa_context"]])
    assert mixed([truth.forced])
