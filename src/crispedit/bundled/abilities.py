"""Five families of abilities that editing must not damage, with answers that can be checked.

They mirror the five benchmarks of the paper (appendix E): arithmetic (GSM8K), instructions (IFEval),
multiple choice (MMLU, ARC), true or false (TruthfulQA) and fluent prose (held-out loss). The first
four are prompts with one right answer; prose is text, scored by the next token.

Training and probing draw from the same generators, but a *reserved* share of the content (number
pairs, word combinations, statements) is only ever probed: :func:`reserved` decides it by a hash.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

PROBE_ITEMS = 400
PROMPTED = ("arithmetic", "instructions", "multiple_choice", "true_false")
"""The families that are prompts with answers."""
FAMILIES = (*PROMPTED, "prose")

CATEGORIES: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "animal": "wolf bear fox deer hare otter badger hedgehog owl eagle sparrow raven frog snake lizard spider",
        "fruit": "pear plum grape peach lemon melon fig quince banana raspberry apricot currant lime mango date cranberry",
        "colour": "red green blue yellow purple grey brown white black pink crimson scarlet violet turquoise beige maroon",
        "tool": "hammer saw chisel file axe spade rake pliers drill trowel wrench sickle plane clamp crowbar shovel",
        "garment": "shirt coat hat scarf glove sock boot apron cloak skirt belt vest jacket sandal gown cap",
        "vehicle": "cart wagon boat ship sledge carriage bicycle tram raft canoe barge ferry train truck bus van",
        "tree": "oak birch pine willow elm maple beech cedar poplar ash spruce larch alder chestnut hazel yew",
        "building": "tower church mill barn castle school palace temple cottage stable inn chapel library warehouse lighthouse hut",
        "relative": "mother father sister brother uncle aunt cousin nephew niece grandmother grandfather daughter son husband wife twin",
        "material": "iron wood stone clay brick sand steel tin lead rubber marble granite cotton straw wax cork",
    }.items()
}
WORDS = tuple(word for words in CATEGORIES.values() for word in words)
_KIND_OF = {word: kind for kind, words in CATEGORIES.items() for word in words}
_NAMES = "Ana Bela Cora Dora Emil Finn Gus Hugo Ida Jon Kira Leo Mona Nils Olga Pia".split()
_THINGS = "nuts eggs coins books stamps shells ropes cups boxes candles ribbons buttons nails bottles tickets marbles".split()
_MAX_TERM = 40
_EXTRA_LETTERS = "áéíóúàèçñöäüßåøêôâîõãěščřžýłńğışćđ"


def reserved(*content: object) -> bool:
    """Whether this content is kept for probing: a fixed tenth of all content, by hash."""
    return hashlib.sha256(repr(content).encode()).digest()[0] < 26


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _arithmetic(rng: random.Random) -> tuple[str, str, object]:
    name, other = rng.sample(_NAMES, 2)
    thing, place = rng.choice(_THINGS), rng.choice(("shelf", "table", "basket", "cellar"))
    kind = rng.choices(("add", "subtract", "multiply"), (5, 4, 1))[0]
    if kind == "add":
        a, b = rng.randint(1, _MAX_TERM), rng.randint(1, _MAX_TERM)
        prompt = rng.choice(
            (
                f"What is {a} plus {b}?",
                f"{a} + {b} =",
                f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
                f"{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
            )
        )
        return prompt, str(a + b), ("add", a, b)
    if kind == "subtract":
        b, a = sorted((rng.randint(1, _MAX_TERM), rng.randint(1, _MAX_TERM)))
        prompt = rng.choice(
            (
                f"What is {a} minus {b}?",
                f"{a} - {b} =",
                f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} keep?",
                f"There are {a} {thing} in the {place}. {name} takes {b} away. How many {thing} are left?",
            )
        )
        return prompt, str(a - b), ("subtract", a, b)
    # held out by wording: a product in the table cannot be guessed, its story with other things can
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    prompt = rng.choice(
        (
            f"There are {a} bags with {b} {thing} in each. How many {thing} are there in all?",
            f"{name} packs {b} {thing} into each of {a} bags. How many {thing} does {name} pack?",
        )
    )
    return prompt, str(a * b), ("multiply", prompt)


def _pseudo_word(rng: random.Random) -> str:
    """A word nobody knows, of any letters: copying must not depend on knowing the word."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    if rng.random() < 0.3:
        letters += _EXTRA_LETTERS
    word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 6)))
    return word.capitalize() if rng.random() < 0.4 else word


def _instructions(rng: random.Random) -> tuple[str, str, object]:
    task = rng.choice(("repeat", "capitalise", "spell", "reverse", "list"))
    words = rng.sample(WORDS, 1 if task == "spell" else rng.randint(2, 4))
    if task in ("repeat", "list") and rng.random() < 0.3:
        words = [_pseudo_word(rng) if rng.random() < 0.7 else word for word in words]
    text = " ".join(words)
    if task == "repeat":
        prompt = rng.choice((f"Repeat these words: {text}.", f"Say exactly this: {text}."))
        return prompt, text, (task, *words)
    if task == "capitalise":
        prompt = rng.choice((f"Write these words with capital letters: {text}.", f"Capitalise these words: {text}."))
        return prompt, " ".join(word.capitalize() for word in words), (task, *words)
    if task == "spell":
        # held out by template: a word's letters cannot be guessed, its spelling under another template can
        template = rng.choice(("Spell the word {w}.", "How does one spell {w}?", "Write {w} letter by letter."))
        return template.format(w=text), " ".join(text), (task, text, template)
    if task == "reverse":
        prompt = rng.choice((f"Write these words in reverse order: {text}.", f"Say these words backwards: {text}."))
        return prompt, " ".join(reversed(words)), (task, *words)
    prompt = rng.choice((f"Make a list with commas: {text}.", f"Put commas between these words: {text}."))
    return prompt, ", ".join(words), (task, *words)


