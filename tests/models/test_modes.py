"""The table of tuning modes, and what derives from it."""

from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("opt-*.yaml")), ids=lambda file: file.stem)
def test_examples_are_options_of_the_command(file, tmp_path):
    from pseuzo.cli.commands import train

    given = train.make_context(
        "train", ["--config", str(file), "--output", str(tmp_path / "run")]
    ).params
    published = {"full": (1e-3, 1e-7), "lora": (1e-2, 5e-5), "prefix": (1e-1, 1e-3)}[given["mode"]]
    assert (given["eps"], given["lr"]) == published
    assert (
        given["window"] == 14
        and given["schedule"] == "cyclic-hyperbola"
        and given["groups"] == "row"
    )
    assert given["batch_size"] == 16 and given["steps"] == 10_000 and given["dtype"] == "fp16"
    assert set(yaml.safe_load(file.read_text())) <= set(given)
