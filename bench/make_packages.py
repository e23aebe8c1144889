"""Makes a second task for the demo's model of the demo's lines: which package is a line from?

python bench/make_packages.py [OUT]      # real/packages by default, as examples/packages.yaml has

The lines of three packages of the Python standard library, in the splits of the demo: 227 for
training, 76 for validation, 329 of other files for testing.
"""

import json
import sys
from importlib import resources
from pathlib import Path

from pseuzo.files import write_atomically

PACKAGES = ("distutils", "asyncio", "email")
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def main() -> None:
    out = (
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "real" / "packages"
    )
    assets = resources.files("pseuzo.demo") / "assets"
    out.mkdir(parents=True, exist_ok=True)
    for split, name in SPLITS.items():
        rows = map(json.loads, (assets / f"{split}.jsonl").read_text().splitlines())
        mine = [
            {"text": row["text"], "package": row["file"].split("/")[0]}
            for row in rows
            if row["file"].split("/")[0] in PACKAGES
        ]
        write_atomically(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in mine))
        print(f"{out / name}.jsonl: {len(mine)} lines")


if __name__ == "__main__":
    main()
