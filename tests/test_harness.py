"""lm-evaluation-harness itself, on tasks of a few local items: what it counts, and that it leaves nothing behind."""

import json
import logging
import os
import random
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'crispedit[tasks]'")

from crispedit import cli
from crispedit.benchmarks import SCORES, Benchmark, parse_benchmarks
from crispedit.bundled import abilities
from crispedit.capability import TaskItems
from crispedit.errors import ConfigError, ModelError
from crispedit.harness import arguments, rows_at_once, run_benchmarks
from crispedit.harness_tasks import LOGGER, PACK, load_benchmarks
from crispedit.models import load_model
from crispedit.rows import Prompter
from crispedit.untouched import untouched_process
from families import CHATML, LLAMA_3, tiny_model, tiny_tokenizer

CHOICES = ["true", "false"]

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
"""
CHOOSING = """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: right
fewshot_split: test
"""
ACC, ACC_NORM = "  - {metric: acc, aggregation: mean, higher_is_better: true}", "  - {metric: acc_norm}"
FUNCTIONS = """
def share(doc, results): return {"share": 0.25 * doc["right"]}
def parts(doc, results): return {"parts": [True, doc["right"] == 1]}
def best(doc, results): return {"best": 1.0}
def pair(doc, results): return {"pair": (1, 0)}
def wide(doc, results): return {"wide": 3.0}

def first(items): return 0.5

def flat_mean(items):
    every = [one for item in items for one in item]
    return sum(every) / len(every)
