"""Runs another engine, by the Python it is installed for: `PYTHON -I peer_runner.py`.

Needs nothing but that engine and the standard library, of Python 3.9 or newer. Line by line, in
JSON: first come the settings, and the answer when the engine is ready is its version; then come
rounds of requests `[[prompt token ids, output tokens], …]`, and the answer to each is how long it
took and how many tokens each output has.
"""

import atexit
import importlib
import json
import os
import sys
import time
from typing import Any, Callable, Dict, List, Tuple  # noqa: UP035 - Python 3.9

Requests = List[Tuple[List[int], int]]  # noqa: UP006 - as above
Run = Callable[[Requests], List[int]]  # noqa: UP006 - as above
Settings = Dict[str, Any]  # noqa: UP006 - as above

_PATIENCE_S = 600.0


def open_vllm(settings: Settings) -> Run:
    """Every argument of `vllm.LLM` can be given."""
    vllm = importlib.import_module("vllm")
    arguments = {
        "model": settings["model"],
        "dtype": settings["dtype"],
        "load_format": settings["load_format"],
        "max_model_len": settings["max_model_len"],
        "enable_prefix_caching": settings["enable_prefix_caching"],
    }
    engine = vllm.LLM(**{**arguments, **settings["arguments"]})

    def run(requests: Requests) -> List[int]:  # noqa: UP006
        sampling = [
            vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            for _, count in requests
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        done = engine.generate(prompts, sampling, use_tqdm=False)
        return [len(one.outputs[0].token_ids) for one in done]

    return run


def open_transformers(settings: Settings) -> Run:
    """Continuous batching, with the arguments of `ContinuousBatchingConfig`; or, with `mode`
    `padded`, `generate` on batches of `batch_size` requests, sorted by output length."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.set_num_threads(settings["threads"])
    arguments = dict(settings["arguments"])
    mode = arguments.pop("mode", "continuous")
    dtype = settings["dtype"] if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    model_class = transformers.AutoModelForCausalLM
    if settings["load_format"] == "dummy":
        config = transformers.AutoConfig.from_pretrained(settings["model"])
        model = model_class.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    else:
        model = model_class.from_pretrained(settings["model"], dtype=dtype)
    model = model.eval()
    if mode == "padded":
        return _padded(torch, model, **arguments)
    if mode != "continuous":
        raise SystemExit(f"mode={mode} is neither continuous nor padded")
    arguments.setdefault("allow_block_sharing", settings["enable_prefix_caching"])
    return _continuous(transformers, model, arguments)


def _padded(torch: Any, model: Any, batch_size: int = 32) -> Run:
    def batch(requests: Requests) -> None:
        longest = max(len(ids) for ids, _ in requests)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (ids, _) in enumerate(requests):
            tokens[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        steps = max(count for _, count in requests)
        with torch.inference_mode():
            model.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=steps,
                min_new_tokens=steps,
                pad_token_id=0,
            )

    def run(requests: Requests) -> List[int]:  # noqa: UP006
        ordered = sorted(requests, key=lambda request: request[1])
        for first in range(0, len(ordered), batch_size):
            batch(ordered[first : first + batch_size])
        return [count for _, count in requests]  # those of a batch beyond them are not counted

    return run


def _continuous(transformers: Any, model: Any, arguments: Settings) -> Run:
    model.set_attn_implementation("sdpa")
    generation = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=2**20, eos_token_id=-1
    )
    config = transformers.ContinuousBatchingConfig(**arguments)

    context = model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    )
    manager = context.__enter__()  # for all rounds: its cache is made once, as others' are
    atexit.register(context.__exit__, None, None, None)

    def run(requests: Requests) -> List[int]:  # noqa: UP006
        found: Dict[str, int] = {}  # noqa: UP006
        names = [
            manager.add_request(ids, max_new_tokens=count, eos_token_id=-1)
            for ids, count in requests
        ]
        while len(found) < len(names):
            result = manager.get_result(timeout=_PATIENCE_S)
            if result is None:
                raise SystemExit(f"no result within {_PATIENCE_S:g} s")
            if result.is_finished():
                found[result.request_id] = len(result.generated_tokens)
        return [found[name] for name in names]

    return run


OPEN = {"vllm": open_vllm, "transformers": open_transformers}


def version_of(module: str) -> str:
    """Also of builds whose distribution has another name."""
    return str(importlib.import_module(module).__version__)


def serve(open_engine: Callable[[Settings], Run], version: Callable[[], str]) -> None:
    """Only answers go to standard output: libraries may print what they like."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run = open_engine(json.loads(sys.stdin.readline()))

    def answer(what: Settings) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    answer({"version": version()})
    for line in sys.stdin:
        requests = [(ids, count) for ids, count in json.loads(line)["requests"]]
        started = time.perf_counter()
        lengths = run(requests)
        answer({"seconds": time.perf_counter() - started, "output_tokens": lengths})


if __name__ == "__main__":
    engine = sys.argv[1]
    serve(OPEN[engine], lambda: version_of(engine))
