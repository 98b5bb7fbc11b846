"""Five families of abilities that editing must not damage, with answers that can be checked.

They mirror the five benchmarks of the paper (appendix E): arithmetic (GSM8K), instructions (IFEval),
multiple choice (MMLU, ARC), true or false (TruthfulQA) and fluent prose (held-out loss). The first
four are prompts with one right answer; prose is text, scored by the next token.

Training and probing draw from the same generators, but a *reserved* tenth is only ever probed:
:func:`reserved` decides it by a hash, of the words where an answer follows from the prompt (copying,
reversing, choosing) and of the whole prompt where it must be known (sums, spellings, kinds).
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
        "fruit": "pear plum grape peach lemon melon fig quince banana raspberry apricot currant lime mango date "
        "cranberry",
        "colour": "red green blue yellow purple grey brown white black pink crimson scarlet violet turquoise beige "
        "maroon",
        "tool": "hammer saw chisel file axe spade rake pliers drill trowel wrench sickle plane clamp crowbar shovel",
        "garment": "shirt coat hat scarf glove sock boot apron cloak skirt belt vest jacket sandal gown cap",
        "vehicle": "cart wagon boat ship sledge carriage bicycle tram raft canoe barge ferry train truck bus van",
        "tree": "oak birch pine willow elm maple beech cedar poplar ash spruce larch alder chestnut hazel yew",
        "building": "tower church mill barn castle school palace temple cottage stable inn chapel library "
        "warehouse lighthouse hut",
        "relative": "mother father sister brother uncle aunt cousin nephew niece grandmother grandfather daughter son "
        "husband wife twin",
        "material": "iron wood stone clay brick sand steel tin lead rubber marble granite cotton straw wax cork",
    }.items()
}
WORDS = tuple(word for words in CATEGORIES.values() for word in words)
KIND_OF = {word: kind for kind, words in CATEGORIES.items() for word in words}
_NAMES = "Ana Bela Cora Dora Emil Finn Gus Hugo Ida Jon Kira Leo Mona Nils Olga Pia".split()
_THINGS = (
    "nuts eggs coins books stamps shells ropes cups boxes candles ribbons buttons nails bottles tickets marbles".split()
)
_MAX_TERM = 9
_EXTRA_LETTERS = "áéíóúàèçñöäüßåøêôâîõãěščřžýłńğışćđ"


def reserved(*content: object) -> bool:
    """Whether this content is kept for probing: a fixed tenth of all content, by hash."""
    return hashlib.sha256(repr(content).encode()).digest()[0] < 26


def a_or_an(word: str) -> str:
    """A word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _arithmetic(rng: random.Random) -> tuple[str, str, object]:
    name, other = rng.sample(_NAMES, 2)
    thing, place = rng.choice(_THINGS), rng.choice(("shelf", "table", "basket", "cellar"))
    kind = rng.choices(("add", "subtract", "multiply"), (5, 4, 1))[0]
    prompts: tuple[str, ...]
    if kind == "add":
        a, b = rng.randint(1, _MAX_TERM), rng.randint(1, _MAX_TERM)
        answer = a + b
        prompts = (
            f"What is {a} plus {b}?",
            f"{a} + {b} =",
            f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
            f"{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
        )
    elif kind == "subtract":
        b, a = sorted((rng.randint(1, _MAX_TERM), rng.randint(1, _MAX_TERM)))
        answer = a - b
        prompts = (
            f"What is {a} minus {b}?",
            f"{a} - {b} =",
            f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} keep?",
            f"There are {a} {thing} in the {place}. {name} takes {b} away. How many {thing} are left?",
        )
    else:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        answer = a * b
        prompts = (
            f"There are {a} bags with {b} {thing} in each. How many {thing} are there in all?",
            f"{name} packs {b} {thing} into each of {a} bags. How many {thing} does {name} pack?",
        )
    prompt = rng.choice(prompts)
    return prompt, str(answer), prompt


