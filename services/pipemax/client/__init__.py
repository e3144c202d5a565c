"""Talk to a running PipeMax system from Python.

::

    from pipemax.client import Client, SamplingParams

    with Client() as client:
        for completion in client.generate(["Water flows", "Stone stays"], SamplingParams()):
            print(completion.text)
"""

from pipemax.client.client import Client
from pipemax.client.completion import Completion
from pipemax.client.jobs import Jobs
from pipemax.client.prompts import Chat, Prompt
from pipemax.proto.messages.ingest import (
    ChatOptions,
    Choice,
    ChoiceDelta,
    JobInfo,
    JobRequest,
    SamplingParams,
    Status,
    Submit,
)

__all__ = [
    "Chat",
    "ChatOptions",
    "Choice",
    "ChoiceDelta",
    "Client",
    "Completion",
    "JobInfo",
    "JobRequest",
    "Jobs",
    "Prompt",
    "SamplingParams",
    "Status",
    "Submit",
]