"""


def as_metric(name: str, aggregation: str = "mean", better: str = "true") -> str:
    listed = f"metric_list:\n  - {{metric: {name}, aggregation: {aggregation}, higher_is_better: {better}}}"
    return f"process_results: !function functions.{name}\n{listed}"


@pytest.fixture
def local(tmp_path):
    """A directory of tasks, and a function that adds one to it."""
    directory = tmp_path / "local tasks"
    directory.mkdir()
    (directory / "functions.py").write_text(FUNCTIONS)
    docs = [
        {"question": question, "choices": CHOICES, "right": CHOICES.index(answer) ^ (number % 3 == 0)}
        for number, (question, answer) in enumerate(abilities.probes("true_false", 12))
    ]
    sums = [
        {"question": question, "answer": "many" if number % 4 == 0 else answer}
        for number, (question, answer) in enumerate(abilities.probes("arithmetic", 10))
    ]

    def add(name: str, rest: str, rows: list[dict] = docs, kind: str = CHOOSING) -> None:
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = COMMON.format(data=json.dumps(str(data)), cache=json.dumps(str(tmp_path / "data")))
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{common}{kind}{rest}\n")

    add("choose", f"metric_list:\n{ACC}\n{ACC_NORM}\ntag: mine")
    add("few", f"metric_list:\n{ACC}\ntag: mine", docs[:4])
    generation = (
        "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['\\n'], do_sample: false, max_gen_toks: 12}\n"
    )
    exact = "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}"
    strip = "filter_list:\n  - {name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}"
    add("generate", f"{exact}\n{strip}", sums, generation)
    add("long", f"{exact}", sums, generation.replace("12", "600"))
    aggregated = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (directory / "group.yaml").write_text(f"group: both\ntask: [choose, few]\n{aggregated}\n")
    (directory / "plain_group.yaml").write_text("group: apart\ntask: [choose, few]\n")
    add.directory, add.docs, add.sums = directory, docs, sums
    return add


def loaded(local, names: str, limit: int | None = None):
    return load_benchmarks(parse_benchmarks(names, limit=limit), include_path=local.directory)


def run(local, bundled, names: str, *, limit: int | None = None, **options):
    options = {"chat": False, "batch_size": 5, **options}
    return run_benchmarks(bundled.model, bundled.tokenizer, loaded(local, names, limit), **options)


@torch.inference_mode()
def log_probability(bundled, context: str, continuation: str) -> float:
    """Of a continuation after a context, alone in a forward pass, as a sum over its tokens."""
    before = bundled.tokenizer(context)["input_ids"]
    ids = bundled.tokenizer(context + continuation)["input_ids"]
    assert ids[: len(before)] == before
    log_p = bundled.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[position - 1, ids[position]]) for position in range(len(before), len(ids)))


@torch.inference_mode()
def continued(bundled, text: str, tokens: int) -> str:
    """Greedily, one row, no cache, up to the first line break."""
    ids = bundled.tokenizer(text)["input_ids"]
    new: list[int] = []
    while len(new) < tokens:
        new.append(int(bundled.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == bundled.tokenizer.eos_token_id or "\n" in bundled.tokenizer.decode(new):
            break
    return bundled.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]


# --- what is counted --------------------------------------------------------------------------------------------------
def test_multiple_choice_is_what_forward_passes_by_hand_give(local, bundled):
    (found,) = run(local, bundled, "choose")
    wanted = []
    for doc in local.docs:
        values = [log_probability(bundled, doc["question"], f" {choice}") for choice in CHOICES]
        wanted.append(float(values.index(max(values)) == doc["right"]))
    assert found.tasks["choose"].items.hits == wanted
    assert 0 < found.items.score < 100  # some answers are wrong on purpose
    assert found.items.score == pytest.approx(100 * sum(wanted) / 12)
    assert (found.tasks["choose"].metric, found.tasks["choose"].filter, found.batch_size) == ("acc", "none", 5)


def test_generation_is_what_greedy_decoding_by_hand_gives(local, bundled):
    (found,) = run(local, bundled, "generate")
    wanted = [float(continued(bundled, s["question"], 12).strip() == s["answer"]) for s in local.sums]
    assert found.tasks["generate"].items.hits == wanted
    assert 0 < found.items.score < 100
    assert found.tasks["generate"].filter == "strip"


@pytest.mark.parametrize("chat_template", [None, CHATML, LLAMA_3])
def test_it_is_what_the_harness_does_when_it_is_called_itself(local, chat_template):
    """Prompts, examples drawn for them, their order in the chat, and scores are those of simple_evaluate."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, chat = tiny_model("llama", max_position_embeddings=2048), chat_template is not None
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    benchmarks = load_benchmarks([Benchmark(name="choose", shots=3, limit=5)], include_path=local.directory)
    for _ in range(2):  # benchmarks can be run again: a base and an edited model get the same examples
        (found,) = run_benchmarks(model, tokenizer, benchmarks, chat=chat, batch_size=4)
        with untouched_process(LOGGER):
            theirs = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
                tasks=["choose"],
                num_fewshot=3,
                limit=5,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=0,
                task_manager=TaskManager(include_path=local.directory, include_defaults=False),
            )
        samples = theirs["samples"]["choose"]
        assert found.tasks["choose"].documents == tuple(f"{s['doc_hash']} {s['prompt_hash']}" for s in samples)
        assert found.tasks["choose"].items.hits == [s["acc"] for s in samples]
        assert found.tasks["choose"].shots == 3
        prompt = samples[0]["arguments"][0][0]
        turns = {None: 0, CHATML: prompt.count("<|im_start|>user"), LLAMA_3: prompt.count("user<|end_header_id|>")}
        assert turns[chat_template] == (4 if chat else 0)


def test_a_prompt_in_a_chat_is_our_own(local, monkeypatch):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    (benchmark,) = loaded(local, "choose", limit=1)
    run_benchmarks(tiny_model("llama"), tokenizer, [benchmark], chat=True, batch_size=2)
    (context, continuation) = benchmark.tasks["choose"].instances[0].args
    assert context == Prompter(tokenizer, chat="on").text(local.docs[0]["question"])
    assert continuation == "true"


