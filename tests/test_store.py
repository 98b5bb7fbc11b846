"""The directory of rounds: what counts, what is tidied away, what is refused, and what a kill at any moment leaves."""

import multiprocessing
import os
import signal
import sqlite3
import time
from contextlib import suppress

import pytest

from crispedit.errors import ArtifactError
from crispedit.store import HEADS, INDEX, ROUNDS, Store


@pytest.fixture
def directory(tmp_path):
    Store.create(tmp_path / "store", {"model": "m"}, lambda path: (path / "base.txt").write_text("base"))
    return tmp_path / "store"


def add(store, text):
    """A round with two files, one in a directory, and a head."""
    with store.new_round() as building:
        (building / "one.txt").write_text(text)
        (building / "deep").mkdir()
        (building / "deep" / "two.txt").write_text(text * 2)
        head = store.head_path()
        head.write_text(f"head of {text}")
        return store.commit(building, {"text": text}, head=head, values={"last": text}, entry=f"round {text}")


def files(directory):
    """All files but SQLite's journal, which a kill may leave and the next transaction uses."""
    found = [p for p in directory.rglob("*") if p.is_file() and not p.name.endswith("-journal")]
    return sorted(p.relative_to(directory).as_posix() for p in found)


def test_rounds_are_kept_and_taken_back(directory):
    with Store.writing(directory) as store:
        assert store.rounds() == []
        assert store.head is None
        assert [add(store, text) for text in "abc"] == [1, 2, 3]
    with Store.reading(directory) as store:
        assert store.about == {"model": "m"}
        assert [record["text"] for record in store.rounds()] == ["a", "b", "c"]
        assert store.path(2, "deep/two.txt").read_text() == "bb"
        assert store.head.read_text() == "head of c"
        assert store.value("last") == "c"
        assert [entry for _, entry in store.entries()] == ["created", "round a", "round b", "round c"]
        assert store.num_bytes() == 4 + 3 * 3 + len("head of c")
        assert len(list((directory / HEADS).iterdir())) == 1  # only the newest
    with Store.writing(directory) as store:
        head = store.head_path()
        head.write_text("head of a")
        store.rewind(1, head=head, values={"last": "a"}, entry="back to 1")
        assert [record["text"] for record in store.rounds()] == ["a"]
        assert store.head.read_text() == "head of a"
        with pytest.raises(ArtifactError, match="has no round 2"):
            store.path(2, "one.txt")
        assert add(store, "d") == 2
        store.rewind(0, head=None, values={}, entry="back to the base")
        assert store.rounds() == []
        assert store.head is None
    assert files(directory) == ["base.txt", INDEX, "session.lock"]


def test_what_does_not_count_is_tidied_away_and_named(directory):
    with Store.writing(directory) as store:
        add(store, "a")
    (directory / ROUNDS / ".half").mkdir()
    (directory / ROUNDS / "0002-renamed-and-never-committed").mkdir()
    (directory / HEADS / "new.safetensors").write_text("x")
    before = files(directory)
    with Store.reading(directory) as store:
        assert len(store.rounds()) == 1
    assert files(directory) == before  # whoever only reads leaves it
    with Store.writing(directory) as store:
        assert store.tidied == ["heads/new.safetensors", "rounds/.half", "rounds/0002-renamed-and-never-committed"]
        assert "removed what an interrupted command had left: heads/new" in store.entries()[-1][1]
    assert len(list((directory / ROUNDS).iterdir())) == 1


def test_a_round_that_is_not_committed_leaves_nothing(directory):
    with Store.writing(directory) as store:
        with suppress(KeyboardInterrupt), store.new_round() as building:
            (building / "one.txt").write_text("x")
            raise KeyboardInterrupt
        assert store.rounds() == []
        assert list((directory / ROUNDS).iterdir()) == []


def test_a_second_writer_is_refused_and_a_reader_is_not(directory):
    with Store.writing(directory) as store:
        add(store, "a")
        with pytest.raises(ArtifactError, match="another process is writing"), Store.writing(directory):
            pass
        with Store.reading(directory) as other:
            assert len(other.rounds()) == 1
    with Store.writing(directory):
        pass


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named_and_nothing_else_is_lost(directory, damage):
    with Store.writing(directory) as store:
        add(store, "a")
        add(store, "b")
        path = store.path(1, "one.txt")
        if damage == "flip":
            path.write_text("A")
        elif damage == "cut":
            path.write_text("")
        else:
            path.unlink()
        with pytest.raises(ArtifactError, match=r"rounds/0001-\w+/one.txt' is (damaged|missing)"):
            store.path(1, "one.txt")
        (line,) = store.damaged()
        assert "one.txt" in line
        assert store.path(2, "one.txt").read_text() == "b"


