"""One engine: what is asked of it, who gets what, and what happens when something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from mtnlg.config import ConfigError
from mtnlg.config.errors import MtnlgError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import (
    Engine,
    EngineClosedError,
    GenerationRequest,
    QueueFullError,
    SamplingRules,
    TokenEvent,
)
from mtnlg.generation.locks import FairLock
from mtnlg.generation.runner import PlainRunner, Row
from mtnlg.generation.scheduler import Draft

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], list(range(30)), list(range(20)) + [3] * 5]


class SpyRunner(PlainRunner):
    """Writes down what each step works on; fails where it is told to."""

    def __init__(self, model, num_pages: int = 64) -> None:
        super().__init__(model, num_pages)
        self.steps: list[list[tuple[int, int]]] = []  # (start, tokens) of each row
        self.error: BaseException | None = None

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        self.steps.append([(row.start, len(row.ids)) for row in rows])
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().run(rows)


def repeated_argmax(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def decode(ids: list[int]) -> str:
    return "".join(chr(ord("a") + token) if token < 26 else f"<{token}>" for token in ids)


def make_engine(model, runner=None, text=None, **settings) -> Engine:
    return Engine(model, text, EngineConfig(**settings), runner or SpyRunner(model))


@pytest.mark.parametrize("family", ["gpt", "llama", "no-positions"])
@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk": 3}, {"max_batch_size": 2}, {"prefix_cache": False}]
)
def test_greedy_equals_repeated_argmax(make_model, family, settings):
    model = make_model(family)
    engine = make_engine(model, **settings)
    found = [engine.submit(GenerationRequest(prompt, max_new_tokens=9)) for prompt in PROMPTS]
    for prompt, generation in zip(PROMPTS, found):
        assert generation.result().ids == repeated_argmax(model, prompt, 9)
        assert generation.finish_reason == "length"
    assert engine.statistics.finished == len(PROMPTS)
    assert engine.statistics.cache_tokens == 0


def test_too_little_memory_makes_requests_take_turns_and_changes_nothing(make_model):
    model = make_model()
    engine = make_engine(model, SpyRunner(model, num_pages=4))
    found = [engine.submit(GenerationRequest(prompt, max_new_tokens=18)) for prompt in PROMPTS]
    for prompt, generation in zip(PROMPTS, found):
        assert generation.result().ids == repeated_argmax(model, prompt, 18)
    assert engine.statistics.preempted > 0


def test_a_request_longer_than_the_memory_is_refused_with_the_limit(make_model):
    model = make_model()
    engine = make_engine(model, SpyRunner(model, num_pages=2))
    assert engine.max_length == 32
    with pytest.raises(ConfigError, match="the model 32 positions"):
        engine.submit(GenerationRequest([1] * 40))
    assert len(engine.submit(GenerationRequest([1] * 30, max_new_tokens=99)).result().ids) == 32


def test_a_long_prompt_never_stalls_those_who_generate(make_model):
    model = make_model()
    runner = SpyRunner(model)
    engine = make_engine(model, runner, prefill_chunk=8)
    first = engine.submit(GenerationRequest([5], max_new_tokens=20))
    engine.step()
    long = [engine.submit(GenerationRequest([n, *range(39)], max_new_tokens=1)) for n in (40, 41)]
    while not all(generation.is_finished for generation in long):
        had = len(first.new_ids)
        engine.step()
        assert len(first.new_ids) == had + 1
        tokens = [count for start, count in runner.steps[-1] if count > 1 or start == 0]
        assert sum(tokens) <= 8 + 1


def test_short_prompts_overtake_long_ones_but_the_oldest_goes_on(make_model):
    model = make_model()
    runner = SpyRunner(model)
    engine = make_engine(model, runner, prefill_chunk=8)
    long = engine.submit(GenerationRequest(list(range(40)), max_new_tokens=1))
    short = [engine.submit(GenerationRequest([n, n, n], max_new_tokens=1)) for n in range(50, 60)]
    engine.step()
    assert short[0].is_finished and not long.is_finished
    assert max(count for _, count in runner.steps[0]) >= 4  # half of the chunk
    for generation in short:
        generation.result()
    assert not long.is_finished
    long.result()


def test_a_prompt_is_computed_once_for_all_its_samples(make_model):
    model = make_model()
    runner = SpyRunner(model)
    engine = make_engine(model, runner, prefill_chunk=16)
    prompt = list(range(35))
    rules = SamplingRules(temperature=1.0, seed=1)
    found = [engine.submit(GenerationRequest(prompt, rules, max_new_tokens=6, stream=n)) for n in range(5)]
    alone = Engine(model, runner=PlainRunner(model, 64))
    for number, generation in enumerate(found):
        same = alone.submit(GenerationRequest(prompt, rules, max_new_tokens=6, stream=number)).result()
        assert generation.result().ids == same.ids
    assert len({tuple(generation.new_ids) for generation in found}) > 1
    assert [generation.usage.cached_tokens for generation in found] == [0, 32, 32, 32, 32]
    prompt_tokens = sum(count for step in runner.steps for start, count in step if start < 35)
    assert prompt_tokens == 35 + 4 * 3


def test_a_conversation_goes_on_from_what_is_held(make_model):
    model = make_model()
    engine = make_engine(model)
    first = engine.submit(GenerationRequest(list(range(20)), max_new_tokens=15)).result()
    turn = [*first.ids, 4, 4]
    second = engine.submit(GenerationRequest(turn, max_new_tokens=5)).result()
    assert second.usage.cached_tokens == 32
    assert second.ids == repeated_argmax(model, turn, 5)
    engine.forget()
    assert engine.submit(GenerationRequest(turn, max_new_tokens=5)).result().usage.cached_tokens == 0


def test_changed_weights_are_used_after_forget(make_model):
    model = make_model()
    engine = make_engine(model)
    engine.submit(GenerationRequest(list(range(33)), max_new_tokens=2)).result()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    engine.forget()
    found = engine.submit(GenerationRequest(list(range(33)), max_new_tokens=5)).result()
    assert found.ids == repeated_argmax(model, list(range(33)), 5)


def test_without_a_cache_everything_is_computed_anew(make_model):
    model = make_model(use_cache=False)
    runner = SpyRunner(model)
    engine = make_engine(model, runner, prefill_chunk=2)
    found = engine.submit(GenerationRequest([1, 2, 3], max_new_tokens=4)).result()
    assert found.ids == repeated_argmax(model, [1, 2, 3], 4)
    assert runner.steps == [[(0, 3)], [(0, 4)], [(0, 5)], [(0, 6)]]


# -- how it ends


def test_an_end_token_is_kept_and_has_no_text(make_model):
    model = make_model()
    expected = repeated_argmax(model, [5, 9, 2], 8)[3:]
    end = expected[3]
    engine = make_engine(model, text=decode)
    found = engine.submit(GenerationRequest([5, 9, 2], end_ids=[end])).result()
    where = expected.index(end)
    assert found.new_ids == expected[: where + 1]
    assert found.finish_reason == "end"
    assert found.text == decode(expected[:where])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_it_wherever_tokens_begin(make_model, include):
    model = make_model()
    expected = repeated_argmax(model, [5, 9, 2], 12)[3:]
    whole = decode(expected)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    engine = make_engine(model, text=decode)
    found = engine.submit(GenerationRequest([5, 9, 2], stop=[stop], include_stop=include)).result()
    end = whole.index(stop)
    assert found.finish_reason == "stop"
    assert found.text == whole[: end + (len(stop) if include else 0)]
    assert found.usage.new_tokens == len(found.new_ids) <= 12


def test_held_back_text_comes_with_the_last_token(make_model):
    model = make_model()
    whole = decode(repeated_argmax(model, [5, 9, 2], 6)[3:])
    engine = make_engine(model, text=decode)
    request = GenerationRequest([5, 9, 2], max_new_tokens=6, stop=[whole[-1] + "never"])
    events = list(engine.submit(request))
    assert "".join(event.text for event in events) == whole
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]


def test_a_finished_constraint_ends_it(make_model):
    class OneThenDone:
        is_complete = False

        def start(self):
            return OneThenDone()

        def fill_mask(self, bitmask):
            bitmask.fill_(0)
            bitmask[0] = 1 << 7

        def accept(self, token):
            assert token == 7
            self.is_complete = True

        def copy(self):
            return self

    engine = make_engine(make_model())
    found = engine.submit(GenerationRequest([1, 2], constraint=OneThenDone())).result()
    assert (found.new_ids, found.finish_reason) == ([7], "stop")


def test_a_cancelled_request_is_gone_within_one_step(make_model):
    engine = make_engine(make_model(), max_batch_size=1)
    running = engine.submit(GenerationRequest(PROMPTS[3], max_new_tokens=15))
    waiting = engine.submit(GenerationRequest(PROMPTS[3], max_new_tokens=15))
    other = engine.submit(GenerationRequest(PROMPTS[2], max_new_tokens=15))
    engine.step()
    had = len(running.new_ids)
    running.cancel()
    waiting.cancel()
    engine.step()
    assert running.result().finish_reason == waiting.result().finish_reason == "cancelled"
    assert len(running.new_ids) == had and waiting.new_ids == []
    assert len(other.result().new_ids) == 15
    assert engine.statistics.cache_tokens == 0
    running.cancel()  # nothing happens any more
    assert engine.statistics.finish_reasons == {"cancelled": 2, "length": 1}


def test_a_deadline_ends_a_request_with_what_it_has(make_model, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mtnlg.generation.engine.time.monotonic", lambda: now[0])
    engine = make_engine(make_model(), max_batch_size=1)
    running = engine.submit(GenerationRequest([1], max_new_tokens=40, deadline_seconds=5))
    waiting = engine.submit(GenerationRequest([1], max_new_tokens=40, deadline_seconds=3))
    patient = engine.submit(GenerationRequest([1], max_new_tokens=2, deadline_seconds=9))
    engine.step()
    now[0] = 104.0
    engine.step()
    assert waiting.finish_reason == "deadline" and running.finish_reason is None
    now[0] = 105.0
    engine.step()
    assert running.result().finish_reason == "deadline"
    assert len(running.new_ids) == 2
    assert running.usage.total_seconds == 5.0
    assert patient.result().finish_reason == "length"


# -- scores and embeddings


@pytest.mark.parametrize("chunk", [4, 64])
def test_prompt_logprobs_are_the_models(make_model, chunk):
    model = make_model()
    engine = make_engine(model, prefill_chunk=chunk)
    prompt = PROMPTS[4]
    engine.submit(GenerationRequest(prompt, max_new_tokens=2)).result()  # now its pages are known
    found = engine.submit(
        GenerationRequest(prompt, max_new_tokens=2, prompt_logprobs=3, logprobs=2)
    ).result()
    with torch.no_grad():
        expected = model(torch.tensor([found.ids])).logits[0].log_softmax(-1)
    scores = [*(found.prompt_logprobs or []), *found.logprobs]
    assert scores[0].logprob is None and scores[0].top == ()
    assert len(scores) == len(found.ids)
    for place, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(float(expected[place, found.ids[place + 1]]), abs=1e-4)
        assert len(score.top) == (3 if place + 1 < len(prompt) else 2)
        assert score.top[0][0] == int(expected[place].argmax())
    only = engine.submit(GenerationRequest(prompt, max_new_tokens=0, prompt_logprobs=0)).result()
    assert only.new_ids == [] and only.finish_reason == "length"
    assert len(only.prompt_logprobs or []) == len(prompt)


def test_prompt_logprobs_come_once_where_memory_is_short(make_model):
    model = make_model()
    engine = make_engine(model, SpyRunner(model, num_pages=5), prefill_chunk=4)
    request = [GenerationRequest([n, *PROMPTS[4]], max_new_tokens=20, prompt_logprobs=0) for n in (3, 4, 5)]
    found = [engine.submit(one) for one in request]
    for one, generation in zip(request, found):
        assert generation.result().ids == repeated_argmax(model, list(one.prompt_ids), 20)
        assert len(generation.prompt_logprobs or []) == len(one.prompt_ids)
    assert engine.statistics.preempted > 0


def test_embeddings_are_the_last_hidden_states_beside_running_requests(make_model):
    model = make_model("llama")
    engine = make_engine(model, prefill_chunk=7)
    running = engine.submit(GenerationRequest(PROMPTS[0], max_new_tokens=12))
    engine.step()
    for prompt in PROMPTS:
        with torch.no_grad():
            hidden = model.embedding(torch.tensor([prompt]), torch.arange(len(prompt))[None])
            head, model.head = model.head, None
            hidden = model(torch.tensor([prompt])).hidden
            model.head = head
            expected = head.norm(hidden)[0]
        found = engine.embed(prompt)
        assert found.shape == (len(prompt), 32)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert running.result().ids == repeated_argmax(model, PROMPTS[0], 12)


# -- what goes wrong


def test_everything_wrong_with_a_request_is_named_at_once(make_model):
    engine = make_engine(make_model())
    request = GenerationRequest(
        [1, 99],
        SamplingRules(logit_bias=((70, 1.0),)),
        max_new_tokens=0,
        min_new_tokens=-1,
        logprobs=-2,
        deadline_seconds=float("nan"),
        stop=["x"],
        end_ids=[67],
        stream=-1,
    )
    with pytest.raises(ConfigError) as refused:
        engine.submit(request)
    names = ["token 99", "logit_bias", "max_new_tokens is 0", "min_new_tokens is -1", "logprobs is -2"]
    names += [
        "deadline_seconds is nan",
        "stop strings need a tokenizer",
        "end_ids names token 67",
        "stream",
    ]
    for name in names:
        assert name in str(refused.value)
    assert engine.statistics.waiting == 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([67], {}, "0 to 66"),
        ([-1], {}, "0 to 66"),
        ([1.5], {}, "whole numbers"),
        ([1] * 48, {}, "48 positions"),
        ([1] * 5, {"max_length": 5}, "counts prompt and continuation"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"max_length": -3}, "max_length is -3"),
        ([1], {"min_new_tokens": 5, "max_new_tokens": 4}, "the least cannot be above the most"),
        ([1], {"stop": "x"}, "list of texts"),
        ([1], {"stop": [""]}, "not empty"),
    ],
)
def test_wrong_requests_are_refused(make_model, prompt, options, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(make_model()).submit(GenerationRequest(prompt, **options))


def test_a_full_queue_refuses(make_model):
    engine = make_engine(make_model(), max_batch_size=1, max_queue_size=2)
    found = [engine.submit(GenerationRequest([1], max_new_tokens=2)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="try again later"):
        engine.submit(GenerationRequest([1]))
    for generation in found:
        generation.result()
    engine.submit(GenerationRequest([1], max_new_tokens=2)).result()


def test_an_error_of_the_model_ends_the_step_and_not_the_engine(make_model, caplog):
    runner = SpyRunner(make_model())
    engine = make_engine(runner.model, runner, max_batch_size=2)
    found = [engine.submit(GenerationRequest([n], max_new_tokens=4)) for n in range(3)]
    engine.step()
    runner.error = RuntimeError("no memory")
    for generation in found[:2]:
        with pytest.raises(MtnlgError, match="no memory"):
            generation.result()
        assert generation.finish_reason == "error"
    assert len(found[2].result().new_ids) == 4
    assert engine.statistics.cache_tokens == 0
    assert "no memory" in caplog.text


def test_a_requests_own_error_ends_that_one_alone(make_model):
    class Broken:
        is_complete = False

        def start(self):
            return self

        def fill_mask(self, bitmask):
            raise ValueError("the rule is broken")

        accept = copy = fill_mask

    model = make_model()
    engine = make_engine(model)
    good = engine.submit(GenerationRequest(PROMPTS[0], max_new_tokens=5))
    bad = engine.submit(GenerationRequest(PROMPTS[1], max_new_tokens=5, constraint=Broken()))
    with pytest.raises(MtnlgError, match="the rule is broken"):
        bad.result()
    assert good.result().ids == repeated_argmax(model, PROMPTS[0], 5)


def test_a_listener_that_fails_ends_its_own_request_alone(make_model):
    model = make_model()
    engine = make_engine(model)
    good = engine.submit(GenerationRequest(PROMPTS[0], max_new_tokens=5))
    bad = engine.submit(GenerationRequest(PROMPTS[1], max_new_tokens=5))

    def listen(event: TokenEvent) -> None:
        raise ConnectionError("gone")

    bad.listen(listen)
    assert good.result().ids == repeated_argmax(model, PROMPTS[0], 5)
    assert bad.finish_reason == "error" and isinstance(bad.error, MtnlgError)


def test_a_mistake_of_the_engine_leaves_nobody_waiting(make_model, monkeypatch, caplog):
    engine = make_engine(make_model())
    found = engine.submit(GenerationRequest([1]))
    monkeypatch.setattr(engine._scheduler, "plan", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.result()
    with pytest.raises(EngineClosedError, match="ZeroDivisionError"):
        engine.submit(GenerationRequest([1]))


def test_ctrl_c_in_a_step_cancels_and_the_engine_lives_on(make_model):
    runner = SpyRunner(make_model())
    engine = make_engine(runner.model, runner)
    found = engine.submit(GenerationRequest([1], max_new_tokens=5))
    engine.step()
    runner.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        found.result()
    assert found.finish_reason == "cancelled"
    assert len(engine.submit(GenerationRequest([1], max_new_tokens=5)).result().new_ids) == 5
    assert engine.statistics.cache_tokens == 0


# -- threads


def test_the_engines_thread_serves_many_threads(make_model):
    model = make_model()
    with make_engine(model, max_batch_size=3).start() as engine:
        answers: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            prompt = PROMPTS[number % len(PROMPTS)]
            answers[number] = engine.submit(GenerationRequest(prompt, max_new_tokens=6)).result().ids

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for number in range(20):
            assert answers[number] == repeated_argmax(model, PROMPTS[number % len(PROMPTS)], 6)
        assert engine.embed([1, 2, 3]).shape == (3, 32)


def test_threads_may_drive_an_engine_without_a_thread(make_model):
    model = make_model()
    engine = make_engine(model)
    found = [engine.submit(GenerationRequest(prompt, max_new_tokens=8)) for prompt in PROMPTS]
    threads = [threading.Thread(target=generation.result) for generation in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for prompt, generation in zip(PROMPTS, found):
        assert generation.ids == repeated_argmax(model, prompt, 8)


@pytest.mark.parametrize("is_started", [True, False])
def test_closing_lets_running_answers_finish_and_takes_nothing_more(make_model, is_started):
    engine = make_engine(make_model(), max_batch_size=1)
    if is_started:
        engine.start()
    found = [engine.submit(GenerationRequest([1], max_new_tokens=20)) for _ in range(3)]
    engine.close(drain_seconds=60)
    assert [generation.result().finish_reason for generation in found] == ["length"] * 3
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit(GenerationRequest([1]))
    with pytest.raises(EngineClosedError):
        engine.start()
    engine.close()


def test_closing_at_once_cancels(make_model):
    engine = make_engine(make_model()).start()
    heard: list[TokenEvent] = []
    found = engine.submit(GenerationRequest([1], max_new_tokens=40))
    found.listen(heard.append)
    engine.close()
    assert found.is_finished
    assert heard[-1].finish_reason == found.finish_reason


def test_times_and_counts_are_kept(make_model):
    engine = make_engine(make_model(), max_batch_size=2)
    for generation in [engine.submit(GenerationRequest([n], max_new_tokens=4)) for n in range(3)]:
        usage = generation.result().usage
        assert (usage.prompt_tokens, usage.new_tokens) == (1, 4)
        assert 0 <= usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds
    found = engine.statistics
    assert (found.finished, found.new_tokens, found.prompt_tokens) == (3, 12, 3)
    assert found.first_token_seconds.count == found.queue_seconds.count == 3
    assert found.between_tokens_seconds.count == 9
    assert found.batch_rows.cumulative()[:2] == [(1, 4), (2, 8)]
    assert found.batch_rows.cumulative()[-1] == (float("inf"), found.steps)
    assert 0 < found.model_seconds < found.step_seconds


class Guesser:
    """Guesses from what it was told; right as often as that was."""

    def __init__(self, answers: list[list[int]], count: int) -> None:
        self.answers, self.count = answers, count
        self.forgotten = 0

    def draft(self, entries):
        found = []
        for entry in entries:
            known = [ids for ids in self.answers if ids[: len(entry.ids)] == entry.ids]
            found.append(Draft(known[0][len(entry.ids) :][: self.count] if known else [1, 2, 3]))
        return found

    def forget(self, entry):
        self.forgotten += 1


@pytest.mark.parametrize("num_pages", [64, 5])
@pytest.mark.parametrize("rules", [SamplingRules(), SamplingRules(temperature=1.0, seed=4)])
def test_guesses_change_the_steps_and_not_the_tokens(make_model, rules, num_pages):
    model = make_model()

    def ask(engine):
        found = [
            engine.submit(GenerationRequest(p, rules, max_new_tokens=15, end_ids=[60], logprobs=1))
            for p in PROMPTS
        ]
        return [generation.result() for generation in found]

    plain = Engine(model, runner=SpyRunner(model))
    expected = ask(plain)
    answers = [found.ids for found in expected]
    wrong = [[*ids[:-4], 0, 0, 0, 0] for ids in answers]
    for known in (answers, wrong, []):
        guesser = Guesser(known, 4)
        engine = Engine(model, runner=SpyRunner(model, num_pages), drafter=guesser)
        found = ask(engine)
        assert [one.ids for one in found] == answers
        assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
        for one, same in zip(found, expected):
            scores, others = [[s.logprob for s in of.logprobs] for of in (one, same)]
            assert scores == pytest.approx(others, abs=1e-4)
        assert engine.statistics.cache_tokens == 0
        assert guesser.forgotten == len(PROMPTS)
        if known is answers and num_pages == 64:
            assert engine.statistics.steps < plain.statistics.steps / 2
            assert engine.statistics.accepted_tokens == engine.statistics.drafted_tokens > 20


def test_a_search_takes_turns_with_running_requests(make_model):
    model = make_model()
    with make_engine(model).start() as engine:
        running = engine.submit(GenerationRequest([5], max_new_tokens=40))
        for _ in range(10):
            with engine.exclusively() as (_runner, books):
                pages = books.take(1)
                num_steps = engine.statistics.steps
                assert engine.statistics.steps == num_steps
                books.give_back(pages)
        assert running.result().ids == repeated_argmax(model, [5], 40)


def test_whoever_waits_for_the_lock_gets_it_next():
    lock = FairLock()
    order: list[str] = []
    is_waiting = threading.Event()

    def guest() -> None:
        is_waiting.set()
        with lock:
            order.append("guest")

    thread = threading.Thread(target=guest)
    with lock:
        thread.start()
        is_waiting.wait()
        while not lock._queue.locked():
            pass
        assert not lock.try_to_enter()
    with lock:
        order.append("holder")
    thread.join()
    assert order == ["guest", "holder"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(make_model):
    runner = SpyRunner(make_model())
    runner.error = SystemExit("ended from within")
    engine = make_engine(runner.model, runner).start()
    found = engine.submit(GenerationRequest([1]))
    assert found.result().finish_reason == "cancelled"
    assert engine._thread is not None
    engine._thread.join(timeout=60)
    assert not engine.is_alive
    with pytest.raises(EngineClosedError):
        engine.submit(GenerationRequest([1]))
    engine.close()


def test_requests_that_ended_in_time_are_not_held_until_their_deadline(make_model):
    engine = make_engine(make_model())
    for _ in range(100):
        engine.submit(GenerationRequest([1], max_new_tokens=1, deadline_seconds=600)).result()
    assert len(engine._deadlines) <= 65
