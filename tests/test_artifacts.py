"""Directories and JSON files are written whole or not at all."""

import pytest

from crispedit.artifacts import check_space, check_writable, read_json, write_directory, write_json
from crispedit.errors import ArtifactError


def test_a_directory_appears_only_when_it_is_whole(tmp_path):
    with write_directory(tmp_path / "a" / "new") as building:
        (building / "file").write_text("x")
        assert not (tmp_path / "a" / "new").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_directory_that_failed(tmp_path, error):
    def fail():
        with write_directory(tmp_path / "new") as building:
            (building / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_until_the_new_one_is_whole(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "mine").write_text("x")
    with pytest.raises(ArtifactError, match="not empty"):
        check_writable(old)
    with pytest.raises(RuntimeError), write_directory(old, overwrite=True):
        raise RuntimeError
    assert (old / "mine").exists()
    with write_directory(old, overwrite=True) as building:
        (building / "new").write_text("y")
    assert [p.name for p in old.iterdir()] == ["new"]


def test_too_little_space_says_how_much(tmp_path):
    check_space(tmp_path / "new", 1)
    with pytest.raises(ArtifactError, match=r"it needs 1100000000\.00 GB and \d+\.\d\d GB are free"):
        check_space(tmp_path / "new", 10**18)


def test_json_round_trip_and_broken_json(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "deep" / "a.json") == {"é": [1, None]}
    assert len(list((tmp_path / "deep").iterdir())) == 1
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_json(tmp_path / "c.json")
