"""Learning from a teacher's logits."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.training.helpers import Recorder
from tests.tuning.helpers import prepared, small_tuning, tune_here, tune_laid_out, write_base

from mtnlg import MegatronLmModel
from mtnlg.config import (
    ConfigError,
    DistillationConfig,
    LayoutConfig,
    MegatronModelConfig,
    StopConfig,
)
from mtnlg.model import IGNORED_LABEL
from mtnlg.tuning import Tuning
from mtnlg.tuning.distillation import DistilledLoss, distilled_cross_entropy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    write_base(folder / "teacher", hidden_size=48, num_hidden_layers=3, intermediate_size=80)
    return folder


def copied(config, run_dir):
    shutil.copytree(config.run_dir, run_dir)
    return str(run_dir)


def distilling(folder, name, tuning=None, **fields):
    teacher = {"teacher": str(folder / "teacher"), "share": 0.7, "temperature": 3.0, **fields}
    values = {"distillation": DistillationConfig(**teacher), **(tuning or {})}
    return small_tuning(folder, values, run_dir=str(folder / name))


def test_the_formula_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    targets = torch.tensor([1, 2, 3, 4, 10])
    loss = distilled_cross_entropy(student, teacher, targets, 0.7, 3.0)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum()
    expected = 0.7 * 9 * divergence + 0.3 * F.cross_entropy(student, targets, reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    known = student.detach().softmax(-1) - F.one_hot(targets, 11)
    assert torch.allclose(student.grad, 0.7 * 3 * (q - p) + 0.3 * known, atol=1e-5)
    padded = F.pad(teacher, (0, 3), value=9.0)  # of an embedding with rows to spare
    assert float(distilled_cross_entropy(student, padded, targets, 0.7, 3.0)) == float(loss)
    same = distilled_cross_entropy(teacher, teacher, targets, 1.0, 2.0)
    assert float(same) == pytest.approx(0.0, abs=1e-5)


def test_the_first_step_is_the_formula_on_scored_tokens(folder):
    config = prepared(distilling(folder, "first"))
    recorder = Recorder()
    result = tune_here(replace(config, stop=StopConfig(steps=1)), recorder)
    batch = Tuning().training_stream(config).batch(0, 4)
    models = [MegatronLmModel.from_pretrained(path) for path in (config.tuning.base, folder / "teacher")]
    with torch.no_grad():
        student, teacher = (
            model(batch.input_ids, None, batch.position_ids, batch.document_ids).logits for model in models
        )
    chosen = batch.labels != IGNORED_LABEL
    loss = distilled_cross_entropy(student[chosen], teacher[chosen], batch.labels[chosen], 0.7, 3.0)
    assert recorder.losses[1] == pytest.approx(float(loss) / batch.num_valid_tokens, rel=1e-5)
    stream = Tuning().validation_stream(config, None)  # of evaluations: cross entropy alone
    batch = stream.batch(0, stream.num_samples)
    model = MegatronLmModel.from_pretrained(config.run_dir)
    with torch.no_grad():
        plain = model(batch.input_ids, batch.labels, batch.position_ids, batch.document_ids).loss
    assert result.validation_loss == pytest.approx(float(plain) / batch.num_valid_tokens, rel=1e-5)


def test_a_softcap_of_the_student_is_in_both_terms():
    """As in Gemma 2, whose head gives it to its loss function."""
    fields = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    student, teacher = (
        MegatronLmModel(MegatronModelConfig(**fields, logit_softcap=cap)) for cap in (0.3, None)
    )
    ids, labels = torch.arange(10).view(2, 5), torch.arange(1, 11).view(2, 5)
    wanted = distilled_cross_entropy(
        student(ids).logits.flatten(0, 1), teacher(ids).logits.flatten(0, 1), labels.flatten(), 0.7, 3.0
    )
    loss = DistilledLoss(teacher, student.head, DistillationConfig("t", 0.7, 3.0))
    student.head.loss_function = loss
    stage = SimpleNamespace(training=True, forward=lambda inputs: inputs)
    loss.listen(stage, (ids,), {})
    assert float(student(ids, labels).loss) == pytest.approx(float(wanted), rel=1e-5)
    plain = F.cross_entropy(student(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert float(student(ids, labels).loss) == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_replicas_learn_the_same(folder, ranks, sharding):
    config = prepared(distilling(folder, f"replicas-{sharding}"))
    config = replace(config, stop=StopConfig(steps=3))
    alone = Recorder()
    tune_here(replace(config, run_dir=copied(config, folder / f"one-{sharding}")), alone)
    layout = LayoutConfig(data_parallel_size=2, data_parallel_sharding=sharding)
    found = ranks.run(2, tune_laid_out, replace(config, layout=layout))[0]
    assert found["losses"] == pytest.approx(alone.losses, rel=2e-5)


def test_what_cannot_learn_from_a_teacher_is_refused(folder):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        config = distilling(folder, "refused")
        prepared(replace(config, layout=LayoutConfig(tensor_parallel_size=2)))
    with pytest.raises(ConfigError, match="does not read virtual tokens"):
        prepared(distilling(folder, "refused", {"method": "prompt"}))
    other = write_base(folder / "other", vocab_size=400)
    prepared(distilling(folder, "padded", teacher=str(other)))  # the same tokens, and room for more
    (other / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="only token by token"):
        prepared(distilling(folder, "refused", teacher=str(other)))
