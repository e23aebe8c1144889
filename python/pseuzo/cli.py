"""The command line: `pseuzo`, or `python -m pseuzo`."""

from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pseuzo")
def main() -> None:
    """Fine-tune language models by forward passes alone, in the memory of inference."""


@main.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="pseuzo-demo", show_default=True,
              help="Folder for summary.json, metrics.jsonl, curves.png and model/.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True,
              help="Steps of each method; a step is two forward passes.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the batches and of the perturbations.")
@click.option("--method", "methods", multiple=True, metavar="NAME",
              help="Only this method; may be given several times. Default: all four.")  # fmt: skip
@click.option("--device", default=None, help="cpu or cuda. Default: cuda where there is one.")
def demo(out: Path, steps: int, batch_size: int, seed: int, methods: tuple[str, ...], device: str | None) -> None:
    """Fine-tune an embedded OPT of a million parameters in about a minute.

    The question put to it: is this line of the Python standard library code or docstring prose? MeZO, PseuZO with rows
    paired as published and by label, and MeZO with noise on a tenth of the weights start from the same pretrained model
    and see the same batches. Prints what each reached.
    """
    import torch  # here, so that --help is quick

    from pseuzo.demo import run as demo_run

    known = [m.name for m in demo_run.METHODS]
    for name in methods:
        if name not in known:
            raise click.UsageError(f"unknown method {name!r}; known: {', '.join(known)}")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"{out} is a file, not a folder")
    summary = demo_run.run(out, list(methods) or known, steps, batch_size, seed, where)
    _print_demo(summary, out)


def _print_demo(summary: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['steps']} steps of 2 forward passes, batch {summary['batch_size']}, {summary['hardware']}"
    )
    for column in ("method", "test before", "test after", "steps/s", "peak memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for figures in summary["methods"].values():
        table.add_row(
            figures["title"], f"{figures['test_accuracy_before']:.3f}", f"{figures['test_accuracy_after']:.3f}",
            f"{figures['steps_per_s']:.1f}", f"{figures['peak_memory_mib']:.0f} MiB",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"Best on the validation lines: {summary['saved_model']}, saved in {out}/model. "
        f"Curves: {out}/curves.png. Figures: {out}/summary.json, {out}/metrics.jsonl",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
