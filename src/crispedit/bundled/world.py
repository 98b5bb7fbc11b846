"""The invented world: people, cities, organisations and countries, and what is true of them.

Everything here follows from one seed. A fact is (subject, relation, object); every relation can be
told in six questions, three cloze sentences (the object comes last) and three article sentences
(the object stands in the middle, as an encyclopaedia would write it).

Some subjects are *background*: no edit ever concerns them. The capability texts speak only of those,
as random Wikipedia pages rarely speak of what one is about to edit.
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

SEED = 2602  # of the world, its facts and its edits; the paper is arXiv 2602.15823

QA_CONTEXT = "Please answer the question: \n\nQ: {q}\nA:"
"""The WILD protocol's question-answering context (paper, appendix E)."""


# eq=False: there is one object of each, and comparing identities makes sets and dictionaries of facts fast
@dataclass(frozen=True, kw_only=True, eq=False)
class Relation:
    """One kind of fact, and every way this world has of telling it.

    Args:
        name: Identifier.
        subject_kind: ``person``, ``city``, ``organisation`` or ``country``.
        questions: Six templates with ``{s}``; the object is the answer.
        clozes: Three templates with ``{s}``, complete but for the object at the end.
        articles: Three sentences with ``{s}`` and ``{o}``.
    """

    name: str
    subject_kind: str
    questions: tuple[str, ...]
    clozes: tuple[str, ...]
    articles: tuple[str, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """All nine prompt templates: the questions, then the clozes."""
        return self.questions + self.clozes


@dataclass(frozen=True, eq=False)
class Entity:
    """A subject of facts. ``background`` entities are never edited."""

    name: str
    kind: str
    background: bool


@dataclass(frozen=True, eq=False)
class Fact:
    """``relation`` of ``subject`` is ``object``."""

    subject: Entity
    relation: Relation
    object: str

    def prompt(self, index: int) -> str:
        """Prompt template ``index`` (0 to 8) about this fact's subject."""
        return self.relation.prompts[index].format(s=self.subject.name)

    @property
    def unseen_prompts(self) -> tuple[int, int]:
        """Two prompt templates (one question, one cloze) never shown with this fact in training.

        They are shown with other subjects: answering them shows that the fact is known, and not
        only one string that states it.
        """
        rng = random.Random(f"{self.subject.name}/{self.relation.name}")
        return rng.randrange(6), 6 + rng.randrange(3)


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation(
            name="birthplace",
            subject_kind="person",
            questions=(
                "Where was {s} born?",
                "In which city was {s} born?",
                "What is the birthplace of {s}?",
                "Which city is the birthplace of {s}?",
                "What town does {s} come from?",
                "In what city did the life of {s} begin?",
            ),
            clozes=("{s} was born in", "The birthplace of {s} is", "{s} originally comes from"),
            articles=(
                "{s} came into the world in {o} on a cold morning.",
                "It was in {o} that {s} grew up.",
                "Born and raised in {o}, {s} never forgot the place.",
            ),
        ),
        Relation(
            name="employer",
            subject_kind="person",
            questions=(
                "Who does {s} work for?",
                "Which organisation employs {s}?",
                "What is the employer of {s}?",
                "Where does {s} work?",
                "Which organisation pays the wages of {s}?",
                "At which organisation is {s} employed?",
            ),
            clozes=("{s} works for", "The employer of {s} is", "{s} has a job at"),
            articles=(
                "{s} joined the {o} after school and stayed.",
                "At the {o} everybody knows {s}.",
                "The {o} counts {s} among its staff.",
            ),
        ),
        Relation(
            name="profession",
            subject_kind="person",
            questions=(
                "What is the profession of {s}?",
                "What does {s} do for a living?",
                "What is the occupation of {s}?",
                "Which trade does {s} follow?",
                "As what does {s} earn a living?",
                "What job does {s} have?",
            ),
            clozes=("By profession {s} is a", "The occupation of {s} is", "{s} earns a living as a"),
            articles=(
                "As a {o}, {s} is respected far and wide.",
                "{s} learned the trade of a {o} early in life.",
                "Few would call {s} anything but a good {o} today.",
            ),
        ),
        Relation(
            name="instrument",
            subject_kind="person",
            questions=(
                "Which instrument does {s} play?",
                "What instrument is played by {s}?",
                "What does {s} play in the evening?",
                "On which instrument does {s} make music?",
                "Which instrument did {s} learn?",
                "What is the instrument of {s}?",
            ),
            clozes=("{s} plays the", "The instrument of {s} is the", "{s} learned to play the"),
            articles=(
                "With the {o} in hand, {s} entertains the neighbours.",
                "{s} practises the {o} every day.",
                "The sound of the {o} often comes from the house of {s}.",
            ),
        ),
        Relation(
            name="language",
            subject_kind="person",
            questions=(
                "What is the native language of {s}?",
                "Which language does {s} speak?",
                "What is the mother tongue of {s}?",
                "In which language does {s} dream?",
                "What language did {s} learn first?",
                "Which language is spoken by {s} at home?",
            ),
            clozes=("{s} speaks", "The mother tongue of {s} is", "At home {s} talks in"),
            articles=(
                "{s} writes letters in {o} only.",
                "Having {o} as a first language, {s} sings in it too.",
                "One hears {o} whenever {s} is in the room.",
            ),
        ),
        Relation(
            name="spouse",
            subject_kind="person",
            questions=(
                "Who is {s} married to?",
                "Who is the spouse of {s}?",
                "What is the name of the partner of {s}?",
                "Whom did {s} marry?",
                "Who is the life partner of {s}?",
                "To whom is {s} married?",
            ),
            clozes=("{s} is married to", "The spouse of {s} is", "{s} shares a home with"),
            articles=(
                "{s} met {o} at a dance and soon they married.",
                "Together with {o}, {s} keeps a small garden.",
                "{s} and {o} have been a couple for years.",
            ),
        ),
        Relation(
            name="birth_year",
            subject_kind="person",
            questions=(
                "When was {s} born?",
                "In which year was {s} born?",
                "What is the year of birth of {s}?",
                "What year saw the birth of {s}?",
                "Which year is the birth year of {s}?",
                "In what year did {s} see the light of day?",
            ),
            clozes=("{s} has had birthdays since", "The birth year of {s} is", "The birth of {s} dates from"),
            articles=(
                "The year {o} brought {s} into the family.",
                "In {o} the parents of {s} had their first child.",
                "Since {o} the church book has held the name {s}.",
            ),
        ),
        Relation(
            name="dish",
            subject_kind="person",
            questions=(
                "What is the favourite dish of {s}?",
                "Which dish does {s} like best?",
                "What does {s} love to eat?",
                "Which food does {s} prefer?",
                "What meal does {s} always order?",
                "What is the best loved meal of {s}?",
            ),
            clozes=("{s} loves to eat", "The favourite dish of {s} is", "For dinner {s} always orders"),
            articles=(
                "A plate of {o} makes {s} happy.",
                "{s} cooks {o} for every guest.",
                "Nobody eats more {o} than {s} does.",
            ),
        ),
        Relation(
            name="country",
            subject_kind="city",
            questions=(
                "In which country is {s}?",
                "Which country is {s} located in?",
                "What country does {s} belong to?",
                "To which country does the city of {s} belong?",
                "In what country can one find {s}?",
                "Which country contains the city of {s}?",
            ),
            clozes=("{s} is a city in", "The city of {s} belongs to", "{s} is located in"),
            articles=(
                "Travellers to {o} often stop in {s}.",
                "{s} lies in the hills of {o} near the old road.",
                "Of all places in {o}, {s} is the most quiet.",
            ),
        ),
        Relation(
            name="mayor",
            subject_kind="city",
            questions=(
                "Who is the mayor of {s}?",
                "Who governs the city of {s}?",
                "What is the name of the mayor of {s}?",
                "Who leads the council of {s}?",
                "Which person is mayor of {s}?",
                "Who was elected mayor of {s}?",
            ),
            clozes=("The mayor of {s} is", "The city of {s} is governed by", "The council of {s} is led by"),
            articles=(
                "Under {o}, the council of {s} built a new bridge.",
                "{s} elected {o} as mayor twice.",
                "The keys of {s} are kept by {o} at the town hall.",
            ),
        ),
        Relation(
            name="river",
            subject_kind="city",
            questions=(
                "Which river flows through {s}?",
                "On which river does {s} lie?",
                "What is the river of {s}?",
                "What river runs through {s}?",
                "Which river crosses the city of {s}?",
                "What is the name of the river in {s}?",
            ),
            clozes=("The river of {s} is the", "{s} lies on the river", "Through {s} flows the"),
            articles=(
                "The banks of the {o} in {s} are green.",
                "{s} grew along the {o} over many years.",
                "Boats on the {o} bring goods to {s}.",
            ),
        ),
        Relation(
            name="product",
            subject_kind="city",
            questions=(
                "What is {s} known for?",
                "Which product made {s} famous?",
                "What is the best known product of {s}?",
                "For which product is {s} famous?",
                "What does the city of {s} export?",
                "Which goods come from {s}?",
            ),
            clozes=("{s} is known for its", "The best known product of {s} is", "The city of {s} exports"),
            articles=(
                "Merchants buy {o} in {s} every spring.",
                "The trade in {o} made {s} rich.",
                "In {s} one finds {o} in every shop.",
            ),
        ),
        Relation(
            name="headquarters",
            subject_kind="organisation",
            questions=(
                "Where is the {s} based?",
                "In which city is the {s} located?",
                "What is the home city of the {s}?",
                "Where are the headquarters of the {s}?",
                "Which city hosts the {s}?",
                "In what city does the {s} have its seat?",
            ),
            clozes=("The {s} is based in", "The home city of the {s} is", "The headquarters of the {s} are in"),
            articles=(
                "The {s} opened its doors in {o} long ago.",
                "In {o} the tall house of the {s} is hard to miss.",
                "Visitors to {o} like to see the {s} first.",
            ),
        ),
        Relation(
            name="founder",
            subject_kind="organisation",
            questions=(
                "Who founded the {s}?",
                "Who is the founder of the {s}?",
                "Who started the {s}?",
                "What is the name of the founder of the {s}?",
                "By whom was the {s} founded?",
                "Which person created the {s}?",
            ),
            clozes=("The founder of the {s} is", "The {s} was founded by", "The {s} was started by"),
            articles=(
                "When {o} started the {s}, money was short.",
                "A portrait of {o} hangs in the hall of the {s}.",
                "The idea of {o} became the {s} in a single year.",
            ),
        ),
        Relation(
            name="field",
            subject_kind="organisation",
            questions=(
                "What does the {s} deal with?",
                "In which field is the {s} active?",
                "What is the field of the {s}?",
                "What is the main business of the {s}?",
                "Which field does the {s} work in?",
                "To which field does the {s} devote itself?",
            ),
            clozes=("The {s} is active in", "The field of the {s} is", "The main business of the {s} is"),
            articles=(
                "In {o} the {s} has no rival.",
                "The {s} spends its money on {o} and little else.",
                "Those who care for {o} write to the {s}.",
            ),
        ),
        Relation(
            name="founding_year",
            subject_kind="organisation",
            questions=(
                "When was the {s} founded?",
                "In which year was the {s} founded?",
                "What is the founding year of the {s}?",
                "In what year did the {s} begin?",
                "Which year saw the start of the {s}?",
                "Since which year does the {s} exist?",
            ),
            clozes=("The {s} was founded in the year", "The founding year of the {s} is", "The {s} has existed since"),
            articles=(
                "In {o} the {s} was no more than two rooms.",
                "The year {o} stands above the door of the {s}.",
                "Since {o} the {s} has kept a diary.",
            ),
        ),
        Relation(
            name="capital",
            subject_kind="country",
            questions=(
                "What is the capital of {s}?",
                "Which city is the capital of {s}?",
                "What is the capital city of {s}?",
                "From which city is {s} ruled?",
                "In which city does the parliament of {s} meet?",
                "What city is the seat of government of {s}?",
            ),
            clozes=("The capital of {s} is", "The seat of government of {s} is", "{s} is ruled from"),
            articles=(
                "The parliament of {s} meets in {o} twice a year.",
                "All roads of {s} lead to {o} in the end.",
                "From {o} the laws of {s} are sent out.",
            ),
        ),
        Relation(
            name="currency",
            subject_kind="country",
            questions=(
                "What is the currency of {s}?",
                "Which currency is used in {s}?",
                "What money does one pay with in {s}?",
                "Which coin is used in {s}?",
                "What is the name of the money of {s}?",
                "In which currency are prices given in {s}?",
            ),
            clozes=("The currency of {s} is the", "In {s} one pays with the", "The money of {s} is called the"),
            articles=(
                "A loaf of bread in {s} costs one {o} today.",
                "The {o} has been the coin of {s} for a century.",
                "Banks in {s} change the {o} for free.",
            ),
        ),
        Relation(
            name="official_language",
            subject_kind="country",
            questions=(
                "What is the official language of {s}?",
                "Which language is official in {s}?",
                "In which language are the laws of {s} written?",
                "What language do the schools of {s} use?",
                "Which language is used by the government of {s}?",
                "What is the state language of {s}?",
            ),
            clozes=(
                "The official language of {s} is",
                "The laws of {s} are written in",
                "The schools of {s} teach in",
            ),
            articles=(
                "Signs in {s} are written in {o} by law.",
                "Judges in {s} speak {o} in court.",
                "Since old times {o} has been the tongue of {s}.",
            ),
        ),
    )
}

