"""The engine's flags, defined once for every command that starts a system.

Names are those vLLM's users know. Defaults are the configuration's own.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from pipemax.proto.config import EngineConfig
from pipemax.services.cli.flag_group import takes

CONFIG_DEFAULTS = _CONFIG = EngineConfig(
    model="", served_model_name="", layer_split=(1,), max_model_len=1
)
_MODEL, _PIPELINE, _GPUS, _MEMORY, _BATCH, _LAUNCH = (
    "Model",
    "Pipeline",
    "GPUs (--device cuda)",
    "KV memory",
    "Batching",
    "Launching",
)


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes // 2**20}MiB"


SystemName = Annotated[
    str, typer.Option("--name", metavar="NAME", help="Which system, where several run.")
]
DEFAULT_NAME = _CONFIG.name
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        "--request-timeout",
        metavar="SECONDS",
        help="How long each request may take once the system has taken it up; then it is cancelled "
        "and gets an error line with the code `timeout` and with what it had produced.",
        show_default="as long as it takes",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a user asked for, not yet validated; `engine_config.build_config` does that."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|NAME",
            help="Model folder: config.json, *.safetensors, tokenizer.json.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model name in results and metrics.",
            show_default="as given to --model",
            rich_help_panel=_MODEL,
        ),
    ] = None
    load_format: Annotated[
        str,
        typer.Option(
            metavar="auto|dummy",
            help="dummy: random weights in the shape of config.json, which is all the folder then "
            "needs; without a tokenizer.json, prompts are token ids.",
            rich_help_panel=_MODEL,
        ),
    ] = _CONFIG.load_format
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="Weights, activations and KV; auto takes the checkpoint's own.",
            rich_help_panel=_MODEL,
        ),
    ] = _CONFIG.dtype
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Longest prompt plus output of one request.",
            show_default="the model's limit, or what one stage's KV pool can hold",
            rich_help_panel=_MODEL,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="For requests that bring no seed.", rich_help_panel=_MODEL),
    ] = _CONFIG.seed

    pipeline_parallel_size: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel-size",
            "-pp",
            metavar="STAGES",
            help="Stages, one process each.",
            rich_help_panel=_PIPELINE,
        ),
    ] = _CONFIG.pipeline_parallel_size
    layer_split: Annotated[
        str | None,
        typer.Option(
            metavar="auto|estimated|even|N,N,...",
            help="Layers per stage. auto measures layers, embedding and head on each kind of "
            "device and makes the slowest stage as fast as memory allows; estimated, on CPUs, goes "
            "by the size of layers and head.",
            show_default="auto on cuda, estimated on cpu, else even",
            rich_help_panel=_PIPELINE,
        ),
    ] = None
    micro_batches: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Micro-batches in flight. One more than there are stages hides the time the "
            "coordinator plans in, and makes each smaller.",
            show_default="as many as stages",
            rich_help_panel=_PIPELINE,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda|modelled:GPU",
            help="Where stages compute. With modelled:GPU (by catalogue, such as "
            "modelled:rtx-3090) stages wait as long as that GPU would compute, and make tokens up: "
            "--model is then a name of the catalogue too, or a folder with a config.json.",
            rich_help_panel=_PIPELINE,
        ),
    ] = _CONFIG.device
    catalogue: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="More GPUs and models for modelled:GPU.",
            rich_help_panel=_PIPELINE,
        ),
    ] = None
    modelled_time_scale: Annotated[
        float,
        typer.Option(
            metavar="FACTOR",
            help="Seconds that a second of the modelled GPU takes; 0.1 runs ten times as fast.",
            rich_help_panel=_PIPELINE,
        ),
    ] = 1.0
    hung_after: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="A process that says nothing for so long is killed and started again.",
            rich_help_panel=_LAUNCH,
        ),
    ] = _CONFIG.hung_after_s
    threads_per_stage: Annotated[
        int | None,
        typer.Option(
            metavar="THREADS",
            help="CPU threads of each stage.",
            show_default="cores without --sampler-workers, divided by stages; 1 on cuda",
            rich_help_panel=_PIPELINE,
        ),
    ] = None
    pin_cores: Annotated[
        bool,
        typer.Option(
            "--pin-cores/--no-pin-cores",
            help="Each CPU stage keeps to cores of its own. For a system that has its machine to "
            "itself: two of them would choose the same cores.",
            rich_help_panel=_PIPELINE,
        ),
    ] = _CONFIG.pin_cores
    spin_wait_s: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a stage that waits for a message stays awake before it sleeps; at most "
            "0.01.",
            show_default="0.0001 where CPU stages leave two cores to others, else 0",
            rich_help_panel=_PIPELINE,
        ),
    ] = None
    activation_transport: Annotated[
        str,
        typer.Option(
            metavar="auto|ipc|shm|tcp",
            help="How activations travel between stages: in GPU memory (ipc, on cuda), shared "
            "memory, or encrypted TCP. auto: ipc where both stages reach that memory, else shm.",
            rich_help_panel=_PIPELINE,
        ),
    ] = _CONFIG.activation_transport

    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="GPUs by ordinal, as nvidia-smi counts them, in the order of stages. Fewer than "
            "stages: neighbouring stages share.",
            show_default="the first, one for each stage",
            rich_help_panel=_GPUS,
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Of a GPU's memory, for all stages on it: what weights and the largest step leave "
            "is the KV pool.",
            show_default="0.9",
            rich_help_panel=_GPUS,
        ),
    ] = None
    attention_backend: Annotated[
        str | None,
        typer.Option(
            metavar="auto|flashinfer|triton|reference",
            help="auto: FlashInfer where it is installed, else Triton. reference is plain torch.",
            show_default="auto",
            rich_help_panel=_GPUS,
        ),
    ] = None
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="No CUDA graphs.", rich_help_panel=_GPUS)
    ] = False
    kv_copies: Annotated[
        str | None,
        typer.Option(
            metavar="stage|daemon",
            help="Whose streams carry KV between host and GPU. The daemon's cost a CUDA context, "
            "some hundred MiB, on every GPU.",
            show_default="stage",
            rich_help_panel=_GPUS,
        ),
    ] = None

    block_size: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens per KV block.",
            show_default=f"{_CONFIG.block_size}; on cuda up to 64, so that a stage's block is at "
            "least 512 KiB",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    kv_cache_memory_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Device KV pool of each stage, for example 64MiB.",
            show_default=f"{_mebibytes(_CONFIG.pool_bytes)}; on cuda by "
            "--gpu-memory-utilization; what a modelled GPU has",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    kv_offloading_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host KV pool for all stages together; 0 turns offloading off.",
            show_default=f"{_mebibytes(_CONFIG.kv_offloading_bytes)}; on cuda half of the memory "
            "available, at most twice that of the GPUs; of a modelled host 400GB",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    emulate_link_bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Per second and direction: slow each stage's link down to this, for example 2GiB.",
            show_default="as fast as memory copies go, or a modelled GPU's",
            rich_help_panel=_MEMORY,
        ),
    ] = None

    max_num_seqs: Annotated[
        int,
        typer.Option(metavar="N", help="Most requests in one micro-batch.", rich_help_panel=_BATCH),
    ] = _CONFIG.max_num_seqs
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Most tokens in one micro-batch; longer prompts are prefilled in chunks.",
            rich_help_panel=_BATCH,
        ),
    ] = _CONFIG.max_num_batched_tokens
    sampler_workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that sample what is more than greedy, while the last stage goes on; 0: "
            "the last stage does it.",
            show_default=str(_CONFIG.sampler_workers),
            rich_help_panel=_BATCH,
        ),
    ] = None
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which requests take part in a step: pipemax, oldest-first, fcfs, count-balanced "
            "or static-prefetch:<fraction of the device pool>.",
            rich_help_panel=_BATCH,
        ),
    ] = _CONFIG.policy
    prefill: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="When prompts are computed: mixed into decode steps, or in phases of their own.",
            rich_help_panel=_BATCH,
        ),
    ] = _CONFIG.prefill
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Prompts that begin alike share those KV blocks.",
            rich_help_panel=_BATCH,
        ),
    ] = _CONFIG.enable_prefix_caching

    fused_layers: Annotated[
        bool | None,
        typer.Option(
            "--fused-layers/--no-fused-layers",
            help="Llama-like layers on the CPU as few large operations, or as transformers' own "
            "modules, which are slower.",
            show_default="fused",
            rich_help_panel=_PIPELINE,
        ),
    ] = None

    metrics_host: Annotated[
        str,
        typer.Option(
            metavar="HOST", help="Address of /metrics and of the page.", rich_help_panel=_LAUNCH
        ),
    ] = _CONFIG.metrics_host
    metrics_port: Annotated[
        int,
        typer.Option(
            metavar="PORT",
            help="Port of /metrics and of the page; 0 takes a free one.",
            rich_help_panel=_LAUNCH,
        ),
    ] = _CONFIG.metrics_port
    warm_up_s: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Most time each stage spends on timing steps at its start; 0: none.",
            rich_help_panel=_LAUNCH,
        ),
    ] = _CONFIG.warm_up_s
    ready_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Give up when the system is not ready after this time.",
            rich_help_panel=_LAUNCH,
        ),
    ] = 300.0

    def given(self) -> tuple[str, ...]:
        """Flags whose value is not the default."""
        return tuple(
            "--" + field.name.replace("_", "-")
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )


takes_engine_options = takes(EngineOptions)
"""Gives a Typer command the engine's flags."""
