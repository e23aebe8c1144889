"""compare and plot refuse bad arguments, and print their results."""

import json

import numpy as np
import pytest
from cli_refusals import BASE, refused
from pseuzo.cli.plots import mean_and_spread

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


def test_means_are_over_the_same_steps():
    def run(*rows):
        return {
            "metric": "f1",
            "history": [
                dict(zip(("step", "forwards", "train_seconds", "eval_f1"), r, strict=True))
                for r in rows
            ],
        }

    a = run((0, 0, 0.0, 0.1), (5, 10, 1.0, 0.2), (10, 20, 2.0, 0.6))
    b = run(
        (0, 0, 0.0, 0.3),
        (5, 10, 2.0, 9.0),
        (5, 10, 3.0, 0.4),
        (7, 14, 3.5, 9.0),
        (10, 20, 4.0, None),
    )
    xs, means, spread = mean_and_spread([a, b], "train_seconds", "eval_f1")  # b was resumed at 5
    np.testing.assert_allclose(xs, [0, 2, 3])
    np.testing.assert_allclose(means, [0.2, 0.3, np.nan])
    np.testing.assert_allclose(spread[:2], np.sqrt(0.02) * np.ones(2))
    assert [len(part) for part in mean_and_spread([a, run()], "forwards", "eval_f1")] == [0, 0, 0]
    assert mean_and_spread([b], "forwards", "eval_f1")[0].tolist() == [0, 10, 14, 20]
