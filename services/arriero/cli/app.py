"""The `arriero` command: its parts put together.

Responsibility: names of commands. Does not know what they do.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from arriero.cli import artifacts, dataset, endpoints, runs, services

app = typer.Typer(
    name="arriero",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="From raw data to a served, fine-tuned, quantized model, as one verified, durable run.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("arriero"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


app.command()(services.up)
app.command()(services.down)
app.command()(services.replicas)
app.command()(services.status)
app.command()(runs.run)
app.command()(runs.schema)
app.add_typer(runs.app, name="runs")
app.add_typer(dataset.app, name="dataset")
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(endpoints.app, name="endpoints")
app.command()(endpoints.chat)
app.command()(endpoints.generate)
app.command("import")(artifacts.import_)
