"""The chat page in a real browser: talking, keeping, branching, settings, failures."""

import json

import pytest
from tests.serving.browser import Visit, chromium
from tests.serving.pretend import Pretend, Served, failure


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def served():
    pretend = Pretend()
    with Served(pretend.app) as server:
        yield pretend, server


@pytest.fixture
def server(served):
    pretend, running = served
    app = pretend.app
    pretend.__init__()
    pretend.app = app
    pretend.url = running.url
    return pretend


@pytest.fixture
def visit(browser, server):
    visit = Visit(browser, server.url, locale="en-US").open()
    yield visit
    visit.close()


def test_an_answer_streams_in_and_is_counted(visit, server):
    server.answers, server.gate = ["One two three four."], 2
    visit.say("count")
    visit.expect_answer("One two")
    assert visit.page.get_by_role("button", name="Stop").is_visible()
    visit.page.wait_for_timeout(30)  # what arrives all at once has no rate
    server.gate = None
    visit.ended()
    assert visit.answers() == ["One two three four."]
    assert visit.texts("user") == ["count"]
    assert visit.page.locator(".stats").inner_text().startswith("5 tokens · ")
    assert "tokens/s" in visit.page.locator(".stats").inner_text()
    assert server.requests[0]["messages"] == [{"role": "user", "content": "count"}]
    assert server.requests[0]["stream_options"] == {"include_usage": True}


def test_the_next_turn_has_the_whole_conversation(visit, server):
    server.answers = ["first", "second"]
    visit.ask("one")
    visit.ask("two")
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1]["content"] == "first"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_came_and_closes_the_connection(visit, server, how):
    server.answers, server.gate = ["One two three four."], 2
    visit.say("count")
    visit.expect_answer("One two")
    if how == "button":
        visit.page.get_by_role("button", name="Stop").click()
    else:
        visit.page.keyboard.press("Escape")
    visit.ended()
    assert visit.answers() == ["One two"]
    assert "Stopped" in visit.page.locator(".stats").inner_text()
    assert server.disconnected.wait(10)


def test_a_reload_keeps_the_conversation(visit, server):
    server.answers = ["**Bold** words."]
    visit.ask("hello")
    visit.page.reload()
    visit.page.wait_for_selector(".assistant .body strong")
    assert visit.texts("user") == ["hello"]
    assert visit.answers() == ["Bold words."]
    assert "3 tokens" not in visit.page.locator(".stats").inner_text()  # 7: the marks are tokens too
    assert visit.page.locator("[aria-current]").inner_text() == "hello"


def test_a_reload_at_once_keeps_the_question_and_the_answer_so_far_is_marked(visit, server):
    server.answers, server.gate = ["One two three four."], 0
    visit.say("first")
    visit.page.locator(".waiting").wait_for()
    visit.page.reload()
    visit.page.get_by_role("button", name="Try again").wait_for()
    assert (visit.texts("user"), visit.answers()) == (["first"], [])
    visit.page.evaluate(
        """async () => {
            const { ConversationStore } = await import("/page/store.js");
            const { addMessage } = await import("/page/conversation.js");
            const store = new ConversationStore();
            await store.open();
            const [conversation] = await store.all();
            addMessage(conversation, "assistant", "One two");
            await store.save(conversation);
        }"""
    )
    visit.page.reload()
    visit.expect_answer("One two")
    assert "Cut off" in visit.page.locator(".stats").inner_text()


def test_a_stopped_answer_goes_on_in_the_same_message(visit, server):
    server.answers, server.gate = ["One two three", " and four."], 2
    visit.say("count")
    visit.expect_answer("One two")
    visit.page.keyboard.press("Escape")
    visit.ended()
    server.gate = None
    visit.page.get_by_role("button", name="Go on").click()
    visit.expect_answer("One two and four.")
    visit.ended()
    sent = server.requests[1]
    assert sent["messages"][-1] == {"role": "assistant", "content": "One two"}
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    assert visit.page.locator(".stats").inner_text().startswith("5 tokens")
    assert visit.page.get_by_role("button", name="Go on").count() == 0
    visit.page.locator(".token", has_text="four").hover()
    assert visit.page.locator(".option.chosen").inner_text().startswith("␣four")