def test_an_edit_that_reverses_the_logits_reverses_the_answers(local, bundled):
    """Of two choices of one token each, the other one is then the likelier."""
    there = loaded(local, "choose")
    (base,) = run_benchmarks(bundled.model, bundled.tokenizer, there, chat=False, batch_size=5)
    with torch.no_grad():
        bundled.model.model.norm.weight.neg_()
    (edited,) = run_benchmarks(bundled.model, bundled.tokenizer, there, chat=False, batch_size=5)
    assert edited.items.hits == [1 - hit for hit in base.items.hits]
    found = edited.less(base)
    assert found.value == pytest.approx(100 - 2 * base.items.score)
    assert found.low < found.value < found.high


def test_groups_are_means_weighted_by_size_as_the_harness_has_them(local, bundled):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (both,) = run(local, bundled, "both")
    with untouched_process(LOGGER):
        manager = TaskManager(include_path=local.directory, include_defaults=False)
        lm = HFLM(pretrained=bundled.model, tokenizer=bundled.tokenizer, batch_size=5)
        theirs = evaluate(lm, manager.load(["both"]), bootstrap_iters=0)
    assert list(both.tasks) == ["choose", "few"]
    assert [len(task.items.hits) for task in both.tasks.values()] == [12, 4]
    assert both.items.score / 100 == pytest.approx(theirs["groups"]["both"]["acc,none"])
    by_task = [task.items.score for task in both.tasks.values()]
    assert both.items.score != pytest.approx(sum(by_task) / 2)


@pytest.mark.parametrize("name", ["mine", "apart"])
def test_tags_and_groups_without_a_score_are_their_tasks(local, bundled, name):
    assert [found.name for found in run(local, bundled, name)] == ["choose", "few"]


def test_a_task_that_comes_twice_is_refused(local):
    assert "task 'few' is named twice, by itself and with others" in refused(local, "few,mine")


def test_fractions_and_lists_are_counted(local, bundled):
    local("share", as_metric("share"))
    local("parts", as_metric("parts", "!function functions.flat_mean"))
    share, parts = run(local, bundled, "share,parts")
    rights = [doc["right"] for doc in local.docs]
    assert share.items.hits == [0.25 * right for right in rights]
    assert parts.items.hits == [1 + right for right in rights]
    assert set(parts.items.counts) == {2}


def test_the_metric_of_a_task_is_the_one_that_is_written_down(local, bundled, monkeypatch):
    monkeypatch.setitem(SCORES, "choose", ("acc_norm", "none"))
    (found,) = run(local, bundled, "choose")
    assert found.tasks["choose"].metric == "acc_norm"


def test_a_limit_takes_the_first_documents(local, bundled):
    (every,), (some,) = run(local, bundled, "choose"), run(local, bundled, "choose", limit=5)
    assert some.items.hits == every.items.hits[:5]
    assert some.tasks["choose"].documents == every.tasks["choose"].documents[:5]


def test_what_is_done_is_told(local, bundled):
    told = []
    run(local, bundled, "few,generate", limit=2, progress=lambda *step: told.append(step))
    assert [step for step in told if step[1] == step[2]] == [
        ("few: prompts", 2, 2),
        ("few: tokenizing inputs", 4, 4),
        ("few: loglikelihood requests", 4, 4),
        ("generate: prompts", 2, 2),
        ("generate: generate_until requests", 2, 2),
    ]


# --- how many rows at once --------------------------------------------------------------------------------------------
def test_a_batch_is_halved_where_memory_runs_out(local, bundled, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    def small(self, rows, *given, **options):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, rows, *given, **options)

    (wanted,), whole = run(local, bundled, "choose"), HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", small)
    (found,) = run(local, bundled, "choose", batch_size=8)
    assert found.batch_size == 2
    assert found.items.hits == wanted.items.hits


