"""What becomes of conversations that are longer than the context, and of rules that take too long."""

import threading

import pytest

from mtnlg.generation.constraints import options

TURNS = [
    {"role": role, "content": f"{word} the cat sat on the mat and the dog sat too."}
    for number in range(20)
    for role, word in (("user", f"question {number}"), ("assistant", f"answer {number}"))
]
SYSTEM = {"role": "system", "content": "春眠不觉晓"}
LAST = {"role": "user", "content": "the last question"}


def body(policy, **fields):
    asked = {"model": "tiny", "messages": [SYSTEM, *TURNS, LAST], "max_tokens": 8, "temperature": 0}
    return {**asked, **({} if policy is None else {"context_policy": policy}), **fields}


@pytest.fixture
def seen(running, monkeypatch):
    """Prompts that the engine was given, as text."""
    found, submit = [], running.engine.submit

    def listen(request):
        found.append(running.server.state.backend.tokenizer.decode(list(request.prompt_ids)))
        return submit(request)

    monkeypatch.setattr(running.engine, "submit", listen)
    return found


@pytest.mark.parametrize("policy", [None, "refuse"])
def test_a_long_conversation_is_refused(running, policy):
    answer = running.post("/v1/chat/completions", body(policy))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_the_oldest_turns_are_dropped(running, seen, stream):
    answer = running.post("/v1/chat/completions", body("drop", stream=stream))
    assert answer.status_code == 200, answer.text
    [prompt] = seen
    assert "春眠不觉晓" in prompt and "the last question" in prompt
    assert "question 19" in prompt and "question 0 " not in prompt
    assert "turns of the conversation are left out" in answer.headers["x-context-notice"]


def test_the_oldest_turns_are_summarised(running, seen):
    answer = running.post("/v1/chat/completions", body("summarise"))
    assert answer.status_code == 200, answer.text
    assert len(seen) > 1 and "Summarise our conversation" in seen[0] and "question 0 " in seen[0]
    assert "question 0 " not in seen[-1] and "the last question" in seen[-1]


def test_what_fits_is_left_as_it_is(running, seen):
    messages = [SYSTEM, *TURNS[:2], LAST]
    for policy in ("refuse", "drop", "summarise"):
        answer = running.post("/v1/chat/completions", body(policy, messages=messages))
        assert answer.status_code == 200 and "x-context-notice" not in answer.headers
    assert len(set(seen)) == 1


def test_a_last_turn_that_is_too_long_is_refused(running):
    messages = [*TURNS, {"role": "user", "content": "the cat sat " * 2000}]
    for policy in ("drop", "summarise"):
        answer = running.post("/v1/chat/completions", body(policy, messages=messages))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(("policy", "num_turns", "most"), [("drop", 4000, 20), ("summarise", 200, 40)])
def test_many_turns_are_not_tried_one_by_one(running, policy, num_turns, most, monkeypatch):
    form, sizes = running.server.state.backend.form, []
    write = type(form).pieces
    monkeypatch.setattr(type(form), "pieces", lambda *a, **b: sizes.append(len(a[1])) or write(*a, **b))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * num_turns
    answer = running.post("/v1/chat/completions", body(policy, messages=[*talk, talk[0]]))
    # a summary by this model is noise, which may have more tokens once it is written again
    assert answer.status_code == 200 or policy == "summarise", answer.text
    assert len(sizes) <= most
    assert max(sizes) <= 2 * 512


def test_a_rule_that_takes_too_long_is_refused_and_nobody_waits(start, monkeypatch):
    is_over = threading.Event()
    make = options.constraint_from_options

    def slow(tokenizer, vocab_size, kind, value, end_ids=None):
        if value == "slow":
            is_over.wait(60)
        return make(tokenizer, vocab_size, kind, value, end_ids)

    monkeypatch.setattr(options, "constraint_from_options", slow)
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 4, "temperature": 0}
    try:
        with start(constraint_timeout_seconds=0.2) as running:
            answer = running.post("/v1/completions", {**asked, "guided_regex": "slow"})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "constraint_too_slow")
            assert "--constraint-timeout" in error["message"]
            # its thread is still busy; others are served
            assert running.post("/v1/completions", {**asked, "guided_regex": "a+"}).status_code == 200
            is_over.set()
    finally:
        is_over.set()


@pytest.mark.parametrize("policy", ["refuse", "drop"])
def test_an_answer_that_was_cut_off_goes_on(running, seen, policy):
    asked = {"model": "tiny", "messages": [SYSTEM, LAST], "temperature": 0, "context_policy": policy}
    whole = running.post("/v1/chat/completions", {**asked, "max_tokens": 12}).json()["choices"][0]
    first = running.post("/v1/chat/completions", {**asked, "max_tokens": 5}).json()["choices"][0]
    begun = [*asked["messages"], {"role": "assistant", "content": first["message"]["content"]}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    rest = running.post("/v1/chat/completions", {**asked, "messages": begun, "max_tokens": 7, **fields})
    assert rest.status_code == 200, rest.text
    assert seen[2] == seen[0] + first["message"]["content"]
    text = rest.json()["choices"][0]["message"]["content"]
    assert first["message"]["content"] + text == whole["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_what_cannot_go_on_is_refused(running, fields, param):
    asked = {"model": "tiny", "messages": [LAST], "max_tokens": 2, **fields}
    answer = running.post("/v1/chat/completions", asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_prompts_go_on_in_the_cache_after_turns_were_dropped(running):
    messages, shares = [SYSTEM, *TURNS], []
    for number in range(6):
        messages.append({"role": "user", "content": f"and question {number}?"})
        asked = {"model": "tiny", "messages": messages, "max_tokens": 4, "context_policy": "drop"}
        usage = running.post("/v1/chat/completions", asked).json()["usage"]
        shares.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
        messages.append({"role": "assistant", "content": "well then"})
    assert sorted(shares)[-4] > 0.7, shares
