"""From raw text to a run that can start: tokenizer, token files, index, the config with all of it.

Each step leaves a note of what it was made from. A step whose note still fits is not done again, so an
interrupted preparation goes on, and a second run starts at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from mtnlg.config import (
    BlendEntry,
    CheckpointError,
    ConfigError,
    DataConfig,
    DataError,
    RunConfig,
    SourceEntry,
    TokenizerConfig,
)
from mtnlg.config.load import save_run_config
from mtnlg.config.progress import Progress, no_progress
from mtnlg.tokens.build_index import build_index
from mtnlg.tokens.denoising import text_of
from mtnlg.tokens.documents import read_documents
from mtnlg.tokens.sources import find_files
from mtnlg.tokens.token_file import TokenFile
from mtnlg.tokens.tokenizer import Tokenizer
from mtnlg.training.checkpoint_files import (
    latest_checkpoint,
    list_checkpoints,
    read_state,
    write_atomically,
)
from mtnlg.training.resume import check_same_run
from mtnlg.training.special_tokens import tokens_to_learn, with_special_tokens

TOKENIZER_TEXT_CHARACTERS = 200_000_000  # more text than this changes a vocabulary hardly at all
_NOTES = "prepared.json"


def prepare(config: RunConfig, progress: Progress = no_progress) -> RunConfig:
    """Make everything in ``run_dir`` that training reads.

    Writes ``tokenizer/`` (trained from ``data.sources``, or copied from ``tokenizer.path``),
    ``data/*.bin`` and ``*.idx`` (``data.sources`` encoded), the index of the batch stream,
    ``blend.json`` (tokens, share and epochs of each corpus), and ``config.yaml``.

    Args:
        config: the run.
        progress: told of the long parts.

    Returns:
        The config with ``data.blend`` instead of ``data.sources``, the tokenizer's path, and the
        vocabulary's size.

    Raises:
        ConfigError: there is nothing to train on, or tokenizer and model do not fit.
        DataError: a source cannot be read, or it changed under a run that has begun.
        CheckpointError: the folder holds a run that was begun with another config.
    """
    if not config.data.sources and not config.data.blend:
        raise ConfigError(
            "there is nothing to train on: give data.sources (raw text) or data.blend (token files)."
        )
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    notes = Notes(run_dir / _NOTES, begun=bool(list_checkpoints(run_dir)))
    tokenizer = _tokenizer(config, run_dir, notes, progress)
    if config.data.sources:
        blend = _encode_sources(config.data, tokenizer, run_dir / "data", notes, progress)
        config = replace(config, data=replace(config.data, sources=[], blend=blend))
    config = with_special_tokens(_with_vocabulary(config, tokenizer, run_dir), tokenizer)
    check_begun_run(config)  # before config.yaml is written over
    for entry in config.data.blend:
        TokenFile(entry.path, vocab_size=config.model.vocab_size)
    _build_index(config, progress)
    save_run_config(config, run_dir / "config.yaml")
    return config


def check_begun_run(config: RunConfig) -> None:
    """Refuse a config that its folder's newest checkpoint was not made with.

    Raises:
        CheckpointError: naming every setting that differs and may not.
    """
    latest = latest_checkpoint(config.run_dir)
    if latest is None:
        return
    try:
        saved = read_state(latest)["config"]
    except (CheckpointError, KeyError):
        return  # a damaged checkpoint: training falls back to an older one, or says that there is none
    check_same_run(config, saved)


class Notes:
    """What each finished step was made from, kept in ``prepared.json``.

    Args:
        path: of that file.
        begun: the run has a checkpoint: nothing under it may change.
    """

    def __init__(self, path: Path, begun: bool) -> None:
        self._path, self._begun = path, begun
        try:
            self._values: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._values = {}

    def is_done(self, name: str, origin: str, result: Path) -> bool:
        """Whether step ``name`` was finished from ``origin`` and ``result`` is still there.

        Raises:
            DataError: a run that has begun would get other data under it.
        """
        noted = self._values.get(name)
        if noted == origin and result.exists():
            return True
        if noted is not None and noted != origin and self._begun:
            raise DataError(
                f"{name}: what it was made from has changed since the run in {self._path.parent} was "
                "begun. Put it back to go on with that run, or use another run_dir."
            )
        return False

    def set_done(self, name: str, origin: str) -> None:
        """Note that step ``name`` was finished from ``origin``."""
        self._values[name] = origin
        write_atomically(self._path, json.dumps(self._values, indent=1))


def _tokenizer(config: RunConfig, run_dir: Path, notes: Notes, progress: Progress) -> Tokenizer:
    folder = run_dir / "tokenizer"
    given = config.tokenizer.path
    if given is not None and Path(given).resolve() == folder.resolve():
        return Tokenizer.from_pretrained(folder)
    if given is not None:
        tokenizer = Tokenizer.from_pretrained(given)
        origin = f"tokenizer {tokenizer.fingerprint}"
        if not notes.is_done("tokenizer", origin, folder / "tokenizer.json"):
            tokenizer.save_pretrained(folder)
            notes.set_done("tokenizer", origin)
        return tokenizer
    if not config.data.sources:
        if (folder / "tokenizer.json").exists():
            return Tokenizer.from_pretrained(folder)
        raise ConfigError("data.blend needs tokenizer.path: the tokenizer its files were made with.")
    names = tokens_to_learn(config)
    learned = [str(config.tokenizer.vocab_size)]
    if config.tokenizer.han_characters != TokenizerConfig.han_characters:
        learned.append(f"han {config.tokenizer.han_characters}")  # runs from before it stay prepared
    origin = origin_of([*learned, *names, *map(_source_origin, config.data.sources)])
    if not notes.is_done("tokenizer", origin, folder / "tokenizer.json"):
        texts = _training_texts(config.data, progress)
        tokenizer = Tokenizer.train(
            texts,
            config.tokenizer.vocab_size,
            more_special_tokens=names,
            han_characters=config.tokenizer.han_characters,
        )
        tokenizer.save_pretrained(folder)
        notes.set_done("tokenizer", origin)
    return Tokenizer.from_pretrained(folder)


def _training_texts(data: DataConfig, progress: Progress) -> Iterator[str]:
    """Texts of all sources in turn, each up to its share of ``TOKENIZER_TEXT_CHARACTERS``."""
    share = TOKENIZER_TEXT_CHARACTERS // len(data.sources)
    total = 0
    for source in data.sources:
        seen = 0
        for document in read_documents([source.path], source.text_key, data.encoding_errors):
            yield document.text
            seen += len(document.text)
            progress("training the tokenizer", total + seen, None, "characters")
            if seen >= share:
                break
        total += seen


def _encode_sources(
    data: DataConfig, tokenizer: Tokenizer, folder: Path, notes: Notes, progress: Progress
) -> list[BlendEntry]:
    from mtnlg.tokens.encode import encode_files  # needs more imports than a run on token files does

    folder.mkdir(exist_ok=True)
    blend = []
    for number, source in enumerate(data.sources):
        prefix = folder / f"{number:02d}-{_stem(source.path)}"
        origin = origin_of([tokenizer.fingerprint, data.encoding_errors, _source_origin(source)])
        if not notes.is_done(prefix.name, origin, Path(f"{prefix}.idx")):
            encode_files(
                [source.path],
                tokenizer,
                prefix,
                text_key=source.text_key,
                progress=progress,
                encoding_errors=data.encoding_errors,
                overwrite=True,
            )
            notes.set_done(prefix.name, origin)
        weight = source.weight
        if weight is None:
            weight = float(max(1, TokenFile(prefix).num_tokens))
        blend.append(BlendEntry(str(prefix.absolute()), weight))
    return blend


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer, run_dir: Path) -> RunConfig:
    model = config.model
    if config.tokenizer.sets_vocab_size:
        model = replace(model, vocab_size=tokenizer.vocab_size)
    elif tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens. "
            "Leave model.vocab_size out to take the tokenizer's."
        )
    path = str((run_dir / "tokenizer").absolute())
    return replace(config, model=model, tokenizer=replace(config.tokenizer, path=path))


def _build_index(config: RunConfig, progress: Progress) -> None:
    steps, tokens = config.stop.steps, config.stop.tokens
    limits = [] if tokens is None else [tokens // config.data.sequence_length]
    limits += [] if steps is None else [steps * config.batch.global_batch_size]
    report = build_index(
        text_of(config.data, config.model.has_encoder),
        config.seed,
        min(limits) if limits else None,
        config.model.vocab_size,
        lambda done, total: progress("index", done, total, "corpora"),
    )
    write_atomically(Path(config.run_dir) / "blend.json", json.dumps(asdict(report), indent=1))


def _stem(path: str) -> str:
    """A short file name for a source: ``runs/x/poems.jsonl.gz`` is ``poems``."""
    name = Path(path.rstrip("/*")).name.split(".")[0]
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "source"


def _source_origin(source: SourceEntry) -> str:
    """Changes when the files of a source do: their names, sizes and times."""
    files = find_files([source.path])
    facts = [f"{file.path} {file.size} {Path(file.path).stat().st_mtime_ns}" for file in files]
    return origin_of([source.path, source.text_key, *facts])


def origin_of(parts: list[str]) -> str:
    """A short text that changes when any of ``parts`` does."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
