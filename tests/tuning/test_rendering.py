"""Exactly what generation would produce is learnt: answers with the token that ends them."""

import pytest
from tests.tuning.helpers import tokenizer

from mtnlg.config import DataError
from mtnlg.generation.dialogue_format import dialogue_prompt
from mtnlg.tuning.conversations import Conversation
from mtnlg.tuning.rendering import Renderer
from mtnlg.tuning.templates import TEXT_CHAT_TEMPLATE, with_template

CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "cat sings"},
    {"role": "user", "content": "red blue"},
    {"role": "assistant", "content": "blue red"},
    {"role": "user", "content": "one dog"},
    {"role": "assistant", "content": "dog <|end|> one"},
]


def with_source(template, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return with_template(tokenizer(), str(path))


def scored_texts(example, tokens):
    """The runs of scored ids, decoded."""
    found, run = [], []
    for number, counts in [*zip(example.ids, example.scored), (0, False)]:
        if counts:
            run.append(number)
        elif run:
            found.append(tokens.decode(run, skip_special_tokens=False))
            run = []
    return found


@pytest.mark.parametrize("template", [None, CHATML, TEXT_CHAT_TEMPLATE])
def test_answers_are_scored_after_the_prompts_that_models_are_asked_with(template, tmp_path):
    tokens = with_template(tokenizer(), None) if template is None else with_source(template, tmp_path)
    example = Renderer(tokens, max_tokens=200).example(Conversation(TURNS, "here"))
    end = "<|endoftext|>" if template == TEXT_CHAT_TEMPLATE else "<|end|>"
    assert scored_texts(example, tokens) == [f"blue red{end}", f"dog <|end|> one{end}"]
    for number in (2, 4):  # what stands before an answer is the prompt that generation makes
        prompt = dialogue_prompt(tokens, TURNS[:number])
        assert example.ids[: len(prompt.ids)] == prompt.ids
        assert example.scored[len(prompt.ids)] and not example.scored[len(prompt.ids) - 1]
        answer = len(prompt.ids)
        while example.scored[answer]:
            answer += 1
            if answer == len(example.ids):
                break
        assert example.ids[answer - 1] in prompt.end_ids


def test_a_special_token_inside_a_message_stays_text(tmp_path):
    tokens = with_template(tokenizer(), None)
    example = Renderer(tokens, max_tokens=200).example(Conversation(TURNS, "here"))
    assert example.ids.count(tokens.special_tokens["<|end|>"]) == 5  # one a message


def test_loss_on_says_what_is_scored():
    tokens = with_template(tokenizer(), None)
    last = Renderer(tokens, "last", 200).example(Conversation(TURNS, "here"))
    assert scored_texts(last, tokens) == ["dog <|end|> one<|end|>"]
    everything = Renderer(tokens, "all", 200).example(Conversation(TURNS, "here"))
    assert all(everything.scored) and everything.num_scored == len(everything.ids) - 1


def test_completions_are_plain_text_with_an_end():
    tokens = with_template(tokenizer(), None)
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": " blue"}]
    example = Renderer(tokens, around=("one ", " two")).example(Conversation(turns, "here", is_plain=True))
    assert tokens.decode(example.ids, skip_special_tokens=False) == "one red two blue<|endoftext|>"
    assert scored_texts(example, tokens) == [" blue<|endoftext|>"]


def test_what_is_too_long_loses_turns_then_the_end_of_its_only_answer():
    tokens = with_template(tokenizer(), None)
    conversation = Conversation(TURNS, "here")
    whole = Renderer(tokens, max_tokens=200).example(conversation)
    renderer = Renderer(tokens, max_tokens=len(whole.ids) - 1)
    cut = renderer.example(conversation)
    assert scored_texts(cut, tokens) == ["blue red<|end|>"] and cut.ids == whole.ids[: len(cut.ids)]
    assert renderer.num_cut == 1
    short = Renderer(tokens, max_tokens=len(cut.ids) - 1).example(conversation)
    assert scored_texts(short, tokens) == ["blue red"]  # no end is learnt where none is
    tiny = Renderer(tokens, max_tokens=3)
    assert tiny.example(conversation) is None and tiny.num_left_out == 1
    leaving = Renderer(tokens, max_tokens=len(whole.ids) - 1, too_long="leave_out")
    assert leaving.example(conversation) is None
    with pytest.raises(DataError, match="here: the conversation has"):
        Renderer(tokens, max_tokens=9, too_long="refuse").example(conversation)


def test_a_template_that_rewrites_earlier_turns_is_told_of(tmp_path):
    forgetful = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content if loop.last else '...') }}"
        "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokens = with_source(forgetful, tmp_path)
    with pytest.raises(DataError, match=r"here: .*loss_on to last"):
        Renderer(tokens, max_tokens=200).example(Conversation(TURNS, "here"))
    two = Conversation(TURNS[1:3], "here")
    with pytest.raises(DataError, match="cannot be told apart"):
        Renderer(tokens, max_tokens=200).example(two)


def test_text_templates_ask_as_they_taught(tmp_path):
    tokens = with_source(TEXT_CHAT_TEMPLATE, tmp_path)
    assert (
        tokens.decode(dialogue_prompt(tokens, TURNS[:2]).ids)
        == "cat sings\n\nUser:\nred blue\n\nAssistant:\n"
    )
