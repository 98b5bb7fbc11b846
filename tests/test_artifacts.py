"""Directories and JSON files are written whole or not at all."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from crispedit.artifacts import check_space, check_writable, read_json, write_directory, write_json, write_tensors
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


def test_others_may_read_what_is_written_as_far_as_the_umask_lets_them(tmp_path):
    """safetensors leaves its files for their owner alone: a server under another account could not load a model."""
    earlier = os.umask(0o027)
    try:
        with write_directory(tmp_path / "model") as building:
            (building / "deep").mkdir()
            save_file({"a": torch.zeros(2)}, building / "deep" / "model.safetensors")
        write_tensors(tmp_path / "patch.safetensors", {"a": torch.zeros(2)}, {}, "a patch")
    finally:
        os.umask(earlier)
    for file in ("model/deep/model.safetensors", "patch.safetensors"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


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


def test_what_a_killed_process_left_is_removed_and_said(tmp_path, caplog):
    killed = """
import os, signal, sys
from pathlib import Path
from crispedit.artifacts import write_directory
with write_directory(Path(sys.argv[1])) as building:
    (building / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    directory = tmp_path / "new"
    (tmp_path / ".new-backup").mkdir()
    for name in ("new", "new", "newer"):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / name)], check=False)
    (newer,) = (path for path in tmp_path.iterdir() if path.name.startswith(".newer."))
    with caplog.at_level(logging.INFO, "crispedit"), write_directory(directory):
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(".new.")]) == 1
        with write_directory(directory):  # another process, at the same time
            assert len([path for path in tmp_path.iterdir() if path.name.startswith(".new.")]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"new", ".new-backup", newer.name}
    (record,) = caplog.records  # the first one's directory was removed by the second, which said so itself
    assert record.getMessage().startswith(f"an interrupted command had left {tmp_path / '.new.building-'}")
