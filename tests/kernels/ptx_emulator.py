"""Runs the PTX that Triton compiles for a GPU on a CPU, with numpy, inline asm included.

`install(90)` makes Triton compile for compute capability 9.0 where there is no GPU. From then on a launch on tensors in
host memory runs the kernel's PTX on them, through the same launch code as on a GPU. It must be called before any kernel
is launched, in a process in which TRITON_INTERPRET is not set.

All programs of a launch run in lockstep; programs that branch to different places part and go on alone. What is not
emulated: timing, caches, the order of threads (every program's threads move as one), launches that overlap, and the
errors of the approximate units: lg2, sqrt, sin and cos are rounded correctly here. An instruction that is not known
here raises NotImplementedError.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

WARP = 32
UNINITIALIZED = 0xA5  # every byte of a register that was never written, and of fresh shared memory
HALVES = {"f16x2": "f16", "bf16x2": "bf16"}
FIRST_ADDRESS = 1 << 12
MEMORY = np.frombuffer(
    (ctypes.c_uint8 * ((1 << 47) - 2 * FIRST_ADDRESS)).from_address(FIRST_ADDRESS), np.uint8
)

opcodes_run: set[str] = set()
kernels_run: set[str] = set()
_allowed: list[tuple[int, int]] | None = None  # addresses, from and to; None: all of the process


def extent(x: torch.Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


@contextmanager
def memory_of(*tensors: torch.Tensor) -> Iterator[None]:
    """Inside, an access outside these tensors and the tensors that a launch is given raises an error."""
    global _allowed
    before, _allowed = _allowed, [extent(x) for x in tensors]
    try:
        yield
    finally:
        _allowed = before


class Threads:
    """The threads of some programs of a launch: their registers, and the shared memory of each program."""

    def __init__(self, ids: np.ndarray, per_program: int, shared: int):
        self.programs, self.per_program = len(ids), per_program
        self.registers = {
            "%tid.x": np.tile(np.arange(per_program, dtype=np.uint32), len(ids)),
            "%ctaid.x": np.repeat(ids.astype(np.uint32), per_program),
        }
        self.shared = np.full((len(ids), shared), UNINITIALIZED, np.uint8)

    @property
    def count(self) -> int:
        return self.programs * self.per_program

    def part(self, programs: np.ndarray) -> "Threads":
        """Those of some programs, a mask, with copies of all that they hold."""
        part = object.__new__(Threads)
        part.programs, part.per_program = int(programs.sum()), self.per_program
        threads = np.repeat(programs, self.per_program)
        part.registers = {name: values[threads] for name, values in self.registers.items()}
        part.shared = self.shared[programs]
        return part


Step = Callable[
    [Threads, np.ndarray | None], None
]  # an instruction; the mask says which threads execute it


class Jump(NamedTuple):
    label: str


class Program(NamedTuple):
    """A kernel. code: of each instruction its guard (a register and whether it is negated) and what it does."""

    name: str
    parameters: list[np.dtype]
    shared: int
    code: list[tuple[str, tuple[str, bool] | None, Step | Jump | None]]  # None: the program ends
    labels: dict[str, int]


def dtype_of(kind: str) -> np.dtype:
    """The numpy type of a PTX type: f16 and f32, u8 to u64, s8 to s64; b8 to b64 and bf16 are bits, unsigned."""
    if kind == "pred":
        return np.dtype(bool)
    letters, bits = re.fullmatch(r"([a-z]+)(\d+)", kind).groups()
    return np.dtype(f"{dict(f='f', s='i').get(letters, 'u')}{int(bits) // 8}")


def bits_type(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


def split(text: str) -> list[str]:
    """Operands: commas inside of brackets do not separate them."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def inside(vector: str) -> list[str]:
    return [part.strip() for part in vector.strip("{} ").split(",")]


