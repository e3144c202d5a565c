"""Are the demo's greedy tokens those that transformers generates? A program of its own, so that
the command line never loads torch: `python -m pipemax.services.demo_check MODEL IN OUT`."""

import json
import sys
from pathlib import Path
from typing import Any


def main(model_dir: Path, requests: Path, results: Path) -> int:
    """Prints one line and returns 0 when all greedy results are equal; else says which is not."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = {line["custom_id"]: line for line in _lines(results)}
    compared = 0
    for request in _lines(requests):
        body = request["body"]
        if body["temperature"] > 0:
            continue
        prompt = torch.tensor([body["prompt"]])
        expected = model.generate(prompt, do_sample=False, max_new_tokens=body["max_tokens"])
        tokens = expected[0, prompt.shape[1] :].tolist()
        choice = found[request["custom_id"]]["response"]["body"]["choices"][0]
        if _without_end(choice["token_ids"], model) != _without_end(tokens, model):
            sys.stderr.write(f"{request['custom_id']}: {choice['token_ids']} is not {tokens}\n")
            return 1
        compared += 1
    sys.stdout.write(f"{compared} greedy results are equal to transformers', token for token\n")
    return 0 if compared else 1


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _without_end(token_ids: list[int], model: Any) -> list[int]:
    """Without the end-of-sequence token, which an output may keep or drop."""
    if token_ids and token_ids[-1] == model.generation_config.eos_token_id:
        return token_ids[:-1]
    return token_ids


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
