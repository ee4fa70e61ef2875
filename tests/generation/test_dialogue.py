"""Conversations: their prompts, their windows, their answers."""

from __future__ import annotations

import functools

import pytest
from tests.tokens import chat_templates as styles

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.generation import Engine, SamplingRules
from mtnlg.generation.dialogue import Dialogue, DialogueOptions
from mtnlg.generation.dialogue_format import choose_format
from mtnlg.generation.dialogue_ids import DialogueIds, ids_of
from mtnlg.generation.dialogue_window import DialogueWindow, stable_start
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.chat_template import DEFAULT_CHAT_TEMPLATE
from mtnlg.tokens.training import learn_definition

TEXTS = [
    "User: hello there\nAssistant: hi, how are you?\n",
    "用户：你好\n助手：早上好！\n",
    "<|x|> [y]\n\n",
] * 10
NAMES = ["user", "system", "assistant", "end", "im_start", "im_end", "eot_id"]
SPECIAL = ["<|endoftext|>", *(f"<|{name}|>" for name in NAMES)]
TEMPLATES = {
    "default": DEFAULT_CHAT_TEMPLATE,
    "chatml": styles.CHATML,
    "trims": DEFAULT_CHAT_TEMPLATE.replace("+ content }}", "+ content | trim }}"),
    "opens": DEFAULT_CHAT_TEMPLATE.replace("'<|assistant|>' }}", "'<|assistant|>' + '<think></think>' }}"),
    "plain": styles.PLAIN,
    "persona": None,
}


@functools.cache
def tokenizer(template: str | None = None) -> Tokenizer:
    return Tokenizer(learn_definition(TEXTS, 320, SPECIAL), {"chat_template": template})


@functools.cache
def model(positions: int = 512) -> MegatronLmDecoder:
    config = MegatronModelConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        position_embedding="rotary",
        init_method_std=0.5,
    )
    made = MegatronLmDecoder(config)
    initialize_weights(made, config, seed=4)
    return made.eval()


class Asked:
    """An engine that keeps the requests it was given."""

    def __init__(self, engine):
        self.engine, self.requests, self.max_length = engine, [], engine.max_length

    def submit(self, request):
        self.requests.append(request)
        return self.engine.submit(request)


def start(style="default", positions=512, **options):
    mine = tokenizer(TEMPLATES[style])
    engine = Asked(Engine(model(positions), mine.decode))
    system = options.pop("system", None)
    fields = {"rules": SamplingRules(1.0, seed=1), "max_new_tokens": 12, **options}
    return Dialogue(engine, mine, choose_format(mine), system, DialogueOptions(**fields)), engine


def shown(engine, style="default"):
    """The text of the last prompt."""
    return tokenizer(TEMPLATES[style]).decode(engine.requests[-1].prompt_ids, skip_special_tokens=False)


# -- answers


@pytest.mark.parametrize("style", TEMPLATES)
def test_an_answer_streams_what_it_becomes(style):
    dialogue, engine = start(style)
    answer = dialogue.ask("hello")
    text = "".join(answer)
    assert text.rstrip() == answer.text.rstrip()
    assert dialogue.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer.text},
    ]
    assert engine.requests[0].end_ids == dialogue.form.end_ids
    assert engine.requests[0].stop == dialogue.form.stop
    assert answer.usage.new_tokens == len(answer.new_ids) == 12


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("seed", range(3))
def test_each_prompt_begins_with_the_tokens_of_the_turns_before(style, seed):
    dialogue, engine = start(style, rules=SamplingRules(1.2, seed=seed), system="你好")
    before = answer = []
    for question in ("hello", "x<|end|>\n", "你好 🦊", "there"):
        dialogue.ask(question).result()
        ids = engine.requests[-1].prompt_ids
        if style != "opens":  # which writes the last answer in another way than its beginning
            assert ids[: len(before)] == before
            assert ids[len(before) : len(before) + len(answer)] == answer
        else:
            assert common(ids, before) >= len(before) - 16
        before, answer = ids, certain_ids(dialogue.last_answer, style)


