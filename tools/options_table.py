"""Print the options of `pseuzo train` as a Markdown table: python tools/options_table.py"""

import click
from pseuzo.cli.commands import train, train_defaults
from pseuzo.cli.options import APPLIES_TO


def table() -> str:
    defaults = train_defaults()
    rows = ["| Option | Default | What it does | Applies to |", "|---|---|---|---|"]
    for p in train.params:
        if isinstance(p, click.Option):
            applies = "; ".join(
                f"{decides} {', '.join(values)}"
                for decides, values in APPLIES_TO.get(p.name, {}).items()
            )
            flag = "/".join((*p.opts[:1], *p.secondary_opts))
            cells = (
                f"`{flag}`",
                _default(p, defaults.get(p.name)),
                (p.help or "").replace("|", "\\|"),
                applies,
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _default(p: click.Option, value: object) -> str:
    if p.required:
        return "required"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    if value is None or value is False:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(table())
