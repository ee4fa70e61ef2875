"""Text files to token files: parallel, resumable, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.config.progress import Progress, no_progress
from mtnlg.tokens.documents import ReadOptions
from mtnlg.tokens.encode_plan import Plan, make_plan
from mtnlg.tokens.encode_pool import run_tasks
from mtnlg.tokens.encode_task import Counts, EncodeSettings
from mtnlg.tokens.sources import find_files
from mtnlg.tokens.token_file import TokenFile, bare_prefix
from mtnlg.tokens.token_writer import TokenFileWriter
from mtnlg.tokens.tokenizer import FILE_NAME, Tokenizer

_BYTES_WORTH_A_WORKER = 4 << 20


@dataclass(frozen=True)
class EncodeReport:
    """What an encoding job did.

    Args:
        prefix: of the token file.
        num_bytes: of text files read, decompressed.
        num_characters: of all texts.
        num_tokens: written, ends of text included.
        num_documents: written.
        seconds: of wall time.
        num_tasks: that the job was divided into.
        num_resumed: of them that an earlier, interrupted run had finished.
        engine: what encoded.
    """

    prefix: str
    num_bytes: int
    num_characters: int
    num_tokens: int
    num_documents: int
    seconds: float
    num_tasks: int
    num_resumed: int
    engine: str

    @property
    def characters_per_token(self) -> float:
        """Characters of text for each token."""
        return self.num_characters / max(self.num_tokens, 1)


def encode_files(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    out_prefix: str | os.PathLike[str],
    text_key: str = "text",
    workers: int | None = None,
    progress: Progress = no_progress,
    *,
    encoding_errors: str = "strict",
    document_separator: str | None = None,
    append_end_of_text: bool = True,
    engine: str = "auto",
    overwrite: bool = False,
) -> EncodeReport:
    """Encode documents into ``PREFIX.bin``, ``PREFIX.idx`` and the notes ``PREFIX.json``.

    The result does not depend on the number of workers. An interrupted job leaves its finished parts in
    ``PREFIX.parts``; the same call goes on from there. A job that was finished already is not done again.

    Args:
        sources: files, folders and patterns, see ``read_documents``.
        tokenizer: gives the ids.
        out_prefix: where to write; folders are made.
        text_key: field of JSON Lines and Parquet that holds the text.
        workers: processes; ``None`` is one per core, fewer for little text.
        progress: told the bytes read.
        encoding_errors: ``"strict"``, ``"replace"`` or ``"ignore"`` bytes that are not UTF-8.
        document_separator: cuts plain text files into documents.
        append_end_of_text: end each document that is not empty with the end-of-text token.
        engine: ``"auto"``, or one of ``mtnlg.tokens.encoders.ENGINES``.
        overwrite: replace a token file that was made from something else.

    Raises:
        ConfigError: an option is wrong.
        DataError: a source cannot be read (says where), or the output is there already.
    """
    began = time.monotonic()
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}: it must be at least 1.")
    reading = ReadOptions(text_key, encoding_errors, document_separator)
    settings = EncodeSettings(reading, append_end_of_text, engine)
    prefix = bare_prefix(out_prefix)
    plan = make_plan(find_files(sources), tokenizer.fingerprint, settings)
    finished = _finished(prefix, plan.key)
    if finished is not None:
        return _report(prefix, finished, began, len(plan.tasks), len(plan.tasks))
    _require_free(prefix, overwrite)
    with _parts_folder(prefix, plan, tokenizer) as folder:
        resumed = [number for number in range(len(plan.tasks)) if _part(folder, number, plan.key)]
        open_tasks = [number for number in range(len(plan.tasks)) if number not in set(resumed)]
        done_bytes = sum(_part(folder, number, plan.key)["counts"]["disk_bytes"] for number in resumed)
        count = min(_worker_count(workers, plan.num_bytes), max(len(open_tasks), 1))
        run_tasks(plan, open_tasks, folder, tokenizer, settings, count, progress, done_bytes)
        facts = _merge(prefix, folder, plan, tokenizer, progress)
    shutil.rmtree(folder)
    return _report(prefix, facts, began, len(plan.tasks), len(resumed))


def _worker_count(workers: int | None, num_bytes: int) -> int:
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // _BYTES_WORTH_A_WORKER))


def _finished(prefix: str, key: str) -> dict[str, Any] | None:
    """The notes of a token file that this very job made, ``None`` where there is none."""
    try:
        facts = TokenFile(prefix).facts
    except DataError:
        return None
    return facts if facts.get("job") == key else None


def _require_free(prefix: str, overwrite: bool) -> None:
    taken = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if os.path.exists(path)]
    if taken and not overwrite:
        raise DataError(
            f"{taken[0]} exists already and was made from other sources, another tokenizer or other "
            "settings: choose another name, or give --overwrite."
        )


@contextlib.contextmanager
def _parts_folder(prefix: str, plan: Plan, tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    """The folder of the finished parts, emptied when it belongs to another job; one job at a time."""
    folder = Path(f"{prefix}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        _lock(lock, folder)
        note = folder / "job"
        if not note.exists() or note.read_text() != plan.key:
            for path in folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            note.write_text(plan.key)
        (folder / FILE_NAME).write_text(tokenizer.definition, encoding="utf-8")
        for path in folder.glob(".*.part"):
            path.unlink()
        yield folder


def _lock(lock: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return  # no such locks on this system
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{folder} is in use: another job is writing the same output.") from error


def _part(folder: Path, number: int, key: str) -> Any:
    """The notes of a finished part; ``None`` if it is missing, damaged or another job's."""
    try:
        facts = TokenFile(folder / f"{number:06d}").facts
    except DataError:
        return None
    return facts if facts.get("job") == key and "counts" in facts else None


def _merge(
    prefix: str, folder: Path, plan: Plan, tokenizer: Tokenizer, progress: Progress
) -> dict[str, Any]:
    counts = Counts()
    facts = {"job": plan.key, "tokenizer_fingerprint": tokenizer.fingerprint}
    with TokenFileWriter(prefix, tokenizer.vocab_size, facts=facts) as writer:
        for number in range(len(plan.tasks)):
            part = TokenFile(folder / f"{number:06d}")
            writer.append_file(part)
            counts.add(part.facts["counts"])
            writer.facts["engine"] = part.facts.get("engine")
            progress("joining the parts", number + 1, len(plan.tasks), "parts")
        if not writer.num_tokens:
            raise DataError(f"{prefix}: there is no text in the {counts.documents} documents found.")
        writer.facts["counts"] = vars(counts)
        return writer.summary()


def _report(prefix: str, facts: dict[str, Any], began: float, tasks: int, resumed: int) -> EncodeReport:
    counts = facts["counts"]
    return EncodeReport(
        prefix=prefix,
        num_bytes=counts["num_bytes"],
        num_characters=counts["characters"],
        num_tokens=facts["num_tokens"],
        num_documents=facts["num_documents"],
        seconds=time.monotonic() - began,
        num_tasks=tasks,
        num_resumed=resumed,
        engine=str(facts.get("engine")),
    )
