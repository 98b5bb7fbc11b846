"""The invented world: facts, edits and texts keep apart what must be kept apart."""

import itertools
from collections import Counter

import pytest

from crispedit.bundled import abilities, corpus, world
from crispedit.edits import edits_from_rows

SPLITS = tuple(world.SPLIT_SIZES)


def test_the_world_is_as_large_as_promised():
    kinds = Counter(entity.kind for entity in world.facts_of())
    assert kinds == {"person": 340, "city": 90, "organisation": 85, "country": 16}
    assert len(world.RELATIONS) == 19
    assert all(len(relation.prompts) == 9 and len(relation.articles) == 3 for relation in world.RELATIONS.values())
    assert len(world.facts()) == 3468


def test_one_to_one_and_many_to_one_relations():
    for relation in world.RELATIONS.values():
        objects = [fact.object for fact in world.facts() if fact.relation is relation]
        one_to_one = relation.name in {"spouse", "mayor", "river", "founder", "capital", "currency"}
        assert (len(set(objects)) == len(objects)) == one_to_one, relation.name


def test_prompts_are_unambiguous():
    """No cloze is the beginning of another one with another meaning, and no prompt is asked twice."""
    prompts = [fact.prompt(index) for fact in world.facts() for index in range(9)]
    assert len(set(prompts)) == len(prompts)
    templates = [(r.subject_kind, cloze) for r in world.RELATIONS.values() for cloze in r.clozes]
    for (kind, one), (other_kind, other) in itertools.permutations(templates, 2):
        assert kind != other_kind or not other.startswith(one + " "), (one, other)


@pytest.mark.parametrize("split", SPLITS)
def test_edits_are_counterfactual_and_their_locality_prompts_are_not_edited(split):
    rows = world.edit_rows(split)
    assert len(rows) == world.SPLIT_SIZES[split]
    truth = {fact.prompt(index): fact.object for fact in world.facts() for index in range(9)}
    for row in rows:
        assert truth[row["prompt"]] == row["old_target"] != row["target"]
        assert len(row["rephrase"]) == 3
        assert row["prompt"] not in row["rephrase"]
        assert all(truth[prompt] == row["old_target"] for prompt in row["rephrase"])
        assert row["locality_prompt"]
        assert all(truth[p] == a for p, a in zip(row["locality_prompt"], row["locality_answer"], strict=True))
    assert len(edits_from_rows(rows)) == len(rows)


def test_splits_are_disjoint_in_their_facts():
    assert sum(world.SPLIT_SIZES.values()) >= 3000
    facts_of_split = [
        {(row["subject"], row["old_target"], row["prompt"].replace(row["subject"], "")) for row in world.edit_rows(s)}
        for s in SPLITS
    ]
    for one, other in itertools.combinations(facts_of_split, 2):
        assert not one & other


def test_no_locality_prompt_asks_for_a_fact_that_its_split_edits():
    fact_of = {fact.prompt(index): fact for fact in world.facts() for index in range(9)}
    for split in SPLITS:
        rows = world.edit_rows(split)
        edited = {fact_of[row["prompt"]] for row in rows}
        assert not edited & {fact_of[prompt] for row in rows for prompt in row["locality_prompt"]}


def test_capability_texts_are_disjoint_from_every_evaluation_prompt():
    texts = "\n".join(corpus.capability_texts())
    asked = [prompt for family in abilities.PROMPTED for prompt, _ in abilities.probes(family)]
    for split in SPLITS:
        for row in world.edit_rows(split):
            asked += [row["prompt"], *row["rephrase"], *row["locality_prompt"]]
    assert not [prompt for prompt in asked if prompt in texts]
    assert not set(corpus.capability_texts()) & set(corpus.probe_prose())


def test_capability_texts_name_no_subject_of_an_edit_as_their_subject():
    """Articles are about background entities; others may be named in them, as the mayor of a city is."""
    background = {entity.name for entity in world.facts_of() if entity.background}
    subjects = {row["subject"] for split in SPLITS for row in world.edit_rows(split)}
    assert not background & subjects


def test_probes_are_distinct_reserved_and_enough():
    training = set()
    documents = corpus.documents(0)
    for prompt, _ in itertools.islice(documents, 20_000):
        training.add(prompt)
    for family in abilities.PROMPTED:
        items = abilities.probes(family)
        assert len({prompt for prompt, _ in items}) == abilities.PROBE_ITEMS
        assert not training & {prompt for prompt, _ in items}, family


def test_held_out_phrasings_are_never_trained_with_their_fact():
    unseen = {(f.prompt(i), f.object) for f in world.facts() for i in f.unseen_prompts}
    unseen |= {(world.QA_CONTEXT.format(q=prompt), answer) for prompt, answer in unseen}
    told = set(itertools.islice(corpus.documents(3), 30_000))
    assert not unseen & told


def test_the_world_does_not_change_by_accident():
    """A change of world, abilities or edits is logged in docs/decisions.md, with results before and after."""
    import hashlib
    import json

    content = [world.edit_rows(split) for split in SPLITS]
    content += [abilities.probes(family) for family in abilities.PROMPTED]
    content += [corpus.capability_texts(), corpus.probe_prose()]
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] == "144a3743887cebc8"
