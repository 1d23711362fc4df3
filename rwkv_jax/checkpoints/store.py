"""Checkpoints of a run, with everything needed to resume exactly. The only module that uses orbax.

`FOLDER/{step}/` holds the master weights and the optimizer state as two items, so that a reader can
load the model alone, and a `manifest` with the description of the arrays (`Metadata`) and the size
and SHA-256 of every file. It is written as `{step}.partial` and flushed, the manifest last. After
it has been read back, one rename makes it a checkpoint. A folder whose name is a number was
therefore complete once. Later damage is detected when it is read: nothing is restored that does not
match its manifest.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from rwkv_jax.checkpoints import arrays, pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.files import flush_folder, reporting_os_errors
from rwkv_jax.model.rwkv7 import Params, abstract_params
from rwkv_jax.parallel import distributed
from rwkv_jax.tracking.train_log import MiniepochLoss

# When a part of a save or a load fails, orbax raises its error, and we report it below. It also
# logs it and abandons the other parts, whose errors then appear in absl's or asyncio's log, as
# un-awaited coroutines, or from tensorstore threads whose event loop is closed.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


def _report_unraisable(error: Any, hook: Callable[[Any], object] = sys.unraisablehook) -> None:
    if str(error.exc_value) != "Event loop is closed" or error.object is not None:
        hook(error)


sys.unraisablehook = _report_unraisable

OLDEST_ORBAX = (0, 12)  # as in pyproject.toml
MANIFEST = "manifest"
_FORMAT = 1  # increment this when the format changes
_MAX_MANIFEST = 16 << 20  # bytes; the manifest of 13.3b on 1,000 processes is smaller
_T = TypeVar("_T")
_UNFINISHED = re.compile(r"\d+\.partial(\.orbax.*)?")  # folders that a killed run leaves
_POINTERS = (b"version https://git-lfs", b"/annex/objects/")
_MARGIN = 1 << 20  # bytes: slack where the sizes of arrays and of files are compared


class Unreadable(UserError):
    """The checkpoint cannot be read now, but it may be intact."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The description of a checkpoint's arrays.

    Attributes:
        model: the architecture.
        loss: mean loss so far of the miniepoch in which the checkpoint was saved.
        run: the run's identity, names and values that `train` compares; empty: a model without a
            run.
    """

    model: ModelConfig
    loss: MiniepochLoss = dataclasses.field(default_factory=MiniepochLoss)
    run: dict[str, Any] = dataclasses.field(default_factory=dict)


def require_orbax() -> None:
    """Refuses an orbax version that cannot save and restore our checkpoints.

    Raises:
        UserError: the installed orbax is older than `OLDEST_ORBAX`.
    """
    installed = importlib.metadata.version("orbax-checkpoint")
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST_ORBAX:
        wanted = ".".join(map(str, OLDEST_ORBAX))
        raise UserError(
            f"orbax-checkpoint {installed} is installed, but saving checkpoints needs {wanted} or "
            f"newer: pip install --upgrade 'orbax-checkpoint>={wanted}'"
        )


class Checkpoints:
    """The checkpoints in one folder; keeps the newest `keep` and writes one at a time.

    Only one process at a time may write to a folder; `run_folder.lock` ensures that.

    Args:
        folder: created with the first checkpoint.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder.absolute()
        self._keep = keep
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """The saved steps, newest first.

        Raises:
            UserError: the folder exists but cannot be read.
        """
        try:
            return sorted((int(path.name) for path in _numbered(self.folder)), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read: {error.strerror}") from None

    def verify(self, step: int) -> Metadata:
        """Verifies every byte of a step's checkpoint and returns its metadata.

        Raises:
            UserError: it is damaged.
        """
        return _verify(self.folder / str(step))

    def read_metadata(self, step: int) -> Metadata:
        """Reads the manifest of a step's checkpoint without verifying the other files.

        Raises:
            UserError: the manifest is missing or damaged.
        """
        return _read_manifest(self.folder / str(step))[0]

    def restore(self, step: int, abstract: Any) -> Any:
        """Restores the state of a step, with the shapes, dtypes and shardings of `abstract`.

        Raises:
            UserError: the checkpoint's arrays differ from `abstract`, or are damaged.
        """
        with arrays.literal(self.folder) as folder, _as_user_error(self.folder / str(step)):
            return type(abstract)(
                **ocp.load_checkpointables(folder / str(step), abstract._asdict())
            )

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint so that it is no longer read, counted or removed."""
        aside = self.folder / f"{step}.aside"
        for number in itertools.count(2):
            if not os.path.lexists(aside):
                break
            aside = self.folder / f"{step}.aside.{number}"
        (self.folder / str(step)).rename(aside)
        return aside

    def check_writable(self) -> None:
        """Saves a single number, checks that it is on disk, and removes it, in every process.

        So a folder that cannot hold checkpoints is reported before the first step.

        Raises:
            UserError: no checkpoint can be written here.
        """
        partial = self.folder / "0.partial"
        items = {"params": {"rehearsal": np.zeros((), np.float32)}}
        failure = ""
        try:
            _make_folder(self.folder)
            with arrays.literal(self.folder) as folder:
                _start_writing(folder / partial.name, items).result()
            if distributed.is_first():
                _check_readable(partial, items)
                _delete(partial)
        except UserError as error:
            failure = str(error)
        except Exception as error:
            failure = f"{partial}: cannot be written: {_brief(error)}"
        finally:
            if distributed.is_first():
                _remove_failed(partial)
        if distributed.from_first(bool(failure)) or failure:
            raise UserError(failure or f"{self.folder}: the first process cannot write there")

    def save(self, step: int, state: Any, metadata: Metadata) -> None:
        """Copies the state to the host, then writes it in the background.

        Errors of the background write are raised by the next `save`, `check` or `close`. Older
        checkpoints are removed only when the new one is complete. A step that is already saved is
        left unchanged.

        Raises:
            UserError: the last save failed, or this one cannot start (no space, no permission).
        """
        self.close()
        # The first process decides: on a shared file system the others may not see the renamed
        # folder yet.
        if distributed.from_first(distributed.is_first() and step in self.steps()):
            return
        refused = self._make_room(state) if distributed.is_first() else ""
        if distributed.from_first(bool(refused)):
            raise UserError(refused or f"{self.folder}: the first process cannot write there")
        partial = self.folder / f"{step}.partial"
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(arrays.literal(self.folder))
            try:
                response = _start_writing(folder / partial.name, state._asdict())
            except Exception as error:
                raise UserError(f"{partial}: cannot be written: {_brief(error)}") from None
            writing = stack.pop_all()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        described = dataclasses.asdict(metadata)  # a copy: the loss changes during the write
        self._pending = self._writer.submit(
            self._finish, step, partial, writing, response, shapes, described
        )

    def check(self) -> None:
        """Raises the error of the last `save` (a `UserError`) if it has already failed."""
        if self._pending is not None and self._pending.done():
            self.close()

    def close(self) -> None:
        """Waits until the last `save` is on disk; raises its `UserError` if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _make_room(self, state: Any) -> str:
        """Removes the remains of a killed run; returns why nothing can be written, or ""."""
        try:
            _check_space(self.folder, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        except UserError as error:
            return str(error)
        _remove(self.folder, lambda name: bool(_UNFINISHED.fullmatch(name)))
        return ""

    def _finish(
        self,
        step: int,
        partial: Path,
        writing: contextlib.ExitStack,
        response: Any,
        shapes: Any,
        metadata: dict[str, Any],
    ) -> None:
        try:
            with writing:
                response.result()
            if distributed.is_first():
                _check_readable(partial, shapes._asdict())
                _commit(partial, self.folder / str(step), metadata)
        except Exception as error:
            _remove_failed(partial)
            raise UserError(f"{partial}: cannot be written: {_brief(error)}") from None
        if distributed.is_first():
            self._remove_older(step)

    def _remove_older(self, step: int) -> None:
        """Keeps the newest `keep` up to a step; later ones belong to a run that resuming set aside.

        Checkpoints that cannot be removed are retried after the next save.
        """
        with contextlib.suppress(OSError, UserError):
            for old in [other for other in self.steps() if other <= step][self._keep :]:
                # Rename first, so that a partly removed checkpoint does not look damaged.
                removed = self.folder / f"{old}.partial"
                _delete(removed)
                (self.folder / str(old)).rename(removed)
                _delete(removed)


def save_model(folder: Path, config: ModelConfig, tensors: Mapping[str, pth.Array]) -> None:
    """Writes one checkpoint with a model and no optimizer state, for `load_newest`.

    Little more than one tensor is in memory at a time, whatever the model's size.

    Args:
        folder: the checkpoint; it gets this name only when it is complete.
        tensors: all official tensors, in the official order.

    Raises:
        UserError: it exists or cannot be written, or a tensor raises one.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; give a new folder")
    folder = folder.absolute()
    partial = folder.with_name(f".{os.getpid()}.partial")
    _check_space(folder.parent, sum(4 * math.prod(tensor.shape) for tensor in tensors.values()))
    try:
        # Orbax writes the same tree with scalar leaves; `arrays.write` then replaces the arrays.
        numbers = jax.tree.map(lambda _: np.zeros((), np.float32), abstract_params(config))
        with arrays.literal(folder.parent) as parent:
            _start_writing(parent / partial.name, {"params": numbers}).result()
        arrays.write(partial / "params", config, tensors)
        _check_readable(partial, {"params": abstract_params(config)})
        _commit(partial, folder, dataclasses.asdict(Metadata(config)))
    except UserError:  # raised by the tensors
        raise
    except Exception as error:
        raise UserError(f"{folder}: cannot be written: {_brief(error)}") from None
    finally:
        _remove_failed(partial)


def load_newest(path: Path, dtype: Any = np.float32) -> tuple[ModelConfig, Params]:
    """Loads the model of a checkpoint, or of the newest good checkpoint in a run's output folder.

    Returns:
        The configuration and the tree of NumPy arrays of that dtype. Peak memory is little more
        than that tree. The optimizer state is not read.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """

    return open_newest(
        path, lambda _, tensors: weights.from_official(tensors, None, dtype, str(path))
    )


def open_newest(path: Path, use: Callable[[ModelConfig, dict[str, pth.Array]], _T]) -> _T:
    """Calls `use` with the configuration and the tensors, and returns its result.

    The model is that of `load_newest`; its tensors are by official name, in the official order, and
    their values are read when they are used. The run may still be training: if its trainer removes
    the checkpoint meanwhile, `use` is called again with the newest one.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    while True:
        with contextlib.ExitStack() as stack:
            folder, model, tensors = _open_newest(path, stack)
            try:
                return use(model, tensors)
            except UserError:
                if folder.is_dir():
                    raise


def _open_newest(
    path: Path, stack: contextlib.ExitStack
) -> tuple[Path, ModelConfig, dict[str, pth.Array]]:
    folder = path.absolute()
    if (folder / MANIFEST).exists():
        return folder, *_open_model(folder, stack)
    checkpoints = Checkpoints(folder / "checkpoints")
    damaged: set[int] = set()
    while steps := [step for step in checkpoints.steps() if step not in damaged]:
        newest = checkpoints.folder / str(steps[0])
        try:
            return newest, *_open_model(newest, stack)
        except UserError as error:
            if newest.is_dir():  # otherwise a trainer has removed it
                if len(steps) == 1:
                    raise
                print(f"warning: {error}; using the previous one", file=sys.stderr, flush=True)
                damaged.add(steps[0])
    if (folder / "_CHECKPOINT_METADATA").exists():
        raise UserError(f"{path}: an orbax checkpoint, but not one of rwkv-jax: no {MANIFEST}")
    if (folder / "config.json").exists():
        raise UserError(
            f"{path}: is the folder of a Hugging Face model: convert it first with "
            f"rwkv-jax hf-to-pth {shlex.quote(str(path))} model.pth"
        )
    raise UserError(
        f"{path}: no checkpoints; give a .pth, the output folder of a run, or a checkpoint"
    )


def _open_model(
    folder: Path, stack: contextlib.ExitStack
) -> tuple[ModelConfig, dict[str, pth.Array]]:
    config = _verify(folder, without="opt_state/").model
    with _as_user_error(folder):
        return config, stack.enter_context(arrays.read(folder / "params", config))


# ------------------------------------------------------------------------------------- writing


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: cannot be written: it is not a folder")
    with reporting_os_errors(folder, "be written"):
        folder.mkdir(parents=True, exist_ok=True)


def _check_space(folder: Path, nbytes: int) -> None:
    needed = nbytes * 21 // 20 + _MARGIN
    _make_folder(folder)
    with reporting_os_errors(folder, "be written"):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint takes {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB "
            "are free"
        )


def _start_writing(partial: Path, items: dict[str, Any]) -> Any:
    """Starts orbax's save of `items` to the folder `partial`; returns when arrays are copied."""
    context = ocp.Context()
    # Weights hardly compress; and without compression a file's size bounds the memory to read it.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _storage
    # Otherwise its threads wait for minutes if it cannot create the folder.
    context.asynchronous.create_directories_asynchronously = False
    with context:
        return ocp.save_checkpointables_async(partial, items, overwrite=True)


def _remove(parent: Path, chosen: Callable[[str], bool]) -> bool:
    """Removes the folders whose names are `chosen`; returns whether there were any."""
    leftovers = [path for path in parent.glob("*") if chosen(path.name)]
    for leftover in leftovers:
        _delete(leftover)
    return bool(leftovers)


def _remove_failed(partial: Path) -> None:
    """Removes the remains of a failed save, until no new file has appeared for half a second.

    When a part of a save fails, orbax abandons the others, which still write and create their
    folders again. What a run's save leaves even later is removed by its next save.
    """
    looks = 0
    for _ in range(50):
        if _remove(partial.parent, lambda name: name.startswith(partial.name)):
            looks = 5
        if not looks:
            break
        looks -= 1
        time.sleep(0.1)


def _delete(folder: Path) -> None:
    """Removes a folder or a link to one; ignores errors."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _storage(path: tuple[Any, ...], leaf: Any) -> Any:
    """The chunk shape in which orbax stores an array; a layer can be read on its own."""
    if leaf.ndim == 3:  # stacked matrices
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))
    if leaf.ndim == 2:
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=arrays.PIECE)
    return None


def _check_readable(partial: Path, items: Mapping[str, Any]) -> None:
    """Checks that these trees of arrays can be read back from disk; raises if not."""
    for name, tree in items.items():
        arrays.check(partial / name, jax.tree.leaves(tree))


def _commit(partial: Path, final: Path, metadata: dict[str, Any]) -> None:
    """Flushes `partial`, adds the manifest and renames it to `final`."""
    files = sorted(_files(partial))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: _digest(partial / name, flush=True), files)
        entries = {
            name: [(partial / name).stat().st_size, digest]
            for name, digest in zip(files, digests, strict=True)
        }
    manifest = {"format": _FORMAT, **metadata, "files": entries}
    body = json.dumps(manifest, indent=1).encode()
    with (partial / MANIFEST).open("wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    _read_manifest(partial)
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        flush_folder(folder)
    partial.rename(final)
    flush_folder(final.parent)


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _digest(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- reading


def _verify(folder: Path, without: str = "/") -> Metadata:
    """Compares all files with the manifest, except those whose names begin with `without`.

    Raises:
        UserError: a file differs from what was written; the message names the first one.
    """
    try:
        metadata, files = _read_manifest(folder)
        expected = {name: entry for name, entry in files.items() if not name.startswith(without)}
        for name, (size, _) in expected.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                _require_fetched(path)
            if not path.is_file():
                raise UserError(f"{folder}: damaged: {name} is missing")
            if path.stat().st_size != size:
                raise UserError(
                    f"{folder}: damaged: {name} has {path.stat().st_size} bytes, not {size}"
                )
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            digests = pool.map(lambda name: _digest(folder / name), expected)
            for (name, (_, digest)), found in zip(expected.items(), digests, strict=True):
                if digest != found:
                    raise UserError(f"{folder}: damaged: {name} differs from what was written")
    except OSError as error:
        raise Unreadable(f"{folder}: cannot be read: {error.strerror}") from None
    stored = sum(size for name, (size, _) in files.items() if name.startswith("params/"))
    needed = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_params(metadata.model)))
    if needed > 2 * stored + _MARGIN:  # arrays of a kilobyte or less are compressed
        raise UserError(f"{folder}: {stored} bytes are too few for a model of {needed} bytes")
    return metadata


def _read_manifest(folder: Path) -> tuple[Metadata, dict[str, tuple[int, str]]]:
    """Reads the manifest and checks the type of every value."""
    path = folder / MANIFEST
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_user_error(path))
        _require_fetched(path)
        with path.open("rb") as file:
            content = file.read(_MAX_MANIFEST)
        digest, _, body = content.partition(b"\n")
        if digest != hashlib.sha256(body).hexdigest().encode():
            raise ValueError("truncated or changed")
        described = json.loads(body)
        if described["format"] != _FORMAT:
            raise Unreadable(
                f"{path}: format {described['format']!r:.20}; this version reads {_FORMAT}"
            )
        numbers = described["model"]
        if not all(type(value) is int and 0 < value < 1 << 31 for value in numbers.values()):
            raise ValueError("not a model")
        total, steps = described["loss"]["total"], described["loss"]["steps"]
        metadata = Metadata(ModelConfig(**numbers), MiniepochLoss(float(total), int(steps)))
        run = dict(described["run"])
        sizes = [run.get(name, 1) for name in ("samples a step", "ctx_len")]
        if not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
            raise ValueError("not a run")
        metadata = dataclasses.replace(metadata, run=run)
        files = {name: (int(size), str(sha)) for name, (size, sha) in described["files"].items()}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a file outside the folder")
        return metadata, files


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Converts any error caused by an untrusted file into a `UserError` that names the file."""
    try:
        yield
    except Unreadable:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (PermissionError, InterruptedError, BlockingIOError, TimeoutError) as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:
        if "Out of memory" in str(error):  # of a device
            raise Unreadable(f"{path}: does not fit the device's memory") from None
        raise UserError(f"{path}: damaged, or of another program: {_brief(error)}") from None


def _require_fetched(path: Path) -> None:
    """Raises `Unreadable` for a dangling link or a Git LFS / git-annex pointer."""
    if path.is_symlink() and not path.exists():
        raise Unreadable(f"{path}: is a link to {os.readlink(path)}, which has not been fetched")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(32).startswith(_POINTERS):
                raise Unreadable(
                    f"{path}: is a Git LFS or git-annex pointer to a file, "
                    "which has not been fetched"
                )


def _numbered(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder: the directories whose name is a number."""
    for path in folder.iterdir():
        number = path.name.isascii() and path.name.isdigit() and len(path.name) < 19
        if number and path.name == str(int(path.name)) and path.is_dir():
            yield path


def _brief(error: Exception) -> str:
    """The first line of an error of any kind."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if "RESOURCE_EXHAUSTED" in text:  # tensorstore's long message for a full disk
        return "no space left on the device"
    line = next(iter(text.splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}" if not isinstance(error, OSError) else line[:200]
