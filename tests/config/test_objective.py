import pytest

from mtnlg.config import ConfigError, DataConfig
from mtnlg.config.objective import Denoiser, ObjectiveConfig, parse_denoiser


def test_lengths_are_those_of_t5():
    """568 tokens of text become 512 and 114 (T5's ``random_spans_helper``; both fill their room)."""
    objective = ObjectiveConfig("span_corruption")
    assert objective.text_length(512, has_encoder=True) == 568
    assert objective.longest_target(512) == 114
    # By the same helper's loop, written out.
    for density, mean, length in ((0.15, 3.0, 1024), (0.25, 5.0, 77), (0.4, 2.0, 64)):
        objective = ObjectiveConfig("span_corruption", density, mean)
        tokens = length - 1

        def sizes(count: int, density: float = density, mean: float = mean) -> tuple[int, int]:
            noise = round(count * density)
            return count - noise + round(noise / mean) + 1, noise + round(noise / mean) + 1

        while sizes(tokens + 1)[0] <= length:
            tokens += 1
        assert objective.text_length(length, has_encoder=True) == tokens
        assert objective.longest_target(length) == sizes(tokens)[1]


@pytest.mark.parametrize("name", ["span_corruption", "prefix_lm", "ul2"])
@pytest.mark.parametrize("length", [8, 33, 512])
@pytest.mark.parametrize("target_length", [None, 8])
def test_a_sample_has_room_and_no_token_more(name, length, target_length):
    objective = ObjectiveConfig(name, target_length=target_length)

    def fits(count: int) -> bool:
        sizes = [denoiser.lengths(count) for denoiser in objective.chosen()]
        room = objective.longest_target(length) if target_length is None else target_length
        return all(inputs <= length and targets <= room for inputs, targets in sizes)

    count = objective.text_length(length, has_encoder=True)
    assert fits(count) and not fits(count + 1)
    count = objective.text_length(length, has_encoder=False)
    most = [max(d.longest_together(n) for d in objective.chosen()) for n in (count, count + 1)]
    assert most[0] <= length + 1 < most[1]


def test_denoisers_are_read():
    assert parse_denoiser("spans 0.5 64 [NLG] x2") == Denoiser("spans", 0.5, 64.0, "[NLG]", 2.0)
    assert parse_denoiser("suffix .25") == Denoiser("suffix", 0.25)
    chosen = ObjectiveConfig("ul2").chosen()
    assert len(chosen) == 7  # table 1 of arXiv 2205.05131: two regular, one sequential, four extreme
    assert [denoiser.mode for denoiser in chosen] == ["[NLU]"] * 2 + ["[S2S]"] + ["[NLG]"] * 4
    assert ObjectiveConfig("ul2").modes() == ["[NLU]", "[S2S]", "[NLG]"]
    assert ObjectiveConfig("ul2", denoisers=["prefix 0.5"]).needs_sentinels is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spans",
        "spans 0.15",
        "spans 1.5 3",
        "spans 0.1 0.5",
        "suffix 0.2 3",
        "words 0.1",
        "prefix 0.1 a b",
    ],
)
def test_what_is_no_denoiser_is_refused(text):
    with pytest.raises(ConfigError, match=r"cannot be read\. Write 'spans DENSITY"):
        ObjectiveConfig("ul2", denoisers=[text])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mlm"}, "choose one of causal, span_corruption"),
        ({"name": "span_corruption", "noise_density": 1.0}, "noise_density is 1.0"),
        ({"name": "span_corruption", "mean_span_length": 0.5}, "mean_span_length is 0.5"),
        ({"name": "ul2", "target_length": 0}, "target_length is 0"),
        ({"name": "ul2", "noise_density": 0.2}, "only span_corruption and prefix_lm read it"),
        ({"name": "prefix_lm", "mean_span_length": 4.0}, "only span_corruption read"),
        ({"denoisers": ["prefix 0.5"]}, "only ul2 read"),
        ({"name": "ul2", "sentinel_ids": "many"}, "give FIRST-LAST"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**fields)


def test_sentinels_may_count_down():
    assert ObjectiveConfig(sentinel_ids="32099-32097").sentinels() == [32099, 32098, 32097]
    assert ObjectiveConfig(sentinel_ids="5-6").sentinels() == [5, 6]


def test_too_short_a_sequence_and_document_masks_are_refused():
    with pytest.raises(ConfigError, match="not even two tokens"):
        ObjectiveConfig("span_corruption").text_length(2, has_encoder=True)
    with pytest.raises(ConfigError, match="takes texts as they follow each other"):
        DataConfig(objective=ObjectiveConfig("ul2"), reset_at_document_boundaries=True)
