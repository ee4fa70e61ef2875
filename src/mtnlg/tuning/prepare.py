"""From chat data and a base to a run that can start: tokenizer with template, examples, the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mtnlg.config import ConfigError, DataError, MegatronModelConfig, RunConfig, TuningConfig
from mtnlg.config.load import save_run_config
from mtnlg.config.progress import Progress
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.shuffle import permutation, seed_of
from mtnlg.tokens.sources import find_files
from mtnlg.training.checkpoint_files import list_checkpoints, write_atomically
from mtnlg.training.model_files import ModelFiles, open_model_files
from mtnlg.training.prepare import Notes, check_begun_run, origin_of
from mtnlg.tuning.conversations import Conversation, read_conversations
from mtnlg.tuning.distillation import distillation_problems
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.pairs import PairRenderer, PairStream, fitting_target
from mtnlg.tuning.rendering import Example, Renderer
from mtnlg.tuning.report import describe
from mtnlg.tuning.stream import ExampleStream
from mtnlg.tuning.templates import with_template

REPORT = "examples.txt"
# Fields that a tuned model may have otherwise than its base: they do not change what weights mean.
_FREE = {"hidden_dropout", "attention_dropout", "use_cache", "parallel_output", "pre_process_first"}
_FREE |= {"post_process_last", "enable_input_require_grads", "init_method_std", "output_layer_init_method"}
_FREE |= {"quantize", "quantize_config"}
_FREE |= {field.name for field in fields(MegatronModelConfig) if field.name.startswith("prompt_tuning")}


def tuning_of(config: RunConfig) -> TuningConfig:
    """The section that makes a run a tuned one."""
    assert config.tuning is not None, "a run without a section tuning"
    return config.tuning


def examples_path(config: RunConfig, split: str) -> Path:
    """Where the prepared examples of ``train`` or ``validation`` are."""
    return Path(config.run_dir) / "data" / f"{split}.safetensors"


def prepare_tuning(config: RunConfig, progress: Progress, tell: Callable[[str], None]) -> RunConfig:
    """Make everything in ``run_dir`` that tuning reads.

    Writes ``tokenizer/`` (the base's, with the chat template), ``data/*.safetensors`` (the examples),
    ``examples.txt`` (their statistics, and three of them) and ``config.yaml``.

    Args:
        config: the run; its ``model`` is the base's.
        progress: told of the long parts.
        tell: given the statistics and the decoded examples, before training starts.

    Returns:
        The config with the tokenizer's path, the number of steps, and what an encoder-decoder has room to
        write.

    Raises:
        ConfigError: base, tokenizer, teacher and config do not fit.
        DataError: data cannot be learnt from, or changed under a run that has begun.
        CheckpointError: the base is not there, or the folder's run was begun with another config.
    """
    tuning = tuning_of(config)
    run_dir = Path(config.run_dir)
    (run_dir / "data").mkdir(parents=True, exist_ok=True)
    notes = Notes(run_dir / "prepared.json", begun=bool(list_checkpoints(run_dir)))
    base = open_model_files(tuning.base)
    tokenizer = _tokenizer(tuning, base)
    check_fits(config, base.config, tokenizer)
    origin = _origin(config, tokenizer)
    train = examples_path(config, "train")
    if not notes.is_done("examples", origin, train):
        tokenizer.save_pretrained(run_dir / "tokenizer")
        report = _write_examples(config, tokenizer, progress)
        write_atomically(run_dir / REPORT, report)
        notes.set_done("examples", origin)
    tell((run_dir / REPORT).read_text(encoding="utf-8"))
    path = str((run_dir / "tokenizer").absolute())
    config = replace(config, tokenizer=replace(config.tokenizer, path=path))
    if Path(tuning.base).is_dir():  # whoever opens the run may stand elsewhere
        config = replace(config, tuning=replace(tuning, base=str(Path(tuning.base).absolute())))
    config = _with_steps(with_target_length(config, ExampleFile.read(train)), train)
    check_begun_run(config)  # before config.yaml is written over
    save_run_config(config, run_dir / "config.yaml")
    return config


def check_fits(config: RunConfig, base: MegatronModelConfig, tokenizer: Tokenizer) -> None:
    """Make sure that the run's model is the base's and reads the base's tokens.

    Raises:
        ConfigError: naming every field that differs.
    """
    ours, theirs = asdict(config.model), asdict(base)
    problems = [
        f"model.{name} is {ours[name]!r}: the base's is {theirs[name]!r}, and its weights fit nothing else."
        for name in ours
        if name not in _FREE and ours[name] != theirs[name]
    ]
    if tokenizer.vocab_size > base.vocab_size:
        problems.append(
            f"{tuning_of(config).base}: its tokenizer has {tokenizer.vocab_size} tokens and its embedding "
            f"{base.vocab_size}: they do not belong together."
        )
    if base.has_encoder and tokenizer.end_of_text_id != base.eos_token_id:
        problems.append(
            f"{tuning_of(config).base}: its tokenizer ends a text with token {tokenizer.end_of_text_id} "
            f"and its config (eos_token_id) with {base.eos_token_id}: they do not belong together."
        )
    problems += method_problems(config)
    teacher = tuning_of(config).distillation
    if teacher is not None:
        problems += _teacher_problems(teacher.teacher, base.vocab_size, base.has_encoder, tokenizer)
    if problems:
        raise ConfigError(problems)


def method_problems(config: RunConfig) -> list[str]:
    """Every reason why the method does not go with the layout or the samples; empty when it does."""
    tuning = tuning_of(config)
    problems = distillation_problems(tuning, config.layout)
    if config.model.has_encoder:
        problems += _encoder_problems(tuning)
    if not tuning.trains_adapter:
        return problems
    adapter = tuning.adapter
    if tuning.packing and adapter.method == "prompt" and adapter.prompt_style != "prepend":
        problems.append(
            f"tuning.adapter.prompt_style is {adapter.prompt_style}: its virtual tokens stand between a "
            "prompt and its answer, of which a packed sample has several; set tuning.packing to false."
        )
    return problems


def _encoder_problems(tuning: TuningConfig) -> list[str]:
    """What of a tuning run there is not for an encoder-decoder."""
    problems = []
    if tuning.loss_on == "all":
        problems.append(
            "tuning.loss_on is all: what an encoder reads is not predicted; use assistant or last."
        )
    if tuning.trains_adapter and tuning.adapter.method == "prompt" and tuning.packing:
        problems.append(
            "tuning.packing is true: an encoder's virtual tokens see the whole of its sample, and would "
            "see other examples; set it to false."
        )
    return problems


def _teacher_problems(name: str, vocab_size: int, has_encoder: bool, tokenizer: Tokenizer) -> list[str]:
    teacher = open_model_files(name)
    problems = []
    if teacher.config.has_encoder != has_encoder:
        kinds = ("a decoder", "an encoder-decoder")
        problems.append(
            f"tuning.distillation.teacher is {name}: it is {kinds[teacher.config.has_encoder]}, and the "
            f"student {kinds[has_encoder]}; they do not read alike."
        )
    theirs = teacher.tokenizer
    are_alike = theirs is not None and theirs.fingerprint == tokenizer.fingerprint
    if teacher.config.vocab_size != vocab_size and not are_alike:
        problems.append(
            f"tuning.distillation.teacher is {name}: it has {teacher.config.vocab_size} tokens and the "
            f"student {vocab_size}; logits can be compared only token by token."
        )
    elif theirs is not None and not are_alike:
        problems.append(f"tuning.distillation.teacher is {name}: its tokenizer is not the student's.")
    return problems


def _tokenizer(tuning: TuningConfig, base: ModelFiles) -> Tokenizer:
    if base.tokenizer is None:
        raise ConfigError(f"{tuning.base} holds no tokenizer, so it cannot read conversations.")
    return with_template(base.tokenizer, tuning.template)


def _origin(config: RunConfig, tokenizer: Tokenizer) -> str:
    """Changes when the examples would."""
    tuning = tuning_of(config)
    files = find_files([*tuning.data, *tuning.validation_data])
    facts = [f"{file.path} {file.size} {Path(file.path).stat().st_mtime_ns}" for file in files]
    names = ("data", "validation_data", "validation_share", "format", "system", "loss_on", "max_turns")
    settings = [repr(getattr(tuning, name)) for name in (*names, "too_long", "packing")]
    others = [str(config.seed), str(_longest(config)), repr(_around(tuning)), tokenizer.fingerprint]
    return origin_of([*facts, *settings, *others, tokenizer.chat_template or ""])


def _write_examples(config: RunConfig, tokenizer: Tokenizer, progress: Progress) -> str:
    tuning = tuning_of(config)
    read = (tuning.format, tuning.system, tuning.max_turns)
    train = read_conversations(tuning.data, *read)
    if tuning.validation_data:
        validation = read_conversations(tuning.validation_data, *read)
    else:
        train, validation = keep_apart(train, tuning.validation_share, config.seed)
    renderer = _renderer(config, tokenizer)
    total = len(train) + len(validation)
    written = []
    for split, conversations in (("train", train), ("validation", validation)):
        done = total - len(validation) - len(train) if split == "train" else len(train)
        examples = _render(renderer, conversations, done, total, progress)
        path = examples_path(config, split)
        path.unlink(missing_ok=True)
        if conversations and not examples:
            raise DataError(
                f"none of the {len(conversations)} conversations for {split} fits into "
                f"data.sequence_length ({config.data.sequence_length}) with an answer: raise it."
            )
        if examples:
            written.append(ExampleFile.of(examples))
            written[-1].write(path)
    config = with_target_length(config, written[0])
    return describe(config, tokenizer, renderer, written[0], written[1] if len(written) > 1 else None)


def _renderer(config: RunConfig, tokenizer: Tokenizer) -> Renderer | PairRenderer:
    tuning, longest = tuning_of(config), _longest(config)
    rest = (tuning.too_long, _around(tuning))
    if config.model.has_encoder:
        target = config.data.target_length(has_encoder=True)
        return PairRenderer(tokenizer, tuning.loss_on, longest, target, *rest)
    return Renderer(tokenizer, tuning.loss_on, longest + 1, *rest)


def with_target_length(config: RunConfig, train: ExampleFile) -> RunConfig:
    """What an encoder-decoder has room to write, where it is not said: as the examples need it."""
    objective = config.data.objective
    if not config.model.has_encoder or objective.target_length is not None:
        return config
    length = fitting_target(train, config.data.sequence_length, tuning_of(config).packing)
    return replace(config, data=replace(config.data, objective=replace(objective, target_length=length)))


def _longest(config: RunConfig) -> int:
    """Places that an example may take of a sample."""
    tuning, length = tuning_of(config), config.data.sequence_length
    most = tuning.adapter.max_seq_length
    if tuning.method != "prompt" or most is None:
        return length
    return min(length, most - tuning.adapter.num_positions)


def _around(tuning: TuningConfig) -> tuple[str, str]:
    """Literal text around prompts: prompt tuning's, as generation puts it there too."""
    if tuning.method != "prompt":
        return "", ""
    return tuning.adapter.prefix, tuning.adapter.suffix


def keep_apart(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training's conversations and those for evaluation; the parts of one record stay together.

    Raises:
        DataError: there is only one record, so nothing can be kept apart.
    """
    records = list(dict.fromkeys(conversation.where for conversation in conversations))
    if share == 0.0:
        return list(conversations), []
    if len(records) < 2:
        raise DataError(
            "there is only one conversation: none can be kept apart for evaluation. Give more, or "
            "tuning.validation_data, or set tuning.validation_share to 0."
        )
    count = min(max(1, round(share * len(records))), len(records) - 1)
    order = permutation(len(records), seed_of("validation", seed)).tolist()
    held_out = {records[number] for number in order[:count]}
    train = [conversation for conversation in conversations if conversation.where not in held_out]
    return train, [conversation for conversation in conversations if conversation.where in held_out]


def _render(
    renderer: Renderer | PairRenderer,
    conversations: Sequence[Conversation],
    done: int,
    total: int,
    progress: Progress,
) -> list[Example]:
    examples: list[Example] = []
    for number, conversation in enumerate(conversations, done + 1):
        examples += renderer.examples(conversation)
        progress("reading conversations", number, total, "conversations")
    return examples


def _with_steps(config: RunConfig, train: Path) -> RunConfig:
    """``tuning.epochs`` as steps."""
    tuning = tuning_of(config)
    if tuning.epochs is None:
        return config
    stream = training_stream(config, ExampleFile.read(train))
    steps = math.ceil(tuning.epochs * stream.samples_per_epoch / config.batch.global_batch_size)
    return replace(config, stop=replace(config.stop, steps=max(1, steps)))


def training_stream(config: RunConfig, examples: ExampleFile) -> ExampleStream:
    """Endless samples of the training examples."""
    seed = config.seed if config.data.seed is None else config.data.seed
    return _stream(config, examples, seed=seed)


def validation_stream(config: RunConfig, num_samples: int | None) -> ExampleStream | None:
    """Each validation example once; ``None`` where there are none."""
    path = examples_path(config, "validation")
    if not path.exists():
        return None
    return _stream(config, ExampleFile.read(path), is_endless=False, num_samples=num_samples)


def _stream(config: RunConfig, examples: ExampleFile, **options: Any) -> ExampleStream:
    length, options = config.data.sequence_length, {**options, "packs": tuning_of(config).packing}
    if config.model.has_encoder:
        target = config.data.target_length(has_encoder=True)
        return PairStream(examples, length, target, config.model, **options)
    padding = Tokenizer.from_pretrained(Path(config.run_dir) / "tokenizer").padding_id
    return ExampleStream(examples, length, padding_id=padding, **options)
