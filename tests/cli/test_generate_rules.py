"""Rules on the command line that cannot be used: what is wrong, before anything is written."""

import pytest
from tests.generation.constraints.models import make_tokenizer

from mtnlg import MegatronLmModel
from mtnlg.cli.main import main
from mtnlg.config import MegatronModelConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    config = MegatronModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    MegatronLmModel(config, tokenizer, seed=1).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--json-schema",
            "no-such-file.json",
            "json-schema is 'no-such-file.json': there is no such file",
        ),
        ("--json-schema", '{"type":', "Expecting value: line 1 column 9"),
        ("--json-schema", '{"not": {"type": "string"}}', '"not" cannot be kept while a text is generated'),
        ("--json-schema", "bytes.json", "'bytes.json': the file cannot be read"),
        ("--grammar", "no-such-file.lark", "a grammar has a rule start: or root ::="),
        ("--regex", "(a", "unclosed group (at character 1 of (a)"),
        ("--choice", "", "a list of texts that are not empty"),
        ("--verse", "sonnet", "choose one of wujue"),
    ],
)
def test_a_rule_that_cannot_be_used(model, option, value, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    assert main(["generate", model, "Hi", option, value]) == 2
    written, error = capsys.readouterr()
    assert message in error and error.startswith("error: ") and not written


def test_a_schema_from_a_file(model, capsys, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"enum": ["秋"]}', encoding="utf-8")
    assert main(["generate", model, "Hi", "--json-schema", str(path)]) == 0
    assert capsys.readouterr().out == 'Hi"秋"\n'
