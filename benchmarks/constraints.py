"""Rules that guide generation: llguidance (what mtnlg uses) beside xgrammar, and what a mask costs.

    python benchmarks/constraints.py --chinese poems.jsonl prose/
    python benchmarks/constraints.py --threads 2 --sizes 8192 50257 --dtypes float32 bf16

Tokenizers of each size are trained on the standard library's sources, Python's documentation topics and
the Chinese files named. First table: how long each library takes for the tokenizer (once), for a rule
(median of --repeat compilations), and for the mask before every token of documents that the rule allows
(median, 99th percentile, worst), on the same tokens, in processor time. Second table: an engine over a
GPT-2-124M shape with random weights, as it runs for everyone, writes texts of 40 tokens with and without
a rule, one kind after the other. A step without a rule is the median of all; what a rule adds is all that
is not the model (mask, its application, the choice, the rule's own step, the text; wall time), mean of a
round with the rule less mean of one without: of the first round, whose masks are new, and the median of
--rounds later ones with other seeds. Short texts, whose steps are the fastest: the share is rather too
large than too small. xgrammar needs `pip install xgrammar`; where it is missing it is named and left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import english

from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import Engine, GenerationRequest, SamplingRules
from mtnlg.generation.constraints import constraint_from_options, default_end_ids, guided
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.tokens import Tokenizer, read_documents

HERE = Path(__file__).resolve().parent
PROMPT, STEPS = 8, 40  # tokens of the texts of the second table
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "author": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "born": {"type": "integer"}},
            "required": ["name"],
            "additionalProperties": False,
        },
        "lines": {"type": "array", "items": {"type": "string"}},
        "mood": {"enum": ["happy", "sad", "calm", "愁"]},
        "rating": {"type": "number"},
    },
    "required": ["title", "author", "lines", "mood"],
    "additionalProperties": False,
}
DOCUMENT = json.dumps(
    {
        "title": "登鹳雀楼 (On the Stork Tower)",
        "author": {"name": "王之涣", "born": 688},
        "lines": ["白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼", 'He said: "climb" \\ look'],
        "mood": "calm",
        "rating": 4.75,
    },
    ensure_ascii=False,
)
LARK = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]+(\\.[0-9]+)?/
"""
EBNF = """
root ::= sum
sum ::= product (("+" | "-") product)*
product ::= atom (("*" | "/") atom)*
atom ::= number | "(" sum ")"
number ::= [0-9]+ ("." [0-9]+)?
"""
SENTENCE = "(今天|昨天|明天)的天气是[一-龥]{1,12}，气温-?[0-9]{1,2}到[0-9]{1,2}度。"
TEXTS = {
    "JSON schema": DOCUMENT,
    "any JSON object": DOCUMENT,
    "regular expression": "昨天的天气是先晴后多云有小雨，气温12到18度。",
    "grammar": "(12+3.5)*7-(((88/4)+9)*1024)/3",
}
# Rules of the second table: each keeps a model that knows nothing busy for as long as wanted.
LONG_RULES: dict[str, tuple[str, Any]] = {
    "JSON schema": ("json_schema", {"type": "array", "items": SCHEMA, "minItems": 50}),
    "regular expression": ("regex", "([一-龥a-z ]{5}[，。\\n]){200}"),
    "verse, 64 lines": ("verse", ",".join(["7"] * 64) + ":rhyme=" + ",".join(map(str, range(2, 65, 2)))),
    "verse, regulated": ("verse", "qilv"),
}


def train_tokenizers(sizes: list[int], chinese: list[Path], keep: Path | None) -> dict[int, Tokenizer]:
    tokenizers = {}
    for size in sizes:
        if keep is not None and (keep / str(size)).is_dir():
            tokenizers[size] = Tokenizer.from_pretrained(keep / str(size))
            continue
        documents = read_documents(chinese or [HERE.parent / "data" / "zh"])
        tokenizers[size] = Tokenizer.train([*english(), *(document.text for document in documents)], size)
        if keep is not None:
            tokenizers[size].save_pretrained(keep / str(size))
    return tokenizers


