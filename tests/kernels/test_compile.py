"""Every Triton kernel compiles to machine code without a GPU.

The kernel must not spill, its accesses must be wide, and it must cost what we claim.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# These are the instructions per normal in the loop over seeds, for sm_90. Speed depends on them, so
# no change may add any unnoticed. It costs more to hash the seed where it is used, or to give a
# thread 2 counters instead of 4.
LIMITS = {"hadamard": 4.7, "hadamard-fp16": 3.3, "rademacher": 4.7, "normal": 10.8, "products": 2.6}
# These are all instructions per normal at K = 14 if the result is rounded stochastically. With 8
# bits of dither there would be 6.12 and 6.82.
ROUNDED = {"bf16": 6.4, "fp16": 7.1}
ALLOWANCES = {"hash": 0.45, "add_noise_steps_kernel": 0.3}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder, runs = tmp_path_factory.mktemp("sass"), []
    for arch, *only in (("80", "--dtype", "fp32"), ("90",)):  # both run at the same time
        command = [
            sys.executable,
            ROOT / "bench/sass_cost.py",
            "--arch",
            arch,
            *only,
            "--json",
            folder / arch,
        ]
        runs.append(
            subprocess.Popen(
                command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
        )
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "".join(errors)[-3000:]
    return [cost for file in sorted(folder.iterdir()) for cost in json.loads(file.read_text())]


def test_nothing_spills(costs):
    assert len(costs) == 5 + 20 and {c["arch"] for c in costs} == {80, 90}
    assert [c["kernel"] for c in costs if c["spill_accesses"]] == []


def test_whole_chunks_are_read_and_written_widely(costs):
    for c in costs:
        # Rows may begin anywhere, unless they are whole planes. Kernels without the inline asm
        # convert layouts through shared memory. Where many updates share an access, its width does
        # not matter.
        anywhere = "rows" in c["kernel"] and "planes" not in c["kernel"]
        if not anywhere and not any(word in c["kernel"] for word in ("steps", "no asm")):
            assert c["shared_accesses"] == 0, c
            wide = {"STG.128"} if "fp32" in c["kernel"] else {"STG.64"}
            assert {w for w in c["widths"] if w.startswith("STG")} == wide, c
            # Only the table's entries and the addresses are loaded in narrower accesses.
            assert not {"LDG.U16", "LDG.S16", "LDG.U8"} & set(c["widths"]), c
            if "no x" not in c["kernel"]:
                assert c["widths"][wide.pop().replace("STG", "LDG")] >= 16, c


def test_instructions_per_normal(costs):
    for c in costs:
        if c["arch"] == 90 and "no asm" not in c["kernel"]:
            words = c["kernel"].split()
            limit = LIMITS[words[1]] + sum(
                more for word, more in ALLOWANCES.items() if word in words
            )
            assert 1 < c["instructions_per_normal"] <= limit, c


def test_instructions_of_stochastic_rounding(costs):
    update = "add_noise_many_kernel hadamard"
    for dtype, limit in ROUNDED.items():
        (c,) = (
            c for c in costs if c["arch"] == 90 and c["kernel"] == f"{update} {dtype} stochastic"
        )
        assert c["instructions_per_normal"] + c["around_per_normal"] / 14 <= limit, c


def test_registers(costs):
    """With 128 registers per thread a multiprocessor runs four blocks.

    Two kernels need more: more than 16 seeds in half precision hold both sums, and stochastic
    rounding to fp16 is a long calculation on 8 planes at once. The steps of a replay hold x beside
    the sums. They may use 168 registers, which leaves three blocks: Triton 3.9 takes 123, Triton
    3.6 takes 152.
    """
    for c in costs:
        if not any(word in c["kernel"] for word in ("blocks", " fp16 stochastic")):
            assert c["registers"] <= (168 if "steps" in c["kernel"] else 128), c
