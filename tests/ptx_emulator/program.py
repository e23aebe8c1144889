"""Parses a kernel's PTX into a program, and runs launches of it."""

import re
from typing import NamedTuple

import numpy as np

from ptx_emulator.arithmetic import dtype_of
from ptx_emulator.decoder import Decoder, Jump, Step
from ptx_emulator.memory import Threads

opcodes_run: set[str] = set()
kernels_run: set[str] = set()


class Program(NamedTuple):
    """A kernel.

    code holds, for each instruction, its guard (a register and whether it is negated) and its
    function.
    """

    name: str
    parameters: list[np.dtype]
    shared: int
    code: list[tuple[str, tuple[str, bool] | None, Step | Jump | None]]  # None: the program ends
    labels: dict[str, int]


def split(text: str) -> list[str]:
    """Split at commas into operands. Commas inside brackets do not separate operands."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def parse(ptx: str, shared: int) -> Program:
    """Parse the kernel of a PTX module. shared: bytes of shared memory that a launch gives a
    program."""
    name, parameters, body = re.search(
        r"\.visible \.entry (\w+)\((.*?)\)[^{]*\n\{\n(.*?)\n(?:\t// -- End|\$L__func_end|\})",
        ptx,
        re.DOTALL,
    ).groups()
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|pragma|file)[^\n]*$", "", body, flags=re.MULTILINE)
    types = [dtype_of(kind) for kind in re.findall(r"\.param \.(\w+)", parameters)]
    said = re.search(r"assertMessage_0\[\d+\] = \{([\d, ]+)\}", ptx)
    decoder, labels, code = (
        Decoder(bytes(map(int, said[1].split(","))).decode() if said else ""),
        {},
        [],
    )
    # A brace where a statement may begin opens or closes a scope. Any other is part of an operand.
    for token in re.findall(r"\s*(\$[\w$]+:|[{}](?=\s*[\w.@$%{}]|\s*$)|[^;]+;)", body):
        if token.endswith(":"):
            labels[token[:-1]] = len(code)
        elif token == "{":
            decoder.scopes.append({})
        elif token == "}":
            decoder.scopes.pop()
        elif token.startswith(".reg"):
            decoder.declare(token[4:-1])
        elif token.startswith(".param"):  # declares an argument of a call
            continue
        else:
            guard, opcode, operands = re.fullmatch(
                r"(?:@(!?\S+)\s+)?([\w.:]+)\s*(.*);", token, re.DOTALL
            ).groups()
            if guard:
                guard = decoder.name(guard.lstrip("!")), guard.startswith("!")
            code.append((opcode, guard, decoder.decode(opcode, split(operands))))
    return Program(name, types, shared, code, labels)


def run(program: Program, arguments: list[np.generic], programs: int, per_program: int) -> None:
    """Run a launch of that many programs."""
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
                # This is a branch or the end of a program.
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
