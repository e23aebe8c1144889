"""Computes the static cost of the noise kernels from their machine code, without a GPU.

    python bench/sass_cost.py [--arch 90] [--json FILE] [--predict] [--all]

Each kernel is compiled ahead of time. The cost per normal is counted for one pass of its inner loop
(one seed) and for the straight code around it; for the kernel of low rank, per product of two
factors. It is given in instructions, and in cycles of the busiest pipe for one warp on one of the
four sub-partitions of a multiprocessor. This is a lower bound from throughput: it ignores
latencies, and nothing is timed. Figures that are called predictions are only such bounds.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache

# The interpreter compiles nothing, and Triton reads this when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pseuzo_kernels.triton import kernels, low_rank, outer, parts

ONE, MANY, ROWS, STEPS, PARTS = (
    f"add_noise_{name}kernel" for name in ("", "many_", "rows_", "steps_", "parts_")
)
OUTER = "add_outer_kernel"  # its inner loop is over products of factors in place of normals
MODULES = {PARTS: parts, OUTER: outer}
# None in these launches
ABSENT = ("found_inf_ptr", "limit", "limits_ptr", "mask_seed_ptr", "takes_ptr", "steps_ptr")
COUNTERS = {ROWS: 128, STEPS: kernels.COUNTERS_STEPS}

# The table has the cycles for which a warp's instruction holds a pipe on sm_90, and the pipe's
# instructions. They come from the throughput table of the CUDA programming guide and the stall
# counts of ptxas. Only a measurement could tell whether IMAD.WIDE takes 2 or 4, and whether half ->
# float conversions share the pipe of the FMAs.
PIPES = {
    "fma": (1, "FFMA FADD FMUL HFMA2 HMUL2 HADD2 HFMA2.MMA HADD2.BF16_V2"),
    "half": (2, "HADD2.F32 F2FP"),
    "wide": (4, "IMAD.WIDE IMAD.HI"),
    "imad": (2, "IMAD IDP"),
    "alu": (2, "LOP3 IADD3 SHF PRMT SEL FSEL ISETP FSETP FMNMX IMNMX VIMNMX VIADD LEA I2FP IABS "
               "MOV PLOP3 SGXT IADD CS2R BMSK P2R R2P HSETP2"),
    "mufu": (8, "MUFU I2F F2I F2F POPC FLO BREV FRND"),
    "lsu": (4, "LDG STG LDS STS LDL STL LDSM STSM SHFL LDC ULDC LDCU ATOMG RED"),
}  # fmt: skip
PIPE_OF = {op: pipe for pipe, (_, ops) in PIPES.items() for op in ops.split()}
# These are the types of the kernels' arguments. out_ptr, x_ptr and dtype_ptr have the tensor's.
ARGUMENT_TYPES = {
    "index_ptr": "*i64", "seeds_ptr": "*i64", "coefs_ptr": "*fp32", "hashes_ptr": "*i64",
    "rounded_ptr": "*fp32", "outs_ptr": "*i64", "xs_ptr": "*i64", "ns_ptr": "*i64",
    "streams_ptr": "*i64", "keeps_ptr": "*fp32", "scales_ptr": "*fp32", "table_ptr": "*i32",
    "firsts_ptr": "*i64", "rounding_hashes_ptr": "*i64", "n": "i64", "N": "i64", "width": "i64",
    "stream": "i64", "rounding_hash": "i64", "K": "i32", "parts": "i32", "S": "i32", "T": "i64",
    "keep": "fp32", "scale": "fp32", "tensors_ptr": "*i64", "ms_ptr": "*i64",
    "strides_ptr": "*i64", "lefts_ptr": "*i64", "rights_ptr": "*i64", "factors_ptr": "*fp32",
    "R": "i32",
}  # fmt: skip


@dataclass
class Cost:
    kernel: str
    arch: int
    registers: int
    spill_accesses: int  # to local memory
    shared_accesses: int
    instructions_per_normal: float  # in the loop over seeds; or a product, in that over factors
    cycles_per_normal: float
    busiest: str
    around_per_normal: float  # instructions outside the loop, once whatever K
    widths: dict[str, int]  # of the global loads and stores on the path of whole chunks


def _tool(name: str) -> str:
    return str(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def compile_kernel(
    name: str,
    arch: int,
    dtype: str = "bf16",
    noise: str = "hadamard",
    stochastic: bool = False,
    hash_in_kernel: bool = False,
    has_x: bool = True,
    asm: bool = True,
    planes: bool = False,
):
    """Return the kernel, compiled as for a launch on aligned tensors. .asm["cubin"] is its machine
    code."""
    kernel = getattr(MODULES.get(name, kernels), name)
    constants = dict(
        NOISE=noise,
        COUNTERS=COUNTERS.get(name, kernels.COUNTERS),
        HAS_X=has_x,
        HASH=hash_in_kernel,
        STOCHASTIC=stochastic,
        ASM=asm,
        PLANES=planes,
        BLOCK=128,
        ALIGNED=True,
        ROWS=low_rank.ROWS,
        COLUMNS=low_rank.WIDE,
        **dict.fromkeys(ABSENT),
    )
    types = ARGUMENT_TYPES | dict.fromkeys(("out_ptr", "x_ptr", "dtype_ptr"), f"*{dtype}")
    names = kernel.arg_names
    signature = {a: "constexpr" if a in constants else types[a] for a in names}
    constants = {(names.index(a),): v for a, v in constants.items() if a in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(names)
        if a.endswith("_ptr") and a not in ABSENT
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    rows = dict(num_warps=1, **kernels.ROWS_OPTIONS)
    options = rows if name == ROWS else dict(num_warps=kernels.WARPS)
    options["enable_fp_fusion"] = False
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(cubin: bytes) -> tuple[list[tuple[str, str]], dict[str, int], str]:
    """Return the instructions (opcode, operands), the labels, and the resource usage of a cubin
    with one kernel."""

    def output_of(*args: str) -> str:
        return subprocess.run(args, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = output_of(_tool("nvdisasm"), "-c", file.name)
        usage = output_of(_tool("cuobjdump"), "-res-usage", file.name)
    code, labels, inside = [], {}, False
    for line in text.splitlines():
        if re.match(r"\s*\.section\s+\.text\.", line):
            inside = True
        elif inside and (m := re.match(r"(\.L\S+):", line)):
            labels[m[1]] = len(code)
        elif inside and (
            m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);", line)
        ):
            code.append((m[1], m[2]))
    return code, labels, usage


def _loops(code, labels) -> list[tuple[int, int]]:
    """Return the indices of each loop's first and last instruction. The last is the branch back."""
    loops = []
    for i, (op, operands) in enumerate(code):
        target = re.search(r"\.L[\w.$]+", operands) if op.startswith("BRA") else None
        if target and labels.get(target[0], i) < i:
            loops.append((labels[target[0]], i))
    return loops


