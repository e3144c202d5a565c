"""Lines that the tests of OpenAI's forms start from."""

import json
from typing import Any

from pipemax.services.batch.openai_lines import BatchRequest, parse_line
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL

CHAT = [{"role": "user", "content": "Where does water go?"}]


def line(url: str = COMPLETIONS_URL, **body: Any) -> bytes:
    prompt = {"messages": CHAT} if url == CHAT_URL else {"prompt": "Water"}
    whole = {"custom_id": "c", "method": "POST", "url": url, "body": {"model": "m"} | prompt | body}
    return json.dumps(whole).encode()


def parse(text: bytes) -> BatchRequest:
    return parse_line(text, "m")