def earlier_rows(path: Path, sizes: list[int]) -> tuple[list[str], list[str]]:
    """Rows of both tables of an earlier run that had other sizes."""
    tables: list[list[str]] = [[], []]
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        if cells[0].isdigit() and int(cells[0]) not in sizes:
            tables[cells[2].isdigit()].append(line)
    return tables[0], tables[1]


# -- the two libraries


class Llguidance:
    name = "llguidance"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ends = tokenizer, tuple(default_end_ids(tokenizer))
        guided._guided_tokenizer(tokenizer.definition, tokenizer.vocab_size, self.ends)

    def compile(self, kind: str) -> Callable[[], Any]:
        grammar = {
            "JSON schema": lambda: guided.json_schema_grammar(SCHEMA),
            "any JSON object": guided.json_object_grammar,
            "regular expression": lambda: guided.regex_grammar(SENTENCE),
            "grammar": lambda: guided.context_free_grammar(LARK),
        }[kind]()
        guided._compile.cache_clear()
        constraint = guided.compile_grammar(
            self.tokenizer, self.tokenizer.vocab_size, self.ends, grammar, "grammar"
        )
        return constraint.start

    @staticmethod
    def fill(state: Any, words: torch.Tensor) -> None:
        state.fill_mask(words[0])

    @staticmethod
    def accept(state: Any, token: int) -> None:
        state.accept(token)


