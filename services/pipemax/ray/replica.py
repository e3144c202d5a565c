"""One PipeMax system as a callable class for `ray.data.Dataset.map_batches`."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from pipemax.client import Client, Completion
from pipemax.proto.errors import ConfigError, NotRunningError, RequestError
from pipemax.proto.rundir import runtime_root
from pipemax.ray import columns
from pipemax.ray.columns import Result
from pipemax.services.batch import inputs
from pipemax.services.batch.job import completions
from pipemax.services.batch.openai_lines import BatchRequest, LineError, parse_line
from pipemax.services.batch.openai_results import error_line, partial_body, result_line
from pipemax.services.batch.outputs import columns_of
from pipemax.services.batch.tally import status_of
from pipemax.services.cli.options import EngineOptions
from pipemax.services.config_limits import request_timeout
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import own_name, sweep
from pipemax.services.launcher.supervisor import Policy
from pipemax.services.launcher.system import System

PURPOSE = "ray"
"""Begins the name of a replica's system, which ends with the pid of its process."""
_OPTIONS = frozenset(field.name for field in fields(EngineOptions))

log = logging.getLogger(__name__)


class Replica:
    """A PipeMax system that lives as long as the object, which is what Ray makes an actor of::

        lines = ray.data.read_text("requests.jsonl").rename_columns({"text": "line"})
        results = lines.map_batches(
            Replica,
            fn_constructor_kwargs={"model": "/models/llama-3-8b", "pipeline_parallel_size": 4,
                                   "device": "cuda"},
            batch_size=256, batch_format="pyarrow", num_gpus=4,
            compute=ray.data.ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=4),
        )

    A row in is an OpenAI batch line: a column `line` with its JSON, or the columns `custom_id`,
    `method`, `url` and `body` (a struct, or a string of JSON). The row out has, in place of those,
    the columns of `columns.Result`; other columns stay, and so does the order of rows. A line that
    cannot be served is a row whose `error` says why, never an exception.

    A batch is done when its last request is, so one batch at a time would leave the pipeline empty
    towards each end: let several calls run at once, with at least twice
    `pipeline_parallel_size * max_num_seqs` rows between them.

    The system dies with the process, however that dies; a run directory that a killed one left is
    removed by the next replica on the machine.
    """

    def __init__(
        self, model: str, *, request_timeout_s: float | None = None, **engine: Any
    ) -> None:
        """`engine`: the engine's flags as `pipemax up --help` has them, with underscores. A request
        that takes longer than `request_timeout_s` is cancelled and a row with the error code
        `timeout`.

        Raises ConfigError or ModelError for what cannot work here, ProcessFailedError when a
        process of the system does not start.
        """
        if unknown := sorted(set(engine) - _OPTIONS):
            raise ConfigError(f"unknown engine options {unknown}; known are {sorted(_OPTIONS)}")
        self._request_timeout_s = request_timeout(request_timeout_s)
        self._stack = contextlib.ExitStack()
        self._clients: SimpleQueue[Client] = SimpleQueue()
        """Connected, and not in a call."""
        self._closing = threading.Lock()
        sweep(runtime_root(), PURPOSE)
        options = EngineOptions(model=model, **engine)
        config = build_config(options, own_name(PURPOSE), log.info)
        policy = Policy(ready_timeout_s=options.ready_timeout)
        system = System(config, policy=policy, on_notice=log.warning, temporary=True)
        with contextlib.ExitStack() as stack:
            self._system = stack.enter_context(system)
            system.wait_ready()
            self._stack = stack.pop_all()

    def __call__(self, batch: Any) -> Any:
        """`batch` is a pyarrow Table or a mapping of columns; the same comes back. May be called
        from several threads at once. Raises ConfigError for a batch without a line's columns,
        PipemaxSystemError when the system ended."""
        texts = columns.request_texts(batch)
        try:
            with self._client() as client:
                results = serve(client, texts, self._request_timeout_s)
        except NotRunningError:
            if self._system.failed:
                self._system.wait()  # raises the cause
            raise
        return columns.with_results(batch, results)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        """Kept between calls: what the coordinator learns of outputs' lengths, it learns by
        client."""
        try:
            client = self._clients.get_nowait()
        except Empty:
            client = Client(self._system.config.name, label="ray")
        try:
            yield client
        except BaseException:
            client.close()
            raise
        self._clients.put(client)

    def close(self) -> None:
        """Stops the system. Safe to call twice."""
        with self._closing:
            while True:
                try:
                    self._clients.get_nowait().close()
                except Empty:
                    break
            self._stack.close()

    def __del__(self) -> None:
        # Ray drops an actor's object when the actor ends in peace.
        if hasattr(self, "_stack"):
            self.close()


def serve(
    client: Client, texts: Sequence[bytes | None], request_timeout_s: float | None = None
) -> list[Result]:
    """What becomes of each line, in their order; None is a line that is too long. Raises as
    `Client.poll`."""
    results: dict[int, Result] = {}

    def requests() -> Iterator[tuple[int, BatchRequest]]:
        for index, text in enumerate(texts):
            try:
                if text is None:
                    raise LineError(
                        "too_large", f"the line is longer than {inputs.MAX_LINE_BYTES} bytes"
                    )
                request = parse_line(text, client.model_name)
                if request_timeout_s is not None:
                    request = request.within(request_timeout_s)
                yield index, request
            except LineError as error:
                results[index] = _refused(error.custom_id, f"line-{index + 1}", error.status, error)

    for index, request, completion in completions(client, requests()):
        results[index] = _result(client.model_name, request, completion)
    return [results[index] for index in range(len(texts))]


def _result(model_name: str, request: BatchRequest, completion: Completion) -> Result:
    made: dict[str, Any] = {"model_name": model_name, "created": int(time.time())}
    if completion.error is None:
        line = result_line(request.custom_id, request.form, completion, **made)
        return _shown(line, None, completion.num_prompt_tokens, completion.num_output_tokens)
    error = RequestError(completion.error_code or "failed", completion.error)
    body = partial_body(request.form, completion, **made)
    status = status_of(error.code)
    return _refused(request.custom_id, completion.request_id, status, error, body)


def _refused(
    custom_id: str | None,
    request_id: str,
    status: int,
    error: RequestError,
    body: Mapping[str, Any] | None = None,
) -> Result:
    line = error_line(
        custom_id, request_id, status=status, code=error.code, message=str(error), body=body
    )
    return _shown(line, error.code, 0, 0)


def _shown(line: bytes, error_code: str | None, prompt_tokens: int, output_tokens: int) -> Result:
    shown: Mapping[str, Any] = columns_of(msgspec.json.decode(line))
    return Result(
        **shown,
        error_code=error_code,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        result=line.decode(),
    )