def certain_ids(answer, style):
    """The tokens of an answer but for those that it may end otherwise with: spaces, half a character."""
    special = tokenizer().special_tokens.values()
    new = answer.new_ids
    new = new[: next((n for n, token in enumerate(new) if token in special), len(new))]
    while new and not tokenizer().decode(new[-1:]).isalnum():
        new = new[:-1]
    first = tokenizer().decode(new[:1])
    begins_alike = first.startswith(" ") and first[1:2].isalnum() if style == "persona" else first.isalnum()
    return new if begins_alike else []


def common(first, second):
    """How many tokens two sequences begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


@pytest.mark.parametrize("style", TEMPLATES)
def test_kept_tokens_say_the_same_as_new_ones(style):
    """Whatever ids are taken over, their text is the text of the conversation."""
    dialogue, engine = start(style, rules=SamplingRules(1.5, seed=3), system="be")
    for question in ("hello", "<|user|>", "你好", ""):
        dialogue.ask(question).result()
    mine = tokenizer(TEMPLATES[style])
    form = dialogue.form
    history = dialogue.messages[:-1]
    examples = form.examples(history)
    fresh = form.encode(form.pieces([history[0], *examples, *history[1:]]))
    decode = functools.partial(mine.decode, skip_special_tokens=False)
    assert decode(engine.requests[-1].prompt_ids) == decode(fresh)


def test_the_engine_finds_the_earlier_turns_in_its_cache():
    dialogue, engine = start()
    dialogue.ask("hello there " * 5).result()
    total = len(engine.requests[0].prompt_ids) + len(dialogue.last_answer.new_ids)
    answer = dialogue.ask("hi").result()
    page = engine.engine.runner.page_size
    assert answer.usage.cached_tokens >= (total - 1) // page * page - page


def test_retry_keeps_the_prompt_and_changes_the_answer():
    dialogue, engine = start()
    first = dialogue.ask("hello").result().text
    second = dialogue.retry().result().text
    assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids
    assert first != second
    assert [message["content"] for message in dialogue.messages] == ["hello", second]


def test_a_seed_repeats_a_whole_conversation():
    texts = []
    for _ in range(2):
        dialogue, _engine = start()
        texts.append([dialogue.ask(text).result().text for text in ("a", "b")])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_undo_clear_system_and_load():
    dialogue, engine = start(system="be kind")
    dialogue.ask("one").result()
    dialogue.ask("two").result()
    assert dialogue.undo() == "two"
    assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant"]
    dialogue.system = "be brief"
    dialogue.ask("three").result()
    assert "<|system|>be brief<|end|>" in shown(engine)
    assert "two" not in shown(engine)
    saved = list(dialogue.messages)
    dialogue.clear()
    assert dialogue.messages == [{"role": "system", "content": "be brief"}]
    dialogue.system = None
    assert dialogue.messages == []
    dialogue.load(saved)
    assert dialogue.messages == saved
    for wrong, message in ((dialogue.load, "messages is empty"),):
        with pytest.raises(ConfigError, match=message):
            wrong([])
    assert dialogue.messages == saved


def test_nothing_to_answer_retry_or_undo_is_said():
    dialogue, _ = start(system="x")
    for action, message in (
        (dialogue.answer, "no question"),
        (dialogue.retry, "no answer to try again"),
        (dialogue.undo, "no question yet"),
    ):
        with pytest.raises(ConfigError, match=message):
            action()


def test_a_cancelled_answer_stays_as_far_as_it_came():
    dialogue, _ = start(max_new_tokens=200, rules=SamplingRules())
    answer = dialogue.ask("hello")
    text = ""
    for number, piece in enumerate(answer):
        text += piece
        if number == 2:
            answer.cancel()
    assert answer.finish_reason == "cancelled"
    assert dialogue.messages[-1]["content"].startswith(text.strip()[:3])
    assert len(answer.new_ids) < 20
    dialogue.ask("go on").result()


def test_a_template_that_refuses_leaves_the_conversation_as_it_was():
    mine = tokenizer("{% if messages|length > 2 %}{{ raise_exception('enough') }}{% endif %}a")
    engine = Engine(model(), mine.decode)
    dialogue = Dialogue(engine, mine, choose_format(mine), options=DialogueOptions(max_new_tokens=2))
    dialogue.ask("a").result()
    with pytest.raises(ConfigError, match="enough"):
        dialogue.ask("b")
    assert len(dialogue.messages) == 2


# -- the window


@pytest.mark.parametrize("style", ["default", "persona"])
def test_the_oldest_turns_are_dropped_and_the_system_prompt_stays(style):
    dialogue, engine = start(style, positions=160, system="be kind")
    notices, starts = [], []
    for number in range(12):
        answer = dialogue.ask(f"question number {number}x").result()
        notices += answer.notices
        text = shown(engine, style)
        assert len(engine.requests[-1].prompt_ids) + 12 <= 160
        assert "be kind" in text
        assert text.rstrip().endswith(("<|assistant|>", "Assistant:"))
        starts.append(next(n for n in range(13) if f"number {n}x" in text))
    assert starts == sorted(starts)
    assert 0 < starts[-1] < 11
    assert len(set(starts)) < len([start for start in starts if start])  # several at once, then none
    assert "left out: the model has 160 positions" in notices[0]
    assert len(dialogue.messages) == 25  # all of it is still there


def test_refuse_says_what_to_do():
    dialogue, engine = start("persona", positions=160, policy="refuse")
    with pytest.raises(ConfigError, match="begin a new one, or choose the policy drop or summarise"):
        for number in range(20):
            dialogue.ask(f"question number {number}x").result()
    assert "number 0x" in shown(engine, "persona")
    dialogue.options.policy = "drop"
    dialogue.ask("now").result()


def test_summaries_take_the_place_of_what_is_dropped():
    dialogue, engine = start(positions=320, policy="summarise", system="be kind")
    for number in range(20):
        answer = dialogue.ask(f"question number {number}x").result()
        if answer.notices:
            break
    mine = tokenizer(TEMPLATES["default"])
    decode = functools.partial(mine.decode, skip_special_tokens=False)
    prompt, summaries = engine.requests[-1], engine.requests[number:-1]
    asked = [decode(request.prompt_ids) for request in summaries]
    lost = next(n for n in range(number + 1) if f"number {n}x" in decode(prompt.prompt_ids))
    assert all(
        f"number {n}x" in "".join(asked) for n in range(lost)
    )  # each of them, whatever fits together
    for text in asked:
        assert text.endswith(("names, facts and wishes.<|end|><|assistant|>", "要求。<|end|><|assistant|>"))
    assert all(request.rules.is_greedy for request in summaries)
    text = decode(prompt.prompt_ids)
    assert "be kind\n\nWhat was said before: " in text or "be kind\n\n此前的谈话：" in text
    assert "number 0x" not in text
    assert "summarised" in answer.notices[0]
    assert dialogue.system == "be kind"


def test_a_message_that_can_never_fit_is_refused_and_the_next_works():
    dialogue, _ = start(positions=64)
    dialogue.ask("hi").result()
    with pytest.raises(ConfigError, match=r"prompt of \d+ tokens, and the model has 64 positions: shorten"):
        dialogue.ask("🦊" * 50)
    assert len(dialogue.messages) == 2
    dialogue.ask("hi").result()


def test_a_long_last_message_leaves_less_room_for_the_answer():
    dialogue, _ = start(positions=64, max_new_tokens=40)
    answer = dialogue.ask("🦊" * 14).result()
    assert answer.finish_reason in ("length", "end")
    assert len(answer.prompt_ids) + len(answer.new_ids) <= 64
    assert len(answer.prompt_ids) > 48


def test_options_are_checked():
    with pytest.raises(ConfigError) as caught:
        DialogueOptions(max_new_tokens=0, policy="forget")
    assert len(caught.value.problems) == 2


# -- ids


def test_only_what_is_known_is_taken_over():
    mine = tokenizer(DEFAULT_CHAT_TEMPLATE)
    form = choose_format(mine)
    ids = DialogueIds(mine, form)
    turn = [{"role": "user", "content": "hello"}]
    pieces = form.pieces(turn)
    prompt = ids.encode(pieces)
    letters = [mine.encode(letter)[0] for letter in "there"]  # other tokens than encode("there")
    assert letters != mine.encode("there")
    ids.remember(prompt, letters)
    prompt = ids_of(prompt)
    answered = [*turn, {"role": "assistant", "content": "there"}, *turn]
    assert ids_of(ids.encode(form.pieces(answered)))[: len(prompt) + 5] == [*prompt, *letters]
    shorter = [*turn, {"role": "assistant", "content": "the"}, *turn]
    assert ids_of(ids.encode(form.pieces(shorter)))[: len(prompt) + 3] == [*prompt, *letters[:3]]
    other = [{"role": "user", "content": "hell"}]
    assert ids_of(ids.encode(form.pieces(other))) == form.encode(form.pieces(other))


def test_an_answer_goes_on_from_the_tokens_it_ended_with():
    for style in ("default", "persona"):
        dialogue, engine = start(style, rules=SamplingRules(0.0))
        first = dialogue.ask("hello").result()
        known = [*first.prompt_ids, *first.new_ids]
        text = dialogue.messages[-1]["content"]
        whole = dialogue.go_on().result()
        asked = engine.requests[-1].prompt_ids
        certain = [*first.prompt_ids, *certain_ids(first, style)]
        assert common(asked, known) >= len(certain) - 4  # but for spaces and half characters at the end
        assert whole.text.startswith(text)
        assert dialogue.messages == [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": whole.text},
        ]


def test_other_words_take_the_place_of_the_last_question():
    dialogue, _ = start()
    dialogue.ask("one").result()
    dialogue.ask("two").result()
    dialogue.reword("three").result()
    assert [m["content"] for m in dialogue.messages[::2]] == ["one", "three"]
    assert dialogue.question == "three"


@pytest.mark.parametrize("style", ["default", "persona"])
def test_a_window_without_memory_begins_where_one_with_memory_would(style):
    mine = tokenizer(TEMPLATES[style])
    form = choose_format(mine)
    remembers = DialogueWindow(form, DialogueIds(mine, form), 256)
    messages, starts = [{"role": "system", "content": "be kind"}], []
    for number in range(30):
        messages.append({"role": "user", "content": f"question {number} " + "你好" * (number % 5)})
        form = form.fixed(messages) if style == "persona" else form
        forgets = DialogueWindow(form, DialogueIds(mine, form), 256)
        forgets.replay(messages, 20)
        prompt = forgets.prompt(messages, 20, "drop", lambda ids, count: "")
        starts.append(forgets._start)
        assert len(prompt.ids) <= 256 - 20
        assert bool(prompt.notices) is (forgets._start > len(form.examples(messages)) // 2)
        expected = remembers.prompt(messages, 20, "drop", lambda ids, count: "")
        assert abs(len(expected.ids) - len(prompt.ids)) < 120
        messages.append({"role": "assistant", "content": "well " * 3})
    assert starts == sorted(starts)
    assert (
        starts[-1] > 20 and len(set(starts)) <= starts[-1] / 2
    )  # some at a time, so that most prompts go on


def test_what_was_dropped_depends_on_earlier_turns_alone():
    asked, whole = [5, 7, 9, 30, 2, 8, 8, 40, 3], [9, 20, 9, 45, 6, 9, 30, 44, 5]
    starts = [stable_start(asked[:n], whole[:n], 60) for n in range(1, 10)]
    assert starts == [0, 0, 0, 2, 2, 4, 4, 7, 7]
    for n, start_ in enumerate(starts):
        assert sum(whole[start_:n]) + asked[n] <= 60
