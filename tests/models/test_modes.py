"""The table of tuning modes defines all that the package knows of a mode."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from pseuzo.cli.commands import train_defaults
from pseuzo.cli.settings import check_combination
from pseuzo.models.modes import MODES, Mode, ModeOption, by_mode, mode_options, tune
from pseuzo.train.methods import METHODS, default_rate
from tiny_models import causal_lm
from tuned_models import trained

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


def test_defaults_of_the_modes():
    assert by_mode("eps") == {
        "full": 1e-3,
        "lora": 1e-2,
        "prefix": 1e-1,
        "prompt": 1e-2,
        "head": 1e-3,
        "scales": 3e-4,
    }
    zeroth_order = {"full": 1e-7, "lora": 5e-5, "prefix": 1e-3, "prompt": 1e-3, "head": 1e-4}
    sgd = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-1, "prompt": 1e-1, "head": 1e-2}
    adam = {"full": 1e-5, "lora": 1e-4, "prefix": 1e-3, "prompt": 1e-3, "head": 1e-4}
    rates = dict.fromkeys(("pseuzo", "mezo", "mezo-momentum"), zeroth_order | {"scales": 1e-8}) | {
        "fo-sgd": sgd | {"scales": 1e-4},
        "fo-adam": adam | {"scales": 3e-6},
    }
    for method, by_name in rates.items():
        assert {mode: default_rate(method, mode) for mode in MODES} == by_name
    assert set(rates) <= set(METHODS)


def tune_bias(model, *, seed, bias_layers):
    """Train the biases of the first layers alone."""
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith(".bias") and any(f".layers.{i}." in name for i in range(bias_layers)):
            p.requires_grad_(True)
    return model


def test_a_mode_is_a_row_and_a_function(monkeypatch):
    row = Mode(
        help="biases of the first layers",
        function=f"{__name__}.tune_bias",
        eps=1e-2,
        lr=1e-4,
        sgd_lr=1e-2,
        adam_lr=1e-3,
        options=(ModeOption("bias_layers", 1, "Number of layers.", least=1),),
    )
    monkeypatch.setitem(MODES, "bias", row)
    names = trained(tune(causal_lm("opt"), "bias"))
    assert names and all(".layers.0." in n and n.endswith(".bias") for n in names)
    assert len(trained(tune(causal_lm("opt"), "bias", bias_layers=2))) == 2 * len(names)
    assert mode_options()["bias_layers"] == (row.options[0], ("bias",))
    with pytest.raises(
        ValueError, match="one of full, lora, prefix, prompt, head, scales, bias, got"
    ):
        tune(causal_lm("opt"), "biases")


@pytest.mark.parametrize("mode", MODES)
def test_a_row_says_which_dtype_is_trained(mode):
    """fo-adam refuses fp16 weights of the modes that train in the dtype of the model."""
    model = tune(causal_lm("opt").half(), mode)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float16 if MODES[mode].model_dtype else torch.float32}
    settings = train_defaults() | {"method": "fo-adam", "dtype": "fp16", "mode": mode}
    with pytest.raises(ValueError, match="fo-adam") if MODES[mode].model_dtype else nullcontext():
        check_combination(settings)


def test_options_of_modes():
    """An option of another mode has no effect. An option that no mode has is an error."""
    names = trained(tune(causal_lm("opt"), "head", lora_r=0, prefix_tokens=0))
    assert names == {"lm_head.weight"}
    with pytest.raises(TypeError, match="no mode has an option lora_rank"):
        tune(causal_lm("opt"), "lora", lora_rank=4)
