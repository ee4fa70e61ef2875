"""vLLM's opinion of our folders; runs in an environment of its own, without mtnlg.

    python vllm_peer.py OUT < '[{"folder": DIR, "dtype": "float32", "ids": [[1]], "new": 8}]'

Writes for each task to OUT ``{"greedy": [ids after each row of ids], "logprobs": [of these],
"prompt": [of the ids themselves, but the first], "chat": [the ids of the messages by the chat template]}``,
or ``{"error": why vLLM does not load it}``. ``messages`` of a task are optional.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
from vllm import LLM, SamplingParams, TokensPrompt


def answer(task):
    model = LLM(
        task["folder"], dtype=task["dtype"], max_model_len=64, max_num_seqs=4, enforce_eager=True,
        skip_tokenizer_init="messages" not in task,
    )  # fmt: skip
    asked = SamplingParams(
        max_tokens=task["new"],
        temperature=0.0,
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    found = model.generate(
        [TokensPrompt(prompt_token_ids=row) for row in task["ids"]], asked, use_tqdm=False
    )
    outputs = [one.outputs[0] for one in found]
    return {
        "greedy": [list(one.token_ids) for one in outputs],
        "logprobs": [of_tokens(one.token_ids, one.logprobs) for one in outputs],
        "prompt": [of_tokens(one.prompt_token_ids[1:], one.prompt_logprobs[1:]) for one in found],
        "chat": chat(model, task["messages"]) if "messages" in task else None,
    }


def of_tokens(ids, steps):
    return [step[token].logprob for token, step in zip(ids, steps)]


def chat(model, messages):
    asked = SamplingParams(max_tokens=1, temperature=0.0)
    return list(model.chat([messages], asked, use_tqdm=False)[0].prompt_token_ids)


def answered(task):
    try:
        return answer(task)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


Path(sys.argv[1]).write_text(json.dumps([answered(task) for task in json.load(sys.stdin)]))
