"""Outputs drawn from random logits follow their grammars to the end."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipemax.coordinator.text.structured import grammar_of
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import NO_TOKEN, RowExtras, SampleRow, SampleRules
from pipemax.proto.messages.ingest import StructuredOutputs
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.sampling import Sampler
from support.step_plans import greedy_row, plan_of

END = 1
DRAWS = 200
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ['{"name": "Anna", "age": 42, "tags": ["x", "y", 3, null]}', "yes or no, really"] * 4
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def is_as_in_schema(text: str) -> bool:
    found = json.loads(text)
    return (
        found.keys() == {"name", "age", "tags"}
        and isinstance(found["name"], str)
        and len(found["name"]) <= 6
        and type(found["age"]) is int
        and 0 <= found["age"] <= 150
        and len(found["tags"]) <= 3
        and all(tag in ("x", "y", 3, None) for tag in found["tags"])
    )


def row(request: int, position: int, rules: SampleRules | None, temperature: float) -> SampleRow:
    extras = RowExtras(request, rules)
    return SampleRow(0, request, position, temperature, 0, 1.0, 0.0, extras=extras)


def outputs_of(
    sampler: Sampler, path: Path, outputs: StructuredOutputs, temperature: float, lose_at: int
) -> list[str]:
    """DRAWS outputs side by side, over logits that know nothing. At step `lose_at` all rules are
    lost and sent again, with what was produced."""
    tokenizer = Tokenizer.from_file(str(path))
    vocab = tokenizer.get_vocab_size() + 7  # a model's vocabulary may be padded
    grammar = grammar_of(outputs)
    produced: dict[int, list[int]] = {request: [] for request in range(DRAWS)}
    generator = torch.Generator().manual_seed(3)
    for step in range(400):
        running = [r for r, tokens in produced.items() if tokens[-1:] != [END]]
        if not running:
            return [tokenizer.decode(tokens[:-1]) for tokens in produced.values()]
        logits = 2 * torch.randn(len(running), vocab, generator=generator)
        rows = []
        for request in running:
            sent = None
            if step in (0, lose_at):
                ids = pack_i32(produced[request])
                sent = SampleRules(output_token_ids=ids, grammar=grammar, end_token_ids=ENDS)
            rows.append(row(request, step, sent, temperature))
        plan = plan_of(rows, epoch=1 + (step >= lose_at))
        for request, token in zip(running, sampler.sample(plan, logits).tokens, strict=True):
            produced[request].append(token)
    raise AssertionError("outputs without an end")


ENDS = pack_i32([END])
KINDS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"json": SCHEMA}, is_as_in_schema),
    ({"regex": "[a-f]{2,5}(é|水)[0-9]"}, re.compile("[a-f]{2,5}(é|水)[0-9]").fullmatch),
    ({"choice": ("yes", "no", 'no, "really"')}, ("yes", "no", 'no, "really"').__contains__),
    ({"grammar": 'start: "(" (start | "x") ")"'}, re.compile(r"\(+x\)+").fullmatch),
]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize(("fields", "fits"), KINDS, ids=lambda v: str(v)[:20])
def test_all_follow_their_grammar(
    tokenizer_file: Path, fields: dict[str, Any], fits: Callable[[str], Any], temperature: float
) -> None:
    found = outputs_of(
        Sampler(tokenizer_file), tokenizer_file, StructuredOutputs(**fields), temperature, 3
    )
    wrong = [text for text in found if not fits(text)]
    assert wrong == []
    assert len(set(found)) > 2


def test_a_grammar_too_complex_to_follow_gives_no_token(
    tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grammar = grammar_of(StructuredOutputs(regex="(a|b|ab)*" * 500))
    rules = SampleRules(grammar=grammar, end_token_ids=ENDS)
    logits = torch.zeros(1, Tokenizer.from_file(str(tokenizer_file)).get_vocab_size())
    logits[0, END] = -1.0
    sampler = Sampler(tokenizer_file)
    picked: list[int] = []
    while not picked or picked[-1] not in (NO_TOKEN, END):
        asked = row(1, len(picked), None if picked else rules, 0.0)
        extras = msgspec.structs.replace(asked.extras, num_logprobs=2)
        plan = plan_of([msgspec.structs.replace(asked, extras=extras), greedy_row(0)], epoch=1)
        found = sampler.sample(plan, logits.repeat(2, 1))
        picked.append(found.tokens[0])
        assert found.tokens[1] == 0
        assert len(found.logprobs) == (picked[-1] != NO_TOKEN)
    assert picked[-1] == NO_TOKEN
    (record,) = caplog.records
    assert len(record.getMessage()) < 300


def test_a_grammar_needs_a_tokenizer() -> None:
    rules = SampleRules(grammar=grammar_of(StructuredOutputs(regex="a")), end_token_ids=ENDS)
    with pytest.raises(InvariantError, match="no tokenizer"):
        Sampler().sample(plan_of([row(1, 0, rules, 1.0)], epoch=1), torch.zeros(1, 20))
