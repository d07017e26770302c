"""Run by test_direct.py in a process of its own: one request for each part of the direct lane that is made to fail."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any
from unittest import mock

from optillm_memory.host.launcher import application
from optillm_memory.testing.upstream import RecordingUpstream

HOST = "optillm_memory.host."


def main() -> None:
    """Print for each fault how often the upstream was asked, the status, and the words that came."""
    with RecordingUpstream(lambda _: "three words here") as upstream:
        app = application("--base-url", upstream.base_url)
        found: dict[str, Any] = {}
        for name in ("nothing", *sys.argv[1:]):
            for stream in (False, True):
                upstream.clear()
                status, words = ask(app, name, stream=stream)
                found[f"{name} {stream}"] = {"asked": len(upstream.requests), "status": status, "words": words}
        print("FOUND", json.dumps(found))


def ask(app: Any, name: str, *, stream: bool) -> tuple[int, str]:
    """Ask with this function failing."""
    body = {"model": "agent_memory-m", "messages": [{"role": "user", "content": f"say {name}"}], "stream": stream}
    with failing(name), app.test_client() as client:
        try:
            response = client.post("/v1/chat/completions", json=body)
            text = response.get_data(as_text=True)
        except Exception as error:  # noqa: BLE001 - the client's connection breaks off
            return 200, f"broke off: {type(error).__name__}"
    if not stream or response.status_code != 200:
        parsed = json.loads(text)
        return response.status_code, parsed["choices"][0]["message"]["content"] if "choices" in parsed else text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return 200, "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


def failing(name: str) -> Any:
    """Give a context in which a function of the lane raises."""
    if name == "nothing":
        return mock.patch.dict({}, {})
    module, _, attribute = name.partition(":")
    target: Any = importlib.import_module(HOST + module)
    *parts, last = attribute.split(".")
    for part in parts:
        target = getattr(target, part)
    return mock.patch.object(target, last, side_effect=RuntimeError("made to fail"))


if __name__ == "__main__":
    main()
