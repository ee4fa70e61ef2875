"""What DeepSpeed itself saves, read here: every tensor as its own ``zero_to_fp32`` finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop.test_deepspeed import megatron_parts, names_of_hugging_face
from tests.interop.test_hugging_face import LLAMA, random_model
from tests.interop.test_megatron import nested

from mtnlg.interop.deepspeed import open_deepspeed
from mtnlg.interop.megatron_config import options_of_config
from mtnlg.training.model_files import open_model_files

PROGRAM = Path(__file__).with_name("deepspeed_peer.py")
PYTHON = os.environ.get("DEEPSPEED_PYTHON") or (sys.executable if find_spec("deepspeed") else None)
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs DeepSpeed: DEEPSPEED_PYTHON=a Python that has it"
)

# Sizes that no alignment and no number of ranks divides.
ODD = dict(tie_word_embeddings=False, hidden_size=15, head_dim=6, intermediate_size=21)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
CASES = {
    f"stage-{stage}-{precision}": dict(stage=stage, precision=precision)
    for stage in range(4)
    for precision in ("fp32", "bf16")
} | {
    "stage-1-float32-gradients": dict(stage=1, precision="bf16", data_types=dict(grad_accum_dtype="fp32")),
    "stage-2-aligned": dict(stage=2, precision="bf16", zero=dict(parameter_alignment=True)),
    "stage-2-round-robin": dict(stage=2, precision="bf16", zero=dict(round_robin_gradients=True)),
    "stage-3-small-groups": dict(stage=3, precision="bf16", zero=dict(sub_group_size=1000)),
    **{f"stage-{stage}-parts-frozen": dict(stage=stage, precision="bf16", frozen=[UP, NORM])
       for stage in (1, 2, 3)},
    **{f"stage-{stage}-buffer": dict(stage=stage, precision="bf16", buffers=[NORM]) for stage in (2, 3)},
    **{f"stage-{stage}-tied": dict(stage=stage, precision="bf16", tied={HEAD: EMBEDDING})
       for stage in (0, 2, 3)},
    **{f"stage-{stage}-megatron": dict(stage=stage, precision="bf16", megatron={}) for stage in (0, 1, 2)},
}  # fmt: skip


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value.contiguous()


def megatron_task(folder: Path) -> dict:
    model = random_model(activation_function="gelu_tanh")
    save_file(dict(flat(nested(megatron_parts(model, 0, 1)))), folder / "megatron.safetensors")
    options = options_of_config(model.config, "float32")
    return dict(weights=str(folder / "megatron.safetensors"), megatron=vars(options))


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def saved(request, tmp_path_factory):
    """The folder of all cases' checkpoints, trained and saved one after the other in one process a rank."""
    place = tmp_path_factory.mktemp("deepspeed")
    model = random_model(**LLAMA | ODD)
    weights = names_of_hugging_face(model, place)
    save_file(weights, place / "whole.safetensors")
    del weights[HEAD]
    save_file(weights, place / "headless.safetensors")
    tasks = []
    for name, case in CASES.items():
        source = place / ("headless.safetensors" if "tied" in case else "whole.safetensors")
        more = megatron_task(place) if "megatron" in case else {}
        tasks.append(dict(case, weights=str(source), out=str(place / name)) | more)
    log = place / "log"
    with log.open("w") as stream:
        done = subprocess.run(
            [str(PYTHON), str(PROGRAM), str(request.param)], input=json.dumps(tasks), text=True,
            stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
        )  # fmt: skip
    assert not done.returncode, log.read_text()[-3000:]
    return place


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_what_deepspeed_finds(saved, name):
    expected = load_file(saved / f"{name}.safetensors")
    if "megatron" in CASES[name]:
        found = open_model_files(saved / name).read()
        reference = saved / f"{name}-as-one"
        reference.mkdir(exist_ok=True)
        options = options_of_config(open_model_files(saved / name).config, "float32")
        torch.save(
            dict(module=expected, args=options, checkpoint_version=3.0),
            reference / "mp_rank_00_model_states.pt",
        )
        expected = open_model_files(reference).read()
    else:
        found = dict(open_deepspeed(saved / name).tensors)
        assert open_model_files(saved / name).read().keys()
    assert expected.keys() <= found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
        assert found[key].dtype == tensor.dtype, key
