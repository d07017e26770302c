"""For tests of agents that use memory: a fake LLM server that records its requests, and a real optillm in front of it.

    from openai import OpenAI

    from optillm_memory.testing import HostProcess, RecordingUpstream

    def test_the_agent_asks_through_memory(tmp_path):
        env = {"OPTILLM_AGENT_MEMORY_ENCODER": "hashing"}  # needs no weights
        with (
            RecordingUpstream(lambda request: "lost_parcel") as upstream,
            HostProcess.serve(upstream.base_url, db=tmp_path / "memory.db", env=env) as host,
            OpenAI(base_url=host.base_url, api_key="alice") as client,
        ):
            question = {"role": "user", "content": "My parcel never came."}
            completion = client.chat.completions.create(model="agent_memory-m", messages=[question])
            assert completion.choices[0].message.content == "lost_parcel"
            assert upstream.requests[-1].json["messages"] == [question]

Both listen on the loopback only. optillm takes about ten seconds to start: share a `HostProcess` among tests, and give
each test a namespace of its own (`extra_body={"agent_memory": {"namespace": ...}}`).
"""

from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordedRequest, RecordingUpstream, Reply, echo, tool_call

__all__ = ["HostProcess", "RecordedRequest", "RecordingUpstream", "Reply", "echo", "tool_call"]
