"""Tables that the commands print."""

from pathlib import Path


def print_comparison(summary: dict, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from pseuzo.cli.compare import cells, columns

    table = Table(
        title=f"{summary['forwards']} forward passes, {summary['seeds']} seed(s), "
        f"{summary['hardware']}"
    )
    for column in columns(summary):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for title, row in summary["methods"].items():
        table.add_row(*cells(title, row))
    console = Console()
    console.print(table)
    console.print(
        f"Table: {output}/table.md. Curves: {output}/compare.png.", highlight=False, soft_wrap=True
    )


def print_demo(summary: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['steps']} steps of 2 forward passes, batch {summary['batch_size']}, "
        f"{summary['hardware']}"
    )
    for column in ("method", "test before", "test after", "steps/s", "peak memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for figures in summary["methods"].values():
        table.add_row(
            figures["title"],
            f"{figures['test_accuracy_before']:.3f}",
            f"{figures['test_accuracy_after']:.3f}",
            f"{figures['steps_per_s']:.1f}",
            f"{figures['peak_memory_mib']:.0f} MiB",
        )
    console = Console()
    console.print(table)
    console.print(
        f"Best on the validation lines: {summary['saved_model']}, saved in {out}/model. "
        f"Curves: {out}/curves.png. Figures: {out}/summary.json, {out}/metrics.jsonl",
        highlight=False,
        soft_wrap=True,
    )
