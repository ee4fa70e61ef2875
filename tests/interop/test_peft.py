"""Adapters beside PEFT's own: the same loss and gradients on the same weights, files read both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtnlg import MegatronLmModel
from mtnlg.config import CheckpointError, ConfigError
from mtnlg.config.adapter import AdapterConfig
from mtnlg.interop.adapter import Adapter, adapter_of
from mtnlg.interop.peft import _matrices, _virtual_to_peft
from mtnlg.training.model_files import open_model_files

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.randint(0, 71, (2, 9), generator=torch.Generator().manual_seed(1))
LORA = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
LLAMA = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "attn.c_proj", "c_fc"]
CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=LLAMA)),
    "rank-stabilized": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=LLAMA, use_rslora=True)),
    "dora": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=LLAMA, use_dora=True)),
    "fused": ("gpt2", lambda: peft.LoraConfig(**LORA, target_modules=GPT2, fan_in_fan_out=True)),
    "prompt": ("llama", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prompt-gpt2": ("gpt2", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "ends": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=[*LLAMA, "embed_tokens", "lm_head"])),
    "tied-ends": ("gpt2", lambda: peft.LoraConfig(**LORA, target_modules=[*GPT2, "wte", "lm_head"])),
    "scaled-ends": ("gemma", lambda: peft.LoraConfig(**LORA, target_modules=["embed_tokens"])),
    "dora-head": ("gemma", lambda: peft.LoraConfig(**LORA, target_modules=["lm_head"], use_dora=True)),
    "prompt-gemma": ("gemma", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prefix": ("llama", lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prefix-gpt2": ("gpt2", lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of transformers' own classes."""
    torch.manual_seed(3)
    sizes = dict(vocab_size=71, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    llama = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **sizes,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, **sizes
    )
    gemma = transformers.GemmaConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, head_dim=6,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, **sizes,
    )  # fmt: skip
    made = {
        "gemma": transformers.GemmaForCausalLM(gemma),
        "llama": transformers.LlamaForCausalLM(llama),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_peft(folder: Path, config: Any) -> Any:
    """PEFT's model with an adapter that does something."""
    model = peft.get_peft_model(theirs_of(folder), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def our_loss(model: MegatronLmModel) -> Tensor:
    labels = torch.cat([IDS[:, 1:], torch.full((len(IDS), 1), -100)], dim=1)
    loss = model(IDS, labels).loss
    assert loss is not None
    return loss / (labels != -100).sum()


def their_gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.replace(".default", "").replace(".weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def our_gradients(model: MegatronLmModel) -> dict[str, Tensor]:
    """Under PEFT's names; a matrix that several of ours share gets the sum of their gradients."""
    found = adapter_of(model)
    grads = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if found.low_rank:
        named: dict[str, Tensor] = {}
        for rule in _matrices(model.config):
            if rule.ours[0] not in found.low_rank:
                continue
            parts = {
                kind: [grads.get(f"{one}.low_rank.{kind}") for one in rule.ours]
                for kind in ("down", "up", "magnitude")
            }
            name = f"base_model.model.{rule.theirs}"
            if rule.ours[0] == "embedding.tokens":
                named[f"{name}.lora_embedding_A"] = parts["down"][0]  # type: ignore[assignment]
                named[f"{name}.lora_embedding_B"] = parts["up"][0]  # type: ignore[assignment]
                continue
            named[f"{name}.lora_A"] = sum(parts["down"])  # type: ignore[arg-type, assignment]
            named[f"{name}.lora_B"] = rule.to_theirs(parts["up"])  # type: ignore[arg-type]
            if parts["magnitude"][0] is not None:
                named[f"{name}.lora_magnitude_vector"] = rule.to_theirs(parts["magnitude"])  # type: ignore[arg-type]
        return named
    prompt = grads.get("embedding.prompt.weight")
    pairs = [
        torch.stack([grads[f"layers.{n}.attention.prefix.{kind}"] for kind in ("key", "value")])
        for n in range(2 if prompt is None else 0)
    ]
    prefix = torch.stack(pairs) if pairs else None
    tensors = _virtual_to_peft(Adapter(found.config, prompt=prompt, prefix=prefix), model.config)[1]
    return {"prompt_encoder.embedding": tensors["prompt_embeddings"]}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_peft(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    theirs = with_peft(bases[family], config())
    theirs.save_pretrained(tmp_path / "adapter")
    ours = MegatronLmModel.from_pretrained(bases[family])
    ours.add_adapter(tmp_path / "adapter")
    their_loss = theirs(IDS, labels=torch.cat([torch.full((2, 1), -100), IDS[:, 1:]], dim=1)).loss
    loss = our_loss(ours)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
    their_loss.backward()
    loss.backward()
    expected, found = their_gradients(theirs), our_gradients(ours)
    assert expected.keys() == found.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_peft_reads_and_we_read_again(
    bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    family, config = CASES[case]
    base = MegatronLmModel.from_pretrained(bases[family])
    kind = config()
    ends = ["embedding.tokens", "head.output"] if case.endswith("ends") else []
    method = {"LORA": "lora", "PROMPT_TUNING": "prompt"}.get(str(kind.peft_type.value), "prefix")
    base.add_adapter(
        AdapterConfig(
            method=method,
            rank=3,
            target_modules=["attention.query", "attention.key", "attention.value", "mlp.up", *ends],
            num_virtual_tokens=4,
            decomposed=bool(getattr(kind, "use_dora", False)),
            rank_stabilized=bool(getattr(kind, "use_rslora", False)),
        )
    )
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    base.save_adapter(tmp_path, base=str(bases[family]))
    theirs = peft.PeftModel.from_pretrained(theirs_of(bases[family]), tmp_path).eval()
    logits = base(IDS).logits
    torch.testing.assert_close(theirs(IDS).logits[:, -IDS.shape[1] :], logits, rtol=1e-4, atol=1e-5)
    again = MegatronLmModel.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, logits)
    first, second = adapter_of(base), adapter_of(again)
    assert first.config == second.config
    assert first.low_rank.keys() == second.low_rank.keys()


def tuned(folder: Path, method: str = "lora", targets: Sequence[str] = ("all-linear",)) -> MegatronLmModel:
    model = MegatronLmModel.from_pretrained(folder)
    model.add_adapter(AdapterConfig(method=method, target_modules=list(targets), num_virtual_tokens=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["all-linear"]),
        ("gemma", ["all-linear", "embedding.tokens", "head.output"]),  # tied, and no longer so
        ("gpt2", ["attention.query", "head.output"]),
    ],
)
def test_merged_weights_compute_the_same_and_leave_as_a_model(
    bases: dict[str, Path], tmp_path: Path, family: str, targets: list[str]
) -> None:
    model = tuned(bases[family], targets=targets)
    logits = model(IDS).logits
    model.save_adapter(tmp_path / "adapter", base=str(bases[family]))
    with pytest.raises(ConfigError, match=r"merge_adapter\(\)"):
        model.save_pretrained(tmp_path / "whole")
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(theirs_of(tmp_path / "whole")(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    files = open_model_files(tmp_path / "adapter")
    for name, weight in files.read().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0.0, atol=1e-6)
    names = [f"{name}.weight" for name in ("layers.0.attention.query", "embedding.tokens", "head.output")]
    for name, weight in files.stream(frozenset(names[: 2 if files.config.tie_word_embeddings else 3])):
        assert torch.equal(weight, model.get_parameter(name)), name


def test_an_adapter_for_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = tuned(bases["llama"])
    model.save_adapter(tmp_path, base=str(bases["llama"]))
    other = MegatronLmModel.from_pretrained(bases["llama"])
    other.add_adapter(tmp_path)
    other.remove_adapter()
    with torch.no_grad():
        other.layers["1"].mlp.down.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="made for another base"):
        other.add_adapter(tmp_path)
    other.to(torch.bfloat16)
    half = MegatronLmModel.from_pretrained(bases["llama"], dtype=torch.bfloat16)
    half.add_adapter(tmp_path)  # another precision is the same base
    quantized = MegatronLmModel.from_pretrained(bases["llama"], quantize={"weights": "int8"})
    quantized.add_adapter(tmp_path)
    with pytest.raises(ConfigError, match="quantized"):
        quantized.merge_adapter()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        MegatronLmModel.from_pretrained(bases["gpt2"]).add_adapter(tmp_path)


def test_what_is_wrong_with_a_folder_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    model = tuned(bases["llama"], "prompt")
    model.save_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="names no base model"):
        MegatronLmModel.from_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    base = MegatronLmModel.from_pretrained(bases["llama"])
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"base_model_name_or_path": "nowhere"}, "cannot be opened"),
    ):
        path.write_text(json.dumps({**saved, **change}))
        with pytest.raises(CheckpointError, match=message):
            if "base" in next(iter(change)):
                MegatronLmModel.from_pretrained(tmp_path)
            else:
                base.add_adapter(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="broken JSON"):
        base.add_adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"Did you mean attention\.query"):
        base.add_adapter(AdapterConfig(target_modules=["attention.qerry"]))


def test_quantized_weights_below_an_adapter(bases: dict[str, Path]) -> None:
    """QLoRA: gradients are those of a float model with the weights that the codes stand for."""
    model = MegatronLmModel.from_pretrained(bases["llama"], quantize={"weights": "int4"})
    plain = MegatronLmModel.from_pretrained(bases["llama"])
    with torch.no_grad():
        for name, linear in plain.named_modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.copy_(model.get_submodule(name).dequantize())  # type: ignore[operator]
    torch.manual_seed(1)
    gradients = []
    for one in (model, plain):
        one.add_adapter(AdapterConfig(target_modules=["all-linear"], decomposed=True))
        our_loss(one).backward()
        gradients.append({name: item.grad for name, item in one.named_parameters() if item.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 3 * 7 * 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)