def test_an_index_with_a_flipped_bit_or_a_missing_end_is_refused_or_says_the_same(directory):
    """Bits that hold nothing may flip unseen; a row that is another one, or gone, may not."""
    with Store.writing(directory) as store:
        add(store, "a")
        add(store, "b")
    index = directory / INDEX
    good, refused = index.read_bytes(), 0

    def listed():
        with Store.reading(directory) as store:
            return store.about, store.rounds(), store.entries(), store.files(), store.value("last"), store.num_bytes()

    found = listed()
    flips = [(place, 1 << place % 8) for place in range(0, len(good), 29)]
    cuts = [good[:size] for size in range(0, len(good), 1021)]
    for damaged in [*(good[:p] + bytes([good[p] ^ bit]) + good[p + 1 :] for p, bit in flips), *cuts]:
        index.write_bytes(damaged)
        try:
            same = listed() == found
        except ArtifactError as error:
            same = INDEX in str(error) or "has format" in str(error)
            refused += 1
        assert same
    assert refused > len(cuts)
    index.write_bytes(good)
    assert listed() == found
    with sqlite3.connect(index) as changed:  # what no database could know
        changed.execute("UPDATE rounds SET record = replace(record, 'a', 'c')")
    with pytest.raises(ArtifactError, match=r"session.db' is damaged: its checksum is another; the patches in"):
        listed()


def test_a_line_of_the_log_counts_like_any_row(directory):
    with Store.writing(directory) as store:
        store.log("by hand")
    with Store.reading(directory) as store:
        assert [entry for _, entry in store.entries()] == ["created", "by hand"]


def test_what_is_no_store_is_said(directory, tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="is no session; 'crispedit session init MODEL DIR' makes one"):
            Store.reading(path).__enter__()
    with pytest.raises(ArtifactError, match="not empty"):
        Store.create(directory, {})
    with sqlite3.connect(directory / INDEX) as index:
        index.execute("UPDATE about SET value = '2' WHERE name = 'format'")
    with pytest.raises(ArtifactError, match="has format 2, and this version reads 1"):
        Store.reading(directory).__enter__()
    (directory / INDEX).write_bytes(b"no database at all, but something longer than a header")
    with pytest.raises(ArtifactError, match=r"session.db' cannot be used"):
        Store.reading(directory).__enter__()


def test_a_store_that_cannot_be_filled_leaves_nothing(tmp_path):
    def fails(path):
        (path / "big").write_text("x")
        raise OSError("No space left on device")

    with pytest.raises(ArtifactError, match="No space left"):
        Store.create(tmp_path / "store", {}, fails)
    assert list(tmp_path.iterdir()) == []


def test_ten_gigabytes_are_listed_at_once_and_no_tensor_is_read(directory, monkeypatch):
    """The files have no content, and take no room; then they are not even there."""
    with monkeypatch.context() as patched, Store.writing(directory) as store:
        patched.setattr("crispedit.store._checksum", lambda path: "0" * 64)  # it would read them
        for number in range(1, 51):
            with store.new_round() as building:
                for name in ("patch", "factors"):
                    (building / f"{name}.safetensors").touch()
                    os.truncate(building / f"{name}.safetensors", 100_000_000)
                scores = {"reliability": 99.0}
                record = {
                    "number": number,
                    "edits": {"source": f"{number}.json", "count": 100},
                    "kept": True,
                    "metrics": {"after": scores, "epoch_losses": [0.123456789] * 200},
                    "drift": {"drift": 0.01},
                    "past": {str(earlier): scores for earlier in range(1, number + 1)},
                }
                store.commit(building, record, head=None, values={}, entry=f"round {number}")

    def listed():
        with Store.reading(directory) as store:
            return store.about, store.rounds(), store.entries(), store.num_bytes()

    began = time.monotonic()
    found = listed()
    assert time.monotonic() - began < 0.5
    assert len(found[1]) == 50
    assert found[3] == 10_000_000_000 + len("base")
    for path in directory.rglob("*.safetensors"):
        path.unlink()
    assert listed() == found


def _add_until_killed(directory):
    with Store.writing(directory) as store:
        for number in range(len(store.rounds()), 1000):
            if number % 7 == 6:
                head = store.head_path()
                head.write_text("back")
                store.rewind(number - 2, head=head, values={"last": "back"}, entry="rewind")
            add(store, str(number))


def test_killed_at_any_moment_the_index_and_the_files_agree(directory):
    for kill in range(12):
        process = multiprocessing.get_context("fork").Process(target=_add_until_killed, args=(directory,))
        process.start()
        time.sleep(0.03 + 0.017 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with Store.writing(directory) as store:
            assert store.damaged() == []
            rounds = store.rounds()
            for number, record in enumerate(rounds, 1):
                assert store.path(number, "one.txt").read_text() == record["text"]
            if rounds:
                assert store.head.read_text() in (f"head of {rounds[-1]['text']}", "back")
            counted = 1 + 2 * len(rounds) + (store.head is not None)
        assert len(files(directory)) == counted + 2  # index and lock