class Xgrammar:
    name = "xgrammar"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        self.module = xgrammar
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer.core, eos_token="<|endoftext|>")
        info = xgrammar.TokenizerInfo.from_huggingface(wrapped, vocab_size=tokenizer.vocab_size)
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str) -> Callable[[], Any]:
        compiled = {
            "JSON schema": lambda: self.compiler.compile_json_schema(json.dumps(SCHEMA)),
            "any JSON object": lambda: self.compiler.compile_json_schema('{"type": "object"}'),
            "regular expression": lambda: self.compiler.compile_regex(SENTENCE),
            "grammar": lambda: self.compiler.compile_grammar(EBNF),
        }[kind]()
        return lambda: self.module.GrammarMatcher(compiled)

    @staticmethod
    def fill(state: Any, words: torch.Tensor) -> None:
        state.fill_next_token_bitmask(words, 0)

    @staticmethod
    def accept(state: Any, token: int) -> None:
        assert state.accept_token(token)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of all threads, which busy neighbours disturb less than wall time."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def compare(size: int, tokenizer: Tokenizer, repeat: int) -> list[str]:
    libraries, rows = [], []
    for make in (Llguidance, Xgrammar):
        try:
            guided._guided_tokenizer.cache_clear()
            seconds, library = timed(lambda make=make: make(tokenizer))
        except ImportError as error:
            print(f"{make.name} is left out: {error}")
            continue
        libraries.append(library)
        rows.append(f"| {size:,} | {library.name} | tokenizer, once | {seconds * 1e3:.0f} ms | | | |")
    words = torch.zeros((1, -(-tokenizer.vocab_size // 32)), dtype=torch.int32)
    for kind, text in TEXTS.items():
        ids = tokenizer.encode(text)
        compiling: dict[str, list[float]] = {library.name: [] for library in libraries}
        filling: dict[str, list[float]] = {library.name: [] for library in libraries}
        for _ in range(repeat):
            for library in libraries:
                seconds, start = timed(lambda library=library, kind=kind: library.compile(kind))
                compiling[library.name].append(seconds)
                for _ in range(3):
                    state = start()
                    for token in ids:
                        seconds, _ = timed(lambda library=library, state=state: library.fill(state, words))
                        filling[library.name].append(seconds)
                        is_allowed = int(words[0, token // 32]) >> (token % 32) & 1
                        assert is_allowed, (library.name, kind, tokenizer.decode([token]))
                        library.accept(state, token)
        for library in libraries:
            masks = np.array(filling[library.name]) * 1e6
            ready = statistics.median(compiling[library.name])
            rows.append(
                f"| {size:,} | {library.name} | {kind} | {ready * 1e3:.2f} ms "
                f"| {np.median(masks):.0f} µs | {np.percentile(masks, 99):.0f} µs | {masks.max():.0f} µs |"
            )
            print(rows[-1], flush=True)
    return rows


# -- the engine


def make_model(vocab_size: int) -> MegatronLmDecoder:
    config = MegatronModelConfig.from_preset("gpt2", vocab_size=vocab_size)
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=1)
    return model.eval()


def beside_the_model(
    engine: Engine, constraint: Any, batch: int, number: int
) -> tuple[list[float], list[float]]:
    """Seconds of whole steps in which all requests get a token, and what of them is not the model."""
    for row in range(batch):
        rules = SamplingRules(temperature=1.0, top_p=0.95, seed=batch * number + row)
        request = GenerationRequest([100] * PROMPT, rules, max_new_tokens=STEPS + 2, constraint=constraint)
        engine.submit(request)
    counted = engine.statistics
    whole, beside = [], []
    is_working, steps = True, 0
    while is_working:
        before = counted.new_tokens, counted.step_seconds, counted.model_seconds
        is_working = engine.step()
        tokens, step, model = (
            now - then
            for now, then in zip((counted.new_tokens, counted.step_seconds, counted.model_seconds), before)
        )
        steps += 1
        if tokens == batch and steps > 1:  # the first has the prompts; after the last some have ended
            whole.append(step)
            beside.append(step - model)
    return whole, beside


def engine_rows(
    size: int, tokenizer: Tokenizer, dtypes: list[str], batches: list[int], rounds: int, mode: str
) -> list[str]:
    rows = []
    model = make_model(tokenizer.vocab_size)
    rules = {
        name: constraint_from_options(tokenizer, tokenizer.vocab_size, kind, value)
        for name, (kind, value) in LONG_RULES.items()
    }
    for batch in batches:
        for dtype in dtypes:
            config = EngineConfig(dtype=dtype, max_batch_size=batch, cache_gib=0.5, compile=mode)
            engine = Engine(model, tokenizer.decode, config)
            steps: list[float] = []
            added: dict[str, list[float]] = {name: [] for name in rules}
            beside_the_model(engine, None, batch, 0)  # warms up
            for number in range(rounds + 1):
                whole, plain = beside_the_model(engine, None, batch, number)
                steps += whole if number else []
                for name, rule in rules.items():
                    _, beside = beside_the_model(engine, rule, batch, number)
                    added[name].append(statistics.mean(beside) - statistics.mean(plain))
            engine.close()
            step = statistics.median(steps)
            for name, (first, *others) in added.items():
                cost = statistics.median(others)
                rows.append(
                    f"| {size:,} | {dtype} | {batch} | {name} | {step * 1e3:.1f} ms | {first * 1e6:.0f} µs "
                    f"| {cost * 1e6:.0f} µs | {cost / step:.1%} |"
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chinese", type=Path, nargs="*", default=[])
    parser.add_argument("--tokenizers", type=Path, help="folder that keeps the trained ones")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8_192, 50_257])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", default="auto", help="see EngineConfig")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "constraints.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizers = train_tokenizers(arguments.sizes, arguments.chinese, arguments.tokenizers)
    libraries, steps = earlier_rows(arguments.out, arguments.sizes)
    for size, tokenizer in tokenizers.items():
        libraries += compare(size, tokenizer, arguments.repeat)
        steps += engine_rows(
            size, tokenizer, arguments.dtypes, arguments.batches, arguments.rounds, arguments.compile
        )
    words = [
        "# Rules that guide generation",
        f"`python benchmarks/constraints.py`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, "
        f"{arguments.threads} threads, torch {torch.__version__}.",
        "## The libraries\n\n| vocabulary | library | rule | ready after | mask, median | 99% | worst |\n"
        "|---:|---|---|---:|---:|---:|---:|\n" + "\n".join(libraries),
        "## What a rule adds to a decode step of GPT-2 124M's shape\n\n"
        "| vocabulary | dtype | batch | rule | a step without | first texts add | later ones | share |\n"
        "|---:|---|---:|---|---:|---:|---:|---:|\n" + "\n".join(steps),
    ]
    arguments.out.write_text("\n\n".join(words) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
