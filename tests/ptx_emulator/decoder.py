"""Turns instructions of PTX into functions of threads."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx_emulator.arithmetic import arithmetic, bits_type, dtype_of, partial_last, three_input_logic
from ptx_emulator.memory import UNINITIALIZED, WARP, Threads, elements

# an instruction; the mask says which threads execute it
Step = Callable[[Threads, np.ndarray | None], None]


class Jump(NamedTuple):
    label: str


def inside(vector: str) -> list[str]:
    return [part.strip() for part in vector.strip("{} ").split(",")]


class Operands:
    """Turns operands into functions of threads.

    scopes: the declared registers by name, with their unique name and the type of their bits. A
    block of inline asm has its own scope.
    """

    def __init__(self) -> None:
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
        """Read a register or a constant as numbers of a type. bf16 is read as the fp32 with its
        bits."""
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
        # A narrower type reads the register's lower bits.
        return lambda threads: threads.registers[name].astype(bits_type(dtype)).view(dtype)

    @staticmethod
    def constant(operand: str, dtype: np.dtype) -> np.generic:
        # Shared memory begins at 0. The message of an assert is not needed.
        if operand == "global_smem" or operand.startswith("assert"):
            return dtype.type(0)
        if operand in ("true", "false"):
            return np.bool_(operand == "true")
        if m := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return np.uint32(int(m[1], 16)).view(np.float32)
        value = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.array(value, bits_type(dtype)).view(dtype)[()]

    def write(self, operand: str) -> Callable[[Threads, np.ndarray, np.ndarray | None], None]:
        """Write the bits of the values to a register, for the threads in the mask.

        Integers are extended by their sign.
        """
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


class Decoder(Operands):
    """Turns instructions into functions of threads. message: the message of a failed assert."""

    def __init__(self, message: str = "") -> None:
        super().__init__()
        self.message = message

    def decode(self, opcode: str, operands: list[str]) -> Step | Jump | None:
        base, *parts = opcode.split(".")
        if base in ("ret", "exit", "trap"):
            return None
        if base == "bra":
            return Jump(operands[0])
        # Threads are in lockstep, so a barrier does nothing. Arguments of a call are not needed.
        if base in ("bar", "cvta") or opcode.startswith("st.param"):
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
        function, kinds = arithmetic(opcode, base, parts)
        return self.function(function, operands, kinds)

    def fail(self, threads: Threads, mask: np.ndarray | None) -> None:
        raise AssertionError(self.message)

    def function(self, function: Callable, operands: list[str], kinds: list[str]) -> Step:
        """Return operands[0] <- function(*operands[1:]), where operands[1:] have these kinds."""
        write = self.write(operands[0])
        reads = [
            self.read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)
        ]

        def step(threads: Threads, mask: np.ndarray | None) -> None:
            write(threads, function(*(read(threads) for read in reads)), mask)

        return step

    def decode_mov_of_parts(self, kind: str, operands: list[str]) -> Step:
        """Copy a register to several narrower ones, the lowest bits first, or several to one."""
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
        """Load four matrices of 8 rows of 16 bytes.

        Thread 8 m + r of a warp has the address of row r of matrix m; thread 4 r + c gets word c of
        that row.
        """
        writes, address = [self.write(x) for x in inside(operands[0])], self.address(operands[1])
        if opcode.replace("::cta", "") != "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
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
