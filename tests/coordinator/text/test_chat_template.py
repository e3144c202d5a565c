"""Templates render as transformers renders them, in a sandbox, and stop when they run away."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipemax.coordinator.text import TextProcessor
from pipemax.coordinator.text.chat_template import ChatTemplate
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import ChatOptions

from .conftest import byte_level_tokenizer, write_model_dir

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "turns": (
        "{{ bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "        {% generation %}\n"
        "        {{- message.content + eos_token }}\n"
        "        {% endgeneration %}\n"
        "    {%- else %}\n"
        "        {{- '[' ~ message['role'] | upper ~ '] ' ~ message['content'] | trim }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{% if add_generation_prompt %}[ASSISTANT]{% endif %}\n"
    ),
    "system_first": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = 'none' %}{% endif %}"
        "<<{{ system }}>>{% for m in messages %}{{ loop.index }}/{{ loop.length }}"
        ":{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}"
    ),
    "loop_controls": (
        "{% for m in messages %}\n"
        "  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "  {% if loop.index > 3 %}{% break %}{% endif %}\n"
        "{{ m.content }}\n"
        "{% endfor %}"
    ),
    "namespace_and_json": (
        "{%- set ns = namespace(count=0) -%}"
        "{%- for m in messages -%}{%- set ns.count = ns.count + 1 -%}{%- endfor -%}"
        "{{ ns.count }} {{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}"
    ),
    "absent_things": (
        "{% if tools %}tools{% endif %}{{ documents is none }}{{ messages[0].name is defined }}"
        "{{ messages[0].nothing }}{{ unk_token is defined }}"
    ),
    "macro": (
        "{%- macro turn(m) %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endmacro -%}"
        "{%- for m in messages %}{{ turn(m) }}{% endfor %}"
    ),
    "python_methods": (
        "{% for m in messages %}{{ m['content'].strip().split(' ')[-1].title() }}"
        "{{ m.items() | list | length }}{% endfor %}"
    ),
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  Is 1 < 2 & 'true'? é水🙂  "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\nfour", "name": None},
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=["one", "four"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(
    name: str, chat: list[dict[str, Any]], model_dirs: dict[str, Path]
) -> None:
    reference = AutoTokenizer.from_pretrained(model_dirs["byte_level"])
    expected = reference.apply_chat_template(
        chat, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    template = ChatTemplate(TEMPLATES[name], VARIABLES, "test")
    assert template.render(chat, 10_000) == expected
    assert len(expected) > 3


CONTINUED = [
    {"role": "user", "content": "Say it"},
    {"role": "assistant", "content": "  It is é, \n and "},
]
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}{{ mood }}"


@pytest.mark.parametrize("source", [TEMPLATES["turns"], TEMPLATES["macro"], TRIMMED])
def test_goes_on_as_transformers_does(source: str, model_dirs: dict[str, Path]) -> None:
    reference = AutoTokenizer.from_pretrained(model_dirs["byte_level"])
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    expected = reference.apply_chat_template(
        CONTINUED, chat_template=source, continue_final_message=True, tokenize=False
    )
    assert ChatTemplate(source, VARIABLES, "test").render(CONTINUED, 1000, options) == expected
    assert expected.endswith("and" if source == TRIMMED else "and ")


def test_options_reach_the_template(model_dirs: dict[str, Path]) -> None:
    reference = AutoTokenizer.from_pretrained(model_dirs["byte_level"])
    source = TEMPLATES["turns"] + "{{ mood }}{{ eos_token }}{{ more | tojson }}"
    variables = {"mood": "calm", "eos_token": "!", "more": {"a": [1, None]}}
    expected = reference.apply_chat_template(
        CHATS[0],
        chat_template=source,
        add_generation_prompt=False,
        tokenize=False,
        **variables,
    )
    options = ChatOptions(add_generation_prompt=False, chat_template_kwargs=variables)
    assert ChatTemplate(source, VARIABLES, "test").render(CHATS[0], 1000, options) == expected


@pytest.mark.parametrize(
    ("source", "fields", "words"),
    [
        ("x", {"continue_final_message": True}, "exclude each other"),
        ("x", {"chat_template_kwargs": {"messages": []}}, "'messages' cannot be set"),
        ("x", {"chat_template_kwargs": {"a b": 1}}, "'a b' cannot be set"),
        (
            "nothing of it",
            {"continue_final_message": True, "add_generation_prompt": False},
            "does not write the last message",
        ),
        (
            "{{ messages[-1].content[4:] }}",
            {"continue_final_message": True, "add_generation_prompt": False},
            "does not write the last message",
        ),
    ],
)
def test_options_that_cannot_be(source: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(source, {}, "test").render(CHATS[0], 1000, ChatOptions(**fields))
    assert caught.value.code == "template"


def test_a_message_without_text_is_not_continued() -> None:
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="has no text"):
        ChatTemplate("x", {}, "test").render([{"role": "assistant"}], 1000, options)


def test_the_clock_is_there() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y') }}", {}, "test").render(CHATS[0], 100)
    assert 2024 <= int(rendered) <= 9999


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].role.nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ],
)
def test_failures_are_the_requests(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(source, {}, "test").render(CHATS[0], 10_000)
    assert caught.value.code == "template"


def test_a_template_that_writes_without_end_is_stopped() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}water{% endfor %}{% endfor %}"
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, {}, "test").render(CHATS[0], 1000)
    assert caught.value.code == "too_long"


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "x", "name": None}]
    ChatTemplate("{{ messages }}", {}, "test").render(messages, 1000)
    assert messages == [{"role": "user", "content": "x", "name": None}]


def test_where_templates_come_from(tmp_path: Path) -> None:
    """chat_template.jinja wins; of named templates the default is taken; special tokens are there
    as in transformers, written as text or as objects."""
    named = [
        {"name": "rag", "template": "wrong"},
        {"name": "default", "template": "{{ bos_token }}{{ pad_token }}{{ messages[0].content }}"},
    ]
    pad = {"content": "</s>", "__type": "AddedToken"}
    folder = write_model_dir(tmp_path, byte_level_tokenizer(), chat_template=named, pad_token=pad)
    chat = [{"role": "user", "content": "water"}]

    def ours() -> str:
        template = TextProcessor(folder)._template
        assert template is not None
        return template.render(chat, 1000)

    def theirs() -> str:
        reference = AutoTokenizer.from_pretrained(folder)
        return str(reference.apply_chat_template(chat, tokenize=False))

    assert ours() == theirs() == "<s></s>water"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}|{{ messages[0]['role'] }}")
    assert ours() == theirs() == "</s>|user"


def test_special_tokens_map_fills_what_the_settings_lack(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path, byte_level_tokenizer(), chat_template="{{ sep_token }}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"sep_token": "<|user|>"}))
    template = TextProcessor(folder)._template
    assert template is not None
    assert template.render(CHATS[0], 100) == "<|user|>"
