"""A replay restores the weights of whole runs of the command line."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_families import EPS, EPS32, arguments, replay, same, train
from helpers import assert_same_weights, pseuzo, weights
from pseuzo.train.journal_file import read_journal

import pseuzo_kernels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def test_replay_until_a_step_is_the_run_up_to_it(tmp_path, folder, task):
    base, out, journal = folder("qwen2"), tmp_path / "run", tmp_path / "run.pzj"
    args = ["--dtype", "bf16", "--weight-decay", 0.1, "--lr", 3e-3]
    train(base, task(), out, *args, "--save-every", 2, "--journal", journal, steps=6)
    train(base, task(), tmp_path / "short", *args, steps=3)

    def replayed(until: int, steps: int) -> Path:
        target = tmp_path / f"until-{until}"
        text = pseuzo(*replay(base, journal, target, "--until", until))
        assert f"{steps} steps replayed, up to step {steps}" in text
        return target

    untouched = {name: p.to(torch.bfloat16) for name, p in weights(base).items()}
    assert same(weights(replayed(0, 0)), untouched)
    assert_same_weights(replayed(3, 3), tmp_path / "short" / "model")
    assert_same_weights(replayed(4, 4), out / "checkpoint-4")
    assert_same_weights(replayed(99, 6), out / "model")
    assert not same(weights(tmp_path / "until-3"), weights(tmp_path / "until-4"))


def test_the_best_step_is_replayed_as_the_run_says(tmp_path, folder, task):
    base, out, journal = folder("opt"), tmp_path / "run", tmp_path / "run.pzj"
    results = train(
        base,
        task(),
        out,
        *"--lr 1e-2 --keep best --eval-every 1 --save-every 1".split(),
        "--journal",
        journal,
        steps=6,
    )
    best = results["best_step"]
    accuracies = [
        row["eval_accuracy"]
        for row in results["history"]
        if row.get("step") and "eval_accuracy" in row
    ]
    assert best == 1 + accuracies.index(max(accuracies))
    assert (f"pseuzo replay --until {best} makes it" in results["text"]) == (best < 6)
    pseuzo(*replay(base, journal, tmp_path / "best", "--until", best))
    assert_same_weights(tmp_path / "best", out / "model")


@pytest.mark.parametrize("method", ["pseuzo", "mezo"])
def test_every_noise_trains_and_replays(tmp_path, folder, task, method):
    base = folder("gpt2")
    found = []
    for noise in ("hadamard", "rademacher", "normal"):
        out, journal = tmp_path / noise, tmp_path / f"{noise}.pzj"
        train(
            base,
            task(),
            out,
            "--method",
            method,
            "--noise",
            noise,
            "--dtype",
            "bf16",
            "--lr",
            "1e-2",
            "--weight-decay",
            0.1,
            "--journal",
            journal,
        )
        assert read_journal(journal)[0]["noise"] == noise
        pseuzo(*replay(base, journal, tmp_path / "replayed" / noise))
        assert_same_weights(out / "model", tmp_path / "replayed" / noise)
        found.append(weights(out / "model"))
    hadamard, rademacher, normal = found
    assert (
        not same(hadamard, rademacher)
        and not same(hadamard, normal)
        and not same(rademacher, normal)
    )


ELSEWHERE = """
import json, sys
sys.modules["pseuzo_kernels._C"] = None  # as where it was not built
import torch
from pseuzo.cli.commands import main
import pseuzo_kernels

ops = sys.modules["pseuzo_kernels.ops"]  # the package has a function of that name
def native():
    return torch._C._dispatch_has_kernel_for_dispatch_key("pseuzo::add_noise_steps_", "CPU")
assert pseuzo_kernels._C is None
for backend, args in json.loads(sys.argv[1]):
    # From here on Triton runs in its interpreter, on tensors of the CPU.
    if backend == "triton" and not native():
        from pseuzo_kernels.triton import launch

        ops.lib.impl("add_noise_steps_", launch.add_noise_steps_triton_, "CPU")
    assert native() == (backend == "triton")
    main(args, standalone_mode=False)
"""


@pytest.mark.skipif(
    pseuzo_kernels._C is None,
    reason="_C is not built: PSEUZO_BUILD=cpu pip install --no-build-isolation -e .",
)
def test_a_run_is_replayed_by_another_backend(tmp_path, folder, task):
    """C++ is compared with plain torch in both directions, and with Triton in its interpreter. The
    interpreter is slow, so it gets few weights."""
    base, rademacher = folder("llama"), ["--noise", "rademacher"]
    few = [
        x
        for name in ("self_attn.v_proj", "post_attention_layernorm")
        for x in ("--noise-on", f"*1.{name}.weight")
    ]
    ways = {
        "hadamard": ["--dtype", "bf16"],
        "rademacher": ["--dtype", "bf16", *rademacher],
        "normal": ["--noise", "normal"],
        "triton": ["--dtype", "bf16", *few],
        "torch": ["--dtype", "bf16", "--lr-scheduler", "linear"],
    }

    def run(name: str) -> list[str]:
        return [
            "--eps",
            str(EPS),
            *"--lr 1e-2 --weight-decay 0.1 --window 2 --momentum 0.7".split(),
            *ways[name],
            "--journal",
            str(journal(name)),
        ]

    def journal(name: str) -> Path:
        return tmp_path / f"{name}.pzj"

    def replayed(name: str) -> Path:
        return tmp_path / "replayed" / name

    by_cpp = ["hadamard", "rademacher", "normal", *(["triton"] if find_spec("triton") else [])]
    for name in by_cpp:
        train(base, task(), tmp_path / name, *run(name))
    jobs = [("torch", arguments(base, task(), tmp_path / "torch", *run("torch")))]
    jobs += [
        ("triton" if n == "triton" else "torch", replay(base, journal(n), replayed(n)))
        for n in by_cpp
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(jobs)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pseuzo(*replay(base, journal("torch"), replayed("torch")))

    for name in {*by_cpp, "torch"} - {"normal"}:
        assert_same_weights(tmp_path / name / "model", replayed(name))
        assert [len(record.seeds) for record in read_journal(journal(name))[1]] == [1, 2, 2]
        assert not same(
            weights(tmp_path / name / "model"), {n: p.bfloat16() for n, p in weights(base).items()}
        )
    # Normal noise does not have the same bits. |z| < 8, so 4 ulps of z are at most 2e-6, and a sum
    # of K terms is rounded K + 2 times.
    records = list(read_journal(journal("normal"))[1])
    noise = sum(record.groups[0][0] * float(record.coefs.abs().sum()) for record in records)
    got, want = weights(replayed("normal")), weights(tmp_path / "normal" / "model")
    largest = max(float(p.abs().max()) for p in want.values())
    for name, p in want.items():
        torch.testing.assert_close(
            got[name], p, rtol=0, atol=2e-6 * noise + len(records) * 4 * EPS32 * largest
        )
    assert not same(want, weights(base))
