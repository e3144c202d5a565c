"""All parts, one after the other: `make gpu-check`."""

import argparse
import contextlib
import datetime
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_device

from gpu_check import machine
from gpu_check.parts import PARTS, ROOT, TOTAL_LIMIT_S, Part, Settings
from gpu_check.report import Report, table
from gpu_check.runner import Interrupted, Outcome, adopt_orphans, run_part

RESULTS = ROOT / "ops" / "benchmarks" / "results"
EXIT_PASSED, EXIT_FAILED, EXIT_CANNOT_RUN = 0, 1, 2
HELD_MIB = 64.0
"""More GPU memory than this in use after a part than before it, and the part left something."""
REHEARSAL_FACTOR = 5.0
"""A rehearsal's sizes are small, but its processes share whatever CPU there is."""
FREED_WITHIN_S = 3.0
"""What the driver may take to free the memory of a process that has ended."""


@dataclass(frozen=True, slots=True)
class Options:
    only: tuple[str, ...]
    rehearse: bool
    gpu: str
    json: Path | None
    commit: str | None
    limit_factor: float


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Returns the exit status: 0 if every part that was asked for ran and none failed, 1 if not, 2
    if nothing could run."""
    options = parse(argv, parts)
    chosen = [part for part in parts if not options.only or part.name in options.only]
    refusal = why_not(options)
    if refusal:
        print(refusal, file=sys.stderr)
        return EXIT_CANNOT_RUN
    adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    head = describe(options, argv if argv is not None else sys.argv[1:])
    say_head(head)
    path = options.json or default_json(options, head)
    report = Report(path, head, [part.name for part in chosen])
    try:
        run_all(chosen, report, options)
    except Interrupted as stop:
        report.add(stop.outcome)
    except KeyboardInterrupt:  # between two parts: what is left does not run
        print("interrupted")
    print(table(report))
    if options.rehearse:
        print("This was a rehearsal without a GPU: it says nothing of CUDA.")
    print(f"All of it is in {path}")
    return EXIT_PASSED if report.passed else EXIT_FAILED


def run_all(parts: Sequence[Part], report: Report, options: Options) -> None:
    """One after the other, none beyond what all may take together. Raises Interrupted."""
    deadline_s = time.monotonic() + TOTAL_LIMIT_S * options.limit_factor
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for number, part in enumerate(parts, 1):
            left_s = max(1.0, deadline_s - time.monotonic())  # a second shows why it failed
            limit_s = min(part.limit_s * options.limit_factor, left_s)
            head = f"[{number}/{len(parts)}] {part.name}: "
            print(f"\n{head}{part.shows} (at most {limit_s:.0f} s)", flush=True)
            outcome = run_one(part, limit_s, Path(folder), options)
            report.add(outcome)
            why = f": {outcome.reason}" if outcome.reason else ""
            print(f"{head}{outcome.status.upper()} after {outcome.seconds:.0f} s{why}", flush=True)


def describe(options: Options, argv: Sequence[str]) -> dict[str, object]:
    """What the JSON says beside the parts."""
    head: dict[str, object] = {
        "rehearsal": options.rehearse,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["gpu-check", *argv]),
        **machine.describe(ROOT, options.gpu),
    }
    return head | ({"commit": options.commit} if options.commit else {})


def parse(argv: Sequence[str] | None, parts: Sequence[Part]) -> Options:
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description="Checks on this machine's GPU whether PipeMax is right, and how fast it is.",
        epilog="Parts: " + "; ".join(f"{part.name}: {part.shows}" for part in parts),
    )
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="PART",
                        help="these parts alone")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="no GPU: run what checks it on "
                        "the CPU, with small sizes and a simulated CUDA")  # fmt: skip
    parser.add_argument("--gpu", default=gpu_device.chosen(),
                        help="which one, as nvidia-smi counts them")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes; else a "
                        "file in ops/benchmarks/results (of a rehearsal: in build)")  # fmt: skip
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    parser.add_argument("--limit-factor", type=float, metavar="X", help="multiplies what each "
                        f"part may take; else 1, of a rehearsal {REHEARSAL_FACTOR:g}")  # fmt: skip
    asked = parser.parse_args(argv)
    factor = asked.limit_factor
    if factor is None:
        factor = REHEARSAL_FACTOR if asked.rehearse else 1.0
    if not factor > 0:
        parser.error("--limit-factor: must be more than 0")
    return Options(tuple(asked.only), asked.rehearse, asked.gpu, asked.json, asked.commit, factor)


def why_not(options: Options) -> str:
    """Why nothing can run here; empty if it can."""
    needed = machine.MODULES if options.rehearse else machine.MODULES | machine.GPU_MODULES
    missing = machine.missing_modules(needed)
    if missing:
        return f"{sys.executable} misses {', '.join(missing)}: install it, or run `make install`"
    if options.rehearse:
        return ""
    if machine.describe_gpu(options.gpu) is None:
        return (
            f"nvidia-smi shows no GPU {options.gpu}: nothing was checked. "
            "GPU_CHECK_ARGS=--rehearse runs the checks themselves without one"
        )
    return ""


def run_one(part: Part, limit_s: float, folder: Path, options: Options) -> Outcome:
    findings = folder / f"{part.name}.json"
    settings = Settings(findings, limit_s, options.rehearse)
    before_mib = None if options.rehearse else gpu_device.used_mib(options.gpu)
    outcome = run_part(
        part.name,
        part.command(settings),
        limit_s=limit_s,
        findings_file=findings,
        environment=machine.child_environment(ROOT, options.gpu, os.environ),
        folder=ROOT,
        echo=lambda line: print(f"  | {line}", flush=True),
    )
    if before_mib is not None:
        outcome = check_held(outcome, before_mib, lambda: gpu_device.used_mib(options.gpu))
    return outcome


def check_held(
    outcome: Outcome, before_mib: float, used_mib: Callable[[], float | None]
) -> Outcome:
    """Fails a part after which more of the GPU's memory is in use than `before_mib`."""
    deadline_s = time.monotonic() + FREED_WITHIN_S
    while (after_mib := used_mib()) is None or after_mib > before_mib + HELD_MIB:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.2)
    else:
        return outcome
    after = "unknown" if after_mib is None else f"{after_mib:.0f} MiB"
    text = f"GPU memory in use: {before_mib:.0f} MiB before, {after} after"
    reason = f"{outcome.reason}; {text}" if outcome.status == "fail" else text
    return Outcome(outcome.name, "fail", reason, outcome.seconds, outcome.findings, outcome.output)


def default_json(options: Options, head: dict[str, object]) -> Path:
    """A part alone does not replace what is recorded of all."""
    if options.rehearse or options.only:
        kind = "rehearsal" if options.rehearse else "part"
        return ROOT / "build" / f"gpu-check-{kind}.json"
    gpu = head["gpu"]
    assert isinstance(gpu, dict)
    slug = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    return RESULTS / f"gpu-check-{slug}-{str(head['date'])[:10]}.json"


def say_head(head: dict[str, object]) -> None:
    gpu, found = head["gpu"], head["versions"]
    if isinstance(gpu, dict):
        print(f"{gpu['name']}, {gpu['memory_mib']} MiB, driver {gpu['driver']}, compute capability "
              f"{gpu['compute_capability']}")  # fmt: skip
    else:
        print("rehearsal: no GPU")
    assert isinstance(found, dict)
    there = {name: text for name, text in found.items() if text != "not installed"}
    print(", ".join(f"{name} {text}" for name, text in there.items()))
    print(f"CUDA of torch {head['cuda_of_torch']}, commit {head['commit']}", flush=True)
    with contextlib.suppress(OSError):
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}", flush=True)
