"""Adapters over HTTP: chosen by the model's name, loaded and removed while the server runs."""

import pytest
from tests.generation.test_adapters import alone, make_adapter

from mtnlg.interop.adapter import Adapter
from mtnlg.interop.fingerprint import fingerprint_of
from mtnlg.interop.peft import write_adapter

ADMIN = {"Authorization": "Bearer change-it"}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Adapters of the model that is served, and one of another model."""
    made = tmp_path_factory.mktemp("adapters")
    for kind in ("all", "prompt"):
        given = make_adapter(model, kind)
        own = Adapter(given.config, fingerprint_of(model), given.low_rank, given.prompt, given.prefix)
        write_adapter(made / kind, own, model.config)
    given = make_adapter(model, "all")
    write_adapter(
        made / "foreign", Adapter(given.config, "0" * 16 + "-" + "0" * 16, given.low_rank), model.config
    )
    (made / "empty").mkdir()
    return made


@pytest.fixture(scope="module")
def served(start, folder):
    with start(admin_key="change-it", adapter_folder=str(folder)) as running:
        yield running


def ask(running, name, ids, count=6):
    body = {"model": name, "prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    answer = running.post("/v1/completions", body | {"logprobs": 0})
    assert answer.status_code == 200, answer.text
    return answer.json()


def names(running):
    return [found.id for found in running.openai().models.list()]


def test_an_adapter_is_loaded_asked_and_removed(served, model, tokenizer):
    ids = list(range(3, 23))
    with_none = ask(served, "tiny", ids)["choices"][0]["text"]
    for kind in ("all", "prompt"):
        loaded = served.post("/v1/adapters", {"name": f"my-{kind}", "path": kind}, headers=ADMIN)
        assert loaded.status_code == 200, loaded.text
        assert (loaded.json()["id"], loaded.json()["parent"]) == (f"my-{kind}", "tiny")
    assert names(served) == ["tiny", "my-all", "my-prompt"]
    shown = served.get("/v1/models/my-prompt").json()
    assert shown["max_model_len"] == 512 - 5
    for kind in ("all", "prompt"):
        answer = ask(served, f"my-{kind}", ids)
        expected = alone(model, make_adapter(model, kind), ids, 6)
        assert answer["model"] == f"my-{kind}"
        said = [served.server.state.backend.vocabulary.name_of(token) for token in expected]
        assert answer["choices"][0]["logprobs"]["tokens"] == said
        assert answer["usage"]["prompt_tokens"] == 20
    chat = {"model": "my-all", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    assert served.post("/v1/chat/completions", chat).json()["model"] == "my-all"
    vectors = [
        served.post("/v1/embeddings", {"model": name, "input": "hello"}).json()["data"][0]["embedding"]
        for name in ("tiny", "my-all")
    ]
    assert vectors[0] != vectors[1]
    refused = served.post("/v1/embeddings", {"model": "my-prompt", "input": "hello"})
    assert refused.status_code == 400 and "virtual tokens" in refused.json()["error"]["message"]
    for kind in ("all", "prompt"):
        gone = served.http().delete(f"/v1/adapters/my-{kind}", headers=ADMIN)
        assert gone.json() == {"id": f"my-{kind}", "object": "model", "deleted": True}
    assert names(served) == ["tiny"]
    assert ask(served, "tiny", ids)["choices"][0]["text"] == with_none
    gone = served.post("/v1/completions", {"model": "my-all", "prompt": "hello"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "x", "path": "../"}, 400, "there is no folder '../'"),
        ({"name": "x", "path": "/etc"}, 400, "there is no folder '/etc'"),
        ({"name": "x", "path": "a\0b"}, 400, "there is no folder"),
        ({"name": "x", "path": "empty"}, 400, "adapter_config.json"),
        ({"name": "x", "path": "foreign"}, 400, "made for another base model"),
        ({"name": "tiny", "path": "all"}, 409, "There is a model 'tiny' already"),
        ({"name": "a b", "path": "all"}, 400, "name"),
        ({"path": "all"}, 400, "Missing required parameter: 'name'"),
    ],
)
def test_what_cannot_be_loaded_is_said(served, body, status, words):
    answer = served.post("/v1/adapters", body, headers=ADMIN)
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert names(served) == ["tiny"]


def test_only_the_admin_key_changes_what_is_served(served, start):
    body = {"name": "x", "path": "all"}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert served.post("/v1/adapters", body, headers=headers).status_code == 401
        assert served.http().delete("/v1/adapters/x", headers=headers).status_code == 401
    assert served.http().delete("/v1/adapters/x", headers=ADMIN).status_code == 404
    with start(api_keys=("a",)) as running:
        for key in ("a", "b"):
            answer = running.post("/v1/adapters", body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 403 and "--admin-key" in answer.json()["error"]["message"]
    with start(admin_key="k") as running:
        answer = running.post("/v1/adapters", body, headers={"Authorization": "Bearer k"})
        assert answer.status_code == 403 and "--adapter-folder" in answer.json()["error"]["message"]