def parse(ptx: str, shared: int) -> Program:
    """The kernel of a PTX module. shared: bytes of shared memory that a launch gives a program."""
    name, parameters, body = re.search(
        r"\.visible \.entry (\w+)\((.*?)\)[^{]*\n\{\n(.*?)\n(?:\t// -- End|\$L__func_end|\})",
        ptx,
        re.DOTALL,
    ).groups()
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|pragma|file)[^\n]*$", "", body, flags=re.MULTILINE)
    types = [dtype_of(kind) for kind in re.findall(r"\.param \.(\w+)", parameters)]
    said = re.search(r"assertMessage_0\[\d+\] = \{([\d, ]+)\}", ptx)
    decoder, labels, code = (
        _Decoder(bytes(map(int, said[1].split(","))).decode() if said else ""),
        {},
        [],
    )
    # a brace where a statement may begin opens or closes a scope; any other is part of an operand
    for token in re.findall(r"\s*(\$[\w$]+:|[{}](?=\s*[\w.@$%{}]|\s*$)|[^;]+;)", body):
        if token.endswith(":"):
            labels[token[:-1]] = len(code)
        elif token == "{":
            decoder.scopes.append({})
        elif token == "}":
            decoder.scopes.pop()
        elif token.startswith(".reg"):
            decoder.declare(token[4:-1])
        elif token.startswith(".param"):  # of a call
            continue
        else:
            guard, opcode, operands = re.fullmatch(
                r"(?:@(!?\S+)\s+)?([\w.:]+)\s*(.*);", token, re.DOTALL
            ).groups()
            if guard:
                guard = decoder.name(guard.lstrip("!")), guard.startswith("!")
            code.append((opcode, guard, decoder.decode(opcode, split(operands))))
    return Program(name, types, shared, code, labels)


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of fp32 or fp16, rounded once. The product is exact in float64; the sum is rounded there to odd, so
    that what was lost still tells on which side of a tie it was."""
    product, z64 = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z64
    back = total - product
    lost = (product - (total - back)) + (z64 - back)
    even = total.view(np.uint64) & np.uint64(1) == 0
    odd = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where(np.isfinite(total) & (lost != 0) & even, odd, total).astype(x.dtype)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16, as bits."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_float(x: np.ndarray, kind: str) -> np.ndarray:
    """fp32 -> the bits of f16 or bf16."""
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Towards zero, saturated; NaN is 0."""
    limits = np.iinfo(dtype)
    whole = np.clip(np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0), limits.min, limits.max)
    return whole.astype(np.int64).astype(dtype)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: each byte of the result is one of the eight of a and b, or its sign."""
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
    for j in range(4):
        choice = selector >> np.uint32(4 * j) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))).astype(
            np.uint32
        ) & np.uint32(0xFF)
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * j)
    return out


def three_input_logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return out


def shifted(op: np.ufunc, x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """A shift by the width or more leaves nothing, or copies of the sign."""
    width = 8 * x.itemsize
    out = op(x, np.minimum(n, width - 1).astype(x.dtype))
    return out if x.dtype.kind == "i" else np.where(n < width, out, x.dtype.type(0))


def bit_field(x: np.ndarray, at: np.ndarray, n: np.ndarray) -> np.ndarray:
    """n bits of a 32-bit number from bit `at` on."""
    return (
        x.astype(np.uint64) >> at & (np.uint64(1) << n.astype(np.uint64)) - np.uint64(1)
    ).astype(x.dtype)


def divided(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integers of 32 bits at most, towards zero."""
    return np.trunc(x.astype(np.float64) / y).astype(x.dtype)


def approximate(function: Callable) -> Callable:
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "fma": fused_multiply_add, "div": divided,
    "mad": lambda x, y, z: x * y + z, "sqrt": approximate(np.sqrt), "lg2": approximate(np.log2),
    "sin": approximate(np.sin), "cos": approximate(np.cos),
}  # fmt: skip
COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


