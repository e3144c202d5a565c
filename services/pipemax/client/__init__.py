"""Talk to a running PipeMax system from Python.

::

    from pipemax.client import Client, SamplingParams

    with Client() as client:
        for completion in client.generate(["Water flows", "Stone stays"], SamplingParams()):
            print(completion.text)
"""

from pipemax.client.client import Chat, Client, Prompt
from pipemax.client.completion import Completion
from pipemax.proto.messages.ingest import SamplingParams, Status, Submit

__all__ = ["Chat", "Client", "Completion", "Prompt", "SamplingParams", "Status", "Submit"]
