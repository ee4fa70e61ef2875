"""Megatron-LM's checkpoints both ways, beside megatron-core and beside files in the older layout."""

from __future__ import annotations

import argparse
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.interop import megatron_workers as workers
from tests.interop.test_hugging_face import LLAMA, random_model
from tests.parallel.megatron_oracle import in_megatron_order, part_of_rank

from mtnlg.config import CheckpointError, ConfigError
from mtnlg.interop.megatron import open_megatron, write_megatron
from mtnlg.interop.megatron_config import options_of_config
from mtnlg.training.model_files import open_model_files

MODELS = {
    "gpt": dict(vocab_size=70),
    "llama": dict(**LLAMA, tie_word_embeddings=False, vocab_size=70),
}
MORE = {
    "qwen3": LLAMA | dict(qk_normalization=True, head_dim=12),
    "gpt-tanh": dict(activation_function="gelu_tanh", tie_word_embeddings=False),
    "relu2-rope": dict(activation_function="squared_relu", position_embedding="rotary", rotary_percent=0.5),
}
MIXTURE = LLAMA | dict(
    tie_word_embeddings=False, num_experts=4, moe_intermediate_size=24, router_load_balancing="none"
)  # fmt: skip
EXPERTS = {
    "experts": MIXTURE,
    "experts-bias": MIXTURE
    | dict(router_load_balancing="bias", router_score_function="sigmoid", num_dense_layers_first=1,
           num_shared_experts=1, router_scaling_factor=1.5, router_aux_loss_coefficient=0.0,
           router_bias_update_rate=0.001),
    "experts-shared": MIXTURE
    | dict(normalize_router_weights=False, num_shared_experts=1, shared_expert_intermediate_size=16,
           shared_expert_gate=True, moe_layer_interval=3),
}  # fmt: skip
ALL = [*MODELS, *MORE, *EXPERTS]
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="pip install 'mtnlg[bench]'")


def write(folder: Path, model, **options):
    state = model.state_dict()
    return write_megatron(folder, model.config, lambda names: ((n, state[n]) for n in names), **options)


def assert_same(model, found):
    expected = model.state_dict()
    weights = found.read()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("fields", [*MODELS.values(), *MORE.values(), *EXPERTS.values()], ids=ALL)
def test_the_way_there_and_back_changes_no_bit(tmp_path, fields):
    model = random_model(**fields)
    write(tmp_path, model)
    files = open_model_files(tmp_path)
    same = {name for name, value in files.config.to_dict().items() if value == model.config.to_dict()[name]}
    derived = {"head_dim", "moe_intermediate_size", "shared_expert_intermediate_size"}
    assert files.config.to_dict().keys() - same <= derived
    assert_same(model, files)


@needs_megatron
@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_megatron_loads_what_we_write(ranks, tmp_path, name, tensor_size):
    write(tmp_path, random_model(**MODELS[name]))
    folder = str(tmp_path / "release")
    assert ranks.run(2, workers.load, folder, MODELS[name], tensor_size) == [0.0, 0.0]


@needs_megatron
@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_we_load_what_megatron_writes(ranks, tmp_path, name, tensor_size):
    folder = workers.make_folder(tmp_path / "iter_0000003")
    ranks.run(2, workers.save, folder, MODELS[name], tensor_size)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    model = random_model(**MODELS[name])
    found = open_megatron(tmp_path)
    assert found.config == model.config
    assert_same(model, found)


@needs_megatron
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_megatrons(ranks, tmp_path, name):
    """It loads them from our files, we from its, and it computes the same with them."""
    fields = EXPERTS[name]
    write(tmp_path / "ours", random_model(**fields))
    folder = workers.make_folder(tmp_path / "theirs" / "iter_0000003")
    assert ranks.run(2, workers.load, str(tmp_path / "ours" / "release"), fields, 1) == [0.0, 0.0]
    ranks.run(2, workers.save, folder, fields, 1)
    assert max(ranks.run(2, workers.logits, fields)) < 1e-5
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("3")
    assert_same(random_model(**fields), open_megatron(tmp_path / "theirs"))


