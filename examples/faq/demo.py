"""The demo: `make demo`.

Runs examples/faq/pipeline.yaml on this machine, then asks the untaught and the
tuned model the same questions. Everything it starts, it stops.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from rich.panel import Panel
from rich.table import Table

from arriero.cli import local, render, watch
from arriero.cli.supervisor import Home
from arriero.client import Client, load_pipeline
from arriero.errors import ArrieroError
from arriero.v1 import orchestrator_pb2 as pb

HERE = Path(__file__).resolve().parent
QUESTIONS = (
    "What is Arriero?",
    "What is a gate?",
    "What happens when a job is killed?",
)
say = render.console.print


def main() -> int:
    """Run it; 0 when the run succeeded."""
    # Ended from outside, it still stops what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = Home.default()
    started_here = home.running() is None
    begun = time.monotonic()
    try:
        if started_here:
            with render.console.status("starting Arriero's services"):
                local.start_detached(home, tied=True)
        state = home.running() or {}
        say(f"Arriero runs at {state['address']}, metrics at {state['metrics']}\n", highlight=False)
        return demonstrate(begun)
    except ArrieroError as error:
        render.fail(error)
    except KeyboardInterrupt:
        say("\nStopped; the next `make demo` goes on from here.")
        return 130
    finally:
        if started_here:
            with render.console.status("stopping what was started"):
                local.stop(home)


def demonstrate(begun: float) -> int:
    """The run, the questions, and what to do next."""
    with Client() as client:
        run = watch.follow(client.watch_run(current(client).id))
        assert run is not None, "a watch yields at least once"
        if run.state != pb.RUN_STATE_SUCCEEDED:
            say(f"\n{run.error.message}\n", style="red", markup=False)
            say(f"Its logs: arriero runs logs {run.id}", highlight=False)
            return 1
        say()
        ask(client)
        say(render.summary(run))
        tuned = client.endpoints.get("faq", score=True)
        for replica in tuned.replicas:
            if replica.HasField("kl_divergence"):
                say(
                    f"\nThe replica that answers is the model that was trained: KL divergence "
                    f"{replica.kl_divergence:.4f} nats per token, same top token at "
                    f"{replica.top1_agreement:.1%} of positions.",
                    highlight=False,
                )
                break
    say(f"Done in {render.seconds(time.monotonic() - begun)}.", highlight=False)
    say(
        Panel.fit(
            "source .venv/bin/activate\n"
            "arriero up --detach\n"
            'arriero chat faq "What are golden logits?"\n'
            "arriero endpoints get faq\n"
            "arriero artifacts lineage gguf/faq:latest\n"
            "arriero down",
            title="what to type next",
            title_align="left",
        )
    )
    return 0


def current(client: Client) -> pb.Run:
    """The demo's run that is under way, else a new one."""
    for run in client.list_runs(20):
        if run.pipeline.name == "faq" and run.state in (
            pb.RUN_STATE_RUNNING,
            pb.RUN_STATE_PENDING,
        ):
            return run
    return client.create_run(load_pipeline(HERE / "pipeline.yaml"))


def ask(client: Client) -> None:
    """The same questions to both models, greedily."""
    answers = Table(show_lines=True, title="The same questions, before and after")
    answers.add_column("question", ratio=1)
    answers.add_column("SmolLM2-135M-Instruct", ratio=2, style="dim")
    answers.add_column("fine-tuned on this machine", ratio=2)
    with render.console.status("asking both models"):
        for question in QUESTIONS:
            said = [
                "".join(client.endpoint(name).chat(question, max_tokens=60, temperature=0))
                for name in ("faq-base", "faq")
            ]
            answers.add_row(question, *(text.strip() for text in said))
    say(answers)
    say()


if __name__ == "__main__":
    sys.exit(main())
