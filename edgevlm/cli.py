"""The command line: verbs to stages, no logic. Tables and bars for people; `--json` on stdout for programs."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgevlm import __version__
from edgevlm.errors import EdgeVLMError, GateFailed

# OpenMP's threads spin while they wait by default. Beside any other busy process that made training 2.3 times slower
# (two threads, two cores, one of them busy) and nothing faster. Read when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Vision-language models from a training GPU to phones, Jetsons and PCs, in one flow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at datasets before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
compare_app = typer.Typer(help="Set ways of doing a step side by side.", no_args_is_help=True)
app.add_typer(compare_app, name="compare")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe (see `edgevlm recipes`) or a .yaml file.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run that `edgevlm run` or `train` has made.")]
BundleFolder = Annotated[Path, typer.Argument(help="Folder of an exported bundle.")]
Out = Annotated[Path | None, typer.Option(help="Output folder.")]
Data = Annotated[str | None, typer.Option(help="Folder of the dataset; wins over the recipe's data.path.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: --set teacher.steps=500")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.callback()
def _global(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks and library chatter.")] = False,
) -> None:
    from edgevlm.quiet import hush

    if not verbose:
        hush()


@app.command()
def run(
    recipe: RecipeName,
    out: Out = None,
    data: Data = None,
    overrides: Set = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    target_ms: Annotated[float | None, typer.Option(help="Prune extractor and fusion until both take so long.")] = None,
    target: Annotated[str | None, typer.Option(help="Of --target-ms: where it is measured; default: onnx.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of --target-ms: in which precision; default: fp32.")] = None,
) -> None:
    """Train, distil, prune, trim, export, verify, bench and score: one command, resumable."""
    from edgevlm.recipes import load_recipe, time_budget

    overrides = [*time_budget(target_ms, target, precision), *(overrides or ())]
    loaded = load_recipe(recipe, overrides)  # a typo is found before torch is even loaded
    from edgevlm.pipeline import run as run_stages
    from edgevlm.progress import ConsoleReporter
    from edgevlm.stages import check, show_scorecard, stages_of

    check(loaded, data)
    folder = out or Path("runs") / loaded.name
    folders = run_stages(stages_of(loaded), loaded, folder, data_path=data, until=until, reporter=ConsoleReporter())
    if "scorecard" in folders:
        show_scorecard(folders["scorecard"], folders["export"], console)


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="A shipped recipe (see `edgevlm recipes`) or a .yaml file.")],
    out: Out = None,
    data: Data = None,
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and count, train nothing.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="With --dry-run: plan for so many processes.")] = None,
    as_json: Json = False,
) -> None:
    """Train: the stages of `run` up to the trained model, resumable; `--dry-run` says what that would take."""
    from edgevlm.processes import is_main, world_size
    from edgevlm.recipes import load_recipe

    loaded = load_recipe(recipe, overrides)
    from edgevlm.stages import check_training, last_training, stages_of

    check_training(loaded, data)
    if dry_run:
        from edgevlm import dryrun

        if is_main():
            plan = dryrun.examine(loaded, data, processes or world_size())
            if as_json:
                print(json.dumps(dryrun.as_dict(plan)))
            else:
                dryrun.render(plan, console)
        return
    from edgevlm.pipeline import run as run_stages
    from edgevlm.progress import ConsoleReporter

    folder = out or Path("runs") / loaded.name
    last = last_training(loaded)
    folders = run_stages(stages_of(loaded), loaded, folder, data_path=data, until=last, reporter=ConsoleReporter())
    if is_main():
        console.print(f"Trained: {folders[last]}")


@app.command()
def prune(
    run: RunFolder,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="--set prune.sparsity=0.6")] = None,
    target_ms: Annotated[float | None, typer.Option(help="Prune extractor and fusion until both take so long.")] = None,
    target: Annotated[str | None, typer.Option(help="Of --target-ms: where it is measured; default: onnx.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of --target-ms: in which precision; default: fp32.")] = None,
    data: Data = None,
) -> None:
    """Prune the distilled student of a run, again or with other settings; resumable."""
    from edgevlm.recipes import time_budget

    _redo(run, "prune", [*time_budget(target_ms, target, precision), *(overrides or ())], data)


@app.command()
def trim(
    run: RunFolder,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="--set trim.rungs=3")] = None,
    data: Data = None,
) -> None:
    """Trim the pruned student of a run, again or with other settings; resumable."""
    _redo(run, "trim", overrides or (), data)


def _redo(run: Path, stage: str, overrides: Sequence[str], data: str | None) -> None:
    from edgevlm.commands import redo
    from edgevlm.progress import ConsoleReporter

    folder = redo(run, stage, overrides, data, ConsoleReporter())
    console.print(f"Next: edgevlm export {folder} --out BUNDLE [--calibration {run / 'calibrate'}]")


@app.command()
def launch_config(
    name: Annotated[str, typer.Argument(help="ddp: every GPU has the whole model. fsdp: they share its weights.")],
) -> None:
    """Print the path of a shipped config for `accelerate launch --config_file`."""
    from edgevlm.errors import RecipeError, nearest

    folder = Path(__file__).parent / "launch"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise RecipeError(f"No launch config '{name}'", f"{nearest(name, names)} Shipped: {', '.join(names)}".strip())
    print(folder / f"{name}.yaml")


@app.command()
def recipes() -> None:
    """List the recipes that ship with the package."""
    from edgevlm.recipes import load_recipe, shipped_recipes

    for name in shipped_recipes():
        loaded = load_recipe(name)
        console.print(f"[bold]{name}[/]  {loaded.task} on {loaded.data.dataset}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a trained checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    calibration: Annotated[Path | None, typer.Option(help="Frozen calibration set; needed for int8.")] = None,
    governor: Annotated[Path | None, typer.Option(help="Folder of the stage govern; default: no governor.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all of the recipe.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all of the recipe.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint into a bundle."""
    from edgevlm.commands import export_checkpoint
    from edgevlm.progress import ConsoleReporter

    export_checkpoint(checkpoint, out, calibration, target, precision, overwrite, ConsoleReporter(), governor)
    console.print(f"Next: edgevlm verify {out} --checkpoint {checkpoint}")


