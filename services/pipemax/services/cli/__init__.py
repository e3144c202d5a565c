"""The command line: one file per command.

A command imports what it needs when it runs, so that `--help` is quick; nothing here or below ever
imports torch or transformers.
"""

import os
import sys

import typer

from pipemax.proto.errors import ConfigError, ModelError, PipemaxError
from pipemax.services.cli.bench import bench
from pipemax.services.cli.cancel import cancel
from pipemax.services.cli.collect_env import collect_env
from pipemax.services.cli.demo import demo
from pipemax.services.cli.down import down
from pipemax.services.cli.jobs import jobs
from pipemax.services.cli.keys import keys
from pipemax.services.cli.plan import plan
from pipemax.services.cli.results import results
from pipemax.services.cli.run_batch import run_batch
from pipemax.services.cli.serve import serve
from pipemax.services.cli.simulate import simulate
from pipemax.services.cli.status import status
from pipemax.services.cli.submit import submit
from pipemax.services.cli.trace import trace
from pipemax.services.cli.up import up
from pipemax.services.cli.version import version

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="pipemax",
    help="Offline LLM inference with pipeline parallelism and KV-cache offloading.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_JOBS = (submit, jobs, results, cancel)
_LOOK = (status, trace)
for _command in (up, down, *_LOOK, run_batch, *_JOBS, demo, plan, simulate, collect_env, version):
    app.command(name=_command.__name__.replace("_", "-"))(_command)
app.command()(serve)
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")

# What Typer raises for a flag it does not know or cannot read. Its base class moved between
# versions; its place above the public BadParameter did not.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main() -> int:
    """The `pipemax` command. Returns the exit status: 2 for what the user can correct, 1 for a
    failure; either comes with one line on stderr."""
    try:
        code = app(prog_name="pipemax", standalone_mode=False)
    except (ConfigError, ModelError) as error:
        return _report(error, EXIT_USAGE)
    except PipemaxError as error:
        return _report(error, EXIT_FAILED)
    except _UsageError as error:
        return _report(_usage_message(error), EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not flush into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


def _report(error: object, code: int) -> int:
    typer.echo("pipemax: " + " ".join(str(error).split()), err=True)
    return code


def _usage_message(error: Exception) -> str:
    format_message = getattr(error, "format_message", None)
    message = str(format_message()) if format_message else str(error)
    return message or "see pipemax --help"
