"""Options are defined once: the arguments, argparse and the command line agree on them."""

import pickle
import subprocess
import sys
from dataclasses import fields

import pytest
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.methods import METHODS, ZEROTH_ORDER
from pseuzo.train.options import NOISES, OPTIONS, ROUNDINGS, ZeroOrderOptions
from transformers import HfArgumentParser

import pseuzo_kernels


def test_nothing_heavy_is_imported():
    code = "import sys, pseuzo.train.options; print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_every_option_of_a_method_is_a_field():
    names = {f.name for f in fields(ZeroOrderOptions)}
    assert names == set(OPTIONS)
    assert {option for method in METHODS.values() for option in method.options} <= names
    assert {key for option in OPTIONS.values() for key in option.applies_to} <= names


def test_where_options_apply():
    applies = {name: option.applies_to for name, option in OPTIONS.items()}
    assert applies["noise"] == applies["journal"] == {"method": ZEROTH_ORDER}
    with_eps = tuple(name for name in ZEROTH_ORDER if name != "forward-gradient")
    assert applies["eps"] == {"method": with_eps}
    assert applies["window"] == {"method": ("pseuzo", "mezo-momentum", "zo-adam")}
    assert applies["momentum"] == {"method": ("pseuzo", "mezo-momentum", "fo-sgd")}
    assert applies["head_lr"] == {"method": ("pseuzo",), "head": ("exact",)}
    assert applies["clip_examples"] == applies["method"] == {}


def test_choices_are_those_of_the_kernels():
    """The choices are written twice, since the kernels' package imports torch."""
    assert sorted(NOISES) == sorted(pseuzo_kernels.NOISES)
    assert sorted(ROUNDINGS) == sorted(pseuzo_kernels.ROUNDINGS)


def test_hf_argument_parser_reads_them(tmp_path):
    given = ["--output_dir", str(tmp_path), "--report_to", "none", "--two_sided", "true"]
    given += [*"--noise_on attention-out v_proj --eps 1e-2 --method mezo-momentum".split()]
    (args,) = HfArgumentParser(PseuZOTrainingArguments).parse_args_into_dataclasses(given)
    assert args.noise_on == ["attention-out", "v_proj"] and args.eps == 1e-2 and args.two_sided
    assert args.momentum == 0.9 and args.learning_rate == 1e-6
    assert pickle.loads(pickle.dumps(args)) == args
    assert args.to_dict()["noise_on"] == ["attention-out", "v_proj"]


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("eps", 0, "eps must be positive, got 0"),
        ("window", 0, "window must be at least 1, got 0"),
        ("momentum", 1.5, "momentum must be at most 1, got 1.5"),
        ("noise", "white", "one of hadamard,"),
        ("head_lr", float("nan"), "head_lr must be positive, got nan"),
        ("head", None, "one of frozen"),
    ],
)
def test_values_out_of_range(tmp_path, name, value, words):
    with pytest.raises(ValueError, match=words):
        PseuZOTrainingArguments(output_dir=str(tmp_path), report_to="none", **{name: value})
