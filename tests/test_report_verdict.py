"""The verdict: what is said of given numbers, case by case."""

import pytest

from crispedit.report_verdict import Held, caveats, sentence


def difference(value, low, high, detectable=0.4):
    return {"value": value, "low": low, "high": high, "error": 0.1, "detectable": detectable}


def measure(after, interval=(0.0, 0.0), found=None):
    return {"after": after, "interval": list(interval), "difference": found}


def held(after, count, before=0, judged=None):
    return Held(after=after, before=before, judged=count if judged is None else judged, count=count)


RELIABLE = measure(99.0, (97.5, 100.0))
CASES = {
    "everything is well": (
        held(198, 200),
        {
            "reliability": RELIABLE,
            "generalization": measure(87.5),
            "locality": measure(93.0, found=difference(-0.5, -1.5, 0.5, 2.04)),
            "abilities": measure(94.0, found=difference(-0.1, -0.3, 0.1, 0.4)),
        },
        "198 of 200 edits hold and 87.5 % of rephrased prompts get the new answer; no loss of unrelated answers is "
        "found (could have shown ≥ 2.1 points), and no loss of abilities is found (could have shown ≥ 0.40 points).",
    ),
    "something was lost": (
        held(200, 200),
        {
            "reliability": RELIABLE,
            "locality": measure(90.0, found=difference(-3.3, -5.0, -1.5)),
            "abilities": measure(92.0, found=difference(-2.3, -3.6, -0.94)),
        },
        "All 200 edits hold; unrelated answers lose 3.3 points (1.5 to 5.0), and abilities lose 2.30 points "
        "(0.94 to 3.60).",
    ),
    "something was gained": (
        held(200, 200, before=1),
        {
            "reliability": RELIABLE,
            "locality": measure(90.0, found=difference(2.0, 1.0, 3.0)),
            "abilities": measure(92.0, found=difference(1.0, 0.5, 1.5)),
        },
        "All 200 edits hold (1 did before); unrelated answers gain 2.0 points (1.0 to 3.0), and abilities gain 1.00 "
        "points (0.50 to 1.50).",
    ),
    "too few to show anything": (
        held(1, 1),
        {
            "reliability": measure(100.0, (2.5, 100.0)),
            "locality": measure(100.0, found=difference(0.0, -97.5, 0.0, 784.9)),
            "loss": measure(0.81, found=difference(0.0, -0.1, 0.1, 101.0)),
        },
        "The one edit holds (too few to say more than 2 to 100 %); no loss of unrelated answers is found (too few to "
        "show any), and no rise of the loss on other texts is found (could have shown ≥ 101.0000 nats per token).",
    ),
    "texts alone, the loss rises": (
        held(0, 200),
        {"reliability": measure(0.0, (0.0, 1.8)), "loss": measure(0.81, found=difference(0.0048, 0.0009, 0.0092))},
        "None of the 200 edits holds; the loss on other texts rises by 0.0048 nats per token (0.0009 to 0.0092).",
    ),
    "texts alone, the loss falls": (
        held(1, 200),
        {"reliability": measure(0.5, (0.0, 1.5)), "loss": measure(0.81, found=difference(-0.02, -0.03, -0.01))},
        "1 of 200 edits hold; the loss on other texts falls by 0.0200 nats per token (0.0100 to 0.0300).",
    ),
    "texts alone, nothing is found": (
        held(200, 200),
        {"reliability": RELIABLE, "loss": measure(0.8, found=difference(0.001, -0.001, 0.003, 0.00301))},
        "All 200 edits hold; no rise of the loss on other texts is found (could have shown ≥ 0.0031 nats per token).",
    ),
    "no texts": (
        held(200, 200),
        {"reliability": RELIABLE},
        "All 200 edits hold; what the edit did to other texts was not measured.",
    ),
    "few edits": (
        held(5, 5, before=2),
        {"reliability": measure(100.0, (47.8, 100.0))},
        "All 5 edits hold (2 did before; too few to say more than 48 to 100 %); what the edit did to other texts was "
        "not measured.",
    ),
    "one edit that holds": (
        held(1, 1),
        {"reliability": measure(100.0, (2.5, 100.0))},
        "The one edit holds (too few to say more than 2 to 100 %); what the edit did to other texts was not measured.",
    ),
    "one edit that does not": (
        held(0, 1),
        {"reliability": measure(0.0, (0.0, 97.5))},
        "The one edit does not hold (too few to say more than 0 to 98 %); what the edit did to other texts was not "
        "measured.",
    ),
    "not all were judged": (
        held(150, 200, judged=160),
        {"reliability": measure(93.8, (90.0, 97.0))},
        "150 of 160 edits that were judged hold; what the edit did to other texts was not measured.",
    ),
    "none was judged": (
        held(0, 200, judged=0),
        {},
        "No answer was judged; what the edit did to other texts was not measured.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_follows_from_the_numbers(case):
    of, measures, said = CASES[case]
    assert sentence(of, measures, has_base=True) == said


def test_without_a_base_no_cost_is_claimed():
    measures = {"reliability": RELIABLE, "locality": measure(91.7), "abilities": measure(94.0), "loss": measure(0.8)}
    assert sentence(held(200, 200, before=None), measures, has_base=False) == (
        "All 200 edits hold; 91.7 % of unrelated prompts are answered as they should be, and what the edit cost cannot "
        "be said without the base model."
    )


FULL = dict.fromkeys(("reliability", "generalization", "locality", "abilities", "drift"), RELIABLE)
RUN = {"same_edits": True, "edits": {"count": 60}, "model": "m"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"measures": {**FULL, "reliability": measure(100, (48, 100))}, "of": held(5, 5)}, ["5 edits are few"]),
        ({"measures": {**FULL, "reliability": measure(100, (2, 100))}, "of": held(1, 1)}, ["One edit says nothing"]),
        ({"unjudged": 1200}, ["1,200 answers were not judged"]),
        ({"base": None}, ["No base model was given"]),
        ({"without": ["drift"]}, ["No texts were given"]),
        ({"without": ["abilities"]}, ["No tasks were run"]),
        ({"without": ["generalization"]}, ["no rephrased prompts: generalization is not known"]),
        (
            {"without": ["generalization", "locality"]},
            ["no rephrased and unrelated prompts: generalization and locality are not known"],
        ),
        ({"run": {**RUN, "same_edits": False}}, ["crispedit.json records another edit set (60 edits)"]),
        ({"run": {**RUN, "model": "other"}}, ["crispedit.json names 'other' as the base; here the model is compared"]),
        ({"run": None}, []),
    ],
)
def test_caveats_are_what_the_reader_must_know(changes, said):
    measures = changes.get("measures", {k: v for k, v in FULL.items() if k not in changes.get("without", ())})
    found = caveats(
        changes.get("of", held(198, 200)),
        measures,
        base=changes.get("base", "m"),
        unjudged=changes.get("unjudged", 0),
        run=changes.get("run", RUN),
    )
    assert len(found) == len(said)
    for caveat, part in zip(found, said, strict=True):
        assert part in caveat
