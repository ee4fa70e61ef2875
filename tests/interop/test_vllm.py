"""What we export and what others have quantized, loaded by vLLM: the same tokens and log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.interop.packed_folders import packed_folder

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.tokens import Tokenizer

PROGRAM = Path(__file__).with_name("vllm_peer.py")
PYTHON = os.environ.get("VLLM_PYTHON") or ("python" if find_spec("vllm") else None)
pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs vLLM: VLLM_PYTHON=a Python that has it")

SHAPE = dict(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    max_position_embeddings=128, init_method_std=0.15,
)  # fmt: skip
LLAMA = dict(
    position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu",
    attention_bias=False, mlp_bias=False, tie_word_embeddings=False, num_key_value_heads=2,
)  # fmt: skip
FLOAT32 = {
    "gpt2": dict(activation_function="gelu_tanh"),
    "llama": LLAMA,
    "qwen3": LLAMA | dict(qk_normalization=True, tie_word_embeddings=True),
}
INT4 = dict(weights="int4", group_size=32, head="float")
QUANTIZED = {
    "w4a16": INT4,
    "w4a16-zeros": INT4 | dict(symmetric=False),
    "w8a8": dict(activations="int8", head="float"),
}
OTHERS = {
    "gptq": dict(quant_method="gptq", bits=4, group_size=32, sym=True, desc_act=False),
    "awq": dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"),
}
BOUNDS = {"w8a8": 0.3}  # activations are rounded, by other roundings than ours
IN_BF16 = 0.15  # of 8 bits of mantissa over two layers with random weights
MESSAGES = [dict(role="user", content="你好, how are you?")]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Each folder, and what vLLM finds in it; all in one process, which takes long to begin."""
    place = tmp_path_factory.mktemp("vllm")
    tokenizer = Tokenizer.train(["How are you? 你好吗？"] * 3, vocab_size=280, min_frequency=1)
    tokenizer = Tokenizer(tokenizer.definition, {"chat_template": TEMPLATE})
    size = dict(SHAPE, vocab_size=tokenizer.vocab_size)
    for name, fields in FLOAT32.items():
        model = MegatronLmModel(MegatronModelConfig(**size, **fields))
        model.tokenizer = tokenizer
        model.save_pretrained(place / name)
    for name, numbers in QUANTIZED.items():
        config = MegatronModelConfig(**size, **LLAMA, quantize=True, quantize_config=numbers)
        MegatronLmModel(config).save_pretrained(place / name)
    for name, said in OTHERS.items():
        packed_folder(place / name, said, **size, **LLAMA)
    ids = [[3, 4, 5, 6], [7, 8, 9, 20, 21, 22, 23, 24, 25]]
    tasks = []
    for name in (*FLOAT32, *QUANTIZED, *OTHERS):
        task = dict(
            folder=str(place / name), dtype="float32" if name in FLOAT32 else "bfloat16", ids=ids, new=8
        )
        tasks.append(task | dict(messages=MESSAGES) if name == "llama" else task)
    command = [str(PYTHON), str(PROGRAM), str(place / "answers.json")]
    done = subprocess.run(command, input=json.dumps(tasks), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((place / "answers.json").read_text())
    return {Path(task["folder"]).name: (task, one) for task, one in zip(tasks, found)}


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", [*FLOAT32, *QUANTIZED, *OTHERS])
def test_vllm_computes_the_same(answers, name):
    task, found = answers[name]
    assert "error" not in found, found["error"]
    model = MegatronLmModel.from_pretrained(task["folder"], dtype=getattr(torch, task["dtype"]))
    bound = 1e-4 if name in FLOAT32 else BOUNDS.get(name, IN_BF16)
    for ids, new, theirs, prompt in zip(task["ids"], *(found[k] for k in ("greedy", "logprobs", "prompt"))):
        with torch.no_grad():
            ours = model(torch.tensor([ids + new])).logits[0, :-1].float().log_softmax(-1)
        expected = torch.tensor(prompt + theirs)
        chosen = ours.gather(1, torch.tensor((ids + new)[1:])[:, None])[:, 0]
        assert float((chosen - expected).abs().max()) < bound
        best = ours[len(ids) - 1 :]
        assert bool((best.amax(-1) - chosen[len(ids) - 1 :] < (1e-4 if name in FLOAT32 else bound)).all())


def test_the_chat_template_goes_along(answers):
    task, found = answers["llama"]
    tokenizer = Tokenizer.from_pretrained(Path(task["folder"]))
    assert found["chat"] == tokenizer.encode("<|user|>你好, how are you?")
