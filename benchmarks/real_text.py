"""A small model on real text, beside two others given the same tokens and the same time.

    python benchmarks/real_text.py poems --source tang_shi.jsonl --minutes 15
    python benchmarks/real_text.py shakespeare --source tinyshakespeare.txt --minutes 5

Contenders, each in a process of its own, one after the other:
  ours          recipes/poems.yaml or recipes/shakespeare.yaml as it stands
  nanogpt       nanoGPT's architecture and training recipe, as a config of ours at our recipe's size
  transformers  GPT2LMHeadModel of the same size in a plain loop with nanoGPT's optimizer settings

Time is processor time divided by threads, so that a neighbour on the machine favours nobody; on an idle
machine it is wall time. Held-out text is never trained on: every 40th poem, or the last tenth of the
play. Loss is over all held-out tokens in windows of the recipe's sequence length.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONTENDERS = ("ours", "nanogpt", "transformers")
HAN = r"[㐀-鿿𠀀-𯿿]"
FIVE_CHARACTER_QUATRAIN = re.compile(rf"({HAN}{{5}}，{HAN}{{5}}。\n?){{2}}")
THIRD_LINE = re.compile(rf"{HAN}{{5}}，")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("corpus", choices=("poems", "shakespeare"))
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--override", action="append", default=[], help="of our recipe: --a.b=value")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.out / arguments.corpus
    if arguments.contender:
        run_contender(arguments, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    divide(arguments.corpus, arguments.source, folder)
    for contender in arguments.contenders:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--contender", contender], check=True)
    report(arguments, folder)


def divide(corpus: str, source: Path, folder: Path) -> None:
    """Write the training text and the held-out text."""
    if corpus == "poems":
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        parts = [line for i, line in enumerate(lines) if i % 40], lines[::40]
    else:
        text = source.read_text(encoding="utf-8")
        parts = [text[: len(text) * 9 // 10]], [text[len(text) * 9 // 10 :]]
    for name, part in zip(("train", "held-out"), parts):
        (folder / f"{name}{source.suffix}").write_text("".join(part), encoding="utf-8")


def our_config(arguments: argparse.Namespace, folder: Path):
    from mtnlg.config import SourceEntry
    from mtnlg.config.load import load_run_config

    recipe = REPOSITORY / "recipes" / f"{arguments.corpus}.yaml"
    config = load_run_config(recipe, arguments.override)
    source = replace(config.data.sources[0], path=str(folder / f"train{arguments.source.suffix}"))
    assert isinstance(source, SourceEntry)
    return replace(
        config,
        run_dir=str(folder / "ours"),
        data=replace(config.data, sources=[source]),
        stop=replace(config.stop, minutes=arguments.minutes),
        training=replace(config.training, num_threads=arguments.threads),
    )


def nanogpt_config(ours, folder: Path):
    """nanoGPT's config/train_shakespeare_char.py without dropout (its README's advice for a CPU)."""
    from mtnlg.config import MegatronModelConfig

    shape = ours.model
    batch = ours.batch.global_batch_size * ours.data.sequence_length
    return replace(
        ours,
        run_dir=str(folder / "nanogpt"),
        model=MegatronModelConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            max_position_embeddings=shape.max_position_embeddings,
            attention_bias=False,
            mlp_bias=False,
        ),
        optimizer=replace(ours.optimizer, name="adamw", learning_rate=1e-3, beta2=0.99),
        schedule=replace(
            ours.schedule, name="cosine", warmup_tokens=100 * batch, min_learning_rate_ratio=0.1
        ),
    )


def run_contender(arguments: argparse.Namespace, folder: Path) -> None:
    import torch

    from mtnlg.training.prepare import prepare

    torch.set_num_threads(arguments.threads)
    config = prepare(our_config(arguments, folder))
    clock = ProcessorClock(arguments.threads)
    if arguments.contender == "transformers":
        logits, facts = train_transformers(config, clock)
    else:
        if arguments.contender == "nanogpt":
            config = prepare(nanogpt_config(config, folder))
        logits, facts = train_ours(config, clock)
    facts["contender"] = arguments.contender
    facts.update(held_out_loss(logits, config, folder / f"held-out{arguments.source.suffix}"))
    if arguments.corpus == "poems":
        facts["form"] = third_lines(logits, config, folder / f"held-out{arguments.source.suffix}")
    path = folder / f"{arguments.contender}.json"
    path.write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
    print(path.read_text(encoding="utf-8"), flush=True)


class ProcessorClock:
    """Processor seconds of this process and its threads, divided by the number of threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __call__(self) -> float:
        return time.process_time() / self._threads


def train_ours(config, clock: ProcessorClock):
    """Train with the public function; ``logits(ids)`` of the trained model, and facts."""
    import torch

    from mtnlg import MegatronLmModel
    from mtnlg.training import trainer
    from mtnlg.training.loop import train

    trainer.Clock.__init__.__defaults__ = (0.0, clock)  # before, now
    result = train(config, fresh=True)
    model = MegatronLmModel.from_pretrained(config.run_dir)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return logits, {
        "parameters": parameters,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
    }