def test_the_oldest_turns_are_left_out_where_the_visitor_wants_it(visit, server):
    server.failures = [failure(400, "too long", code="context_length_exceeded")]
    visit.say("hello")
    visit.page.get_by_role("button", name="Leave out the oldest turns").click()
    visit.expect_answer("Hello there.")
    visit.ended()
    assert [request.get("context_policy") for request in server.requests] == [None, "drop"]
    visit.page.get_by_role("button", name="Settings").click()
    choice = visit.page.get_by_label("When it is longer than the model can read")
    assert choice.input_value() == "drop"
    choice.select_option("refuse")
    visit.page.get_by_role("button", name="Close").click()
    visit.ask("again")
    assert "context_policy" not in server.requests[-1]


def test_a_server_that_comes_back_is_found_without_a_click(browser, server):
    visit = Visit(browser, server.url, locale="en-US")
    visit.page.clock.install()
    visit.page.route("**/v1/models", lambda route: route.abort())
    visit.open()
    visit.page.get_by_text("The server cannot be reached.").wait_for()
    visit.page.unroute("**/v1/models")
    visit.page.clock.run_for(6000)
    visit.page.locator(".notice").wait_for(state="detached")
    assert visit.page.get_by_role("combobox", name="Model").input_value() == "pretend"
    visit.close()


def test_regenerate_makes_a_version_and_the_first_stays(visit, server):
    server.answers = ["first", "second"]
    visit.ask("hello")
    visit.page.get_by_role("button", name="Answer again").click()
    visit.expect_answer("second")
    visit.ended()
    assert server.requests[1]["messages"] == server.requests[0]["messages"]
    assert visit.page.get_by_role("group", name="Version 2 of 2").is_visible()
    visit.page.get_by_role("button", name="Version before").click()
    assert visit.answers() == ["first"]
    visit.page.get_by_role("button", name="Version after").click()
    assert visit.answers() == ["second"]


def test_edit_begins_a_branch_and_the_old_one_stays(visit, server):
    server.answers = ["to the first", "to the other"]
    visit.ask("first")
    visit.page.locator(".user").hover()
    visit.page.get_by_role("button", name="Edit", exact=True).click()
    box = visit.page.get_by_role("textbox", name="Edit the message")
    assert box.input_value() == "first"
    box.fill("other")
    box.press("Enter")
    visit.expect_answer("to the other")
    visit.ended()
    assert visit.texts("user") == ["other"]
    assert server.requests[1]["messages"] == [{"role": "user", "content": "other"}]
    visit.page.get_by_role("button", name="Version before").click()
    assert (visit.texts("user"), visit.answers()) == (["first"], ["to the first"])
    visit.page.reload()  # the branch that is shown is kept too
    visit.page.wait_for_selector(".assistant")
    assert visit.texts("user") == ["first"]


def test_settings_reach_the_server(visit, server):
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_label("System prompt").fill("Answer in verse.")
    values = {"Temperature": 0.3, "Top-p": 0.9, "Top-k": 7, "Min-p": 0.05, "New tokens at most": 12}
    values |= {"Repetition penalty": 1.1, "Presence penalty": 0.5, "Frequency penalty": -0.5, "Seed": 42}
    for name, value in values.items():
        visit.page.get_by_role("spinbutton", name=name).fill(str(value))
    visit.page.get_by_label("Stop at (one per line)").fill("END\n###")
    visit.page.get_by_role("button", name="Close").click()
    visit.ask("hello")
    [sent] = server.requests
    names = ["temperature", "top_p", "top_k", "min_p", "max_tokens"]
    names += ["repetition_penalty", "presence_penalty", "frequency_penalty", "seed"]
    assert [sent[name] for name in names] == list(values.values())
    assert sent["stop"] == ["END", "###"]
    assert sent["messages"][0] == {"role": "system", "content": "Answer in verse."}
    visit.page.reload()
    visit.page.wait_for_selector("[data-ready]")
    visit.page.get_by_role("button", name="Settings").click()
    assert visit.page.get_by_role("spinbutton", name="Temperature").input_value() == "0.3"
    visit.page.get_by_role("button", name="Back to defaults").click()
    visit.page.get_by_role("button", name="Close").click()
    visit.ask("again")
    assert not set(names) & set(server.requests[-1])


def test_what_was_not_set_is_not_sent(visit, server):
    visit.ask("hello")
    expected = {"model", "messages", "stream", "stream_options", "logprobs", "top_logprobs"}
    assert set(server.requests[0]) == expected
    assert server.requests[0]["top_logprobs"] == 5


