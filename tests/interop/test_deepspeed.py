"""DeepSpeed's checkpoints: files as its three stages of ZeRO and its pipeline modules leave them."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path

import pytest
import torch
from tests.interop.test_hugging_face import LLAMA, random_model
from tests.interop.test_megatron import LEGACY, MODELS, assert_same, nested
from tests.parallel.megatron_oracle import in_megatron_order, part_of_rank

from mtnlg.config import CheckpointError
from mtnlg.interop import write_hugging_face
from mtnlg.interop.deepspeed import open_deepspeed
from mtnlg.interop.megatron_config import options_of_config
from mtnlg.training.model_files import open_model_files

STEP = "global_step20"
RANKS = 3


def names_of_hugging_face(model, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the trained module, and its ``config.json`` in ``folder``."""
    from safetensors.torch import load_file

    write_hugging_face(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


@pytest.fixture(autouse=True)
def deepspeed_modules(monkeypatch):
    """DeepSpeed's own enumeration, as it is in the files of its optimizers."""
    name = ""
    for part in ("deepspeed", "runtime", "zero", "config"):
        name = f"{name}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].ZeroStageEnum = IntEnum("ZeroStageEnum", {"gradients": 2, "weights": 3}, module=name)


def stage_enum(value: int):
    return sys.modules["deepspeed.runtime.zero.config"].ZeroStageEnum(value)


def save(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def half(tensors):
    return OrderedDict((name, tensor.to(torch.float16)) for name, tensor in tensors.items())


def save_stage_2(folder: Path, tensors: dict, prefix="zero", untrained=(), alignment=1, **more) -> None:
    """Two groups of parameters; each flattened, filled up to a multiple of twice the ranks, and cut.

    With an alignment every parameter but the last of a group is filled up to a multiple of it.
    """
    names = [name for name in tensors if name not in untrained]
    groups = [names[0::2], names[1::2]]
    shapes = [OrderedDict((name, tensors[name].shape) for name in group) for group in groups]
    state = {"module": half(tensors), "param_shapes": shapes, "ds_version": "0.16.4", **more}
    save(folder / STEP / "mp_rank_00_model_states.pt", state)
    flat, gaps = [], []
    for group in groups:
        gaps.append([-tensors[name].numel() % alignment for name in group[:-1]] + [0])
        filled = [
            torch.cat([tensors[name].flatten(), torch.full((gap,), torch.nan)])
            for name, gap in zip(group, gaps[-1])
        ]
        whole = torch.cat(filled)
        whole = torch.cat([whole, whole.new_zeros(-len(whole) % (2 * RANKS))])
        flat.append(whole.chunk(RANKS))
    for rank in range(RANKS):
        optimizer = {"zero_stage": stage_enum(2), "partition_count": [RANKS, RANKS]}
        optimizer["single_partition_of_fp32_groups"] = [group[rank].clone() for group in flat]
        if alignment > 1:
            optimizer["param_alignment_paddings"] = gaps
        path = folder / STEP / f"{prefix}_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save(path, {"optimizer_state_dict": optimizer})
    (folder / "latest").write_text(STEP)


def save_stage_3(folder: Path, tensors: dict, frozen=(), buffers=()) -> None:
    """Every parameter is cut over all ranks by itself, the last part filled up; buffers are whole."""
    names = [name for name in tensors if name not in {*frozen, *buffers}]
    groups = [names[:2], names[2:]]
    shapes = [OrderedDict((name, tensors[name].shape) for name in group) for group in groups]
    parts = {}
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        parts[name] = torch.cat([flat, flat.new_zeros(-len(flat) % RANKS)]).chunk(RANKS)
    for rank in range(RANKS):
        stem = f"zero_pp_rank_{rank}_mp_rank_00"
        empty = OrderedDict((name, torch.empty(0)) for name in names)
        state = {"module": empty | {name: tensors[name] for name in buffers}, "param_shapes": shapes}
        state["frozen_param_shapes"] = {name: tensors[name].shape for name in frozen}
        state["frozen_param_fragments"] = {name: parts[name][rank].clone() for name in frozen}
        save(folder / STEP / f"{stem}_model_states.pt", state)
        flat_groups = [torch.cat([parts[name][rank] for name in group]) for group in groups]
        optimizer = {"zero_stage": stage_enum(3), "partition_count": RANKS, "fp32_flat_groups": flat_groups}
        save(folder / STEP / f"{stem}_optim_states.pt", {"optimizer_state_dict": optimizer})
    (folder / "latest").write_text(STEP)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fields", [{}, LLAMA | dict(tie_word_embeddings=False)], ids=["gpt2", "llama"])
def test_parts_of_float32_weights_are_put_together(tmp_path, fields, stage):
    model = random_model(**fields)
    tensors = names_of_hugging_face(model, tmp_path)
    {2: save_stage_2, 3: save_stage_3}[stage](tmp_path, tensors)
    files = open_model_files(tmp_path)
    assert files.config == model.config
    assert_same(model, files)
    with torch.no_grad():  # one parameter alone, and a slice of it
        ((_, found),) = files.stream(["layers.1.mlp.up.weight"], lambda name, whole: whole[3:9, 5:])
    assert torch.equal(found, model.state_dict()["layers.1.mlp.up.weight"][3:9, 5:])


# Two sizes that three ranks and eight numbers do not divide.
ODD = LLAMA | dict(tie_word_embeddings=False, hidden_size=15, head_dim=6, intermediate_size=21)
NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("stage", [1, 3])
def test_what_was_not_trained_is_beside_the_optimizer(tmp_path, stage):
    """Frozen parameters and buffers: of ZeRO 1 in the module, frozen ones of ZeRO 3 cut over ranks."""
    model = rounded(random_model(**ODD))
    tensors = names_of_hugging_face(model, tmp_path)
    if stage == 1:
        save_stage_2(tmp_path, tensors, untrained=[NORM, UP])
    else:
        save_stage_3(tmp_path, tensors, frozen=[UP], buffers=[NORM])
    found = open_model_files(tmp_path).read()
    assert all(torch.equal(found[name].float(), item) for name, item in model.state_dict().items())


def test_parameters_at_aligned_addresses(tmp_path):
    model = random_model(**ODD)
    save_stage_2(tmp_path, names_of_hugging_face(model, tmp_path), alignment=8)
    assert_same(model, open_model_files(tmp_path))


def test_a_tied_tensor_has_float32_under_both_names(tmp_path):
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"a": weight, "b": weight, "c": weight.sum(0)}
    save_stage_2(tmp_path, tensors, untrained=["b"], shared_params={"b": "a"})
    found = open_deepspeed(tmp_path).tensors
    assert torch.equal(found["a"], weight) and torch.equal(found["b"], weight)


@pytest.mark.parametrize("save_stage", [save_stage_2, save_stage_3])
def test_parts_of_another_size_are_refused(tmp_path, save_stage):
    save_stage(tmp_path, {"a": torch.randn(40, 3), "b": torch.randn(5), "c": torch.randn(7)})
    for path in (tmp_path / STEP).glob("*_model_states.pt"):
        state = torch.load(path)
        state["param_shapes"][0]["a"] = torch.Size([40, 2])
        torch.save(state, path)
    with pytest.raises(CheckpointError, match="have another size than the weights they are of"):
        open_deepspeed(tmp_path)


def test_stage_3_without_its_optimizer_has_no_weights(tmp_path):
    save_stage_3(tmp_path, {"a": torch.randn(40, 3), "b": torch.randn(5), "c": torch.randn(7)})
    for path in (tmp_path / STEP).glob("*_optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="ZeRO 3 keeps the weights in zero_pp_rank_"):
        open_deepspeed(tmp_path)


def test_experts_are_refused(tmp_path):
    save_stage_2(tmp_path, {"a": torch.randn(4, 3), "b": torch.randn(5)})
    save(tmp_path / STEP / "layer_0_expert_3_mp_rank_00_model_states.pt", {})
    with pytest.raises(CheckpointError, match="experts of DeepSpeed are not read"):
        open_deepspeed(tmp_path)


def test_a_missing_part_is_noticed(tmp_path):
    save_stage_3(tmp_path, names_of_hugging_face(random_model(), tmp_path))
    (tmp_path / STEP / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="saved by 3 data ranks and there are files of 2"):
        open_model_files(tmp_path)


def test_weights_without_their_config_need_it(tmp_path):
    save_stage_2(tmp_path / "there", names_of_hugging_face(random_model(), tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match=r"put its config\.json"):
        open_model_files(tmp_path / "there")


def megatron_parts(model, rank: int, size: int) -> dict[str, torch.Tensor]:
    whole = in_megatron_order(dict(model.named_parameters(remove_duplicate=False)), model.config)
    if model.config.tie_word_embeddings:
        del whole["output_layer.weight"]
    return {
        name: part_of_rank(name, item.detach(), model.config, rank, size).clone()
        for name, item in whole.items()
    }


def rounded(model):
    """The model with the numbers that float16 keeps."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_megatron_deepspeed_without_a_pipeline(tmp_path, name, tensor_size):
    model = random_model(**MODELS[name])
    options = options_of_config(model.config, "float32")
    options.tensor_model_parallel_size = tensor_size
    for rank in range(tensor_size):
        module = nested(megatron_parts(model, rank, tensor_size))
        content = {"module": module, "args": options, "checkpoint_version": 3.0}
        save(tmp_path / STEP / f"mp_rank_{rank:02d}_model_states.pt", content)
    (tmp_path / "latest").write_text(STEP)
    files = open_model_files(tmp_path)
    assert files.config == model.config
    assert_same(model, files)


def test_megatron_deepspeed_with_float32_weights(tmp_path):
    model = random_model(**MODELS["gpt"])
    parts = {}

    def flatten(state, prefix=""):
        for key, value in state.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                parts[prefix + key] = value

    flatten(nested(megatron_parts(model, 0, 1)))
    options = options_of_config(model.config, "float32")
    save_stage_2(tmp_path, parts, "bf16_zero", args=options)
    assert_same(model, open_model_files(tmp_path))


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_pipeline_module(tmp_path, name, tensor_size):
    """As BLOOM's training saved them: one file a layer, numbered with gaps, the tied embedding twice."""
    model = rounded(random_model(**MODELS[name]))
    options = options_of_config(model.config, "float32")
    options.tensor_model_parallel_size, options.pipeline_model_parallel_size = tensor_size, 2
    for rank in range(tensor_size):
        layers: dict[int, dict] = {}
        for key, item in half(megatron_parts(model, rank, tensor_size)).items():
            for new, old in LEGACY.items():
                key = key.replace(new, old)
            section, _, rest = key.partition(".")
            if section == "embedding":
                layers.setdefault(1, {})[rest] = item
            elif rest.startswith("layers."):
                _, index, part = rest.split(".", 2)
                layers.setdefault(3 + int(index), {})[part] = item
            elif section == "decoder":
                layers.setdefault(7, {})[rest.split(".")[-1]] = item
            else:
                layers.setdefault(8, {})["lm_head.weight"] = item
        if model.config.tie_word_embeddings:
            layers[8] = dict(layers[1])
        for number, content in layers.items():
            save(tmp_path / STEP / f"layer_{number:02d}-model_{rank:02d}-model_states.pt", content)
    for rank in range(2 * tensor_size):
        save(tmp_path / STEP / f"mp_rank_{rank:02d}_model_states.pt", {"module": None, "args": options})
    (tmp_path / "latest").write_text(STEP)
    files = open_model_files(tmp_path)
    weights = files.read()
    assert all(torch.equal(weights[key], item.half()) for key, item in model.state_dict().items())
