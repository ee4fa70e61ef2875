"""Rules that guide generation: llguidance (what mtnlg uses) beside xgrammar, and what a mask costs.

    python benchmarks/constraints.py --chinese poems.jsonl prose/
    python benchmarks/constraints.py --threads 2 --sizes 8192 50257 --dtypes float32 bf16

Tokenizers of each size are trained on the standard library's sources, Python's documentation topics and
the Chinese files named. First table: how long each library takes for the tokenizer (once), for a rule
(median of --repeat compilations), and for the mask before every token of documents that the rule allows
(median, 99th percentile, worst), on the same tokens, in processor time. Second table: what a rule
adds to the choice of the next tokens (mask, its application, the rule's own step; processor time of 40
steps on random logits, mean), as a share of a decode step of a GPT-2-124M shape with random weights
(fastest of forty, wall time), so that the share is rather too large than too small on a busy machine.
xgrammar needs
`pip install xgrammar`; where it is missing it is named and left out.
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
from mtnlg.generation import GenerationRequest, SamplingRules
from mtnlg.generation.choose_runner import make_runner
from mtnlg.generation.constraints import constraint_from_options, default_end_ids, guided
from mtnlg.generation.runner import Row
from mtnlg.generation.sampler import SamplingState, sample
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.tokens import Tokenizer, read_documents

HERE = Path(__file__).resolve().parent
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


def model_step(model: MegatronLmDecoder, dtype: str, mode: str, batch: int) -> float:
    """Wall seconds of the model's fastest step over so many sequences of 32 tokens."""
    config = EngineConfig(dtype=dtype, max_batch_size=batch, cache_gib=0.5, compile=mode)
    runner = make_runner(model, config)
    pages = [[2 * row, 2 * row + 1, 2 * row + 2] for row in range(0, 2 * batch, 2)]
    fastest = float("inf")
    for _ in range(40):
        rows = [Row([100], 31, own) for own in pages]
        began = time.perf_counter()
        runner.run(rows)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def sampling_seconds(constraint: Any, vocab_size: int, rows: int, seed: int) -> float:
    """Processor seconds of choosing a token for each row and of moving on by it, on random logits."""
    generator = torch.Generator().manual_seed(seed)  # so that no text comes twice
    rules = [SamplingRules(temperature=1.0, top_p=0.95, seed=row) for row in range(rows)]
    states = [
        SamplingState.of_request(GenerationRequest([1], rule, constraint=constraint)) for rule in rules
    ]
    seconds = []
    for _ in range(40):
        logits = torch.randn(rows, vocab_size, generator=generator)
        began = time.thread_time()
        for state, sampled in zip(states, sample(logits, states)):
            assert sampled.error is None, sampled.error
            state.accept(sampled.token)
        seconds.append(time.thread_time() - began)
        for row, state in enumerate(states):  # those that are at their end begin again
            if state.constraint is not None and state.constraint.is_complete:
                request = GenerationRequest([1], rules[row], constraint=constraint)
                states[row] = SamplingState.of_request(request)
    return statistics.mean(seconds)


def engine_rows(
    size: int, tokenizer: Tokenizer, dtypes: list[str], batches: list[int], rounds: int, mode: str
) -> list[str]:
    rows = []
    threads = torch.get_num_threads()
    model = make_model(tokenizer.vocab_size)
    for batch in batches:
        added: dict[str, list[float]] = {name: [] for name in LONG_RULES}
        torch.set_num_threads(1)  # threads that wait for each other would count as work
        for number in range(rounds + 1):
            plain = sampling_seconds(None, tokenizer.vocab_size, batch, number)
            for name, (kind, value) in LONG_RULES.items():
                rule = constraint_from_options(tokenizer, tokenizer.vocab_size, kind, value)
                seconds = sampling_seconds(rule, tokenizer.vocab_size, batch, number)
                if number:  # the first warms up
                    added[name].append(seconds - plain)
        torch.set_num_threads(threads)
        for dtype in dtypes:
            step = model_step(model, dtype, mode, batch)
            for name, costs in added.items():
                cost = statistics.median(costs)
                rows.append(
                    f"| {size:,} | {dtype} | {batch} | {name} | {step * 1e3:.1f} ms | {cost * 1e6:.0f} µs "
                    f"| {cost / step:.1%} |"
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", default="off", help="see EngineConfig")
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
        "| vocabulary | dtype | batch | rule | the model's step | a rule adds | share |\n"
        "|---:|---|---:|---|---:|---:|---:|\n" + "\n".join(steps),
    ]
    arguments.out.write_text("\n\n".join(words) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
