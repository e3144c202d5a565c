"""`pipemax serve`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.where import WhereOptions, takes_where

_LISTENING, _LIMITS = "Listening", "Limits"


@takes_where
def serve(
    where: WhereOptions,
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="Address to listen on. Beyond this machine only with an API key.",
            rich_help_panel=_LISTENING,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="PORT", help="0 takes a free one and says which.", rich_help_panel=_LISTENING
        ),
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys, one a line, in a file that only you can read.",
            show_default="the key in $PIPEMAX_API_KEY; without one, none is asked for",
            rich_help_panel=_LISTENING,
        ),
    ] = None,
    insecure_no_api_key: Annotated[
        bool,
        typer.Option(
            "--insecure-no-api-key",
            help="Serve whoever can connect, also from other machines and other sites' pages.",
            rich_help_panel=_LISTENING,
        ),
    ] = False,
    max_body_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Of a request that is no upload.", rich_help_panel=_LIMITS
        ),
    ] = "4MiB",
    max_file_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of an uploaded file.", rich_help_panel=_LIMITS)
    ] = "1GiB",
    max_concurrent_requests: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Answered at once, streams and uploads among them; more get status 429.",
            rich_help_panel=_LIMITS,
        ),
    ] = 1000,
) -> None:
    """Put a running system behind OpenAI's HTTP interface, until Ctrl-C.

    Chats, completions (streamed or not), files and batches, for OpenAI's client and whatever else
    speaks to it: set its base URL to http://HOST:PORT/v1. Files and batches are kept on disk, and
    go on when this command or the system is started again.
    """
    import os

    from pipemax.proto.errors import ConfigError
    from pipemax.services.config_limits import size_of
    from pipemax.services.serve.keys import read_keys
    from pipemax.services.serve.settings import ServeSettings

    settings = ServeSettings(
        host=host,
        port=port,
        keys=read_keys(api_key_file, os.environ),
        insecure=insecure_no_api_key,
        max_body_bytes=size_of("--max-body-size", max_body_size),
        max_file_bytes=size_of("--max-file-size", max_file_size),
        max_concurrent_requests=max_concurrent_requests,
    )
    settings.check()
    try:
        from pipemax.services.serve import command
    except ImportError as error:
        raise ConfigError(
            f"pipemax serve needs {error.name}: install it with `pip install 'pipemax[serve]'`"
        ) from error
    command.serve(where.system, settings, lambda line: typer.echo(line, err=True))
