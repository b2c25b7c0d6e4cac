"""Folders and files appear completely or not at all, and a disk error is one line."""

import errno
import os

import pytest

from megatron_oprd.runtime.cli import ArgumentParser, run_command
from megatron_oprd.runtime.files import commit_partial, prepare_partial, write_folder, write_text
from megatron_oprd.types import ServiceFailed, UserError


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "out"
    with write_folder(target) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("x")
        assert not target.exists()
    assert (target / "a" / "b").read_text() == "x"
    assert os.listdir(target.parent) == ["out"]


def test_an_error_leaves_no_files(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "a").write_text("x"))])
def test_an_existing_target_is_not_overwritten(make, tmp_path):
    make(tmp_path / "out")
    with pytest.raises(UserError, match="out exists and is not"), write_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_target_and_an_old_partial_folder_are_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("x")
    (prepare_partial(tmp_path / "out") / "a").write_text("x")
    commit_partial(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["a"]


def test_files_are_synced_before_the_folder_is_renamed(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    with write_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    partial = str(tmp_path / "out.partial")
    assert synced == [f"{partial}/a", partial, str(tmp_path)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_error_names_the_path(code, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"cannot write .*out: {os.strerror(code)}"), write_folder(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match=r"cannot write .*state\.json"):
        write_text(tmp_path / "state.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_error_that_a_library_wrapped_is_found(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "/disk/file")
    with pytest.raises(UserError, match="cannot write /disk/file: No space left"), write_folder(tmp_path / "a"):
        try:
            raise full
        except OSError as error:
            raise RuntimeError("wrapped") from error
    collected = RuntimeError("checkpointing failed")
    collected.failures = {1: (full, "its traceback")}
    with pytest.raises(UserError, match="cannot write /disk/file: No space left"), write_folder(tmp_path / "a"):
        raise collected


def test_other_errors_are_not_changed(tmp_path):
    for error in (BrokenPipeError(errno.EPIPE, "pipe"), ValueError("x")):
        with pytest.raises(type(error)), write_folder(tmp_path / "a"):
            raise error


def test_text_is_replaced_in_one_step(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (raises(UserError("bad\nthing")), 2, "error: bad thing\n"),
        (
            raises(OSError(errno.ENOSPC, "No space left on device", "/x")),
            2,
            "error: /x: No space left on device; free some space or name another folder\n",
        ),
        (raises(KeyboardInterrupt()), 130, ""),
        (raises(ServiceFailed("a server:\nis gone")), 1, "error: a server: is gone\n"),
        (
            lambda: ArgumentParser(prog="x").parse_args(["--no"]),
            2,
            "error: unknown option --no; options: --help\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_its_exit_code(main, code, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == message


def test_only_rank_zero_prints_the_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        run_command(raises(UserError("bad")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_an_internal_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raises(ZeroDivisionError()))
