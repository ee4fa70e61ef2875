"""What the laid-out model promises besides parity."""

from pathlib import Path

import pytest
import torch
from tests.parallel import workers
from tests.parallel.parity import GPT, LLAMA, layout_fields
from tests.ranks import RankPool

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.parallel import build_mesh, lay_out


@pytest.mark.parametrize("fields", [GPT, LLAMA])
def test_one_process_runs_the_plain_model(fields: dict[str, object]) -> None:
    config = MegatronModelConfig(**fields)
    plain = MegatronLmDecoder(config)
    initialize_weights(plain, config, seed=5)
    model = lay_out(config, build_mesh(LayoutConfig()), seed=5)
    ours = dict(model.named_parameters())
    assert model.is_whole and type(model.decoder) is MegatronLmDecoder
    assert all(type(parameter) is torch.nn.Parameter for parameter in ours.values())
    assert list(ours) == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(ours[name], parameter) for name, parameter in plain.named_parameters())
    batch = workers.make_batches(config.vocab_size, 2, 8, True, 1, 1)[0][0]
    loss = model.forward_backward([batch], batch.num_valid_tokens, loss_scale=4.0)
    output = plain(batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
    (output.loss * (4.0 / batch.num_valid_tokens)).backward()
    assert torch.equal(loss, output.loss.detach())
    norms = []
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-6, atol=1e-7)
        norms.append(parameter.grad.norm())
    torch.testing.assert_close(model.gradient_norm(), torch.stack(norms).norm())
    model.scale_gradients(0.5)
    torch.testing.assert_close(model.gradient_norm(), 0.5 * torch.stack(norms).norm())
    model.zero_gradients()
    assert all(parameter.grad is None for parameter in ours.values())


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_dropout_differs_where_activations_do(ranks: RankPool, sequence_parallel: bool) -> None:
    layout = {**layout_fields(2, 1, 2), "sequence_parallel": sequence_parallel}
    numbers = ranks.run(4, workers.dropout_streams, layout)
    assert all(first == again != second for first, second, again in numbers)
    firsts = [first for first, _, _ in numbers]
    assert len(set(firsts)) == (4 if sequence_parallel else 2)
    assert (firsts[0] == firsts[1]) is not sequence_parallel, "ranks 0 and 1 share each matrix"


@pytest.mark.parametrize("fields", [GPT, LLAMA])
def test_compiled_layers_get_plain_tensors(ranks: RankPool, fields: dict[str, object]) -> None:
    # Compiling failed in the backward pass on torch's tensors that are still under way.
    assert ranks.run(2, workers.embedded_type, fields, layout_fields(2, 1, 1)) == ["Tensor"] * 2


def test_wrong_number_of_ranks_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    from tests.ranks import RankError

    with pytest.raises(RankError, match="3 ranks are asked for"):
        ranks.run(2, workers.dropout_streams, layout_fields(1, 1, 3))
