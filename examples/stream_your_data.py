"""Stream a labelled file of your own through optillm, and see whether memory helps.

The file holds one JSON object with `input` and `output` a line. Start `optillm-memory serve` first, then:

    python examples/stream_your_data.py tickets.jsonl --url http://127.0.0.1:8000/v1 --model gpt-4o-mini
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from optillm_memory.bench.stream import Server, run
from optillm_memory.bench.tasks import load_tasks


def main() -> None:
    """Ask for every task without memory, then with it, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the labelled tasks")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server with memory")
    parser.add_argument("--model", default="gpt-4o-mini", help="the upstream's model")
    parser.add_argument("--limit", type=int, help="how many tasks at most")
    arguments = parser.parse_args()

    tasks = load_tasks(arguments.file)[: arguments.limit]
    key = os.environ.get("OPENAI_API_KEY", "sk-none")
    server = Server(arguments.url, f"agent_memory-{arguments.model}", key)
    without = run(server, tasks, mode="off", feedback="none")
    with_memory = run(server, tasks, feedback="demonstration", namespace=arguments.file.stem)
    for name, result in (("without memory", without), ("with memory", with_memory)):
        figures = result.figures()
        print(f"{name:15} accuracy {figures['accuracy']:.3f}, over the last 100 {figures['accuracy_last_100']:.3f}")


if __name__ == "__main__":
    main()