def _pipe(op: str) -> str:
    parts = op.split(".")
    return PIPE_OF.get(".".join(parts[:2])) or PIPE_OF.get(parts[0]) or "other"


def _cycles(code) -> dict[str, float]:
    """Return the cycles that each resource needs. FMAs run on both halves of their pipe, integer
    multiplies on one of them."""
    counts = collections.Counter(_pipe(op) for op, _ in code if op != "NOP")
    heavy = counts["wide"] * 4 + counts["imad"] * 2
    return {
        "issue": sum(counts.values()),
        "alu": counts["alu"] * 2,
        "imad": heavy,
        "fma": (heavy + counts["fma"] * 2) / 2,
        "half": counts["half"] * 2,
        "mufu": counts["mufu"] * 8,
        "lsu": counts["lsu"] * 4,
    }


def _normals(name: str) -> int:
    """Return how many normals, or products, a thread makes in one pass of the loop."""
    if name == OUTER:
        return low_rank.ROWS * low_rank.WIDE // (32 * kernels.WARPS)
    warps = 1 if name == ROWS else kernels.WARPS
    return 16 * COUNTERS.get(name, kernels.COUNTERS) // (32 * warps)


def _widths(code) -> dict[str, int]:
    """Count the global loads and stores by their bits."""
    widths = collections.Counter()
    for op, _ in code:
        if op.startswith(("LDG", "STG")):
            size = re.search(r"\.(128|64|[US]16|[US]8)\b", op)
            widths[f"{op[:3]}.{size[1] if size else '32'}"] += 1
    return dict(widths)


def _path_of_whole_chunks(code, labels) -> tuple[list, list]:
    """Return the instructions of the first loop that makes noise and is followed by unmasked
    accesses, and the instructions around it."""
    loops = _loops(code, labels)
    exits = {i for i, (op, _) in enumerate(code) if op in ("EXIT", "RET", "BRA")}
    exits -= {last for _, last in loops}
    # Only noise multiplies to 64 bits.
    noisy = [
        (first, last)
        for first, last in loops
        if any(_pipe(op) == "wide" for op, _ in code[first:last])
    ]
    found, start = [], 0
    for first, last in noisy:
        if any((first, last) != (a, b) and first <= a and b <= last for a, b in noisy):
            continue  # this is not an innermost loop
        end = min((i for i in exits if i > last), default=len(code) - 1) + 1
        around = code[start:first] + code[last + 1 : end]
        found.append((code[first : last + 1], around))
        start = end
    # Unmasked accesses are wide, and so there are few of them.
    return min(found, key=lambda path: sum(op.startswith("STG") for op, _ in path[1]))


def _path_of_products(code, labels) -> tuple[list, list]:
    """Return the instructions of the loop with the most products, and all others."""
    first, last = max(
        _loops(code, labels), key=lambda loop: sum(op == "FMUL" for op, _ in code[slice(*loop)])
    )
    return code[first : last + 1], code[:first] + code[last + 1 :]


