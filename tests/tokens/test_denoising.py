import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens.blends import data_config, numbered_documents, write_tokens

from mtnlg.config import ConfigError, DataError
from mtnlg.config.objective import ObjectiveConfig
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.tokens.denoising import DenoisingStream, open_stream
from mtnlg.tokens.noise import input_and_target, random_spans

SENTINELS = list(range(60_000, 60_100))
END, PADDING, START = 60_101, 60_102, 60_103
MODES = {"[NLU]": 60_110, "[S2S]": 60_111, "[NLG]": 60_112}
OBJECTIVES = ("span_corruption", "prefix_lm", "ul2")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Every token of the two files is another number, so that a text shows where it is from."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(5)
    short = numbered_documents(random.integers(1, 40, 60).tolist())
    long = numbered_documents(random.integers(500, 2000, 9).tolist(), first=20_000)
    return write_tokens(folder / "short", short), write_tokens(folder / "long", long)


def objective_of(name, **fields) -> ObjectiveConfig:
    ids = dict(sentinel_ids="60000-60099", end_id=END, padding_id=PADDING, start_id=START, mode_ids=MODES)
    return ObjectiveConfig(name, **{**ids, **fields})


def stream(corpora, name="span_corruption", split="train", length=64, seed=3, has_encoder=True, **fields):
    data = data_config(
        *corpora, split="80,10,10", sequence_length=length, objective=objective_of(name, **fields)
    )
    return open_stream(data, split, seed, vocab_size=61_000, has_encoder=has_encoder)


def restore(inputs: list[int], target: list[int]) -> list[int]:
    """The text that a pair was made of: each sentinel of the input gives way to what follows it in the
    target; without sentinels the target follows the input."""
    inputs = [token for token in inputs if token not in (*MODES.values(), END)]
    target = [token for token in target if token != END]
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = []
        elif spans:
            spans[list(spans)[-1]].append(token)
    if not spans:
        return inputs + target
    assert [token for token in inputs if token in SENTINELS] == list(spans) == SENTINELS[: len(spans)]
    assert all(spans.values()), "an empty span"
    return [word for token in inputs for word in spans.get(token, [token])]


def pairs_of(batch: Batch, has_encoder: bool) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for row in range(len(batch)):
        target = [token for token in batch.labels[row].tolist() if token != IGNORED_LABEL]
        inputs = batch.input_ids[row].tolist()
        if not has_encoder:
            assert batch.prefix_lengths is not None
            inputs = inputs[: int(batch.prefix_lengths[row])]
        elif batch.encoder_mask is not None:
            inputs = [token for token, there in zip(inputs, batch.encoder_mask[row].tolist()) if there]
        pairs.append((inputs, target))
    return pairs


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_text_can_be_put_together_again(corpora, name, has_encoder):
    denoising = stream(corpora, name, has_encoder=has_encoder)
    texts = denoising.text.batch(0, 200).input_ids.tolist()
    pairs = pairs_of(denoising.batch(0, 200), has_encoder)
    assert [restore(*pair) for pair in pairs] == texts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_decoder_of_two_reads_is_what_it_should_write_one_place_later(corpora, name):
    batch = stream(corpora, name).batch(0, 50)
    assert batch.labels.shape == batch.decoder_input_ids.shape == (50, batch.labels.shape[1])
    assert (batch.decoder_input_ids[:, 0] == START).all()
    read, written = batch.decoder_input_ids[:, 1:], batch.labels[:, :-1]
    there = written != IGNORED_LABEL
    assert torch.equal(read[there], written[there])
    assert (read[~there] == PADDING).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_decoder_is_scored_on_the_target_alone(corpora, name):
    batch = stream(corpora, name, has_encoder=False).batch(0, 50)
    assert batch.input_ids.shape == batch.labels.shape == (50, 64)
    for row in range(50):
        prefix, scored = int(batch.prefix_lengths[row]), batch.labels[row] != IGNORED_LABEL
        end = prefix + int(scored.sum()) - 1  # of what is read
        assert scored.nonzero().flatten().tolist() == list(range(prefix - 1, end))
        assert torch.equal(batch.labels[row, prefix - 1 : end - 1], batch.input_ids[row, prefix:end])