@app.command()
def verify(
    bundle: BundleFolder,
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint the bundle was exported from.")],
    out: Annotated[Path, typer.Option(help="Folder of the parity report.")] = Path("parity"),
    data: Data = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prove that every exported file still gives PyTorch's answers; exits 2 if one does not."""
    from edgevlm.commands import verify_folder
    from edgevlm.progress import ConsoleReporter

    report = verify_folder(bundle, checkpoint, out, data, overwrite, ConsoleReporter())
    if as_json:
        print(report.model_dump_json(indent=1))
    else:
        from edgevlm.report.terminal import print_parity

        print_parity(report, console)
    failed = [row for row in report.rows if row.verdict == "failed"]
    if failed:
        raise GateFailed(f"{len(failed)} of {len(report.rows)} rows failed parity", f"Read the reasons in {out}")


@app.command()
def bench(
    bundle: BundleFolder,
    checkpoint: Annotated[Path | None, typer.Option(help="Adds PyTorch's own latency as the baseline.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the latency report.")] = Path("latency"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed repetitions per program.")] = 50,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure load, first and warm latency and memory of every exported file on this machine."""
    from edgevlm.commands import bench_folder
    from edgevlm.progress import ConsoleReporter

    report = bench_folder(bundle, checkpoint, out, threads, runs, overwrite, ConsoleReporter())
    if as_json:
        print(report.model_dump_json(indent=1))
    else:
        from edgevlm.report.terminal import print_latency

        print_latency(report, console)


@app.command()
def ask(
    bundle: BundleFolder,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question or sentence about it.")],
    target: Annotated[str | None, typer.Option(help="Runtime to use; default: the first that is installed.")] = None,
    precision: Annotated[str | None, typer.Option()] = None,
    rung: Annotated[str | None, typer.Option(help="Token budget; default: the full one.")] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Start low, climb while the answer is unsure.")] = False,
    max_ms: Annotated[
        float | None, typer.Option(help="The largest rung that answers in time; needs --latency.")
    ] = None,
    latency: Annotated[Path | None, typer.Option(help="Of --max-ms: what `edgevlm bench` measured here.")] = None,
    draw: Annotated[Path | None, typer.Option(help="Write a PNG with the regions it looked at.")] = None,
    as_json: Json = False,
) -> None:
    """Answer a question about an image from an exported file."""
    from dataclasses import asdict

    from edgevlm.ask import ask as ask_bundle
    from edgevlm.ask import course
    from edgevlm.ask import draw as draw_reply

    reply = ask_bundle(
        bundle,
        image,
        question,
        target=target,
        precision=precision,
        rung=rung,
        adaptive=adaptive,
        max_ms=max_ms,
        latency=latency,
    )
    if draw is not None:
        draw_reply(image, reply, draw)
    if as_json:
        print(json.dumps(asdict(reply)))
        return
    console.print(f"[bold]{reply.answer}[/]  ({reply.probability:.0%})")
    others = ", ".join(f"{answer} {probability:.0%}" for answer, probability in reply.runners_up)
    console.print(f"[dim]then {others}; {reply.target} {reply.precision}, rung {reply.rung}[/]")
    for line in course(reply):
        console.print(f"[dim]{line}[/]")
    if draw is not None:
        console.print(f"[dim]{len(reply.regions)} regions drawn into {draw}[/]")


@app.command()
def inspect(
    network: Annotated[str, typer.Argument(help="An extractor or fusion by name, or a checkpoint folder.")],
    size: Annotated[str, typer.Option(help="Input of an extractor, pixels: 512, or rows x columns.")] = "512",
    classes: Annotated[int | None, typer.Option(min=1, help="Object classes; default: MiniVLM's 1591.")] = None,
    attributes: Annotated[int | None, typer.Option(min=0, help="Attributes; default: MiniVLM's 524.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a network costs: parameters and multiply-adds by part, counted and by formula."""
    from edgevlm.report import inspection

    parts = inspection.parts_of(network, size, classes, attributes)
    if as_json:
        print(json.dumps(inspection.as_dict(network, parts)))
    else:
        inspection.print_parts(network, parts, console)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what can be verified on this machine, and what is missing."""
    from edgevlm import doctor as examine

    findings = examine.collect()
    if as_json:
        print(json.dumps(examine.as_dict(findings)))
    else:
        examine.render(findings, console)


@data_app.command("check")
def check_data(
    dataset: Annotated[str, typer.Argument(help="A recipe, or a folder or .jsonl file (or URL) of your own data.")],
    data: Data = None,
    split: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Read every record without training; say what is wrong, with file and line; exits 1 if anything is."""
    from edgevlm.data import check as checking
    from edgevlm.progress import ConsoleReporter

    report = checking.check(dataset, data, split, overrides, ConsoleReporter())
    if as_json:
        print(json.dumps(checking.as_dict(report)))
    else:
        checking.render(report, console)
    if not report.ok:
        raise typer.Exit(1)


@compare_app.command("prune")
def compare_prune(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run (up to `distil` at least).")],
    keep: Annotated[list[float] | None, typer.Option(help="Share to keep, 0..1; repeat for several.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other draws.")] = 3,
    target: Annotated[list[str] | None, typer.Option(help="Where latency is measured; default: onnx.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="In which precision; default: fp32.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="For all ways: --set prune.steps=500")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Prune a run's student in our way and by the baselines, at equal budgets; resumable."""
    from dataclasses import asdict

    from edgevlm.compare import prune as compare
    from edgevlm.progress import ConsoleReporter

    settings = {"ways": way, "keeps": keep, "targets": target, "precisions": precision, "overrides": overrides}
    chosen = {name: tuple(values) for name, values in settings.items() if values}
    found = compare.compare_prune(run, seeds=seeds, data_path=data, reporter=ConsoleReporter(), **chosen)  # pyright: ignore
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        compare.print_comparison(found, console)
        console.print(f"[dim]also {run / 'compare' / 'prune.md'} and prune.png[/]")


@compare_app.command("trim")
def compare_trim(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run (up to `prune` at least).")],
    way: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    rungs: Annotated[int, typer.Option(min=2, help="Of each ladder, the full one among them.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other draws.")] = 3,
    target: Annotated[list[str] | None, typer.Option(help="Where latency is measured; default: onnx.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="In which precision; default: fp32.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="For all ways: --set trim.steps=500")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Trim a run's pruned student by learned trimmers and by the baselines, each with its own ladder; resumable."""
    from dataclasses import asdict

    from edgevlm.compare import trim as compare
    from edgevlm.progress import ConsoleReporter

    settings = {"ways": way, "targets": target, "precisions": precision, "overrides": overrides}
    chosen = {name: tuple(values) for name, values in settings.items() if values}
    shared = {"rungs": rungs, "seeds": seeds, "data_path": data, "reporter": ConsoleReporter()}
    found = compare.compare_trim(run, **shared, **chosen)  # pyright: ignore
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        compare.print_comparison(found, console)
        console.print(f"[dim]also {run / 'compare-trim' / 'trim.md'} and trim.png[/]")


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


def main() -> None:
    """Entry point: errors become one line and an exit code; a traceback appears only with -v."""
    try:
        app()
    except EdgeVLMError as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        from edgevlm.processes import rank, world_size

        where = f" (process {rank()})" if world_size() > 1 else ""
        errors.print(f"[bold red]error{where}:[/] {error}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()
