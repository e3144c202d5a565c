"""The flags of `pipemax bench`, each defined once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.options import EngineOptions

_WORK = "Requests"
_PEER = "Against another engine"


@dataclass(frozen=True, kw_only=True)  # no slots: two bases that have some cannot be combined
class WorkFlags:
    """Which requests; `bench.command.load_data` checks them."""

    dataset_name: Annotated[
        str,
        typer.Option(
            metavar="lognormal|sharegpt|jsonl",
            help="Where lengths come from: lognormal draws them, with made-up tokens; sharegpt "
            "takes the first two turns of conversations; jsonl has prompt_token_ids and "
            "output_tokens in each line.",
            rich_help_panel=_WORK,
        ),
    ] = "lognormal"
    dataset_path: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of sharegpt (JSON) and jsonl.", rich_help_panel=_WORK),
    ] = None
    num_prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Requests.",
            min=1,
            show_default="128; of jsonl all",
            rich_help_panel=_WORK,
        ),
    ] = None
    input_len: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS",
            help="Mean prompt length of lognormal.",
            show_default="128",
            rich_help_panel=_WORK,
        ),
    ] = None
    output_len: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS",
            help="Mean output length of lognormal; every output of sharegpt.",
            show_default="96; of sharegpt, each answer's",
            rich_help_panel=_WORK,
        ),
    ] = None
    sigma: Annotated[
        float | None,
        typer.Option(
            metavar="SIGMA",
            help="Standard deviation of the logarithm of lognormal's lengths; 0: all alike.",
            show_default="0.6",
            rich_help_panel=_WORK,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ThroughputFlags(EngineOptions, WorkFlags):
    """Of `bench throughput`."""

    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How often the requests are run; figures are of the median.",
            min=1,
            show_default="1, with --against 5",
            rich_help_panel=_WORK,
        ),
    ] = None

    limit: Annotated[
        bool,
        typer.Option(
            "--limit",
            help="Also measure the machine, before anything is started, and say what share of the "
            "limit for these requests is reached (see `pipemax bench limit`).",
            rich_help_panel=_WORK,
        ),
    ] = False
    against: Annotated[
        str | None,
        typer.Option(
            metavar="transformers|vllm|llama.cpp",
            help="Also run this engine, in turns, on the same requests, and print the ratio.",
            rich_help_panel=_PEER,
        ),
    ] = None
    peer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="The virtual environment that it is installed in; of llama.cpp, llama-server.",
            show_default="of transformers, our own",
            rich_help_panel=_PEER,
        ),
    ] = None
    peer_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.gguf", help="The same model, for llama.cpp.", rich_help_panel=_PEER
        ),
    ] = None
    peer_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Setting of that engine, may be given several times: of vllm.LLM, of "
            "transformers' ContinuousBatchingConfig (or mode=padded, batch_size), a flag of "
            "llama-server without its dashes.",
            rich_help_panel=_PEER,
        ),
    ] = None
    peer_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Variable of its environment, may be given several times.",
            rich_help_panel=_PEER,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LimitFlags(WorkFlags):
    """Of `bench limit`."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Model folder; its config.json is enough.",
            show_default="a Llama of 121 million parameters",
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="Of weights and KV; auto takes the checkpoint's own.",
        ),
    ] = "auto"
    cores: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cores to count on.", show_default="all usable"),
    ] = None
    max_num_seqs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most requests at once.", min=1, show_default="all of them"),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Of lengths and tokens.")] = 0
