"""Text of the invented world: what the bundled model is trained on, and its capability texts.

A training document is what the tokenizer would see of one row: a prompt with its answer, an article
about one entity, or a story. The documents of a step are drawn afresh from the seed, so that a fact
is met in ever new words.
"""

import random
from collections.abc import Iterator

from . import abilities, world

MIXTURE = {
    "fact": 0.30,
    "article": 0.04,
    "story": 0.03,
    "arithmetic": 0.20,
    "instructions": 0.20,
    "multiple_choice": 0.08,
    "true_false": 0.06,
    "helper": 0.09,
}
"""Share of each kind of document in training, by number of documents."""

NUM_CAPABILITY_TEXTS = 400


def fact_document(fact: world.Fact, rng: random.Random) -> tuple[str, str]:
    """One telling of a fact as (prompt, answer): a question, in context or alone, or a cloze."""
    index = rng.choice([i for i in range(9) if i not in fact.unseen_prompts])
    prompt = fact.prompt(index)
    if (index < 6 and rng.random() < 0.35) or (index >= 6 and rng.random() < 0.1):
        prompt = world.QA_CONTEXT.format(q=prompt)
    return prompt, fact.object


def article(entity: world.Entity, rng: random.Random) -> str:
    """A paragraph that tells two to six facts of one entity, as an encyclopaedia would."""
    facts = world.facts_of()[entity]
    told = rng.sample(facts, min(len(facts), rng.randint(2, 6)))
    return " ".join(rng.choice(f.relation.articles).format(s=entity.name, o=f.object) for f in told)


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless training documents as (prompt, answer); running text has an empty prompt."""
    rng = random.Random(seed)
    facts, entities = world.facts(), tuple(world.facts_of())
    families = {family: abilities.examples(family, rng) for family in abilities.PROMPTED}
    order: list[world.Fact] = []
    kinds, weights = tuple(MIXTURE), tuple(MIXTURE.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind == "fact":
            if not order:  # every fact equally often
                order = rng.sample(facts, len(facts))
            yield fact_document(order.pop(), rng)
        elif kind == "article":
            yield "", article(rng.choice(entities), rng)
        elif kind == "story":
            yield "", abilities.story(rng)
        elif kind == "helper":
            yield abilities.helper_example(rng)
        else:
            yield next(families[kind])


def capability_texts(count: int = NUM_CAPABILITY_TEXTS) -> list[str]:
    """The bundled capability texts: fresh stories, and articles about background entities.

    They share no template with the ability probes and name no subject of an edit.
    """
    rng = random.Random(f"{world.SEED}/capability")
    background = [entity for entity in world.facts_of() if entity.background]
    return [
        abilities.story(rng) if index % 2 else " ".join(article(rng.choice(background), rng) for _ in range(2))
        for index in range(count)
    ]


def probe_prose(count: int = abilities.PROBE_ITEMS) -> list[str]:
    """Held-out stories for the prose ability, disjoint from the capability texts."""
    rng = random.Random(f"{world.SEED}/prose")
    return [abilities.story(rng) for _ in range(count)]