LEGACY = {
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


def save_ranks(
    folder: Path, model, tensor: int, pipeline: int, is_legacy: bool, padded: int = 0, **more
) -> None:
    """Files as Megatron-LM's ``--ckpt-format torch`` has them: one for each rank, layers counted anew."""
    config, count = model.config, model.config.num_hidden_layers // pipeline
    whole = in_megatron_order(dict(model.named_parameters(remove_duplicate=False)), config)
    if config.tie_word_embeddings:
        del whole["output_layer.weight"]
    options = options_of_config(config, "float32")
    vars(options).update(more)
    options.tensor_model_parallel_size, options.pipeline_model_parallel_size = tensor, pipeline
    for stage in range(pipeline):
        for rank in range(tensor):
            state = {}
            for name, item in whole.items():
                is_layer, is_first = name.startswith("decoder.layers."), name.startswith("embedding")
                if not is_layer and stage != (0 if is_first else pipeline - 1):
                    continue
                if "word_embeddings" in name and padded:
                    item = torch.cat([item, item.new_zeros(padded, item.shape[1])])
                if is_layer:
                    layer = int(name.split(".")[2])
                    if layer // count != stage:
                        continue
                    name = name.replace(f".{layer}.", f".{layer % count}.", 1)
                part = part_of_rank(name, item.detach(), config, rank, tensor).clone()
                state[name] = part
            inner = nested(state) if is_legacy else state
            place = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            place.mkdir(parents=True)
            saved = {"args": options, "checkpoint_version": 3.0, "iteration": 7, "model": inner}
            torch.save(saved, place / "model_optim_rng.pt")


def nested(state):
    """The names of Megatron-LM before its core."""
    inner: dict = {"language_model": {}}
    for name, item in state.items():
        for new, old in LEGACY.items():
            name = name.replace(new, old)
        section, _, rest = name.partition(".")
        if section == "embedding":
            part, _, kind = rest.partition(".")
            inner["language_model"].setdefault("embedding", {}).setdefault(part, {})[kind] = item
        elif section == "decoder":
            inner["language_model"].setdefault("encoder", {})[rest] = item
        else:
            inner["language_model"].setdefault("output_layer", {})[rest] = item
    return inner


@pytest.mark.parametrize("is_legacy", [False, True], ids=["core", "legacy"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_files_of_ranks_are_put_together(tmp_path, name, tensor, pipeline, is_legacy):
    model = random_model(**MODELS[name], num_hidden_layers=4)
    save_ranks(tmp_path / "iter_0000007", model, tensor, pipeline, is_legacy)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    files = open_model_files(tmp_path)
    assert files.config == model.config
    assert_same(model, files)


def test_rows_that_only_fill_up_the_vocabulary_are_left_out(tmp_path):
    model = random_model(**MODELS["llama"])
    save_ranks(tmp_path, model, 1, 1, is_legacy=False, padded=26)
    assert_same(model, open_megatron(tmp_path))


def test_a_missing_rank_is_named(tmp_path):
    save_ranks(tmp_path, random_model(**MODELS["llama"], num_hidden_layers=4), 2, 2, is_legacy=False)
    (tmp_path / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="tensor rank 1, pipeline rank 1 is missing"):
        open_megatron(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_runs_anything(tmp_path):
    evil = Evil(tmp_path / "made by a pickle")
    place = tmp_path / "mp_rank_00"
    place.mkdir()
    torch.save({"args": argparse.Namespace(), "model": evil}, place / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"its pickle names \w+\.mkdir, which could run code"):
        open_megatron(tmp_path)
    write(tmp_path / "new", random_model(**MODELS["gpt"]))
    (tmp_path / "new" / "release" / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"its pickle names \w+\.mkdir, which could run code"):
        open_megatron(tmp_path / "new")
    assert not evil.path.exists()


def test_what_does_not_fit_is_said(tmp_path):
    softmax_with_a_bias = MIXTURE | dict(router_load_balancing="bias")
    with pytest.raises(ConfigError, match=r"router_load_balancing is 'bias': there only with"):
        write(tmp_path, random_model(**softmax_with_a_bias))
    save_ranks(tmp_path / "old", random_model(**MODELS["llama"]), 1, 1, is_legacy=False, num_experts=4)
    with pytest.raises(CheckpointError, match=r"num_experts is 4: experts are read from distributed"):
        open_megatron(tmp_path / "old")
    with pytest.raises(ConfigError, match="activation_function is 'geglu'"):
        write(tmp_path, random_model(**LLAMA | dict(activation_function="geglu")))
    release = write(tmp_path, random_model(**MODELS["llama"]))
    common = torch.load(release / "common.pt", weights_only=False)
    common["args"].num_layers = 4
    torch.save(common, release / "common.pt")
    with pytest.raises(CheckpointError, match=r"layers\.3\.attention_norm\.weight is missing"):
        open_megatron(tmp_path)
    common["args"].num_layers, common["args"].hidden_size = 3, 64
    torch.save(common, release / "common.pt")
    with pytest.raises(CheckpointError, match=r"has the shape \[70, 32\], expected \[70, 64\]"):
        open_megatron(tmp_path)
    common["args"].multi_latent_attention = True
    torch.save(common, release / "common.pt")
    with pytest.raises(CheckpointError, match="multi_latent_attention is True"):
        open_megatron(tmp_path)
    (release / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError):
        open_megatron(tmp_path).read()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(CheckpointError, match="no folder iter_0000012"):
        open_megatron(tmp_path)
