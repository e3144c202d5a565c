"""The one configuration tree. The launcher validates it once and writes it to the run directory;
every process reads it from there."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipemax.proto.errors import ConfigError
from pipemax.proto.modelled import KV_TOKEN_BYTES, ModelledDevice
from pipemax.proto.rundir import NAME_PATTERN, TCP_PATTERN

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
PortNumber = Annotated[int, Meta(ge=0, le=65535)]
TcpEndpoint = Annotated[str, Meta(pattern=TCP_PATTERN, max_length=300)]
Device = Literal["cpu", "cuda", "modelled"]

CONFIG_FILE = "config.json"


class CudaDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How stages use GPUs."""

    gpus: tuple[NotNegative, ...]
    """Ordinal of each stage's GPU; stages may share one."""
    names: tuple[str, ...] = ()
    """Of those GPUs, for people; empty where nobody looked."""
    block_bytes: tuple[Positive, ...]
    """Of a KV block, by stage: the host pool is laid out, and pinned, before stages are loaded."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that the stages on it may take, all together. What weights and the
    largest step leave of it is the KV pool, unless `kv_cache_memory_bytes` is given."""
    attention_backend: Literal["auto", "flashinfer", "triton", "reference"] = "auto"
    """`reference` is plain torch. `auto` is FlashInfer where it is installed, else Triton."""
    enforce_eager: bool = False
    """True turns CUDA graphs off."""
    kv_copies: Literal["stage", "daemon"] = "stage"
    """Whose streams carry KV between host and device. The daemon's need a CUDA context of its own
    on every GPU, which takes some hundred MiB of each; a stage has one anyway."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the processes of one system agree on.

    Names follow vLLM's flags where vLLM has one. All sizes are bytes, all times seconds.
    """

    name: Annotated[str, Meta(pattern=NAME_PATTERN)] = "default"
    """Names the run directory, so that several systems can live on one machine."""
    model: str
    """Model folder: config.json, *.safetensors, tokenizer.json."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`: random weights in the shape that config.json gives, which is all the folder needs.
    Without a tokenizer.json, prompts are token ids and answers too."""
    served_model_name: str
    """Model name in results and in metric labels."""
    pipeline_parallel_size: Positive = 1
    """Stages, one process each."""
    layer_split: tuple[Positive, ...]
    """Layers per stage, in order; its length is `pipeline_parallel_size`."""
    device: Device = "cpu"
    """Where stages compute."""
    cuda: CudaDevice | None = None
    """Given if, and only if, `device` is `cuda`."""
    modelled: ModelledDevice | None = None
    """Given if, and only if, `device` is `modelled`: which GPU the stages behave like. Sizes are
    then those of that GPU and its host, far beyond what this machine has."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights, activations and KV. `auto` takes the checkpoint's own."""
    max_model_len: Positive
    """Longest prompt plus output of one request, tokens."""
    block_size: Annotated[int, Meta(ge=1, le=256)] = 16
    """Tokens per KV block. Larger blocks copy faster and waste more in the last one."""
    kv_cache_memory_bytes: Positive | None = 256 * 2**20
    """Device KV pool per stage. None, on CUDA only: what `gpu_memory_utilization` leaves."""
    kv_offloading_bytes: NotNegative = 1024 * 2**20
    """Host KV pool for all stages together (`--kv-offloading-size`). 0 turns offloading off:
    requests that no longer fit are then recomputed."""
    emulate_link_bandwidth_bytes_s: Positive | None = None
    """Bytes per second each stage's link carries in each direction. None: as fast as memory copies
    go. The modelled device has one always."""
    fused_layers: bool = True
    """On the CPU, layers like Llama's run as few large operations over packed weights; off: as
    transformers' own modules. The same numbers but for rounding. Other families run transformers'
    modules, over packed weights if on; GPUs always do, over plain ones."""
    micro_batches: Annotated[int, Meta(ge=0, le=64)] = 0
    """Micro-batches in flight (`--micro-batches`); 0: one per stage. When weights dominate the step
    time, as in decoding with few requests, every further one costs 1/stages of the throughput. One
    more pays where steps are long enough to be bound by arithmetic: then no stage waits while the
    coordinator plans."""
    max_num_seqs: Positive = 256
    """Most requests in one micro-batch."""
    max_num_batched_tokens: Positive = 1024
    """Most tokens in one micro-batch. Longer prompts are prefilled in chunks."""
    sampler_workers: Annotated[int, Meta(ge=0, le=64)] = 0
    """Processes that sample what is more than greedy (`--sampler-workers`), off the last stage's
    way: it goes on with its next step at once. 0: the last stage samples itself."""
    policy: str = "pipemax"
    """Which requests take part in a step: `pipemax`, `oldest-first`, `fcfs`, `count-balanced` or
    `static-prefetch:<fraction>`; see the coordinator's policy.py."""
    prefill: Literal["mixed", "phases"] = "mixed"
    """When prompts are computed: `mixed` cuts them into chunks that ride on decode steps, `phases`
    alternates between steps of prompts only and steps that only decode."""
    enable_prefix_caching: bool = True
    """Requests whose prompts begin alike share those KV blocks, so they are computed once."""
    seed: NotNegative = 0
    """Seeds the sampling of requests that bring no seed of their own."""
    activation_transport: Literal["auto", "ipc", "shm", "tcp"] = "auto"
    """How activations travel between stages: a ring on the GPU (`ipc`), one in shared memory, or
    TCP frames (CURVE-encrypted, for stages on different hosts). `auto`, for each pair of stages:
    `ipc` where both compute on one GPU or on two that read each other's memory, else `shm`."""
    activation_host: str = "127.0.0.1"
    """Address at which stages listen for activations over TCP."""
    warm_up_s: Annotated[float, Meta(ge=0, le=600)] = 1.0
    """Most time that each stage spends at its start on timing synthetic steps, from which the
    scheduler predicts real ones; a slow model's few steps may take longer. 0 turns it off: then the
    scheduler learns from the first real steps only."""
    hung_after_s: Annotated[float, Meta(ge=2, le=86400)] = 60.0
    """A process that says nothing for so long hangs: it is killed and started again. More than the
    longest step takes: a stage says nothing while it computes on a CPU."""
    threads_per_stage: Positive = 1
    """CPU threads of each stage's kernels. More than the cores there are slows everything down."""
    pin_cores: bool = False
    """Each stage keeps to its share of the cores it may use, on device `cpu`. Systems that know
    nothing of each other would choose the same ones."""
    spin_wait_s: Annotated[float, Meta(ge=0, le=0.01)] = 0.0
    """How long a stage that waits for a message stays awake before it sleeps. Saves the time to
    wake up, at every step; costs the core meanwhile."""
    metrics_host: str = "127.0.0.1"
    """Address /metrics listens on. It has no password: anything but loopback is seen by others."""
    metrics_port: PortNumber = 0
    """/metrics port; 0 takes a free one, written to `metrics.port` in the run directory."""
    client_credits: Positive = 4096
    """Most unfinished requests of one client; the next one is refused, not queued."""
    listen: TcpEndpoint | None = None
    """Where clients of other machines are served, beside those of this one: `tcp://HOST:PORT`; port
    0 takes a free one, written to `ingest.endpoint` in the run directory. Goes with `keys_dir`:
    TCP without keys does not exist."""
    keys_dir: str | None = None
    """Folder of the server's key and of the public keys of clients that are let in."""
    max_jobs: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    """Most jobs in the journal, finished ones included: the next one is refused."""
    max_journal_bytes: Annotated[int, Meta(ge=2**20, le=2**46)] = 256 * 2**30
    """Largest journal (`--max-journal-size`): what would make it larger is refused. Results of what
    was taken before are always written."""

    def device_name(self, stage: int) -> str:
        """What this stage computes on, in words."""
        if self.cuda is None:
            return self.device if self.modelled is None else f"modelled {self.modelled.gpu.name}"
        name = f" {self.cuda.names[stage]}" if self.cuda.names else ""
        return f"GPU {self.cuda.gpus[stage]}{name}"

    @property
    def num_slots(self) -> int:
        """Micro-batches in flight."""
        return self.micro_batches or self.pipeline_parallel_size

    @property
    def held_block_bytes(self) -> int | None:
        """What a block of any stage really takes in this machine's memory; None: as much as it
        takes on the link."""
        return None if self.modelled is None else self.block_size * KV_TOKEN_BYTES

    @property
    def pool_bytes(self) -> int:
        """`kv_cache_memory_bytes` where it was given, as it is on every device but CUDA."""
        assert self.kv_cache_memory_bytes is not None
        return self.kv_cache_memory_bytes

    @property
    def held_host_bytes(self) -> int:
        """The same for the whole host pool."""
        if self.modelled is None or self.held_block_bytes is None:
            return self.kv_offloading_bytes
        on_link = sum(self.modelled.block_bytes(n, self.block_size) for n in self.layer_split)
        num_blocks = self.kv_offloading_bytes // on_link
        return num_blocks * len(self.layer_split) * self.held_block_bytes

    def __post_init__(self) -> None:
        if (self.device == "modelled") != (self.modelled is not None):
            raise ValueError("`modelled` goes with device `modelled`, and only with that")
        if (self.device == "cuda") != (self.cuda is not None):
            raise ValueError("`cuda` goes with device `cuda`, and only with that")
        if self.kv_cache_memory_bytes is None and self.cuda is None:
            raise ValueError("`kv_cache_memory_bytes` may be left open on device `cuda` only")
        if self.sampler_workers and self.modelled is not None:
            raise ValueError("`sampler_workers` have nothing to sample on device `modelled`")
        if (self.listen is None) != (self.keys_dir is None):
            raise ValueError("`listen` and `keys_dir` go together: plain TCP is refused")
        if self.activation_transport == "ipc" and self.cuda is None:
            raise ValueError("`activation_transport` `ipc` goes with device `cuda`")
        if self.cuda is not None:
            for name in ("gpus", "block_bytes", *(("names",) if self.cuda.names else ())):
                if len(getattr(self.cuda, name)) != self.pipeline_parallel_size:
                    raise ValueError(f"`cuda.{name}` must have one entry for each stage")


def save_config(config: EngineConfig, run_dir: Path) -> None:
    """Writes the configuration where every process of the system reads it."""
    (run_dir / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def load_config(run_dir: Path) -> EngineConfig:
    """Raises ConfigError when the file is missing or does not hold a valid configuration."""
    path = run_dir / CONFIG_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineConfig)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; start the system with `pipemax up`") from error