def test_no_memory_for_a_single_row_is_said(local, bundled, monkeypatch):
    def never(self, *given, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._model_call", never)
    with pytest.raises(ModelError, match="no memory for a single row of task 'choose'"):
        run(local, bundled, "choose")


def test_a_batch_is_what_half_of_the_free_memory_holds(bundled, monkeypatch):
    """512 positions of 2,560 logits, three times in float32: 15.7 MB a row."""
    for free, rows in ((1e12, 64), (2 * 15.8e6 * 20, 16), (2 * 15.8e6 * 16, 16), (1e6, 1)):
        monkeypatch.setattr("crispedit.harness.free_memory", lambda device, free=free: int(free))
        assert rows_at_once(bundled.model) == rows


# --- nothing is left behind -------------------------------------------------------------------------------------------
def apart(model):
    """Makes the head of a tied model a matrix of its own, edited."""
    head = torch.nn.Parameter(-model.model.embed_tokens.weight.detach(), requires_grad=False)
    model.lm_head.weight = head
    return head


def test_the_harness_destroys_an_edited_head_and_we_do_not_let_it(local, bundled):
    """What HFLM's tie_weights() does where the configuration says that embedding and head are tied.

    -E in place of E as the head turns the answers of two choices round; tied again, they are the base model's.
    """
    from lm_eval.models.huggingface import HFLM

    there = loaded(local, "choose")
    (base,) = run_benchmarks(bundled.model, bundled.tokenizer, there, chat=False, batch_size=5)
    head = apart(bundled.model)
    (edited,) = run_benchmarks(bundled.model, bundled.tokenizer, there, chat=False, batch_size=5)
    assert bundled.model.lm_head.weight is head
    assert edited.items.hits == [1 - hit for hit in base.items.hits]
    with untouched_process(LOGGER):
        HFLM(pretrained=bundled.model, tokenizer=bundled.tokenizer)
    assert bundled.model.lm_head.weight is bundled.model.model.embed_tokens.weight


def test_the_harness_destroys_a_head_that_transformers_had_kept(tmp_path, bundled):
    """A directory with both matrices: from_pretrained sees that they differ, and keeps both; HFLM ties them."""
    from lm_eval.models.huggingface import HFLM
    from safetensors.torch import save_file

    apart(bundled.model)
    bundled.model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in bundled.model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    bundled.tokenizer.save_pretrained(tmp_path)
    read = load_model(str(tmp_path)).model
    assert torch.equal(read.lm_head.weight, state["lm_head.weight"])
    with untouched_process(LOGGER):
        HFLM(pretrained=read, tokenizer=bundled.tokenizer)
    assert not torch.equal(read.lm_head.weight, state["lm_head.weight"])


def test_the_harness_leaves_a_model_alone_that_says_it_is_not_tied():
    from lm_eval.models.huggingface import HFLM

    model = tiny_model("llama", tie_word_embeddings=False)
    head = model.lm_head.weight
    with untouched_process(LOGGER):
        HFLM(pretrained=model, tokenizer=tiny_tokenizer())
    assert model.lm_head.weight is head


def test_nothing_is_left_behind(local, bundled, capsys):
    model, tokenizer = bundled.model, bundled.tokenizer
    model.train().model.layers[3].eval()
    model.model.norm.weight.requires_grad_(False)
    logs = [logging.getLogger(), logging.getLogger(LOGGER)]

    def now():
        return {
            "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
            "modes": [module.training for module in model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "attributes": sorted(vars(model)),
            "config": (model.config.to_dict(), model.generation_config.to_dict()),
            "tokenizer": (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer)),
            "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            "environment": dict(os.environ),
            "logging": [(log.level, list(log.handlers), log.propagate, log.disabled) for log in logs],
            "bars": sys.modules["lm_eval.models.huggingface"].tqdm,
            "threads": (torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        }

    run(local, bundled, "few")  # imports are not undone
    capsys.readouterr()
    before = now()
    run(local, bundled, "choose,generate", limit=3)
    after = now()
    weights = before.pop("weights"), after.pop("weights")
    assert after == before
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert capsys.readouterr() == ("", "")


# --- what cannot be run -----------------------------------------------------------------------------------------------
def refused(local, names: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(local, names)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tasks_that_cannot_be_measured_are_refused(local):
    kind = "output_type: loglikelihood_rolling\ndoc_to_text: question\ndoc_to_target: question\n"
    local("perplexity", "metric_list:\n  - {metric: word_perplexity}", kind=kind)
    assert "'perplexity' measures loss on texts; give texts by --texts" in refused(local, "perplexity")
    local("unsafe", "unsafe_code: true")
    assert "'unsafe' runs code that the model writes" in refused(local, "unsafe")
    local("pictures", "doc_to_image: question")
    assert "'pictures' asks about images or sounds" in refused(local, "pictures")


def test_data_that_cannot_be_reached_are_named(local):
    local("gone", "")
    (local.directory / "gone.jsonl").unlink()
    assert refused(local, "gone").startswith("the data of task 'gone' cannot be reached (")
    config = "task: far\ndataset_path: nobody/nothing\ntest_split: test\n" + CHOOSING
    (local.directory / "far.yaml").write_text(config)
    assert refused(local, "far").startswith("the data of task 'far' cannot be reached (")


def test_tasks_that_cannot_be_loaded_say_why(local):
    local("broken", "metric_list:\n  - {aggregation: mean}")
    (local.directory / "needy.py").write_text("import no_such_package")
    local("needy", "process_results: !function needy.score")
    assert "task 'broken' cannot be loaded (" in refused(local, "broken")
    assert "task 'needy' needs more (No module named 'no_such_package')" in refused(local, "needy")
    (local.directory / "no_dir").write_text("")
    with pytest.raises(ConfigError, match="no_dir' is no directory"):
        load_benchmarks([Benchmark(name="few")], include_path=local.directory / "no_dir")


@pytest.mark.parametrize(("metric", "settings"), [("best", ("mean", "false")), ("share", ("median",))])
def test_scores_that_can_be_no_share_of_right_answers_are_refused_before_they_are_computed(local, metric, settings):
    local("odd", as_metric(metric, *settings))
    assert f"the {metric} of task 'odd' is no share of right answers" in refused(local, "odd")


@pytest.mark.parametrize(
    ("metric", "aggregation", "said"),
    [
        ("pair", "!function functions.first", "is no share of right answers"),
        ("wide", "mean", "is no share of right answers"),
        ("share", "!function functions.first", r"is no mean over its documents \(0.\d* is, 0.5 is the harness's\)"),
    ],
)
def test_scores_that_are_no_share_of_right_answers_are_refused(local, bundled, metric, aggregation, said):
    local("odd", as_metric(metric, aggregation))
    with pytest.raises(ConfigError, match=f"the {metric} of task 'odd' {said}"):
        run(local, bundled, "odd")


def test_answers_longer_than_the_context_are_refused(local, bundled):
    with pytest.raises(ModelError, match="'long' may have 600 tokens, but the model's context is 512"):
        run(local, bundled, "long")


# --- the harness's own tasks ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def registry():
    """All tasks of the installed harness; reading them takes long, so it is done once."""
    from lm_eval.tasks import TaskManager

    with untouched_process(LOGGER):
        return TaskManager(include_path=[PACK])


@pytest.fixture
def known(registry, monkeypatch):
    from lm_eval.tasks import TaskManager

    def manager(include_defaults=True, **options):
        return registry if include_defaults else TaskManager(include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


def test_an_unknown_task_is_refused_with_the_nearest_name(known):
    with pytest.raises(ConfigError, match=r"has no task 'arc_challeng' \(did you mean 'arc_challenge'\?\)"):
        load_benchmarks(parse_benchmarks("crispedit_zsre,arc_challeng"))


QUESTION = {
    "question": "Which is it?",
    "answer": "It is 3. #### 3",
    "key": 1,
    "prompt": "Say it.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
    "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    "subject": "anatomy",
}
OF_ARC = {"choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"}
OF_MMLU = {"choices": ["a", "b", "c", "d"], "answer": 1}


def made_up(path, name=None, **_):
    """Documents with the fields of the real ones: there is no network."""
    from datasets import Dataset

    fields = {**QUESTION, **(OF_ARC if "arc" in path else OF_MMLU if "mmlu" in path else {})}
    split = Dataset.from_list([{**fields, "question": f"{number}. Which is it?"} for number in range(300)])
    return dict.fromkeys(("train", "validation", "dev", "test"), split)


def test_the_papers_plan_is_what_the_harness_gets(known, monkeypatch):
    """Its own tasks, found by name in its own list, with what they will be asked with (baselines.md, 11.4)."""
    from lm_eval.evaluator_utils import get_sample_size
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr("datasets.load_dataset", made_up)
    benchmarks = load_benchmarks(parse_benchmarks("paper"))
    tasks = {b.name: [task.get_config("num_fewshot") for task in b.tasks.values()] for b in benchmarks}
    assert tasks == {
        "ifeval": [0],
        "truthfulqa_mc2": [0],
        "mmlu": [5] * 57,
        "arc_challenge": [25],
        "gsm8k_cot": [8],
    }
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    with untouched_process(LOGGER):
        lm = HFLM(pretrained=tiny_model("llama"), tokenizer=tokenizer, batch_size=1)
        for benchmark in benchmarks:
            given = arguments(lm, benchmark, chat=True)
            assert (given["limit"], given["apply_chat_template"], given["fewshot_as_multiturn"]) == (200, True, True)
            assert {get_sample_size(task, given["limit"]) for task in benchmark.tasks.values()} == {200}
            for name, task in list(benchmark.tasks.items())[:2]:
                task.set_fewshot_seed(1234)
                task.build_all_requests(
                    limit=2, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lm.apply_chat_template
                )
                shots = task.get_config("num_fewshot")
                assert task.instances[0].args[0].count("<|im_start|>user") == shots + 1, name


def test_tokens_are_padded_on_the_left(bundled):
    from lm_eval.models.huggingface import HFLM

    with untouched_process(LOGGER):
        lm = HFLM(pretrained=tiny_model("llama"), tokenizer=tiny_tokenizer())
        ids, mask = lm.tok_batch_encode(["a", "abc"])
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert ids[0, :2].tolist() == [0, 0]


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command_puts_tasks_beside_the_base_model(local, tmp_path, capsys, monkeypatch):
    prose = TaskItems(hits=[1], counts=[2])  # the bundled world's own tasks take long
    monkeypatch.setattr("crispedit.evaluation.bundled_items", lambda *given, **options: {"prose": prose})
    monkeypatch.setattr("crispedit.evaluate_job._drift_texts", lambda *given: None)
    (tmp_path / "edits.json").write_text('[{"prompt": "What is 9 minus 1?", "target": "8"}]')
    given = [
        "evaluate",
        "bundled",
        str(tmp_path / "edits.json"),
        "--base",
        "bundled",
        "--json",
        str(tmp_path / "e.json"),
    ]
    assert (
        cli._run([*given, "--tasks", "both,generate", "--include-path", str(local.directory), "--task-limit", "4"]) == 0
    )
    said = capsys.readouterr().out
    assert "less the base model, with 95 % intervals" in said
    assert "no loss found" in said
    result = json.loads((tmp_path / "e.json").read_text())
    assert {"prose", "both", "generate"} == set(result["capability"]["tasks"])
    both = result["harness"]["tasks"]["both"]
    assert both["score"] == both["base"] == result["capability"]["tasks"]["both"]
    assert both["difference"]["value"] == 0
    assert (both["documents"], both["limit"], both["chat"]) == (8, 4, False)
    assert set(both["tasks"]) == {"choose", "few"}