def test_hover_shows_the_alternatives(visit, server):
    server.answers = ["Red blue green"]
    visit.ask("colours")
    visit.page.locator(".token", has_text="blue").hover()
    bubble = visit.page.locator("#alternatives")
    rows = bubble.locator(".option").all_inner_texts()
    assert [row.split("\n")[0] for row in rows] == ["␣blue", "␣blue~", "other", "a", "b"]
    assert "60%" in rows[0] and "2.0%" in rows[4]
    assert bubble.locator(".chosen").count() == 1
    visit.page.locator("#prompt").hover()
    assert bubble.is_hidden()


def test_a_character_of_several_tokens_is_one_piece(visit):
    pieces = visit.page.evaluate(
        """async () => {
            const { PieceFiler } = await import("/page/tokens.js");
            const pieces = [];
            const filer = new PieceFiler(pieces);
            filer.push("", [["\\ufffd", -1, []]]);
            filer.push("你", [["\\ufffd", -2, []]]);
            filer.push("ab", [["a", -3, []], ["b", -4, []]]);
            return pieces.map(([length, tokens]) => [length, tokens.map(([, logprob]) => logprob)]);
        }"""
    )
    assert pieces == [[1, [-1, -2]], [1, [-3]], [1, [-4]]]


def test_probabilities_can_be_turned_off(visit, server):
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_role("switch", name="Probabilities of tokens").uncheck()
    visit.page.get_by_role("button", name="Close").click()
    visit.ask("hello")
    assert "logprobs" not in server.requests[0]
    assert visit.page.locator(".token").count() == 0


def test_a_base_model_continues_text(visit, server):
    visit.page.get_by_role("radio", name="Continue text").click()
    server.answers = [" there was", " a lighthouse."]
    visit.ask("Once upon a time,")
    assert server.requests[0]["prompt"] == "Once upon a time,"
    assert server.requests[0]["logprobs"] == 5
    visit.page.locator(".token", has_text="was").hover()
    assert visit.page.locator(".option").count() == 5
    visit.page.get_by_role("button", name="Go on").click()
    visit.page.locator(".assistant >> nth=1").wait_for()
    visit.ended()
    assert server.requests[1]["prompt"] == "Once upon a time, there was"
    assert (
        "".join(visit.page.locator(".body").all_text_contents())
        == "Once upon a time, there was a lighthouse."
    )


def test_conversations_are_renamed_found_deleted_and_brought_back(visit, server):
    visit.ask("about boats")
    visit.page.get_by_role("button", name="New conversation").click()
    visit.ask("about trains")
    names = lambda: visit.page.locator(".pick").all_inner_texts()  # noqa: E731
    assert names() == ["about trains", "about boats"]
    visit.page.locator(".item", has_text="boats").hover()
    visit.page.get_by_role("button", name="Rename “about boats”").click()
    visit.page.get_by_role("textbox", name="New title").fill("Ships")
    visit.page.keyboard.press("Enter")
    assert names() == ["about trains", "Ships"]
    visit.page.get_by_role("searchbox").fill("boats")  # its text still has the word
    assert names() == ["Ships"]
    visit.page.get_by_role("searchbox").fill("")
    visit.page.locator(".item", has_text="Ships").hover()
    visit.page.get_by_role("button", name="Delete “Ships”").click()
    assert names() == ["about trains"]
    visit.page.get_by_role("button", name="Undo").click()
    visit.page.locator(".user", has_text="about boats").wait_for()
    assert sorted(names()) == ["Ships", "about trains"]
    assert visit.texts("user") == ["about boats"]


def test_what_is_exported_can_be_imported(visit, server, tmp_path):
    visit.ask("keep me")
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Export all").click()
    path = tmp_path / "conversations.json"
    download.value.save_as(path)
    found = json.loads(path.read_text())
    assert found["format"] == "mtnlg-conversations"
    visit.page.locator(".item").hover()
    visit.page.get_by_role("button", name="Delete “keep me”").click()
    visit.page.set_input_files("#import-file", path)
    visit.page.locator(".pick", has_text="keep me").click()
    assert (visit.texts("user"), visit.answers()) == (["keep me"], ["Hello there."])