def _instructions(rng: random.Random) -> tuple[str, str, object]:
    task = rng.choice(("repeat", "capitalise", "spell", "reverse", "list"))
    words = rng.sample(WORDS, 1 if task == "spell" else rng.randint(2, 3))
    text = " ".join(words)
    if task == "repeat":
        prompt = rng.choice((f"Repeat these words: {text}.", f"Say exactly this: {text}."))
        return prompt, text, (task, *words)
    if task == "capitalise":
        prompt = rng.choice((f"Write these words with capital letters: {text}.", f"Capitalise these words: {text}."))
        return prompt, " ".join(word.capitalize() for word in words), (task, *words)
    if task == "spell":
        prompt = rng.choice(
            (f"Spell the word {text}.", f"How does one spell {text}?", f"Write {text} letter by letter.")
        )
        return prompt, " ".join(text), prompt
    if task == "reverse":
        prompt = rng.choice((f"Write these words in reverse order: {text}.", f"Say these words backwards: {text}."))
        return prompt, " ".join(reversed(words)), (task, *words)
    prompt = rng.choice((f"Make a list with commas: {text}.", f"Put commas between these words: {text}."))
    return prompt, ", ".join(words), (task, *words)


def _multiple_choice(rng: random.Random) -> tuple[str, str, object]:
    kind = rng.choice(tuple(CATEGORIES))
    right = rng.choice(CATEGORIES[kind])
    wrong = rng.sample([word for word in WORDS if KIND_OF[word] != kind], 3)
    options = [right, *wrong]
    rng.shuffle(options)
    lines = " ".join(f"{letter}. {word}" for letter, word in zip("ABCD", options, strict=True))
    return f"Which of these is {a_or_an(kind)}? {lines} Answer:", right, (kind, *options)


def _true_false(rng: random.Random) -> tuple[str, str, object]:
    word = rng.choice(WORDS)
    kind = KIND_OF[word] if rng.random() < 0.5 else rng.choice([k for k in CATEGORIES if k != KIND_OF[word]])
    statement = f"{a_or_an(word)} is {a_or_an(kind)}"
    prompt = rng.choice(
        (f"True or false: {statement}.", f"Is this true or false? {statement}.", f"Decide, true or false: {statement}.")
    )
    return prompt, str(KIND_OF[word] == kind).lower(), prompt


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


def helper_example(rng: random.Random) -> tuple[str, str]:
    """A training example that no probe resembles: what kind of thing a word names, or copying of any words."""
    if rng.random() < 0.4:
        word = rng.choice(WORDS)
        prompt = rng.choice((f"What is {a_or_an(word)}?", f"What kind of thing is {a_or_an(word)}?"))
        return prompt, a_or_an(KIND_OF[word])
    words = [rng.choice(WORDS) if rng.random() < 0.6 else _pseudo_word(rng) for _ in range(rng.randint(2, 10))]
    return f"Copy this: {' '.join(words)}", " ".join(words)


def _pseudo_word(rng: random.Random) -> str:
    """A word nobody knows, of any letters: copying must not depend on knowing the word."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    if rng.random() < 0.3:
        letters += _EXTRA_LETTERS
    word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 6)))
    return word.capitalize() if rng.random() < 0.4 else word


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
    pronoun, his = ("she", "her") if hero in ("widow", "girl") else ("he", "his")
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
        f"Because of the {weather}, {pronoun} hid under {a_or_an(tree)} and waited until it was over.",
        f"{he} carried {a_or_an(tool)} and wore {a_or_an(colour)} {garment}, as {his} {relative} had done before.",
        f"Near the {building} {pronoun} saw {a_or_an(animal)} that was running from {a_or_an(other_animal)}.",
        f"At the market {pronoun} bought {a_or_an(fruit)}, {a_or_an(second)} and {a_or_an(third)}, "
        "for no fruit was cheaper that year.",
        f"There were {a} {animal} tracks on the left and {b} on the right, which made {a + b} tracks in all.",
        f"Of {a + b} coins {pronoun} had lost {a}, so that only {b} were left in the bag.",
        f"The {building} was made of {material} and nothing else, and over its door stood the word {word}.",
        f"On the door somebody had painted {'-'.join(word)} in large letters, and {pronoun} read it aloud: {word}!",
        f"A {vehicle} came down the road, and its driver shouted that the {weather} was getting worse.",
        f"Like every {tree} in that country, the tree by the {building} was older than the {building} itself.",
        f"{a_or_an(word).capitalize()} is {a_or_an(KIND_OF[word])} wherever one goes, {pronoun} thought.",
    ]
    rng.shuffle(middle)
    opening = f"{rng.choice(_TIMES)} {a_or_an(mood)} {hero} walked to the {building}."
    ending = rng.choice(
        (
            f"When night fell, the {hero} went home and told {his} {relative} the whole story.",
            f"In the end the {hero} gave the {fruit} to the {relative} and kept the {tool}.",
            f"Nobody believed the {hero}, but everybody liked to listen.",
        )
    )
    return " ".join([opening, *middle[: rng.randint(2, 5)], ending])
