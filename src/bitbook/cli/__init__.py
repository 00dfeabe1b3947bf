"""The command line.  Each command is a module of this folder; heavy imports wait until one runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from bitbook.cli.codes import EXPLAINED, INTERRUPTED, MISTAKE
from bitbook.cli.compress import compress
from bitbook.cli.diff import diff
from bitbook.cli.explain import explain
from bitbook.cli.files import decompress, evaluate, inspect
from bitbook.cli.rd import rd
from bitbook.cli.search import search
from bitbook.cli.study import study
from bitbook.errors import BitbookError

app = typer.Typer(
    help="Make trained networks small: scalar and vector quantization, compared by the bytes of the file.",
    epilog=f"'bitbook COMMAND --help' shows an example of each. {EXPLAINED}",
    pretty_exceptions_enable=False,
)
for command in (study, search, compress, decompress, inspect, diff, evaluate, rd, explain):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from bitbook import __version__

        typer.echo(f"bitbook {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (`codes`); a mistake of the user's is one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], prog_name="bitbook", standalone_mode=False) or 0
    except typer.TyperException as error:
        code = _fail(f"{error.format_message()} See 'bitbook --help', and --help of each command.")
    except (BitbookError, OSError) as error:
        code = _fail(str(error))
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return MISTAKE
