"""PTX types as numpy types, and what arithmetic instructions compute."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

HALVES = {"f16x2": "f16", "bf16x2": "bf16"}


def dtype_of(kind: str) -> np.dtype:
    """Return the numpy type of a PTX type.

    f16 and f32 are floats, u8 to u64 and s8 to s64 are integers, b8 to b64 and bf16 are unsigned
    bits.
    """
    if kind == "pred":
        return np.dtype(bool)
    letters, bits = re.fullmatch(r"([a-z]+)(\d+)", kind).groups()
    return np.dtype(f"{dict(f='f', s='i').get(letters, 'u')}{int(bits) // 8}")


def bits_type(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return x * y + z of fp32 or fp16, rounded once.

    The product is exact in float64. The sum is rounded to odd in float64, so that its last bit
    still shows on which side of a tie it was.
    """
    product, z64 = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z64
    back = total - product
    lost = (product - (total - back)) + (z64 - back)
    even = total.view(np.uint64) & np.uint64(1) == 0
    odd = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where(np.isfinite(total) & (lost != 0) & even, odd, total).astype(x.dtype)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bf16 of each fp32."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_float(x: np.ndarray, kind: str) -> np.ndarray:
    """Return the bits of each fp32 as f16 or bf16."""
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round x towards zero and saturate it. NaN becomes 0."""
    limits = np.iinfo(dtype)
    whole = np.clip(np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0), limits.min, limits.max)
    return whole.astype(np.int64).astype(dtype)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Permute bytes as prmt.b32: each byte of the result is one of the eight of a and b, or its
    sign."""
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
    """Shift x by n bits. A shift by the width or more leaves 0, or copies of the sign."""
    width = 8 * x.itemsize
    out = op(x, np.minimum(n, width - 1).astype(x.dtype))
    return out if x.dtype.kind == "i" else np.where(n < width, out, x.dtype.type(0))


def bit_field(x: np.ndarray, at: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return n bits of a 32-bit number, from bit `at` on."""
    return (
        x.astype(np.uint64) >> at & (np.uint64(1) << n.astype(np.uint64)) - np.uint64(1)
    ).astype(x.dtype)


def divided(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x / y. Integers, of at most 32 bits, are rounded towards zero, fp32 to nearest."""
    if x.dtype.kind == "f":
        return x / y
    return np.trunc(x.astype(np.float64) / y).astype(x.dtype)


def approximate(function: Callable) -> Callable:
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "fma": fused_multiply_add,
    "div": divided,
    "mad": lambda x, y, z: x * y + z,
    "sqrt": approximate(np.sqrt),
    "lg2": approximate(np.log2),
    "sin": approximate(np.sin),
    "cos": approximate(np.cos),
}
COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def partial_last(function: Callable, last: Any) -> Callable:
    return lambda *args: function(*args, last)


def of_halves(function: Callable) -> Callable:
    """Return a function that applies this one to the two fp16 numbers in each word."""

    def both(*words: np.ndarray) -> np.ndarray:
        pairs = [word.view(np.float16) for word in words]
        return function(*pairs).view(np.uint32)

    return both


def comparison(how: str) -> Callable:
    """Return a comparison of numbers by its PTX name.

    "num" asks whether both are numbers, "nan" whether one is NaN. A "u" at the end of any other
    name makes the comparison true if one is NaN.
    """
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


def conversion(opcode: str, to: str, of: str) -> tuple[Callable, list[str]]:
    if to in HALVES:  # the first operand is the high half
        halves = HALVES[to]
        pack = lambda high, low: (  # noqa: E731
            from_float(high, halves).astype(np.uint32) << np.uint32(16) | from_float(low, halves)
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


def arithmetic(opcode: str, base: str, parts: list[str]) -> tuple[Callable, list[str]]:
    """Return the function that an instruction computes, and the types of its operands."""
    kind = parts[-1]
    if base == "mov":
        return (lambda x: x), [kind]
    if base == "selp":
        return (lambda x, y, p: np.where(p, x, y)), [kind, kind, "pred"]
    if base == "setp" and len(parts) == 2:
        return comparison(parts[0]), [kind] * 2
    if base == "cvt":
        return conversion(opcode, *parts[-2:])
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
    unlike_any_here = {"sat", "hi"} | ({"full", "approx"} if base == "div" else set())
    if base not in ARITHMETIC or unlike_any_here & set(parts):
        raise NotImplementedError(opcode)
    function = ARITHMETIC[base]
    if kind in HALVES:
        return of_halves(function), ["b32"] * count
    if "wide" in parts:  # the type is that of the two factors
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        widen = dtype_of(wide).type
        return (lambda x, y, *z: function(x.astype(widen), y.astype(widen), *z)), [kind] * 2 + [
            wide
        ] * (count - 2)
    if "ftz" in parts:
        return (lambda *xs: flushed(function(*map(flushed, xs)))), [kind] * count
    return function, [kind] * count
