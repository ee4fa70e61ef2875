"""The verbs one after another on a small text, as a user types them."""

import json
from pathlib import Path

import pytest

from mtnlg.cli.main import main

TEXTS = Path(__file__).resolve().parents[2] / "data" / "zh"
TINY = """
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
data: {sequence_length: 32, split: "80,10,10"}
batch: {micro_batch_size: 2, global_batch_size: 2}
stop: {steps: 3}
evaluation: {interval_steps: 0, num_batches: 1}
logging: {interval_steps: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer, token files and a run, made by the verbs."""
    place = tmp_path_factory.mktemp("place")
    lines = [line for path in sorted(TEXTS.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]
    with (place / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines[:400])
    (place / "tiny.yaml").write_text(TINY)
    tokenizer, tokens = str(place / "tokenizer"), str(place / "tokens")
    source = str(place / "text.jsonl")
    assert main(["tokenizer", source, "--vocab-size", "400", "--out", tokenizer]) == 0
    assert main(["encode", source, "--tokenizer", tokenizer, "--out", tokens, "--workers", "1"]) == 0
    settings = [f"--tokenizer.path={tokenizer}", f"--data.blend={{path: {tokens}}}"]
    run = ["--run_dir", str(place / "run")]
    assert main(["train", str(place / "tiny.yaml"), *settings, *run]) == 0
    return place


def test_train_leaves_a_run_and_says_what_is_next(place, capsys):
    code = main(["train", str(place / "run" / "config.yaml"), "--stop.steps=5"])
    captured = capsys.readouterr()
    assert code == 0
    assert "going on from step 3" in captured.err
    assert "stopped after 5 steps" in captured.err
    assert f"mtnlg evaluate {place / 'run'}" in captured.out
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_prepare_makes_everything_and_does_not_train(place, capsys):
    run = place / "prepared"
    sources = f"--data.sources={place / 'text.jsonl'}"
    words = [str(place / "tiny.yaml"), sources, f"--run_dir={run}", "--tokenizer.vocab_size=400"]
    assert main(["train", *words, "--prepare"]) == 0
    assert f"mtnlg train {run}/config.yaml" in capsys.readouterr().out
    assert (run / "tokenizer" / "tokenizer.json").exists()
    assert not (run / "metrics.jsonl").exists()


def test_evaluate_prints_a_table_or_json(place, capsys):
    assert main(["evaluate", str(place / "run"), "--split", "test"]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", str(place / "run"), "--split", "test", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert table.split()[:3] == ["text", "tokens", "loss"]
    assert f"{values['bits_per_character']:.4g}" in table
    assert 0 < values["loss"] < 7


def test_evaluate_takes_files(place, capsys):
    words = ["--files", str(place / "text.jsonl"), "--max-tokens", "100", "--json"]
    assert main(["evaluate", str(place / "run"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 100


def test_evaluate_of_a_folder_without_splits_asks_for_files(place, capsys):
    assert main(["evaluate", str(place / "tokenizer")]) == 2
    assert "--files" in capsys.readouterr().err


def test_generate_streams_what_json_repeats(place, capsys):
    words = ["generate", str(place / "run"), "春天", "--max-new-tokens", "8", "--seed", "3"]
    assert main(words) == 0
    streamed = capsys.readouterr().out
    assert main([*words, "--json", "--samples", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert streamed == first["text"] + "\n"
    assert first["text"].startswith("春天")
    assert first != second


def test_samples_are_written_below_each_other(place, capsys):
    words = ["generate", str(place / "run"), "春", "--max-new-tokens", "9", "--seed", "3", "--samples", "3"]
    assert main(words) == 0
    written = capsys.readouterr().out
    assert main([*words, "--json", "--logprobs", "2"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert written == "".join(record["text"] + "\n" for record in records)
    assert len(records) == 3
    for record in records:
        assert record["finish_reason"] in ("length", "end")
        assert len(record["logprobs"]) == record["new_tokens"]
        assert all(len(score["top"]) == 2 and score["logprob"] <= 0 for score in record["logprobs"])


def test_every_rule_has_its_option(place, capsys):
    words = ["generate", str(place / "run"), "春", "--max-new-tokens", "6"]
    for options in (
        "--max-length 8 --min-new-tokens 2 --min-p 0.1 --typical-p 0.9 --top-k 5",
        "--repetition-penalty 1.2 --frequency-penalty 0.5 --presence-penalty 0.5",
        "--no-repeat-ngram-size 2 --deadline 60 --stop 。 --stop x",
        '--logit-bias {"300":-5} --best-of 3 --samples 2 --deterministic --dtype float32',
        "--num-beams 4 --num-beam-groups 2 --diversity-penalty 0.5 --length-penalty 0.8 --samples 2",
        "--penalty-alpha 0.6 --top-k 4",
        "--speculation ngram --num-speculative-tokens 3 --greedy",
    ):
        assert main([*words, *options.split()]) == 0
        out, err = capsys.readouterr()
        count = 2 if "--samples 2" in options else 1
        assert out.count("春") >= count
        assert err == ""


def test_forms_from_the_command_line(place, capsys, tmp_path):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [12, 34]}', encoding="utf-8")
    words = ["generate", str(place / "run"), "春"]
    for options, allowed in (
        (["--choice", "江", "--choice", "河"], ("江", "河")),
        (["--regex", "[ab]"], ("a", "b")),
        (["--json-schema", str(schema)], ("12", "34")),
        (["--grammar", 'start: "x" "y"'], ("xy",)),
    ):
        assert main([*words, *options]) == 0
        assert capsys.readouterr().out.strip().removeprefix("春") in allowed


def test_greedy_and_temperature_0_are_the_same(place, capsys):
    words = ["generate", str(place / "run"), "江", "--max-new-tokens", "6"]
    texts = []
    for option in (["--greedy"], ["--temperature", "0"], ["--greedy", "--use-cache", "false"]):
        assert main([*words, *option]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_a_prompt_from_stdin(place, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("江水\n"))
    assert main(["generate", str(place / "run"), "-", "--max-new-tokens", "1", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("江水")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "-1"], "max_new_tokens"),
        (["--samples", "0"], "--samples is 0"),
        (["--device", "tpu"], "choose cpu or cuda"),
        (["--top-p", "3"], "top_p"),
        (["--logprobs", "3"], "needs --json"),
        (["--num-beams", "2", "--best-of", "3"], "best_of"),
        (["--max-new-tokens", "4", "--min-new-tokens", "5"], "min_new_tokens"),
        (["--prefill-chunk", "0"], "prefill_chunk is 0"),
    ],
)
def test_options_out_of_range_are_explained(place, capsys, words, message):
    assert main(["generate", str(place / "run"), "a", *words]) == 2
    assert message in capsys.readouterr().err


def test_train_lists_all_problems_before_anything_starts(place, capsys):
    words = ["--model.hiden_size=3", "--batch.micro_batch_size=0", "--layout.tensor_parallel_size=3"]
    assert main(["train", str(place / "tiny.yaml"), *words, f"--run_dir={place / 'none'}"]) == 2
    err = capsys.readouterr().err
    assert "did you mean model.hidden_size?" in err
    assert "batch.micro_batch_size is 0" in err
    assert not (place / "none").exists()