def train_transformers(config, clock: ProcessorClock):
    """GPT-2 of transformers in the loop that its users write."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from mtnlg.tokens.stream import BatchStream

    torch.manual_seed(config.seed)
    shape = config.model
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.max_position_embeddings,
            n_embd=shape.hidden_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    stream = BatchStream(config.data, "train", config.seed)
    size, length = config.batch.global_batch_size, config.data.sequence_length
    budget, begin, step = 60.0 * config.stop.minutes, clock(), 0
    while (share := (clock() - begin) / budget) < 1.0:
        rate = 1e-4 + 0.5 * (1e-3 - 1e-4) * (1.0 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100)
        batch = stream.batch(step * size, size)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision.dtype == "bf16"):
            logits = model(batch.input_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            print(f"transformers: step {step}, loss {loss.item():.3f}, {share:.0%}", flush=True)
    model.eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = clock() - begin
    return logits_of, {
        "parameters": parameters,
        "steps": step,
        "tokens": step * size * length,
        "seconds": seconds,
    }


def held_out_loss(logits, config, path: Path) -> dict[str, float]:
    """Nats a token and bits a character of the held-out text."""
    import torch
    import torch.nn.functional as F

    from mtnlg.config import BlendEntry
    from mtnlg.tokens import Tokenizer
    from mtnlg.tokens.documents import read_documents
    from mtnlg.tokens.encode import encode_files
    from mtnlg.tokens.stream import BatchStream

    tokenizer = Tokenizer.from_pretrained(config.tokenizer.path)
    prefix = path.with_suffix("")
    encode_files([str(path)], tokenizer, str(prefix), text_key=text_key(path))
    characters = sum(len(item.text) for item in read_documents([str(path)], text_key=text_key(path)))
    data = replace(config.data, blend=[BlendEntry(str(prefix.absolute()))], sources=[])
    stream = BatchStream(data, "all", shuffle=False)
    nats, tokens = 0.0, 0
    for position in range(0, stream.num_samples, 32):
        batch = stream.batch(position, 32)
        scores = logits(batch.input_ids).flatten(0, 1).float()
        nats += F.cross_entropy(scores, batch.labels.flatten(), reduction="sum", ignore_index=-100).item()
        tokens += int((batch.labels != -100).sum())
    assert isinstance(nats, float) and torch.isfinite(torch.tensor(nats))
    return {
        "held_out_tokens": tokens,
        "loss": nats / tokens,
        "bits_per_character": nats / math.log(2) / characters,
    }


def text_key(path: Path) -> str:
    return "paragraphs" if path.suffix == ".jsonl" else "text"


def third_lines(logits, config, path: Path, num_prompts: int = 50) -> dict[str, object]:
    """Give the first couplet of held-out five-character quatrains; how many third lines are in form?"""
    import torch

    from mtnlg.tokens import Tokenizer

    tokenizer = Tokenizer.from_pretrained(config.tokenizer.path)
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    verses = ["\n".join(record["paragraphs"]) for record in records]
    quatrains = [text for text in verses if FIVE_CHARACTER_QUATRAIN.fullmatch(text)][:num_prompts]
    generator = torch.Generator().manual_seed(0)
    in_form, examples = 0, []
    for text in quatrains:
        prompt = text.split("\n")[0] + "\n"
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        start = len(ids)
        for _ in range(20):
            scores = logits(torch.tensor([ids]))[0, -1].float() / 0.8
            best = scores.topk(50)
            chosen = torch.multinomial(best.values.softmax(0), 1, generator=generator)
            ids.append(int(best.indices[chosen]))
        line = tokenizer.decode(ids[start:]).split("\n")[0]
        in_form += bool(THIRD_LINE.match(line))
        examples.append({"prompt": prompt.strip(), "written": line})
    return {"prompts": len(quatrains), "in_form": in_form, "examples": examples[:10]}


def report(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the table of all contenders that have been measured in ``folder``."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for name in CONTENDERS
            if (path := folder / f"{name}.json").exists()]  # fmt: skip
    lines = [
        f"# {arguments.corpus}: {arguments.minutes:g} minutes on {arguments.threads} threads",
        "",
        f"{date.today()}, {platform.machine()}, {processor()}. Time is processor time over threads.",
        "",
        "| | parameters | steps | tokens | held-out loss (nats/token) | bits/character |"
        + (" third lines in form |" if arguments.corpus == "poems" else ""),
        "|---|---|---|---|---|---|" + ("---|" if arguments.corpus == "poems" else ""),
    ]
    for row in rows:
        line = (
            f"| {row['contender']} | {row['parameters']:,} | {row['steps']:,} | {row['tokens']:,} "
            f"| {row['loss']:.4f} | **{row['bits_per_character']:.4f}** |"
        )
        if "form" in row:
            line += f" {row['form']['in_form']} of {row['form']['prompts']} |"
        lines.append(line)
    if "form" in rows[0]:
        lines += ["", "First held-out prompts and what ours wrote (temperature 0.8, top-k 50):", ""]
        lines += [f"- {e['prompt']} → {e['written']}" for e in rows[0]["form"]["examples"]]
    table = REPOSITORY / "benchmarks" / "results" / f"{arguments.corpus}.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = re.findall(r"model name\s*: (.*)", text)
    return f"{len(names)} cores {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