def _label(name: str, options: dict) -> str:
    what = "products" if name == OUTER else options.get("noise", "hadamard")
    words = [name, what, options.get("dtype", "bf16")]
    words += ["stochastic"] * options.get("stochastic", False)
    words += ["hash"] * options.get("hash_in_kernel", False)
    words += ["no x"] * (not options.get("has_x", True))
    words += ["whole planes"] * options.get("planes", False)
    words += ["no asm"] * (not options.get("asm", True))
    return " ".join(words)


def cost(name: str, arch: int, **options) -> Cost:
    """Return the cost of a kernel on the path of whole chunks."""
    code, labels, usage = disassemble(compile_kernel(name, arch, **options).asm["cubin"])
    loop, around = (_path_of_products if name == OUTER else _path_of_whole_chunks)(code, labels)
    ops, cycles = collections.Counter(op.split(".")[0] for op, _ in code), _cycles(loop)
    busiest, normals = max(cycles, key=cycles.get), _normals(name)
    return Cost(
        kernel=_label(name, options),
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spill_accesses=ops["STL"] + ops["LDL"],
        shared_accesses=ops["LDS"] + ops["STS"] + ops["LDSM"] + ops["STSM"],
        instructions_per_normal=cycles["issue"] / normals,
        cycles_per_normal=cycles[busiest] / normals,
        busiest=busiest,
        around_per_normal=_cycles(around)["issue"] / normals,
        widths=_widths(around),
    )


USUAL = (
    (MANY, dict(dtype="bf16", stochastic=True)),
    (MANY, dict(dtype="fp16", stochastic=True)),
    (MANY, dict(dtype="fp32")),
    (ONE, dict(dtype="bf16", hash_in_kernel=True)),
    (ONE, dict(dtype="fp32", hash_in_kernel=True, has_x=False)),
    (ROWS, dict(dtype="bf16", hash_in_kernel=True)),
    (ROWS, dict(dtype="bf16", hash_in_kernel=True, planes=True)),
    (MANY, dict(dtype="bf16", noise="hadamard-fp16", stochastic=True)),
    (MANY, dict(dtype="fp32", noise="hadamard-fp16")),
    (MANY, dict(dtype="bf16", noise="hadamard-fp16 blocks", stochastic=True)),
    (ROWS, dict(dtype="bf16", noise="hadamard-fp16", planes=True)),
    (MANY, dict(dtype="bf16", noise="rademacher", stochastic=True)),
    (MANY, dict(dtype="bf16", noise="normal", stochastic=True)),
    (STEPS, dict(dtype="bf16", stochastic=True)),
    (STEPS, dict(dtype="fp32")),
    (PARTS, dict(dtype="bf16", stochastic=True)),
    (OUTER, dict(dtype="fp32")),
    (OUTER, dict(dtype="bf16")),
    (OUTER, dict(dtype="bf16", stochastic=True)),
    (ONE, dict(dtype="bf16", asm=False)),
)
ALL = tuple(
    (
        name,
        dict(
            dtype=dtype,
            noise=noise,
            stochastic=stochastic,
            hash_in_kernel=name in (ONE, ROWS),
            asm=asm,
        ),
    )
    for name in (ONE, MANY, ROWS, STEPS)
    for noise in ("hadamard", "hadamard-fp16", "hadamard-fp16 blocks", "rademacher", "normal")
    for dtype in ("fp32", "bf16", "fp16")
    for stochastic in (False, True)
    for asm in (True, False)
    if not (stochastic and (dtype == "fp32" or name == ROWS))
    and not (name == STEPS and "fp16" in noise)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="*", default=[90], help="compute capabilities, 80 and up"
    )
    parser.add_argument("--all", action="store_true", help="every variant, not just the usual ones")
    parser.add_argument(
        "--dtype", nargs="*", default=["fp32", "bf16", "fp16"], help="only kernels for these"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--predict", action="store_true", help="and milliseconds of OPT models, see predict.py"
    )
    args = parser.parse_args()
    costs = []
    for arch in args.arch:
        for name, options in ALL if args.all else USUAL:
            if options["dtype"] not in args.dtype:
                continue
            costs.append(c := cost(name, arch, **options))
            print(
                f"sm_{arch} {c.kernel}: {c.instructions_per_normal:.2f} instructions and "
                f"{c.cycles_per_normal:.2f} cycles ({c.busiest}) a normal, "
                f"{c.around_per_normal:.2f} around, {c.registers} registers, "
                f"{c.spill_accesses} spills, {c.shared_accesses} shared, {c.widths}",
                flush=True,
            )
    if args.predict:
        from predict import predict

        predict(cache(cost), ONE, MANY)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps([asdict(c) for c in costs], indent=1))


if __name__ == "__main__":
    main()
