"""What can befall the directory of a session, through the command line: one line says it, and nothing else is lost."""

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from builders import long_texts
from crispedit import cli
from crispedit.curvature import Curvature
from crispedit.models import load_model
from crispedit.patch import Patch
from crispedit.session import Session
from crispedit.store import INDEX, Store
from families import tiny_model, tiny_tokenizer

SETTINGS = {"lr": 0.02, "epochs": 4, "energy": 0.5}


def run(*arguments):
    return cli._run(["session", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A session of three rounds, a fourth file of edits, and the patches to its rounds from the base."""
    place = tmp_path_factory.mktemp("made")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    loaded = load_model(str(place / "base"))
    curvature = Curvature.estimate(loaded.model, loaded.tokenizer, long_texts(), layers=[1])
    Session.create(place / "s", loaded, curvature, settings=SETTINGS, layers=[1])
    for number in range(1, 5):
        rows = [{"prompt": f"Number {number}{i} is", "target": f"{number}{i}x"} for i in range(3)]
        (place / f"{number}.json").write_text(json.dumps(rows))
    for number in (1, 2, 3):
        assert run("edit", place / "s", place / f"{number}.json", "--keep-edits") == 0
        assert run("export", place / "s", "--patch", "--out", place / f"{number}.safetensors") == 0
    return place


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys):
    """What was said on stderr by the last command."""
    return capsys.readouterr().err


def damage(path, how):
    content = path.read_bytes()
    place = 2 * len(content) // 3
    path.write_bytes(content[:place] + (bytes([content[place] ^ 1]) + content[place + 1 :] if how == "flip" else b""))


def loads(work):
    """The rounds whose patch from the base can be had, and is what it was."""
    found = []
    for number in (1, 2, 3):
        if run("export", "s", "--round", number, "--patch", "--out", "again.safetensors", "--overwrite") == 0:
            again, known = (Patch.read(work / name) for name in ("again.safetensors", f"{number}.safetensors"))
            assert again.after == known.after
            found.append(number)
    return found


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize(
    ("file", "refused"),
    [
        ("curvature/factors.safetensors", ["edit", "s", "4.json"]),
        ("curvature/curvature.json", ["edit", "s", "4.json"]),
        ("rounds/0003-*/curvature/factors.safetensors", ["edit", "s", "4.json"]),
        ("rounds/0003-*/curvature/curvature.json", ["edit", "s", "4.json"]),
        ("rounds/0002-*/edits.json", ["revert", "s", "--round", "1"]),
    ],
)
def test_a_damaged_file_is_named_and_every_round_still_loads(work, capsys, file, refused, how):
    (path,) = (work / "s").glob(file)
    damage(path, how)
    capsys.readouterr()
    assert run(*refused) == 2
    line = f"crispedit: '{path.relative_to(work)}' is damaged: its checksum is another; nothing else was touched\n"
    assert said(capsys) == line
    assert loads(work) == [1, 2, 3]
    assert run("log", "s") == 0
    capsys.readouterr()
    assert run("status", "s", "--verify") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"crispedit: 1 files are damaged or missing: '{path.relative_to(work)}' is damaged")
    with Store.reading(work / "s") as store:
        assert len(store.rounds()) == 3


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("file", ["heads/*", "rounds/0001-*/patch.safetensors", "rounds/0003-*/patch.safetensors"])
def test_of_damaged_patches_one_at_a_time_can_be_done_without(work, capsys, file, how):
    """A round is reached from the newest, or from the base."""
    (path,) = (work / "s").glob(file)
    damage(path, how)
    capsys.readouterr()
    assert loads(work) == [1, 2, 3]
    assert run("status", "s", "--verify") == 2
    assert str(path.relative_to(work)) in said(capsys)
    if file == "heads/*":
        assert run("edit", "s", "4.json") == 0
        assert run("status", "s", "--verify") == 0  # there is a new one


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_round_that_two_damaged_files_hide_is_refused_and_the_others_load(work, capsys, how):
    for file in ("heads/*", "rounds/0002-*/patch.safetensors"):
        (path,) = (work / "s").glob(file)
        damage(path, how)
    capsys.readouterr()
    assert loads(work) == [1]
    assert said(capsys).count(f"crispedit: '{path.relative_to(work)}' is damaged") == 2  # of rounds 2 and 3


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_index_is_named_and_comes_back_whole(work, capsys, how):
    index = work / "s" / INDEX
    good = index.read_bytes()
    damage(index, how)
    capsys.readouterr()
    for command in (["log", "s"], ["status", "s"], ["edit", "s", "4.json"], ["revert", "s", "--to", "1"]):
        assert run(*command) == 2
        line = said(capsys)
        assert f"'s/{INDEX}'" in line
        assert line.count("\n") == 1
    index.write_bytes(good)
    assert run("status", "s", "--verify") == 0
    assert loads(work) == [1, 2, 3]


def _hold(directory, held, done):
    with Store.writing(directory):
        held.set()
        done.wait()


def test_a_second_process_is_refused_and_may_look(work, capsys):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(work / "s", held, done))
    other.start()
    held.wait()
    capsys.readouterr()
    try:
        for command in (["edit", "s", "4.json"], ["revert", "s", "--to", "1"], ["revert", "s", "--round", "1"]):
            assert run(*command) == 2
            assert said(capsys) == "crispedit: another process is writing to 's'; wait until it is done\n"
        assert run("status", "s") == run("log", "s") == 0
    finally:
        done.set()
        other.join()
    assert run("edit", "s", "4.json") == 0


@contextmanager
def no_file_larger_than(num_bytes):
    """As on a full disk, writing fails; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "file"), [(5_000, "patch"), (8_000, "factors"), (20_000, "session.db")])
