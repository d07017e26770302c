"""Ask, report, restart, ask again: memory that outlives the server, with the OpenAI client.

Run it with OPENAI_API_KEY set (and OPENAI_BASE_URL for another provider):

    python examples/quickstart.py --model gpt-4o-mini
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import httpx
from openai import OpenAI

from optillm_memory.testing.host import HostProcess


def ask(client: OpenAI, model: str, question: str) -> str:
    """Ask through optillm, show what memory did, and return the trace's id."""
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    memory = (reply.model_extra or {})["agent_memory"]
    print(f"you:    {question}\nmodel:  {reply.choices[0].message.content}")
    print(f"memory: {memory['action']}, {len(memory['injected'])} exemplars in the prompt\n")
    return reply.id


def main() -> None:
    """Run the tour on a database of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt-4o-mini", help="the upstream's model")
    parser.add_argument("--upstream", default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"))
    arguments = parser.parse_args()
    key = os.environ["OPENAI_API_KEY"]
    model = f"agent_memory-{arguments.model}"

    with tempfile.TemporaryDirectory() as folder:
        # The holdout is off, so that the tour shows the same to everyone.
        env = {"OPENAI_API_KEY": key, "OPTILLM_AGENT_MEMORY_HOLDOUT": "0"}
        server = HostProcess.serve(arguments.upstream, db=Path(folder) / "memory.db", env=env)
        with server, OpenAI(base_url=server.base_url, api_key=key) as client:
            trace_id = ask(client, model, "Which queue does this go to? 'My parcel never came.'")
            feedback = {"trace_id": trace_id, "metric": "demonstration", "value": "lost_parcel", "source": "human"}
            headers = {"Authorization": f"Bearer {key}"}
            receipt = httpx.post(f"{server.base_url}/agent_memory/feedback", json=feedback, headers=headers)
            print(f"feedback: {receipt.json()['status']}\n\n(restarting the server)\n")
        with server, OpenAI(base_url=server.base_url, api_key=key) as client:
            ask(client, model, "Which queue does this go to? 'My parcel has never arrived.'")


if __name__ == "__main__":
    main()
