"""The prompt tool against a server in this process that speaks OpenAI's chat interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sgm.errors import UserError
from tools import convert_demo

TOOL = Path(convert_demo.__file__)


def completion(text: str | None, **message: Any) -> tuple[int, Any]:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, **message},
    }
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                 "choices": [choice]}  # fmt: skip


def failure(status: int, message: str = "it is so") -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "t", "code": "c"}}


class Endpoint:
    """Answers requests with `answers` in order, repeats the last one, and keeps the requests."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append(json.loads(body))
        self.paths.append(handler.path)
        self.keys.append(handler.headers["Authorization"])
        status, content = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        page = isinstance(content, str)
        data = (content if page else json.dumps(content)).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if page else "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("Retry-After-Ms", "1")  # else the client waits half a second and more
        handler.end_headers()
        handler.wfile.write(data)

    def sent_ideas(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    scripted = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            scripted.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield scripted
    server.shutdown()
    server.server_close()
    thread.join()


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        convert_demo.main(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_idea_becomes_one_line_on_the_screen(endpoint, capsys):
    endpoint.answers = [completion(' "A long\nprompt,\n\nin parts." ')]
    assert convert_demo.main(["--prompt", "ein Hund", "--model", "some-model"]) == 0
    assert capsys.readouterr().out == "A long prompt, in parts.\n"
    [request] = endpoint.requests
    assert request["model"] == "some-model"
    assert request["messages"][0] == {"role": "system", "content": convert_demo.INSTRUCTIONS}
    assert request["messages"][-1] == {"role": "user", "content": "ein Hund"}
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.keys == ["Bearer a-key"]


def test_a_file_of_ideas_becomes_a_file_of_prompts_in_order(endpoint, tmp_path):
    ideas, prompts = tmp_path / "ideas.txt", tmp_path / "prompts.txt"
    ideas.write_text("one\n\n  二 \nthree\n", encoding="utf-8")
    endpoint.answers = [completion("First."), completion("Second,\r\nin two."), completion("猫.")]
    argv = ["--input-file", str(ideas), "--output-file", str(prompts)]
    assert convert_demo.main(argv) == 0
    assert endpoint.sent_ideas() == ["one", "二", "three"]
    assert prompts.read_text(encoding="utf-8") == "First.\nSecond, in two.\n猫.\n"
    assert sorted(tmp_path.iterdir()) == [ideas, prompts]


def test_quotation_marks_inside_a_prompt_stay(endpoint, capsys):
    endpoint.answers = [completion('"Yes" and "no" are written')]
    convert_demo.main(["--prompt", "x"])
    assert capsys.readouterr().out == '"Yes" and "no" are written\n'


def test_failures_on_the_way_and_empty_answers_are_tried_again(endpoint, capsys):
    endpoint.answers = [failure(500), failure(429), completion(""), completion("At last.")]
    assert convert_demo.main(["--prompt", "x", "--retries", "2"]) == 0
    assert capsys.readouterr().out == "At last.\n"
    assert len(endpoint.requests) == 4


def test_tries_end_after_the_given_number(endpoint):
    endpoint.answers = [failure(503, "too busy")]
    assert "503: too busy" in error_of("--prompt", "x", "--retries", "2")
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (failure(401, "no such key"), ["refused", "401: no such key", "OPENAI_API_KEY"]),
        (failure(404, "no model"), ["404: no model", "--model", "'gpt-4o'", "OPENAI_BASE_URL"]),
        (failure(429), ["limit", "--retries"]),
        (failure(400, "bad\nthing"), ["400: bad thing"]),
        ((502, "<html>gateway</html>"), ["502"]),
        ((200, "<html>hello</html>"), ["not a chat completion", "/v1"]),
        ((200, {"error": "x"}), ["not a chat completion"]),
        (completion(None, refusal="I will not."), ["no text for 'x' in 1 tries", "I will not."]),
        (completion("  \n"), ["no text for 'x' in 1 tries"]),
    ],
)
def test_an_endpoint_that_refuses_is_explained(endpoint, answer, parts):
    endpoint.answers = [answer]
    message = error_of("--prompt", "x", "--retries", "0")
    for part in parts:
        assert part in message


def test_an_endpoint_that_is_not_there_is_explained(monkeypatch):
    with socket.socket() as free:  # bound and not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        message = error_of("--prompt", "x", "--retries", "0")
    assert message.startswith(f"{address} gave no usable answer")
    assert "Connection refused" in message and "OPENAI_BASE_URL" in message


def test_an_endpoint_that_does_not_answer_in_time_is_explained(monkeypatch):
    monkeypatch.setattr(convert_demo, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert "timed out" in error_of("--prompt", "x", "--retries", "0")


@pytest.mark.parametrize("key", ["", " \n", "schlüssel"])
def test_an_unfit_key_is_explained(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert error_of("--prompt", "x").startswith("OPENAI_API_KEY ")


def test_an_address_without_its_scheme_is_explained(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    message = error_of("--prompt", "x", "--retries", "0")
    assert (
        message.startswith("localhost:8000 gave no usable answer") and "OPENAI_BASE_URL" in message
    )


def test_without_the_package_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # makes its import fail
    assert "pip install openai" in error_of("--prompt", "x")


def test_prompts_that_were_paid_for_are_kept_when_a_later_one_fails(endpoint, tmp_path):
    ideas, prompts = tmp_path / "ideas.txt", tmp_path / "prompts.txt"
    ideas.write_text("one\ntwo\n", encoding="utf-8")
    prompts.write_text("of another day\n", encoding="utf-8")
    endpoint.answers = [completion("First."), failure(400)]
    message = error_of("--input-file", str(ideas), "--output-file", str(prompts))
    kept = tmp_path / "prompts.txt.partial"
    assert str(kept) in message
    assert kept.read_text(encoding="utf-8") == "First.\n"
    assert prompts.read_text(encoding="utf-8") == "of another day\n"


def test_a_failure_of_the_first_leaves_no_file(endpoint, tmp_path):
    endpoint.answers = [failure(400)]
    error_of("--prompt", "x", "--output-file", str(tmp_path / "prompts.txt"))
    assert list(tmp_path.iterdir()) == []


def test_files_are_checked_before_anything_is_sent(endpoint, tmp_path):
    endpoint.answers = [completion("x")]
    away = str(tmp_path / "absent" / "file.txt")
    assert away in error_of("--input-file", away)
    assert away in error_of("--prompt", "x", "--output-file", away)
    assert endpoint.requests == []


def test_the_command_prints_a_sentence_and_no_trace(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    command = [sys.executable, str(TOOL), "--prompt", "x"]
    run = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: OPENAI_API_KEY is not set")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--prompt", " "], ["--prompt", "x", "--retries", "-1"]])
def test_a_wrong_command_line_exits_with_2(argv):
    with pytest.raises(SystemExit) as caught:
        convert_demo.main(argv)
    assert caught.value.code == 2
