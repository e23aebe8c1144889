"""python -m pseuzo_kernels.bench runs on torch alone, within its time, and its numbers follow from
its times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from pseuzo_kernels import ops
from pseuzo_kernels.bench import __main__ as command
from pseuzo_kernels.bench import limits
from pseuzo_kernels.bench.table import row_of, svg, table
from pseuzo_kernels.bench.timing import in_turn
from pseuzo_kernels.bench.ways import DIRECTIONS, EPS, LR, OURS, SMALL, coefs_of, torch_loop, ways

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
RUN = """
import sys
from pseuzo_kernels.bench.__main__ import main
main(sys.argv[1:])
print("imported", *sorted({"transformers", "pseuzo", "matplotlib", "numpy"} & set(sys.modules)))
"""


def test_a_run_writes_a_table_a_plot_and_a_line_of_json_for_each_row(tmp_path):
    files = ["--json", tmp_path / "rows.json", "--svg", tmp_path / "plot.svg"]
    options = ["--device", "cpu", "--size", "5000", "--seconds", "0.05", "--threads", "1"]
    command = [sys.executable, "-W", "ignore", "-c", RUN, *options, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert {"transformers", "pseuzo", "matplotlib"}.isdisjoint(lines[-1].split()[1:])
    assert torch.__version__ in lines[0] and "1 thread(s)" in lines[0]
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    found = {(row["dtype"], row["op"], row["impl"]) for row in rows}
    for dtype in ("float32", "bfloat16"):
        want = {(dtype, w.op, w.impl) for w in ways(getattr(torch, dtype), CPU)}
        assert want <= found
        want = {"copy", "noise", "perturb", "restore", "update, K = 1", "update, K = 14"}
        assert want <= {op for name, op, _ in found if name == dtype}
    for row in rows:
        assert row["n"] == 5000 and row["calls"] >= 1 and row["torch"] == torch.__version__
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert (row["pct_of_limit"] is not None) <= (row["impl"] == OURS)
        assert row["pct_of_copy"] == pytest.approx(100) or row["op"] != "copy"
        assert sum(line.startswith(row["op"] + " ") for line in lines) >= 2
    bars = ElementTree.parse(tmp_path / "plot.svg").iter("{http://www.w3.org/2000/svg}rect")
    assert len(list(bars)) == 1 + len(rows)  # and the background


def test_the_numbers_follow_from_the_times():
    given = dict(n=1000, itemsize=2, K=14, passes=2, copy_ms=0.5)
    row = row_of([9.0, 2.0, 3.0, 1.0, 2.0], **given, limit_ms=1.5)
    assert (row["ms_p20"], row["ms_p50"], row["ms_p80"], row["calls"]) == (1.0, 2.0, 3.0, 5)
    assert row["gb_per_s"] == pytest.approx(4000 / 2e-3 / 1e9)
    assert row["gnormals_per_s"] == pytest.approx(14_000 / 2e-3 / 1e9)
    assert (row["pct_of_copy"], row["pct_of_limit"]) == (25, 75)
    one_pass = row_of([0.25], **given | {"passes": 1})
    assert (one_pass["pct_of_copy"], one_pass["pct_of_limit"]) == (100, None)


def test_the_table_and_the_plot():
    def row(op, impl, ms):
        numbers = row_of([ms], n=10, itemsize=4, K=1, passes=2, copy_ms=2.0)
        return dict(op=op, impl=impl, dtype="float32", n=10) | numbers

    rows = [row("copy", "torch copy_", 2.0), row("a < b", OURS, 1234.4)]
    text = table(rows)
    assert "float32, 10 elements" in text and "1234" in text
    lines = text.splitlines()[2:]
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    bars = list(ElementTree.fromstring(svg(rows, "a & b")).iter("{http://www.w3.org/2000/svg}rect"))
    copy, slow = (float(bar.get("width")) for bar in bars[1:])
    low, high = 0.1, 617.2  # the axis, in copies
    span = torch.tensor(high / low).log().item()
    assert copy / slow == pytest.approx(torch.tensor(1 / low).log().item() / span, abs=1e-3)


def test_calls_take_turns_within_their_shares():
    order, costs = [], {"fast": 1.0, "slow": 40.0, "huge": 1000.0}

    def measure(call):
        order.append(call)
        return costs[call]

    times = in_turn({name: name for name in costs}, 0.3, measure)  # 100 ms each
    assert order[:6] == ["fast", "slow", "huge", "fast", "slow", "huge"]
    assert times["slow"] == [40.0], "its first call is a warm-up, and a third would take too long"
    assert times["huge"] == [1000.0, 1000.0] and len(times["fast"]) == 99
    assert sum(map(sum, times.values())) < 300 + 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_ways_and_the_loop_are_what_they_are_called(dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=draw).to(dtype)
    stochastic = dtype is not torch.float32
    how = dict(rounding="stochastic" if stochastic else "nearest", rounding_seed=3)
    for way in ways(dtype, CPU):
        got, out = x.clone(), torch.zeros_like(x)
        way.run(got, out)
        want, want_out = x.clone(), torch.zeros_like(x)
        seeds, coefs = list(range(way.K)), coefs_of(way.K)
        if way.impl == "torch loop":
            torch_loop(want, seeds, coefs, LR)
        elif way.op.startswith("update"):
            ops.update_(want, seeds, coefs, lr=LR, **how)
        elif way.op.startswith("Adam"):
            ops.adam_update_(want, seeds, coefs, lr=LR, **how)
        elif way.op == "restore":
            ops.restore_(want, 0, EPS)
        elif way.op.startswith("perturb"):
            ops.add_noise(x, 0, EPS, 0, out=want_out)
            if "masked" in way.op:
                want_out = torch.where(x.float().abs() <= torch.tensor(SMALL), want_out, x)
        elif way.op == "copy":
            want_out = x
        elif way.impl == OURS:
            want_out = ops.noise((5000,), 0, 0, dtype=dtype)
        else:
            want_out = out  # torch.randn is not seeded
            assert 0.9 < out.float().std() < 1.1
        assert torch.equal(got, want) and torch.equal(out, want_out), way.name


def test_the_kernel_with_tl_randn_adds_seeded_normals():
    pytest.importorskip("triton")
    from pseuzo_kernels.bench.randn import add_tl_randn

    n, seeds, coefs = 5000, torch.arange(DIRECTIONS), torch.tensor(coefs_of(DIRECTIONS))
    x, out, one = torch.full((n,), 3.0), torch.empty(n), torch.zeros(n)
    add_tl_randn(x, seeds, coefs, out=out)
    for k in range(DIRECTIONS):  # the same sum, a seed at a time
        add_tl_randn(one, seeds[k : k + 1], coefs[k : k + 1], out=one)
    size = coefs.norm().item()
    # each product and each of the 14 sums, which are below 128, is rounded once
    torch.testing.assert_close(out - 3, one, rtol=0, atol=4 * DIRECTIONS * 64 * 2**-23)
    assert abs(one.mean()) < 6 * size / n**0.5
    assert abs(one.std() / size - 1) < 6 / (2 * n) ** 0.5


def test_the_counts_are_those_of_the_machine_code():
    """bench/results/sass.json is what bench/sass_cost.py last wrote."""
    names = {
        ("update", "float32"): "add_noise_many_kernel hadamard fp32",
        ("update", "bfloat16"): "add_noise_many_kernel hadamard bf16 stochastic",
        ("perturb", "bfloat16"): "add_noise_kernel hadamard bf16 hash",
        ("noise", "float32"): "add_noise_kernel hadamard fp32 hash no x",
    }
    counted = {
        (c["arch"], c["kernel"]): (c["cycles_per_normal"], c["around_per_normal"])
        for c in json.loads((ROOT / "bench/results/sass.json").read_text())
    }
    for (arch, op, dtype), cost in limits.COSTS.items():
        assert cost == counted[arch, names[op, dtype]]
    assert {key[1:] for key in limits.COSTS} == names.keys()


def test_the_limit_of_a_known_gpu_is_its_issue_rate():
    chip = limits.chip_named("NVIDIA H100 80GB HBM3")
    ms = limits.issue_ms(chip, "update", torch.bfloat16, 1_000_000, 14)
    assert ms == pytest.approx(1e6 * (14 * 4.546875 + 22.46875) / (128 * 132 * 1.755e9) * 1e3)
    assert limits.issue_ms(chip, "", torch.bfloat16, 1000, 1) is None, "this was not counted"
    assert limits.issue_ms(None, "update", torch.bfloat16, 1000, 1) is None
    assert limits.chip_named("AMD EPYC") is None and limits.chip_of(CPU) is None


@pytest.mark.parametrize(
    "name, major, khz, arch, rate",
    [
        ("NVIDIA H100 PCIe", 9, 0, 90, 114 * 1.755),  # of a chip in the table, on a smaller card
        ("NVIDIA GeForce RTX 4090", 8, 2_520_000, 80, 114 * 2.52),
        ("NVIDIA GeForce RTX 4090", 8, 0, None, None),  # torch does not tell the clock
        ("NVIDIA B200", 10, 1_965_000, None, None),  # no kernel was counted for it
    ],
)
def test_the_limit_of_another_gpu_is_what_its_driver_says(
    name, major, khz, arch, rate, monkeypatch
):
    said = SimpleNamespace(name=name, major=major, clock_rate=khz, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    chip = limits.chip_of(torch.device("cuda"))
    assert (chip and chip.arch) == arch
    if chip:
        assert chip.multiprocessors * chip.ghz == pytest.approx(rate)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--size", "5"], "at least 1024 elements, got 5"),
        (["--size", str(1 << 40)], "does not fit here"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--threads", "0"], "at least 1"),
        (["--dtypes", "float64"], "float64"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--device", "meta"], "must be cpu or cuda"),
        (["--json", "missing/rows.json"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_a_sentence(options, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.arguments(["--device", "cpu", *options])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pseuzo_kernels.bench.randn import add_tl_randn_kernel as kernel

types = {"seeds_ptr": "*i64", "coefs_ptr": "*fp32", "n": "i64", "K": "i32"}
types |= {"out_ptr": "*bf16", "x_ptr": "*bf16", "BLOCK": "constexpr"}
signature = {name: types[name] for name in kernel.arg_names}
source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 1024})
assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.slow
def test_the_kernel_with_tl_randn_compiles_for_a_gpu():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