def test_spans_fill_their_rows_with_no_padding(corpora):
    batch = stream(corpora, length=512).batch(0, 20)
    assert batch.encoder_mask is None
    assert (batch.input_ids != PADDING).all()
    assert batch.labels.shape == (20, 114)
    assert (batch.labels != IGNORED_LABEL).all()
    assert (batch.input_ids[:, -1] == END).all() and (batch.labels[:, -1] == END).all()


def test_share_and_length_of_spans_are_those_asked_for():
    taken = np.stack([random_spans(568, 85, 28, seed) for seed in range(2000)])
    assert (taken.sum(axis=1) == 85).all()
    begins = taken & ~np.pad(taken, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.sum(axis=1) == 28).all()
    assert not taken[:, 0].any() and taken[:, -1].all()
    # Any division into spans is as likely: the first span is one token with the chance of 27 cuts of
    # the 84 places between tokens, one of them the first; its mean is 85 / 28.
    runs = [np.diff(np.flatnonzero(np.diff(np.pad(row, 1).astype(int))))[::2] for row in taken]
    first = np.array([lengths[0] for lengths in runs])
    assert (first == 1).mean() == pytest.approx(27 / 84, abs=0.03)
    assert first.mean() == pytest.approx(85 / 28, abs=0.2)
    assert np.concatenate(runs).mean() == pytest.approx(85 / 28)
    # Away from the ends every place is taken as often.
    assert taken[:, 60:500].mean(axis=0).std() < 0.012
    assert taken[:, 60:500].mean() == pytest.approx(0.15, abs=0.005)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.floats(1.0, 9.0), st.integers(0, 2**40))
@settings(deadline=None, max_examples=200)
def test_any_text_can_be_taken_apart(length, density, mean, seed):
    objective = ObjectiveConfig("span_corruption", density, mean)
    (denoiser,) = objective.chosen()
    noise, spans = denoiser.noise_and_spans(length)
    taken = random_spans(length, noise, spans, seed)
    inputs, target = input_and_target(np.arange(length), taken, np.array(SENTINELS))
    assert (len(inputs) + 1, len(target) + 1) == denoiser.lengths(length)
    assert restore(inputs.tolist(), target.tolist()) == list(range(length))


def test_prefixes_end_anywhere(corpora):
    denoising = stream(corpora, "prefix_lm", length=64)
    lengths = denoising.batch(0, 3000).encoder_mask.sum(dim=1)
    assert denoising.text.sequence_length == 65
    assert (int(lengths.min()), int(lengths.max())) == (1, 64)
    assert lengths.float().mean().item() == pytest.approx(32.5, abs=1.2)
    assert len(lengths.unique()) == 64


def test_denoisers_are_drawn_by_weight_and_say_which(corpora):
    denoisers = ["spans 0.15 3 [NLU] x3", "suffix 0.25 [S2S]"]
    batch = stream(corpora, "ul2", length=128, denoisers=denoisers).batch(0, 2000)
    modes = batch.input_ids[:, 0]
    assert sorted(modes.unique().tolist()) == [MODES["[NLU]"], MODES["[S2S]"]]
    assert (modes == MODES["[NLU]"]).float().mean().item() == pytest.approx(0.75, abs=0.03)
    written = (batch.labels[modes == MODES["[S2S]"]] != IGNORED_LABEL).sum(dim=1) - 2.0  # sentinel, end
    length = ObjectiveConfig("ul2", denoisers=denoisers).text_length(128, has_encoder=True)
    assert written.mean().item() == pytest.approx(0.25 * length, rel=0.08)