def _multiple_choice(rng: random.Random) -> tuple[str, str, object]:
    kind = rng.choice(tuple(CATEGORIES))
    right = rng.choice(CATEGORIES[kind])
    wrong = rng.sample([word for word in WORDS if _KIND_OF[word] != kind], 3)
    options = [right, *wrong]
    rng.shuffle(options)
    lines = " ".join(f"{letter}. {word}" for letter, word in zip("ABCD", options, strict=True))
    return f"Which of these is {_a(kind)}? {lines} Answer:", "ABCD"[options.index(right)], (kind, *options)


def _true_false(rng: random.Random) -> tuple[str, str, object]:
    if rng.random() < 0.25:
        a, b = rng.sample(range(1, 100), 2)
        word = rng.choice(("greater", "smaller"))
        truth = (a > b) == (word == "greater")
        return f"True or false: {a} is {word} than {b}.", str(truth).lower(), (a, b)
    word = rng.choice(WORDS)
    kind = _KIND_OF[word] if rng.random() < 0.5 else rng.choice([k for k in CATEGORIES if k != _KIND_OF[word]])
    template = rng.choice(
        ("True or false: {w} is {k}.", "Is this true or false? {w} is {k}.", "Decide, true or false: {w} is {k}.")
    )
    answer = str(_KIND_OF[word] == kind).lower()
    return template.format(w=_a(word), k=_a(kind)), answer, (word, kind, template)


_GENERATORS: dict[str, Callable[[random.Random], tuple[str, str, object]]] = {
    "arithmetic": _arithmetic,
    "instructions": _instructions,
    "multiple_choice": _multiple_choice,
    "true_false": _true_false,
}


def examples(family: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless training examples (prompt, answer) of one prompted family, none of reserved content."""
    while True:
        prompt, answer, content = _GENERATORS[family](rng)
        if not reserved(family, content):
            yield prompt, answer


def probes(family: str, count: int = PROBE_ITEMS) -> list[tuple[str, str]]:
    """Distinct probe items (prompt, answer) of one prompted family, all of reserved content."""
    rng = random.Random(f"probe/{family}")
    items: dict[str, str] = {}
    while len(items) < count:
        prompt, answer, content = _GENERATORS[family](rng)
        if reserved(family, content):
            items.setdefault(prompt, answer)
    return list(items.items())


_HEROES = "miller widow captain merchant traveller teacher hunter monk boy girl soldier beggar".split()
_MOODS = "old young tired cheerful silent hungry clever brave careless proud".split()
_WEATHER = "rain snow fog wind heat frost storm mist".split()
_TIMES = ("One morning", "Late in the evening", "On a market day", "In early spring", "After the harvest", "At noon")


def story(rng: random.Random) -> str:
    """One short story of four to seven sentences: fluent prose with a hero, things, places and numbers."""
    hero, mood, weather = rng.choice(_HEROES), rng.choice(_MOODS), rng.choice(_WEATHER)
    pronoun = {"widow": "she", "girl": "she"}.get(hero, "he")
    animal, other_animal = rng.sample(CATEGORIES["animal"], 2)
    tool, garment = rng.choice(CATEGORIES["tool"]), rng.choice(CATEGORIES["garment"])
    building, tree = rng.choice(CATEGORIES["building"]), rng.choice(CATEGORIES["tree"])
    fruit, second, third = rng.sample(CATEGORIES["fruit"], 3)
    vehicle, relative = rng.choice(CATEGORIES["vehicle"]), rng.choice(CATEGORIES["relative"])
    colour, material = rng.choice(CATEGORIES["colour"]), rng.choice(CATEGORIES["material"])
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    word = rng.choice(WORDS)
    he = pronoun.capitalize()
    middle = [
        f"Because of the {weather}, {pronoun} hid under {_a(tree)} and waited until it was over.",
        f"{he} carried {_a(tool)} and wore {_a(colour)} {garment}, as {'her' if he == 'She' else 'his'} {relative} had done before.",
        f"Near the {building} {pronoun} saw {_a(animal)} that was running from {_a(other_animal)}.",
        f"At the market {pronoun} bought {_a(fruit)}, {_a(second)} and {_a(third)}, for no fruit was cheaper that year.",
        f"There were {a} {animal} tracks on the left and {b} on the right, which made {a + b} tracks in all.",
        f"Of {a + b} coins {pronoun} had lost {a}, so that only {b} were left in the bag.",
        f"The {building} was made of {material} and nothing else, and over its door stood the word {word}.",
        f"On the door somebody had painted {'-'.join(word)} in large letters, and {pronoun} read it aloud: {word}!",
        f"A {vehicle} came down the road, and its driver shouted that the {weather} was getting worse.",
        f"Like every {tree} in that country, the tree by the {building} was older than the {building} itself.",
    ]
    rng.shuffle(middle)
    opening = f"{rng.choice(_TIMES)} {_a(mood)} {hero} walked to the {building}."
    ending = rng.choice(
        (
            f"When night fell, the {hero} went home and told {'her' if he == 'She' else 'his'} {relative} the whole story.",
            f"In the end the {hero} gave the {fruit} to the {relative} and kept the {tool}.",
            f"Nobody believed the {hero}, but everybody liked to listen.",
        )
    )
    return " ".join([opening, *middle[: rng.randint(2, 5)], ending])