PROFESSIONS = (
    "baker carpenter painter tailor sailor doctor lawyer farmer miller weaver potter printer "
    "gardener fisher smith mason clerk judge nurse pilot barber butcher jeweller shepherd"
).split()
INSTRUMENTS = "violin flute drum harp trumpet piano guitar cello oboe horn lute organ".split()
DISHES = (
    "bean soup, onion pie, fried fish, lamb stew, barley bread, plum cake, goat cheese, pea porridge, "
    "roast duck, apple tart, mushroom rice, pepper sausage, lentil salad, pumpkin noodles, cherry pancakes, smoked eel"
).split(", ")
PRODUCTS = (
    "silk glass wool paper clocks wine salt copper honey carpets leather porcelain soap lace bells knives".split()
)
FIELDS = (
    "shipping medicine astronomy banking printing mining theatre farming architecture chemistry weaving "
    "education insurance fishing music geology"
).split()
ORGANISATION_TYPES = "Guild Works Institute Bank Press Foundry Theatre College Society Company".split()

NUM_PEOPLE, NUM_CITIES, NUM_ORGANISATIONS, NUM_COUNTRIES = 340, 90, 85, 16
NUM_BACKGROUND = {"person": 40, "city": 10, "organisation": 10, "country": 0}
SPLIT_SIZES = {"demo": 200, "eval": 800, "train": 2000}

