"""Write folders and files completely or not at all.

No communication: in a group of processes, one rank prepares and commits a folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_oprd.types import UserError

_HUB_PART = re.compile(r"\w[\w.-]*")  # of a name on the Hugging Face hub: organisation/model
COPY_FILE_AGAIN = "copy the file again"
LFS_START = b"version https://git-lfs"
GET_LFS_FILE = "get the file with `git lfs pull`"
# Errors that a user can act on. Broken pipes, time-outs and other kinds of OSError are not among them.
DISK_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def partial_of(target: str | Path) -> Path:
    """Return `<target>.partial`, in which a folder is written until it is complete.

    The path is on the same file system as the target, so that the rename is atomic.
    """
    target = Path(target)
    return target.with_name(target.name + ".partial")


def check_new_folder(target: str | Path) -> None:
    """Raise UserError if `target` is a file or a folder that is not empty."""
    target = Path(target)
    with explain_os_errors(target):
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{target} exists and is not empty; name a new folder")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} exists and is not a folder; name a new folder")


def check_writable(folder: str | Path) -> None:
    """Raise UserError if `folder` cannot be created or written to, as far as permissions tell."""
    existing = Path(folder).absolute()
    with explain_os_errors(folder):
        while not existing.exists() and not existing.is_symlink():
            existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"cannot write {folder}: {existing} is not a folder; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write {folder}: {existing} is read-only; name another folder or change its permissions"
        )


def prepare_partial(target: str | Path) -> Path:
    """Create an empty `<target>.partial` and return its path. Remove an old one, left by a process that died.

    Raises UserError if the target is not empty or its parent cannot be written to.
    """
    check_new_folder(target)
    partial = partial_of(target)
    with explain_os_errors(partial):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


def commit_partial(target: str | Path) -> None:
    """Force `<target>.partial` to the disk and rename it to `target`. Raises UserError if the disk refuses."""
    target, partial = Path(target), partial_of(target)
    with explain_os_errors(target):
        fsync_tree(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        _fsync(target.absolute().parent)


def discard_partial(target: str | Path) -> None:
    """Remove `<target>.partial` if it exists."""
    shutil.rmtree(partial_of(target), ignore_errors=True)


@contextlib.contextmanager
def write_folder(target: str | Path) -> Iterator[Path]:
    """Yield a folder to fill. It becomes `target` when the block ends and is removed if the block raises.

    Raises UserError for a target that is not empty and for a full, read-only or forbidden disk.
    """
    partial = prepare_partial(target)
    try:
        with explain_os_errors(partial):
            yield partial
        commit_partial(target)
    except BaseException:
        discard_partial(target)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Replace a UTF-8 file in one step. Readers see the old text or the new text, even after a power cut."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explain_os_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _fsync(path.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON document as `write_text` does, indented, with keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_lfs_pointer(path: Path) -> bool:
    """Return True for a small text file that a clone without Git LFS has in place of a large file."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_START)) == LFS_START
    except OSError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises UserError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        if is_lfs_pointer(path):
            raise UserError(f"{path} is a pointer of Git LFS", GET_LFS_FILE) from None
        raise UserError(f"{path} is not valid JSON: {error}", COPY_FILE_AGAIN) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(values).__name__}", COPY_FILE_AGAIN)
    return values


def check_model_folder(path: str | Path) -> None:
    """Raise UserError if a model path is not a folder. For a name of the Hugging Face hub, say how to download it."""
    if Path(path).is_dir():
        return
    parts = Path(path).parts
    is_hub_name = len(parts) == 2 and _HUB_PART.fullmatch(parts[0]) and _HUB_PART.fullmatch(parts[1])
    if is_hub_name and parts[0] != "models" and not Path(parts[0]).exists():  # recipes download to models/
        folder = f"models/{parts[1]}"
        raise UserError(
            f"{path} is not a folder; if it is a model of the Hugging Face hub, download it with `hf download {path} "
            f"--local-dir {folder}` and use {folder}"
        )
    raise UserError(
        f"{path} is not a folder with a Hugging Face model; name one with a config.json. A recipe in examples/ begins "
        "with the downloads of its models"
    )


def fsync_tree(folder: str | Path) -> None:
    """Force every file and folder below `folder` to the disk. Raises OSError."""
    for root, _, files in os.walk(folder):
        for file in files:
            _fsync(Path(root, file))
        _fsync(Path(root))


@contextlib.contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn a disk error of the block into a UserError that names the file, even if a library wrapped the error."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        cause = find_disk_error(error)
        if cause is not None:
            raise UserError(f"cannot write {_filename(cause) or path}: {cause.strerror}{disk_advice(cause)}") from None
        # safetensors and torch's zip writer report a failed write without the OSError.
        text = str(error)
        if "PytorchStreamWriter" in text or "unexpected pos" in text:
            raise UserError(f"cannot write {path}: the disk did not take all of it; free some space") from None
        if "(os error" in text:
            raise UserError(
                f"cannot write {path}: {text.splitlines()[0]}; free some space or name another folder"
            ) from None
        raise


def find_disk_error(error: BaseException | None) -> OSError | None:
    """Return the disk error behind an exception, or None.

    Follows the causes of the exception and the failures of ranks that torch's checkpointing collects.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error if error.errno in DISK_ERRORS else None
        # torch.distributed.checkpoint's CheckpointException: {rank: (exception, traceback)}
        failures = getattr(error, "failures", None)
        error = next(iter(failures.values()))[0] if isinstance(failures, dict) and failures else error.__cause__
    return None


def disk_advice(error: OSError) -> str:
    """Return what to do about a disk error, as the end of a message, or ''."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; free some space or name another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; name another folder or change its permissions"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return "; check the path"
    return "; check the disk" if error.errno == errno.EIO else ""


def _filename(error: OSError) -> str | None:
    return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