def test_the_seven_denoisers_of_ul2_take_what_they_should(corpora):
    denoising = stream(corpora, "ul2", length=512)
    batch = denoising.batch(0, 700)
    modes, written = batch.input_ids[:, 0], (batch.labels != IGNORED_LABEL).sum(dim=1)
    counts = [int((modes == MODES[name]).sum()) for name in ("[NLU]", "[S2S]", "[NLG]")]
    assert counts == pytest.approx([200, 100, 400], rel=0.2)
    length = denoising.text.sequence_length
    expected = {d.lengths(length)[1] for d in denoising.denoisers if d.kind == "spans"}
    assert set(written[modes != MODES["[S2S]"]].tolist()) == expected


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_do_not_depend_on_replicas_batch_size_or_restarts(corpora, name, has_encoder):
    whole = stream(corpora, name, has_encoder=has_encoder).batch(17, 24)
    again = stream(corpora, name, has_encoder=has_encoder)
    shares = [again.batch(17, 24, replica, 5) for replica in range(5)]
    steps = [again.batch(position, 3) for position in range(17, 41, 3)]
    for pieces in (shares, steps):
        for field, tensor in vars(whole).items():
            if tensor is not None:
                assert torch.equal(torch.cat([vars(piece)[field] for piece in pieces]), tensor), field


def test_noise_follows_the_seed_and_the_position(corpora):
    one, other = stream(corpora), stream(corpora, seed=4)
    tokens = np.arange(73)
    pairs = [one.pair(tokens, 0), one.pair(tokens, 1), other.pair(tokens, 0)]
    assert len({tuple(inputs.tolist()) for inputs, _ in pairs}) == 3
    assert np.array_equal(one.pair(tokens, 1)[0], stream(corpora).pair(tokens, 1)[0])


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_validation_is_the_same_for_every_seed_and_ends_with_empty_rows(corpora, name, has_encoder):
    one, two = (stream(corpora, name, "valid", seed=seed, has_encoder=has_encoder) for seed in (1, 2))
    assert one.num_samples == two.num_samples > 0
    batch = one.batch(0, one.num_samples + 2)
    assert torch.equal(batch.labels, two.batch(0, one.num_samples + 2).labels)
    assert batch[one.num_samples :].num_valid_tokens == 0
    texts = one.text.batch(0, one.num_samples)
    read = [restore(*pair) for pair in pairs_of(batch[: one.num_samples], has_encoder)]
    lengths = (texts.labels != IGNORED_LABEL).sum(dim=1).tolist()
    for text, row, length in zip(read, texts.input_ids.tolist(), lengths):
        assert text == row[: min(length + 1, len(row))]
    if has_encoder:
        assert batch.encoder_mask.any(dim=1).all(), "an encoder reads something in every row"


def test_a_changed_objective_is_refused(corpora):
    state = json.loads(json.dumps(stream(corpora).state(123)))
    assert stream(corpora).check(state) == 123
    with pytest.raises(DataError, match=r"data\.objective was .*span_corruption.*prefix_lm"):
        stream(corpora, "prefix_lm").check(state)
    with pytest.raises(DataError, match=r"data\.objective was "):
        stream(corpora, noise_density=0.2).check(state)
    with pytest.raises(DataError, match=r"data\.objective was .* and is None"):
        open_stream(data_config(*corpora, split="80,10,10", sequence_length=72), "train", 3).check(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sentinel_ids": "60000-60001"}, "takes up to 3 spans .* there are 2 sentinels"),
        ({"end_id": None}, "end_id is missing"),
        ({"padding_id": None}, "padding_id is missing"),
        ({"sentinel_ids": "70000-70099"}, r"token ids 70000, .*only 0 to 60999"),
        ({"name": "ul2", "mode_ids": {"[NLU]": 1}}, r"no token for the mode \[S2S\]"),
    ],
)
def test_special_tokens_that_are_missing_are_named(corpora, fields, message):
    with pytest.raises(ConfigError, match=message):
        stream(corpora, **fields)


def test_next_tokens_come_from_the_plain_stream(corpora):
    data = data_config(*corpora)
    assert not isinstance(open_stream(data), DenoisingStream)
