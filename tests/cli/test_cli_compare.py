"""compare and plot refuse bad arguments, and print their results."""

import json
import math

import pytest
from cli_refusals import BASE, refused
from pseuzo.cli.plots import curve

pytestmark = pytest.mark.slow


BAD_METHODS = {
    "mezo:lr=fast": "lr: 'fast' is neither",
    "mezo:lr=[1": "lr: '[1' is neither",
    "mezo:eps=-1": "eps: -1.0 is not in the range",
    "mezo:steps=5": "steps is not a method's own",
    "mezo:output=x": "output is not a method's own",
    "mezo:resume=true": "resume is not a method's own",
    "mezo:config=x": "is not KEY=VALUE",
    "mezo:method=pseuzo": "method is not a method's own",
    "mezo:lr": "is not KEY=VALUE",
    "mezo:lr=": "is not KEY=VALUE",
    "mezo:groups=row": "--groups is for pseuzo, not for mezo",
    "mezo:dev_size=5": "dev_size is not a method's own; it belongs to the task",
    "adam": "is not a method",
}


@pytest.mark.parametrize("text", BAD_METHODS)
def test_compare_refuses(tmp_path, compared, text):
    sentence = refused(
        "compare", *BASE, "--methods", "fo-sgd", "--methods", text, "--output", tmp_path / "out"
    )
    assert BAD_METHODS[text] in sentence and not compared and not (tmp_path / "out").exists()


def test_compare_reads_values_and_gives_each_method_its_options(tmp_path, compared):
    titles = [
        "mezo:lr=4e-4,noise_on=v_proj+out_proj=2,two-sided=false",
        "pseuzo:groups=none",
        "fo-adam",
    ]
    methods = [word for title in titles for word in ("--methods", title)]
    sentence = refused(
        "compare", *BASE, *methods, "--window", 5, "--eps", "1e-2", "--output", tmp_path / "out"
    )
    assert sentence == "far enough"
    mezo, pseuzo, adam = (compared[title] for title in titles)
    assert (
        mezo["lr"] == 4e-4
        and list(mezo["noise_on"]) == ["v_proj", "out_proj=2"]
        and mezo["two_sided"] is False
    )
    assert (mezo["window"], pseuzo["window"], adam["window"]) == (14, 5, 14)
    assert (mezo["eps"], pseuzo["eps"], adam["eps"]) == (1e-2, 1e-2, None)
    assert pseuzo["groups"] == "none" and pseuzo["lr"] is adam["lr"] is None
    # eps is given to all, so a MeZO whose eps is tuned is added.
    assert compared["mezo"]["eps"] is compared["mezo"]["lr"] is None
    assert "--directions is for mezo" in refused(
        "compare",
        *BASE,
        *"--methods fo-sgd --methods pseuzo --directions 2".split(),
        "--output",
        tmp_path / "out",
    )


def test_compare_refuses_capture_without_a_gpu_before_its_folder_is_made(tmp_path, compared):
    args = (
        "--device",
        "cpu",
        "--methods",
        "fo-sgd",
        "--methods",
        "mezo",
        "--capture",
        "--output",
        tmp_path / "out",
    )
    assert "mezo: --capture: capture needs a CUDA GPU" in refused("compare", *BASE, *args)
    assert not compared and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "results",
    [
        [],
        5,
        {"history": 5, "metric": "f1"},
        {"history": [5], "metric": "f1"},
        {"history": [], "metric": []},
        {"history": [{"step": 1, "forwards": 2, "loss": "low"}], "metric": "f1"},
    ],
)
def test_plot_of_what_is_no_run(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "is not the folder of a finished run" in refused(
        "plot", tmp_path, "--output", tmp_path / "x.png"
    )
    assert not (tmp_path / "x.png").exists()


def test_a_curve_has_the_last_row_of_each_step():
    names = "step", "forwards", "train_seconds", "eval_f1"
    rows = (
        (0, 0, 0.0, 0.3),
        (5, 10, 2.0, 9.0),
        (7, 14, 3.5, 9.0),
        (5, 10, 3.0, 0.4),
        (10, 20, 4.0, None),
    )
    run = {"history": [dict(zip(names, row, strict=True)) for row in rows]}  # resumed after step 0
    run["history"].append({"step": 10, "forwards": 20, "loss": 0.7})  # of the training, in the log
    xs, ys = curve(run, "train_seconds", "eval_f1")
    assert xs == [0.0, 3.0, 3.5, 4.0] and ys[:3] == [0.3, 0.4, 9.0] and math.isnan(ys[3])
    assert curve(run, "forwards", "loss") == ([20], [0.7])
    assert curve({"history": []}, "forwards", "eval_f1") == ([], [])
