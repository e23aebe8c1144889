"""Tables that the commands print."""

from pathlib import Path

BRIEF = (0, 3, 4, 5, 8, 9)  # the columns of a comparison that fit on a screen


def print_comparison(summary: dict, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from pseuzo.compare.report import overall_rows, rows_of

    console = Console()
    tables = {
        f"{task}: {of['forwards']} forward passes, {summary['seeds']} seeds": [
            [row[column] for column in BRIEF] for row in rows_of(of)
        ]
        for task, of in summary["tasks"].items()
    }
    if len(tables) > 1:
        tables["Differences from MeZO"] = overall_rows(summary)
    for title, (head, *rows) in tables.items():
        table = Table(title=title)
        for column in head:
            left = column in ("method", "")
            table.add_column(column, justify="left" if left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        f"Table, with what was tuned: {output}/table.md. Plots: {output}/*.png. Every run: "
        f"{output}/ledger.jsonl.",
        highlight=False,
        soft_wrap=True,
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
