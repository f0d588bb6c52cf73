"""The judge against a real server on loopback that answers as OpenAI-compatible endpoints do."""

import email.utils
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ocrm_ray import judge as judge_module
from ocrm_ray.config import JudgeGold
from ocrm_ray.errors import RunError, UserError
from ocrm_ray.gold import load_gold
from ocrm_ray.judge import REMINDER, Judge, JudgeStatistics, retry_after_s

KEY = "sk-a-key-that-nobody-may-see"
Reply = tuple[int, dict[str, str], bytes]


def completion(answer: object, usage: dict[str, int] | None = None) -> Reply:
    told = {} if usage is None else {"usage": usage}
    return 200, {}, json.dumps({"choices": [{"message": {"content": answer}}], **told}).encode()


def failure(status: int, body: str = "", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body.encode()


def answers_of(question: str) -> tuple[str, str]:
    first, second = (
        question.split(f"<answer_{letter}>\n")[1].split(f"\n</answer_{letter}>")[0] for letter in ("a", "b")
    )
    return first, second


def prefers_longer(question: str) -> Reply:
    first, second = map(len, answers_of(question))
    return completion("T" if first == second else "A" if first > second else "B", {"prompt_tokens": 100})


@dataclass
class Endpoint:
    """``reply`` answers questions; what was asked is kept."""

    url: str = ""
    reply: Callable[[str], Reply] = prefers_longer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def script(self, *replies: Reply) -> None:
        """Answer these in turn, the last one for ever."""
        left = list(replies)
        self.reply = lambda _: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.bodies.append(body)
            endpoint.headers.append(dict(self.headers))
            endpoint.paths.append(self.path)
            status, headers, content = endpoint.reply(body["messages"][0]["content"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            endpoint.paths.append(f"GET {self.path}")
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    yield endpoint
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.fixture
def config(endpoint: Endpoint, tmp_path: Path) -> JudgeGold:
    return JudgeGold(base_url=endpoint.url, model_name="tribunal", cache_file=tmp_path / "kept" / "answers.jsonl")


def changed(config: JudgeGold, **fields: object) -> JudgeGold:
    return config.model_copy(update=fields)


def never(seconds: float) -> None:
    raise AssertionError(f"waits {seconds} s")


# ---- verdicts


def test_the_better_response_wins_in_both_orders(config: JudgeGold) -> None:
    judge = Judge(config, never)
    assert judge.compare(["p", "q", "r"], ["long one", "x", "abc"], ["short", "longer", "xyz"]) == [1.0, 0.0, 0.5]
    assert (judge.statistics.num_pairs, judge.statistics.num_disagreements) == (3, 0)


def test_a_judge_that_prefers_a_position_gives_ties_and_disagrees_with_itself(
    config: JudgeGold, endpoint: Endpoint
) -> None:
    endpoint.script(completion("A"))
    judge = Judge(config, never)
    assert judge.compare(["p"] * 3, ["a", "b", "c"], ["x", "y", "z"]) == [0.5] * 3
    assert judge.statistics.num_disagreements == 3


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_disagreement(config: JudgeGold, endpoint: Endpoint) -> None:
    endpoint.reply = lambda question: completion("A" if answers_of(question)[0] == "good" else "T")
    judge = Judge(config, never)
    assert judge.compare(["p"], ["good"], ["bad"]) == [0.5]
    assert judge.statistics.num_disagreements == 1


def test_gold_is_the_preference_over_the_reference(config: JudgeGold) -> None:
    gold = load_gold(config, None, trust_remote_code=False)
    assert gold is not None
    assert gold(["p", "p", "p"], ["longest", "s", "longer"], ["long", "long", "longer"]) == [1.0, 0.0, 0.5]


def test_the_judge_reads_prompt_and_both_answers_whatever_braces_they_have(
    config: JudgeGold, endpoint: Endpoint
) -> None:
    Judge(config, never).compare(["the {request}"], ["{first}"], ["{0} second"])
    assert {answers_of(question) for question in endpoint.questions} == {
        ("{first}", "{0} second"),
        ("{0} second", "{first}"),
    }
    assert all("<request>\nthe {request}\n</request>" in question for question in endpoint.questions)


def test_requests_carry_the_model_and_the_parameters(config: JudgeGold, endpoint: Endpoint) -> None:
    Judge(changed(config, parameters={"max_completion_tokens": 512}), never).compare(["p"], ["a"], ["b"])
    for body in endpoint.bodies:
        assert (body["model"], body["max_completion_tokens"]) == ("tribunal", 512)
        assert body.keys() == {"model", "messages", "max_completion_tokens"}
    assert endpoint.paths == ["/v1/chat/completions"] * 2


def test_equal_responses_tie_without_a_request(config: JudgeGold, endpoint: Endpoint) -> None:
    judge = Judge(config, never)
    assert judge.compare(["p", "p"], ["same", "longer"], ["same", "long"]) == [0.5, 1.0]
    assert len(endpoint.bodies) == 2
    assert judge.statistics.num_pairs == 1


def test_a_pair_that_comes_twice_is_asked_about_once(config: JudgeGold, endpoint: Endpoint) -> None:
    assert Judge(config, never).compare(["p", "p"], ["longer", "longer"], ["long", "long"]) == [1.0, 1.0]
    assert len(endpoint.bodies) == 2


def test_a_prompt_without_a_reference_is_refused_before_any_request(config: JudgeGold, endpoint: Endpoint) -> None:
    with pytest.raises(UserError) as caught:
        Judge(config, never)(["p", "q"], ["a", "b"], ["r", None])
    assert str(caught.value) == (
        "gold.kind: got 1 of 2 prompts without a reference, need a reference for the judge to compare with, for every "
        "prompt: add a column output, reference or response, or use another gold"
    )
    assert endpoint.bodies == []


# ---- replies that are no letter


def test_a_reply_that_is_no_letter_is_asked_for_once_more(config: JudgeGold, endpoint: Endpoint) -> None:
    endpoint.reply = lambda question: prefers_longer(question) if REMINDER in question else completion("A is better")
    judge = Judge(config, never)
    assert judge.compare(["p"], ["longer"], ["long"]) == [1.0]
    assert (judge.statistics.num_asked_again, judge.statistics.num_unreadable) == (2, 0)


@pytest.mark.parametrize("answer", ["", None, "a", "A.", "AB", "Answer: A"])
def test_a_verdict_that_stays_unreadable_is_a_counted_tie_and_no_disagreement(
    config: JudgeGold, endpoint: Endpoint, answer: str | None
) -> None:
    endpoint.reply = lambda question: completion(answer if answers_of(question)[0] == "x" else " B\n")
    judge = Judge(config, never)
    assert judge.compare(["p", "p"], ["x", "better"], ["y", "x"]) == [0.5, 0.5]
    told = judge.statistics
    assert (told.num_asked_again, told.num_unreadable, told.num_disagreements) == (2, 2, 0)


def test_a_judge_that_answers_no_question_by_a_letter_ends_the_call(config: JudgeGold, endpoint: Endpoint) -> None:
    endpoint.script(completion("I cannot say."))
    with pytest.raises(RunError) as caught:
        Judge(config, never).compare(["p"], ["a"], ["b"])
    assert str(caught.value) == (
        f"judge {endpoint.url}/chat/completions: none of 2 questions was answered by a letter of A, B, T: "
        "try other gold.parameters or another model"
    )


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}'])
def test_a_reply_that_is_no_chat_completion_ends_the_call(
    config: JudgeGold, endpoint: Endpoint, content: bytes
) -> None:
    endpoint.script((200, {}, content))
    with pytest.raises(RunError) as caught:
        Judge(config, never).compare(["p"], ["a"], ["b"])
    assert str(caught.value) == f"judge {endpoint.url}/chat/completions: no chat completion but {content.decode()!r}"


# ---- retries


def one_at_a_time(config: JudgeGold, **fields: object) -> JudgeGold:
    return changed(config, concurrency=1, **fields)


def test_overload_is_waited_out_as_long_as_the_endpoint_asks(config: JudgeGold, endpoint: Endpoint) -> None:
    waits: list[float] = []
    endpoint.script(failure(429, Retry_After="7"), completion("A"), completion("B"))
    judge = Judge(one_at_a_time(config), waits.append)
    assert judge.compare(["p"], ["a"], ["b"]) == [1.0]
    assert waits == [7.0]
    assert (judge.statistics.num_retries, judge.statistics.num_requests) == (1, 2)


def test_faults_of_the_server_end_the_call_once_the_retries_are_used_up(config: JudgeGold, endpoint: Endpoint) -> None:
    waits: list[float] = []
    endpoint.script(failure(503, "out of order"))
    with pytest.raises(RunError) as caught:
        Judge(one_at_a_time(config, num_retries=8), waits.append).compare(["p"], ["a"], ["b"])
    assert waits[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert str(caught.value) == (
        f"judge {endpoint.url}/chat/completions: status 503: 'out of order' (after 9 attempts)"
    )


def test_a_connection_that_breaks_is_tried_again(config: JudgeGold, endpoint: Endpoint) -> None:
    waits: list[float] = []
    whole = completion("T")
    endpoint.script((200, {"Content-Length": "999"}, b""), whole)
    assert Judge(one_at_a_time(config), waits.append).compare(["p"], ["a"], ["b"]) == [0.5]
    assert waits == [1.0]


def test_an_endpoint_that_nobody_serves_is_named(config: JudgeGold) -> None:
    url = "http://127.0.0.1:9"
    with pytest.raises(RunError) as caught:
        Judge(one_at_a_time(config, base_url=url, num_retries=1), lambda _: None).compare(["p"], ["a"], ["b"])
    assert f"judge {url}/chat/completions: URLError" in str(caught.value)
    assert str(caught.value).endswith("(after 2 attempts)")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(config: JudgeGold, endpoint: Endpoint, status: int) -> None:
    endpoint.script(failure(status, "no such model"))
    with pytest.raises(RunError) as caught:
        Judge(one_at_a_time(config), never).compare(["p"], ["a"], ["b"])
    assert str(caught.value) == f"judge {endpoint.url}/chat/completions: status {status}: 'no such model'"


def test_an_endpoint_that_asks_for_too_much_patience_ends_the_call(config: JudgeGold, endpoint: Endpoint) -> None:
    endpoint.script(failure(429, "quota", Retry_After="86400"))
    with pytest.raises(RunError, match=r"status 429: 'quota' \(after 1 attempts, and now asks to wait 86400 s\)"):
        Judge(one_at_a_time(config), never).compare(["p"], ["a"], ["b"])


def test_retry_after_is_read_as_a_number_or_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module.time, "time", lambda: 1_000_000.0)
    assert retry_after_s("12") == 12.0
    assert retry_after_s(email.utils.formatdate(1_000_030, usegmt=True)) == 30.0
    assert [retry_after_s(header) for header in (None, "", "soon")] == [0.0, 0.0, 0.0]


# ---- the key


def keyed(config: JudgeGold, monkeypatch: pytest.MonkeyPatch, value: str = KEY) -> JudgeGold:
    monkeypatch.setenv("TRIBUNAL_KEY", value)
    return one_at_a_time(config, api_key_env="TRIBUNAL_KEY")


def test_the_key_is_in_the_authorization_header_and_nowhere_else(
    config: JudgeGold, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    config = keyed(config, monkeypatch)
    judge = Judge(config, never)
    judge.compare(["p"], ["a"], ["bb"])
    for headers in endpoint.headers:
        assert headers.pop("Authorization") == f"Bearer {KEY}"
    shown = [endpoint.headers, endpoint.bodies, endpoint.paths, config, judge.statistics, caplog.text]
    assert "tribunal" in caplog.text
    assert KEY not in f"{shown}{config.cache_file.read_text()}"


def test_without_a_key_no_authorization_is_sent(config: JudgeGold, endpoint: Endpoint) -> None:
    Judge(config, never).compare(["p"], ["a"], ["bb"])
    assert len(endpoint.headers) == 2
    assert all("Authorization" not in headers for headers in endpoint.headers)


@pytest.mark.parametrize("status", [401, 500])
def test_a_key_that_the_endpoint_echoes_is_not_in_the_error(
    config: JudgeGold, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    endpoint.script(failure(status, "x" * 190 + KEY))
    with pytest.raises(RunError) as caught:
        Judge(changed(keyed(config, monkeypatch), num_retries=0), never).compare(["p"], ["a"], ["b"])
    assert f"status {status}: '{'x' * 190}***'" in str(caught.value)
    assert caught.value.__cause__ is None
    assert KEY[:5] not in str(caught.value)


def test_a_redirect_is_not_followed(config: JudgeGold, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.script(failure(302, Location=f"{endpoint.url}/elsewhere"))
    with pytest.raises(RunError, match="status 302"):
        Judge(keyed(config, monkeypatch), never).compare(["p"], ["a"], ["b"])
    assert set(endpoint.paths) == {"/v1/chat/completions"}


@pytest.mark.parametrize("value", ["", " \n", "two\nlines", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(
    config: JudgeGold, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    with pytest.raises(UserError) as caught:
        Judge(keyed(config, monkeypatch, value))
    assert str(caught.value) == (
        "gold.api_key_env: got no such variable, or one whose value is no key, need the name of an environment "
        "variable that holds the key: export it, or set null for no key"
    )


# ---- the bound of concurrency


def test_as_many_requests_as_configured_are_open_at_once_and_no_more(config: JudgeGold, endpoint: Endpoint) -> None:
    num_open, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3, timeout=20)

    def reply(question: str) -> Reply:
        nonlocal num_open, most
        with lock:
            num_open += 1
            most = max(most, num_open)
            if most > 3:
                together.abort()
        for _ in range(50):  # breaks unless three are open at once; a fourth has all these rounds to show itself
            together.wait()
        with lock:
            num_open -= 1
        together.wait()  # none of the three is answered before all have been counted
        return prefers_longer(question)

    endpoint.reply = reply
    wins = Judge(changed(config, concurrency=3), never).compare(["p"] * 6, list("abcdef"), ["longer"] * 6)
    assert wins == [0.0] * 6
    assert most == 3


# ---- the cache


def test_a_second_run_asks_for_nothing(config: JudgeGold, endpoint: Endpoint) -> None:
    pairs = ["p", "q"], ["longer", "x"], ["long", "yy"]
    assert Judge(config, never).compare(*pairs) == [1.0, 0.0]
    endpoint.bodies.clear()
    judge = Judge(config, never)
    assert judge.compare(*pairs) == [1.0, 0.0]
    assert endpoint.bodies == []
    assert asdict(judge.statistics) == asdict(
        JudgeStatistics(
            num_pairs=2, num_disagreements=0, num_asked_again=0, num_unreadable=0, num_cached=4, num_requests=0,
            num_retries=0, num_unmetered=0, input_tokens=0, output_tokens=0, cost_usd=None,
        )
    )  # fmt: skip


def test_a_second_call_asks_for_nothing(config: JudgeGold, endpoint: Endpoint) -> None:
    judge = Judge(config, never)
    assert [judge.compare(["p"], ["longer"], ["long"]) for _ in range(2)] == [[1.0], [1.0]]
    assert len(endpoint.bodies) == 2
    assert (judge.statistics.num_cached, judge.statistics.num_requests, judge.statistics.num_pairs) == (2, 2, 2)


def test_answers_before_a_failure_are_not_paid_for_again(config: JudgeGold, endpoint: Endpoint) -> None:
    endpoint.script(completion("A"), failure(400))
    with pytest.raises(RunError):
        Judge(one_at_a_time(config), never).compare(["p"], ["a"], ["b"])
    endpoint.bodies.clear()
    endpoint.script(completion("B"))
    assert Judge(one_at_a_time(config), never).compare(["p"], ["a"], ["b"]) == [1.0]
    assert [answers_of(question) for question in endpoint.questions] == [("b", "a")]


@pytest.mark.parametrize("change", [{"model_name": "another"}, {"parameters": {"temperature": 1}}])
def test_another_model_or_another_parameter_is_asked_anew(
    config: JudgeGold, endpoint: Endpoint, change: dict[str, object]
) -> None:
    Judge(config, never).compare(["p"], ["a"], ["b"])
    Judge(changed(config, **change), never).compare(["p"], ["a"], ["b"])
    assert len(endpoint.bodies) == 4


def test_a_line_torn_by_the_death_of_its_writer_is_passed_over_and_stays_alone(
    config: JudgeGold, endpoint: Endpoint
) -> None:
    config = one_at_a_time(config)
    Judge(config, never).compare(["p"], ["longer"], ["long"])
    whole = config.cache_file.read_bytes()
    config.cache_file.write_bytes(whole[:-20])
    endpoint.bodies.clear()
    assert Judge(config, never).compare(["p"], ["longer"], ["long"]) == [1.0]
    assert len(endpoint.bodies) == 1
    judge = Judge(config, never)
    assert judge.compare(["p"], ["longer"], ["long"]) == [1.0]
    assert (len(endpoint.bodies), judge.statistics.num_cached) == (1, 2)


def test_lines_of_another_form_are_passed_over(config: JudgeGold) -> None:
    config.cache_file.parent.mkdir()
    config.cache_file.write_bytes(b'\xff\n[]\n3\n{"request": "x"}\n\n{"request": [], "answer": "A"}\n')
    assert Judge(config, never).compare(["p"], ["longer"], ["long"]) == [1.0]


# ---- what it costs


def test_cost_is_tokens_times_price(config: JudgeGold, endpoint: Endpoint) -> None:
    usage = {"prompt_tokens": 250, "completion_tokens": 2}
    endpoint.reply = lambda question: completion("T", usage)
    judge = Judge(changed(config, input_price=3.0, output_price=15.0), never)
    judge.compare(["p", "q"], ["a", "b"], ["x", "y"])
    told = judge.statistics
    assert (told.num_requests, told.input_tokens, told.output_tokens) == (4, 1000, 8)
    assert told.cost_usd == pytest.approx(0.00312)  # 1000 x 3e-6 + 8 x 15e-6


def test_cost_is_unknown_if_the_endpoint_does_not_tell_all_tokens(config: JudgeGold, endpoint: Endpoint) -> None:
    endpoint.script(
        completion("A", {"prompt_tokens": 5, "completion_tokens": 1}), completion("B", {"prompt_tokens": 5})
    )
    judge = Judge(one_at_a_time(config, input_price=3.0, output_price=15.0), never)
    judge.compare(["p"], ["a"], ["b"])
    assert (judge.statistics.num_unmetered, judge.statistics.cost_usd) == (1, None)