def test_on_a_full_disk_a_round_is_refused_and_the_session_is_as_it_was(work, capsys, size, file):
    """Whichever file is the first that does not fit."""
    capsys.readouterr()
    with no_file_larger_than(size):
        assert run("edit", "s", "4.json", "--keep-edits") == 2
    line = said(capsys)
    assert line.startswith("crispedit: ")
    assert file in line
    assert line.count("\n") == 1
    with Store.writing(work / "s") as store:
        assert len(store.rounds()) == 3
        assert store.damaged() == store.strays() == []
    assert loads(work) == [1, 2, 3]


def test_a_session_that_does_not_fit_is_not_begun(work, capsys):
    capsys.readouterr()
    there = sorted(work.iterdir())
    with Session.reading(work / "s") as session:
        session.curvature(0).save("c")
    for size in (1, 4096, 20_000):
        with no_file_larger_than(size):
            assert run("init", work / "base", "t", "--layers", "1", "--curvature", "c") == 2
        line = said(capsys)
        assert line.startswith("crispedit: cannot write")
        assert line.count("\n") == 1
    assert sorted(work.iterdir()) == sorted([*there, work / "c"])


@contextmanager
def only_readable(directory):
    """By whoever runs the tests: root, who may write anywhere, is somebody else meanwhile."""
    folders = [path for path in [directory, *directory.rglob("*")] if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


def test_a_directory_that_cannot_be_written_is_read(work, capsys, monkeypatch):
    with tempfile.TemporaryDirectory() as place:  # pytest's own are closed to others
        os.chmod(place, 0o755)
        shutil.copytree(work / "s", Path(place) / "s")
        shutil.copy(work / "4.json", place)
        monkeypatch.chdir(place)
        capsys.readouterr()
        with only_readable(Path(place) / "s"):
            for command in (["edit", "s", "4.json"], ["revert", "s", "--to", "1"]):
                assert run(*command) == 2
                assert said(capsys) == "crispedit: 's' cannot be written to; it can only be read\n"
            assert run("log", "s") == run("status", "s") == 0
        monkeypatch.chdir(work)