class _Decoder:
    """Turns instructions into functions of threads. scopes: registers that were declared, by name; a block of inline
    asm has its own. The value is the register's unique name and the type of its bits. message: of a failed assert."""

    def __init__(self, message: str = "") -> None:
        self.message = message
        self.scopes: list[dict[str, tuple[str, np.dtype]]] = [
            {"%tid.x": ("%tid.x", np.dtype("u4"))}
        ]
        self.scopes[0]["%ctaid.x"] = ("%ctaid.x", np.dtype("u4"))
        self.declared = 0

    def declare(self, text: str) -> None:
        kind, names = text.strip().lstrip(".").split(maxsplit=1)
        for name in names.split(","):
            self.declared += 1
            prefix, count = re.fullmatch(r"([\w%$]+?)(?:<(\d+)>)?", name.strip()).groups()
            entry = f"{prefix}@{self.declared}", bits_type(dtype_of(kind))
            many = {f"{prefix}{i}": (f"{prefix}{i}", entry[1]) for i in range(int(count or 0))}
            self.scopes[-1].update(many or {prefix: entry})

    def register(self, name: str) -> tuple[str, np.dtype] | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def name(self, register: str) -> str:
        return self.register(register)[0]

    def read(self, operand: str, kind: str) -> Callable[[Threads], np.ndarray]:
        """Reads a register or a constant as numbers of a type; bf16 as the fp32 with its bits."""
        if kind == "bf16":
            bits = self.read(operand, "b16")
            return lambda threads: (bits(threads).astype(np.uint32) << np.uint32(16)).view(
                np.float32
            )
        dtype = dtype_of(kind)
        found = self.register(operand)
        if found is None:
            constant = self.constant(operand, dtype)
            return lambda threads: np.full(threads.count, constant)
        name, held = found
        if held.itemsize == dtype.itemsize:
            return lambda threads: threads.registers[name].view(dtype)
        return lambda threads: (
            threads.registers[name].astype(bits_type(dtype)).view(dtype)
        )  # its lower bits

    @staticmethod
    def constant(operand: str, dtype: np.dtype) -> np.generic:
        if operand == "global_smem" or operand.startswith(
            "assert"
        ):  # the beginning of shared memory; what is said
            return dtype.type(0)
        if operand in ("true", "false"):
            return np.bool_(operand == "true")
        if m := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return np.uint32(int(m[1], 16)).view(np.float32)
        value = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.array(value, bits_type(dtype)).view(dtype)[()]

    def write(self, operand: str) -> Callable[[Threads, np.ndarray, np.ndarray | None], None]:
        """Writes the bits of the values to a register, of the threads in the mask; integers widen by their sign."""
        if operand == "_":
            return lambda threads, values, mask: None
        name, held = self.register(operand.split("|")[0])

        def write(threads: Threads, values: np.ndarray, mask: np.ndarray | None) -> None:
            bits = values if values.dtype.itemsize != held.itemsize else values.view(held)
            bits = bits.astype(held)
            if mask is not None:
                before = threads.registers.get(name)
                if before is None:
                    before = np.full(threads.count * held.itemsize, UNINITIALIZED, np.uint8).view(
                        held
                    )
                bits = np.where(mask, bits, before)
            threads.registers[name] = bits

        return write

    def address(self, operand: str) -> Callable[[Threads], np.ndarray]:
        base, offset = re.fullmatch(r"\[\s*([\w%$.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        read, offset = self.read(base, "s64"), np.int64(offset or 0)
        return lambda threads: read(threads) + offset

    def decode(self, opcode: str, operands: list[str]) -> Step | Jump | None:
        base, *parts = opcode.split(".")
        if base in ("ret", "exit", "trap"):
            return None
        if base == "bra":
            return Jump(operands[0])
        if base in ("bar", "cvta") or opcode.startswith(
            "st.param"
        ):  # threads are in lockstep; arguments of a call
            return lambda threads, mask: None
        if base == "call" and operands[0] == "__assertfail":
            return self.fail
        if base in ("ld", "st", "ldmatrix"):
            return getattr(self, "decode_" + base)(opcode, parts, operands)
        if base == "mov" and "{" in "".join(operands):
            return self.decode_mov_of_parts(parts[-1], operands)
        if base == "lop3":
            *operands, table = operands
            return self.function(
                partial_last(three_input_logic, int(table, 0)), operands, ["b32"] * 3
            )
        if base in ("redux", "shfl"):
            return self.decode_warp(opcode, parts, operands)
        function, kinds = self.arithmetic(opcode, base, parts)
        return self.function(function, operands, kinds)

    def fail(self, threads: Threads, mask: np.ndarray | None) -> None:
        raise AssertionError(self.message)

    def function(self, function: Callable, operands: list[str], kinds: list[str]) -> Step:
        """operands[0] <- function(*operands[1:]), which are of these kinds."""
        write = self.write(operands[0])
        reads = [
            self.read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)
        ]

        def step(threads: Threads, mask: np.ndarray | None) -> None:
            write(threads, function(*(read(threads) for read in reads)), mask)

        return step

    def arithmetic(self, opcode: str, base: str, parts: list[str]) -> tuple[Callable, list[str]]:
        """What an instruction computes, and the types of its operands."""
        kind = parts[-1]
        if base == "mov":
            return (lambda x: x), [kind]
        if base == "selp":
            return (lambda x, y, p: np.where(p, x, y)), [kind, kind, "pred"]
        if base == "setp" and len(parts) == 2:
            return self.comparison(parts[0]), [kind] * 2
        if base == "cvt":
            return self.conversion(opcode, *parts[-2:])
        if base in ("shl", "shr"):
            op = np.left_shift if base == "shl" else np.right_shift
            return (lambda x, n: shifted(op, x, n)), [kind, "u32"]
        if base == "bfe" and kind == "u32":
            return bit_field, [kind, "u32", "u32"]
        if base == "prmt":
            return permuted, ["b32"] * 3
        if base in ("min", "max") and kind[0] in "su":
            return (np.minimum if base == "min" else np.maximum), [kind] * 2
        count = (
            1
            if base in ("neg", "abs", "not", "sqrt", "lg2", "sin", "cos")
            else 3
            if base in ("fma", "mad")
            else 2
        )
        if base not in ARITHMETIC or "sat" in parts or "hi" in parts:
            raise NotImplementedError(opcode)
        function = ARITHMETIC[base]
        if kind in HALVES:
            return of_halves(function), ["b32"] * count
        if "wide" in parts:  # of the two factors
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            widen = dtype_of(wide).type
            return (lambda x, y, *z: function(x.astype(widen), y.astype(widen), *z)), [kind] * 2 + [
                wide
            ] * (count - 2)
        if "ftz" in parts:
            return (lambda *xs: flushed(function(*map(flushed, xs)))), [kind] * count
        return function, [kind] * count

    @staticmethod
    def comparison(how: str) -> Callable:
        """Of floating-point numbers: "num", are both numbers; with a "u" at the end, or is one of them NaN."""
        if how in ("num", "nan"):
            return lambda x, y: (np.isnan(x) | np.isnan(y)) == (how == "nan")
        if how in COMPARISONS:
            test, unordered = COMPARISONS[how], False
        else:
            test, unordered = COMPARISONS[how.removesuffix("u")], True

        def compare(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            result = test(x, y)
            if x.dtype.kind == "f":
                nan = np.isnan(x) | np.isnan(y)
                result = result | nan if unordered else result & ~nan
            return result

        return compare

    @staticmethod
    def conversion(opcode: str, to: str, of: str) -> tuple[Callable, list[str]]:
        if to in HALVES:  # the first operand is the high half
            halves = HALVES[to]
            pack = lambda high, low: (  # noqa: E731
                from_float(high, halves).astype(np.uint32) << np.uint32(16)
                | from_float(low, halves)
            )
            return pack, ["f32", "f32"]
        if of == "f32" and to in ("f16", "bf16"):
            return (lambda x: from_float(x, to)), [of]
        if of in ("f16", "bf16") and to == "f32":
            return (lambda x: x.astype(np.float32)), [of]
        if of == "f32" and to[0] in "su" and ".rzi." in opcode:
            return (lambda x: to_integer(x, dtype_of(to))), [of]
        if of[0] in "su" and (to[0] in "su" or to == "f32"):
            return (lambda x: x.astype(dtype_of(to))), [of]
        raise NotImplementedError(opcode)

    def decode_mov_of_parts(self, kind: str, operands: list[str]) -> Step:
        """A register to several narrower ones, the lowest first, or the other way round."""
        whole, parts = (
            (operands[0], inside(operands[1]))
            if "{" in operands[1]
            else (operands[1], inside(operands[0]))
        )
        width = int(kind[1:]) // len(parts)
        shifts = [np.uint64(width * i) for i in range(len(parts))]
        if "{" in operands[0]:
            read, writes = self.read(whole, kind), [self.write(part) for part in parts]
            narrow = dtype_of(f"b{width}")

            def unpack(threads: Threads, mask: np.ndarray | None) -> None:
                values = read(threads).astype(np.uint64)
                for shift, write in zip(shifts, writes, strict=True):
                    write(threads, (values >> shift).astype(narrow), mask)

            return unpack
        write, reads = self.write(whole), [self.read(part, f"b{width}") for part in parts]

        def pack(threads: Threads, mask: np.ndarray | None) -> None:
            values = np.zeros(threads.count, np.uint64)
            for shift, read in zip(shifts, reads, strict=True):
                values |= read(threads).astype(np.uint64) << shift
            write(threads, values.astype(dtype_of(kind)), mask)

        return pack

    def decode_ld(self, opcode: str, parts: list[str], operands: list[str]) -> Step:
        space, kind = parts[0], parts[-1]
        if space == "param":
            write, number = self.write(operands[0]), int(re.search(r"_param_(\d+)", operands[1])[1])
            return lambda threads, mask: write(
                threads, threads.registers[f"parameter {number}"], mask
            )
        writes, address = [self.write(x) for x in inside(operands[0])], self.address(operands[1])
        dtype = bits_type(dtype_of(kind))

        def load(threads: Threads, mask: np.ndarray | None) -> None:
            values = np.zeros((threads.count, len(writes)), dtype)
            there = np.ones(threads.count, bool) if mask is None else mask
            memory, at = elements(threads, space, address(threads), there, dtype, len(writes))
            values[there] = memory[at]
            for i, write in enumerate(writes):
                write(threads, values[:, i].copy(), mask)

        return load

    def decode_st(self, opcode: str, parts: list[str], operands: list[str]) -> Step:
        space, kind = parts[0], parts[-1]
        reads, address = (
            [self.read(x, "b" + kind[1:]) for x in inside(operands[1])],
            self.address(operands[0]),
        )

        def store(threads: Threads, mask: np.ndarray | None) -> None:
            there = np.ones(threads.count, bool) if mask is None else mask
            values = np.stack([read(threads) for read in reads], axis=1)
            memory, at = elements(threads, space, address(threads), there, values.dtype, len(reads))
            memory[at] = values[there]

        return store

    def decode_ldmatrix(self, opcode: str, parts: list[str], operands: list[str]) -> Step:
        """Four matrices of 8 rows of 16 bytes. Thread 8 m + r of a warp has the address of row r of matrix m; thread
        4 r + c gets word c of that row."""
        writes, address = [self.write(x) for x in inside(operands[0])], self.address(operands[1])
        if opcode != "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
            raise NotImplementedError(opcode)

        def load(threads: Threads, mask: np.ndarray | None) -> None:
            rows, lane = address(threads).reshape(-1, WARP), np.arange(WARP)
            for matrix, write in enumerate(writes):
                at = (rows[:, 8 * matrix + lane // 4] + 4 * (lane % 4)).reshape(-1)
                memory, at = elements(
                    threads, "shared", at, np.ones(threads.count, bool), np.dtype("u4"), 1
                )
                write(threads, memory[at][:, 0], mask)

        return load

    def decode_warp(self, opcode: str, parts: list[str], operands: list[str]) -> Step:
        write, read = self.write(operands[0]), self.read(operands[1], parts[-1])
        if parts[:2] == ["sync", "bfly"]:
            lanes = self.read(operands[2], "u32")

            def exchange(threads: Threads, mask: np.ndarray | None) -> None:
                of = np.arange(threads.count) ^ lanes(threads)
                write(threads, read(threads)[of], mask)

            return exchange
        if parts[:2] != ["sync", "max"]:
            raise NotImplementedError(opcode)

        def largest(threads: Threads, mask: np.ndarray | None) -> None:
            write(threads, np.repeat(read(threads).reshape(-1, WARP).max(1), WARP), mask)

        return largest


def partial_last(function: Callable, last: Any) -> Callable:
    return lambda *args: function(*args, last)


def of_halves(function: Callable) -> Callable:
    """Of the two fp16 numbers in each word."""

    def both(*words: np.ndarray) -> np.ndarray:
        pairs = [word.view(np.float16) for word in words]
        return function(*pairs).view(np.uint32)

    return both


def elements(
    threads: Threads,
    space: str,
    addresses: np.ndarray,
    there: np.ndarray,
    dtype: np.dtype,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A memory as elements of a type, and which of them, [threads that are there, count], begin at the addresses."""
    addresses, size = addresses[there], dtype.itemsize * count
    if (addresses % size).any():
        raise RuntimeError(f"an access of {size} bytes is not aligned")
    if space == "shared":
        memory = threads.shared
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > memory.shape[1]):
            raise RuntimeError("an access outside of shared memory")
        programs = np.repeat(np.arange(threads.programs), threads.per_program)[there]
        addresses, memory = addresses + programs * memory.shape[1], memory.reshape(-1)
    elif space == "global":
        memory = MEMORY
        if len(addresses) and (
            addresses.min() < FIRST_ADDRESS or addresses.max() >= FIRST_ADDRESS + len(MEMORY)
        ):
            raise RuntimeError(f"an access to address {int(addresses.min()):#x}")
        if _allowed is not None:
            begins, ends = np.array(sorted(_allowed)).T
            at = np.searchsorted(begins, addresses, side="right") - 1
            if ((at < 0) | (addresses + size > np.maximum.accumulate(ends)[at])).any():
                raise RuntimeError("an access outside of the tensors that the kernel may touch")
        addresses = addresses - FIRST_ADDRESS
    else:
        raise NotImplementedError(f"memory {space}")
    return memory.view(dtype), (addresses // dtype.itemsize)[:, None] + np.arange(count)


def run(program: Program, arguments: list[np.generic], programs: int, per_program: int) -> None:
    """A launch of that many programs."""
    kernels_run.add(program.name)
    everyone = Threads(np.arange(programs), per_program, program.shared)
    for number, value in enumerate(arguments):
        everyone.registers[f"parameter {number}"] = np.full(everyone.count, value)
    waiting = [(everyone, 0)]
    with np.errstate(all="ignore"):
        while waiting:
            threads, at = waiting.pop()
            while True:
                opcode, guard, step = program.code[at]
                opcodes_run.add(opcode)
                at, mask = at + 1, None
                if guard is not None:
                    mask = threads.registers[guard[0]] ^ guard[1]
                if step is not None and not isinstance(step, Jump):
                    step(threads, mask)
                    continue
                # a branch, or the end of a program
                goes = np.ones(threads.count, bool) if mask is None else mask
                goes = goes.reshape(threads.programs, -1)
                if (goes.any(1) != goes.all(1)).any():
                    raise NotImplementedError("threads of one program branch to different places")
                goes = goes[:, 0]
                if not goes.all():
                    if isinstance(step, Jump) and goes.any():
                        waiting.append((threads.part(goes), program.labels[step.label]))
                    threads = threads.part(~goes)
                elif isinstance(step, Jump):
                    at = program.labels[step.label]
                else:
                    break


class Launcher:
    """What Triton calls to launch a kernel."""

    def __init__(self, source: Any, metadata: Any):
        self.types, self.threads = list(source.signature.values()), WARP * metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
        global _allowed
        _, _, _, _, *given = rest  # metadata and hooks
        given = [
            value for value, kind in zip(given, self.types, strict=True) if kind != "constexpr"
        ]
        assert y == z == 1
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
        values += [0] * (
            len(program.parameters) - len(values)
        )  # pointers to scratch that these kernels do not use
        arguments = [
            np.array(value, dtype)
            if dtype.kind == "f"
            else np.array(value & (1 << 8 * dtype.itemsize) - 1, dtype)
            for value, dtype in zip(values, program.parameters, strict=True)
        ]
        before = _allowed
        if _allowed is not None:
            _allowed = _allowed + [
                extent(value) for value in given if isinstance(value, torch.Tensor)
            ]
        try:
            run(program, arguments, x, self.threads)
        finally:
            _allowed = before


class Utilities:
    @staticmethod
    def load_binary(name: str, ptx: bytes, shared: int, device: int) -> tuple:
        return object(), parse(ptx.decode(), shared), 0, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 227 << 10,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": WARP,
        }


def install(arch: int) -> None:
    """From here on Triton compiles for this compute capability (90: 9.0), and launches run here."""
    import triton
    from triton import backends
    from triton.backends.compiler import GPUTarget

    nvidia = backends.backends["nvidia"]

    class OnlyPtx(nvidia.compiler):
        """Stops at PTX, which is what is launched."""

        def __init__(self, target: GPUTarget):
            super().__init__(target)
            self.binary_ext = "ptx"

        def hash(self) -> str:  # what is compiled is cached apart
            return f"{super().hash()} only ptx"

        def add_stages(self, stages: dict, options: Any, language: Any) -> None:
            super().add_stages(stages, options, language)
            stages["ptx"] = lambda source, metadata, make=stages["ptx"]: make(
                source, metadata
            ).encode()
            del stages["cubin"]

    class Driver:
        utils, launcher_cls = Utilities, Launcher
        get_current_device = get_current_stream = staticmethod(lambda *args: 0)
        set_current_device = staticmethod(lambda device: None)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, WARP))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    backends.backends["nvidia"] = backends.Backend(compiler=OnlyPtx, driver=nvidia.driver)
    triton.runtime.driver.set_active(Driver())
