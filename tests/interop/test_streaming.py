"""Models come straight from the disk: no rank reads what it does not hold, and nothing is there twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.interop import rank_reading
from tests.interop.test_hugging_face import LLAMA, random_model
from tests.interop.test_megatron import write

from mtnlg.interop import write_hugging_face

FAMILIES = {
    "gpt2": dict(activation_function="gelu_tanh"),
    "llama": dict(**LLAMA, tie_word_embeddings=False),
    "mixtral": dict(**LLAMA, num_experts=4, moe_intermediate_size=24, tie_word_embeddings=False),
}


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_reads_only_what_it_holds(ranks, tmp_path, family, tensor, pipeline):
    model = random_model(**FAMILIES[family], num_hidden_layers=4)
    write_hugging_face(model, tmp_path, max_shard_bytes=30_000)
    found = ranks.run(tensor * pipeline, rank_reading.bytes_of_rank, str(tmp_path), tensor, pipeline)
    assert all(read == held for read, held in found)
    whole = sum(item.nbytes for item in model.parameters())
    assert all(read < 0.75 * whole for read, _ in found)


def test_so_it_is_with_a_checkpoint_of_megatron(ranks, tmp_path):
    model = random_model(**FAMILIES["llama"], num_hidden_layers=4)
    write(tmp_path, model)
    found = ranks.run(4, rank_reading.bytes_of_rank, str(tmp_path), 2, 2)
    assert all(read == held for read, held in found)


PROGRAM = """
import resource, sys
import torch
from mtnlg import MegatronLmModel
from mtnlg.training import model_files

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model_files.open_model_files(sys.argv[1])  # imports what is needed
before = peak()
model = MegatronLmModel.from_pretrained(sys.argv[1])
size = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) / size)
"""


def test_loading_takes_the_memory_of_the_model(tmp_path):
    """GPT-2's matrices are stored the other way round: one of them at a time is there twice."""
    model = random_model(vocab_size=8000, hidden_size=512, num_hidden_layers=6, intermediate_size=2048)
    write_hugging_face(model, tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.15