@pytest.mark.parametrize("text", ["nonsense", "{}", '{"conversations": [{"messages": {"x": 3}}, null, 7]}'])
def test_a_foreign_file_is_refused_kindly(visit, text, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    visit.page.set_input_files("#import-file", path)
    said = visit.page.get_by_text("This file holds no conversations of this page.")
    said.wait_for()
    assert said.is_visible()


def test_a_file_whose_messages_run_in_a_circle_is_made_sound(visit, tmp_path):
    message = {"id": "a", "parent": "b", "role": "user", "text": "round", "created": 1}
    other = {**message, "id": "b", "parent": "a", "role": "assistant", "created": 2}
    found = {"conversations": [{"title": "circle", "messages": {"a": message, "b": other}, "leaf": "b"}]}
    path = tmp_path / "circle.json"
    path.write_text(json.dumps(found))
    visit.page.set_input_files("#import-file", path)
    visit.page.locator(".pick", has_text="circle").click()
    assert visit.answers() == ["round"]


def test_the_newer_of_two_answers_may_stream_while_another_conversation_is_read(visit, server):
    server.answers, server.gate = ["One two three four."], 2
    visit.say("slow")
    visit.expect_answer("One two")
    visit.page.get_by_role("button", name="New conversation").click()
    assert visit.page.get_by_role("button", name="Send").is_visible()
    server.gate = None
    visit.page.locator(".dot").wait_for(state="detached")
    visit.page.locator(".pick", has_text="slow").click()
    assert visit.answers() == ["One two three four."]


def test_models_can_be_chosen(visit, server):
    server.models = [{"id": "small"}, {"id": "large"}]
    visit.page.reload()
    visit.page.get_by_role("combobox", name="Model").select_option("large")
    visit.ask("hello")
    assert server.requests[0]["model"] == "large"


def test_a_key_that_is_missing_or_wrong_is_asked_for(visit, server):
    server.key = "secret"
    visit.page.reload()
    notice = visit.page.get_by_role("alert")
    notice.get_by_text("This server asks for an API key.").wait_for()
    notice.get_by_role("button", name="Enter a key").click()
    box = visit.page.get_by_label("API key")
    assert box.evaluate("node => node === document.activeElement")
    box.fill("wrong")
    visit.page.get_by_role("button", name="Close").click()
    notice.get_by_text("The server did not accept this API key.").wait_for()
    notice.get_by_role("button", name="Enter a key").click()
    box.fill("secret")
    visit.page.get_by_role("button", name="Close").click()
    visit.page.locator(".notice").wait_for(state="detached")
    assert visit.ask("hello") == "Hello there."


def refused(*arguments, **more):
    return lambda server: server.failures.append(failure(*arguments, **more))


FAILURES = {
    "busy": (refused(429, headers={"Retry-After": "600"}), "Many are asking right now."),
    "starting": (refused(503), "The server is starting or pausing"),
    "fault": (refused(500, "sorry"), "The server says: sorry"),
    "setting": (refused(400, "top_p is 7"), "The server says: top_p is 7"),
    "long": (refused(400, "too long", code="context_length_exceeded"), "longer than the model can read"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_said_kindly_and_can_be_tried_again(visit, server, name):
    prepare, words = FAILURES[name]
    prepare(server)
    visit.say("hello")
    notice = visit.page.get_by_role("alert")
    notice.get_by_text(words).wait_for()
    assert visit.answers() == []
    assert visit.texts("user") == ["hello"]
    notice.get_by_role("button", name="Try again").click()
    visit.expect_answer("Hello there.")
    visit.ended()
    assert visit.page.locator(".notice").count() == 0
    assert len(server.requests) == 2


def test_retry_after_is_counted_down_and_tried_again(visit, server):
    server.failures = [failure(429, headers={"Retry-After": "1"})]
    visit.say("hello")
    visit.page.get_by_text("Trying again in 1 s").wait_for()
    visit.expect_answer("Hello there.")


def test_a_visitor_need_not_wait(visit, server):
    server.failures = [failure(429, headers={"Retry-After": "600"})]
    visit.say("hello")
    visit.page.get_by_role("button", name="Do not wait").click()
    assert visit.page.get_by_text("Trying again").count() == 0


def test_a_stream_that_breaks_keeps_what_came(visit, server):
    server.answers, server.gate, server.breaks_after = ["One two three four."], 2, 2
    visit.say("count")
    visit.expect_answer("One two")
    server.gate = None
    visit.page.get_by_role("alert").get_by_text("broke off midway").wait_for()
    assert visit.answers() == ["One two"]
    assert "Cut off" in visit.page.locator(".stats").inner_text()
    server.breaks_after = None
    visit.page.get_by_role("button", name="Try again").click()
    visit.expect_answer("One two three four.")
    assert visit.page.get_by_role("group", name="Version 2 of 2").is_visible()


def test_a_network_that_is_gone_is_said(visit, server):
    visit.context.set_offline(True)
    visit.say("hello")
    visit.page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
    visit.context.set_offline(False)
    visit.page.get_by_role("button", name="Try again").click()
    visit.expect_answer("Hello there.")