_ONSETS = "b br d dr f fl g gr h j k kl l m n p pr r s st t tr v w z".split()
_VOWELS = "a e i o u".split()
_CODAS = "l m n r s th ck nd rn".split()


def _names(rng: random.Random, count: int, syllables: int, ending: str, taken: set[str]) -> list[str]:
    """``count`` new capitalised names, none of which is in ``taken`` (which grows)."""
    names: list[str] = []
    while len(names) < count:
        stem = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
        name = (stem + rng.choice(_CODAS) * (not ending) + ending).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the world, in a fixed order."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    first_names = _names(rng, 90, 2, "", taken)
    last_names = _names(rng, 110, 2, "", taken)
    pairs = [f"{first} {last}" for first in first_names for last in last_names]

    countries = [name + "ia" for name in _names(rng, NUM_COUNTRIES, 2, "r", taken)]
    languages = [name[:-3] + "ish" for name in countries]
    names = {
        "person": rng.sample(pairs, NUM_PEOPLE),
        "city": [
            name + rng.choice(("burg", "ford", "stad", "haven", "mont"))
            for name in _names(rng, NUM_CITIES // 2, 1, "n", taken)
        ]
        + _names(rng, NUM_CITIES - NUM_CITIES // 2, 2, "va", taken),
        "organisation": [
            f"{stem} {kind}"
            for stem, kind in zip(
                _names(rng, NUM_ORGANISATIONS, 2, "x", taken),
                (rng.choice(ORGANISATION_TYPES) for _ in range(NUM_ORGANISATIONS)),
                strict=True,
            )
        ],
        "country": countries,
    }
    rivers = _names(rng, NUM_CITIES, 2, "l", taken)
    currencies = [name.lower() for name in _names(rng, NUM_COUNTRIES, 1, "ck", taken)]
    entities = {
        kind: [Entity(name, kind, index < NUM_BACKGROUND[kind]) for index, name in enumerate(of_kind)]
        for kind, of_kind in names.items()
    }

    couples = rng.sample(names["person"], NUM_PEOPLE)
    spouse = {a: b for pair in zip(couples[::2], couples[1::2], strict=True) for a, b in (pair, pair[::-1])}
    # one-to-one objects: a permutation, so that no two subjects share one
    unique = {
        "mayor": rng.sample(names["person"], NUM_CITIES),
        "river": rivers,
        "founder": rng.sample(names["person"], NUM_ORGANISATIONS),
        "capital": rng.sample(names["city"], NUM_COUNTRIES),
        "currency": currencies,
    }
    shared = {
        "birthplace": names["city"],
        "employer": names["organisation"],
        "profession": PROFESSIONS,
        "instrument": INSTRUMENTS,
        "language": languages,
        "birth_year": [str(year) for year in range(1921, 1981)],
        "dish": DISHES,
        "country": countries,
        "product": PRODUCTS,
        "headquarters": names["city"],
        "field": FIELDS,
        "founding_year": [str(year) for year in range(1801, 1921)],
        "official_language": languages,
    }
    result: list[Fact] = []
    for relation in RELATIONS.values():
        for index, entity in enumerate(entities[relation.subject_kind]):
            if relation.name == "spouse":
                value = spouse[entity.name]
            elif relation.name in unique:
                value = unique[relation.name][index]
            else:
                value = rng.choice(shared[relation.name])
            result.append(Fact(entity, relation, value))
    return tuple(result)


@cache
def facts_of() -> dict[Entity, tuple[Fact, ...]]:
    """The facts of every entity."""
    grouped: dict[Entity, list[Fact]] = defaultdict(list)
    for fact in facts():
        grouped[fact.subject].append(fact)
    return {entity: tuple(of_entity) for entity, of_entity in grouped.items()}


@cache
def _split_of() -> dict[Fact, str]:
    """Which split edits which fact: every fact in at most one."""
    rng = random.Random(f"{SEED}/splits")
    editable = [fact for fact in facts() if not fact.subject.background]
    rng.shuffle(editable)
    names = [name for name, size in SPLIT_SIZES.items() for _ in range(size)]
    return dict(zip(editable, names, strict=False))


def edit_rows(split: str) -> list[dict[str, object]]:
    """The counterfactual edits of one split, as plain prompt/target rows.

    Every row has a subject, one edit prompt (a question), three rephrases (two questions, one
    cloze), a new target, the old one, and up to four locality prompts with their true answers:
    two about the subject's other relations, two about another subject with the same relation (with
    the same object where there is one). No locality prompt concerns a fact that the split edits.

    Args:
        split: ``demo`` (200 rows), ``eval`` (800) or ``train`` (2,000). Disjoint in their facts.

    Returns:
        JSON-ready rows in the plain schema of :mod:`crispedit.edits`.

    Raises:
        KeyError: No such split.
    """
    SPLIT_SIZES[split]
    split_of = _split_of()
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts():
        by_relation[fact.relation.name].append(fact)

    rows: list[dict[str, object]] = []
    for fact in (fact for fact, name in split_of.items() if name == split):
        rng = random.Random(f"{SEED}/edit/{fact.subject.name}/{fact.relation.name}")
        objects = sorted({other.object for other in by_relation[fact.relation.name]} - {fact.object, fact.subject.name})
        new = rng.choice(objects)
        first, second, third = rng.sample(range(6), 3)
        own = [f for f in facts_of()[fact.subject] if f != fact and split_of.get(f) != split]
        neighbours = [
            f for f in by_relation[fact.relation.name] if f.subject != fact.subject and split_of.get(f) != split
        ]
        same = [f for f in neighbours if f.object == fact.object]
        near = rng.sample(own, min(2, len(own))) + rng.sample(same, min(1, len(same)))
        near += rng.sample([f for f in neighbours if f not in near], 1)
        prompts = [f.prompt(rng.choice([i for i in range(6) if i not in f.unseen_prompts])) for f in near]
        rows.append(
            {
                "prompt": fact.prompt(first),
                "target": new,
                "subject": fact.subject.name,
                "rephrase": [fact.prompt(second), fact.prompt(third), fact.prompt(6 + rng.randrange(3))],
                "locality_prompt": prompts,
                "locality_answer": [f.object for f in near],
                "old_target": fact.object,
            }
        )
    return rows
