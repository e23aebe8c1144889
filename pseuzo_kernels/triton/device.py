"""The noise contract as Triton device functions.

`pseuzo_kernels.reference` defines what each of them computes. ASM picks inline PTX where Triton's
own lowering costs more instructions. The interpreter has no PTX, so every such function has a twin
in plain Triton with the same bits; both ways are compiled and tested.
"""

import triton
import triton.language as tl

from pseuzo_kernels.bits import KEY_MASK, KEY_ROUNDING
from pseuzo_kernels.implementations import TRITON
from pseuzo_kernels.laws import HADAMARD, LAWS, SIGNS

if tuple(map(int, triton.__version__.split(".")[:2])) < TRITON:
    raise ImportError(f"the kernels do not compile with Triton {triton.__version__}")

NOISE_KEY0, NOISE_KEY1 = map(tl.constexpr, LAWS["normal"].keys[0])
SECOND_KEY0 = tl.constexpr(LAWS["normal"].keys[1][0])  # in the place of NOISE_KEY0
ROUNDS = tl.constexpr(LAWS["hadamard"].rounds)  # those of "rademacher", too
NORMAL_ROUNDS = tl.constexpr(LAWS["normal"].rounds)
HADAMARD_MASK, HADAMARD_ONES = map(tl.constexpr, HADAMARD)
SIGNS_MASK, SIGNS_ONES = map(tl.constexpr, SIGNS)
ROUNDING_KEY0, ROUNDING_KEY1 = map(tl.constexpr, KEY_ROUNDING)
MASK_KEY0, MASK_KEY1 = map(tl.constexpr, KEY_MASK)
ROUNDING_ROUNDS = tl.constexpr(7)


@triton.jit
def hash_seed(seed):
    """splitmix64 of an int64."""
    z = seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def round17(coef):
    """fp32 rounded to 17 significant bits; infinities and NaN unchanged."""
    bits = coef.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + 0x40) & 0xFFFFFF80, bits).to(tl.float32, bitcast=True)


@triton.jit
def stays_finite(coef):
    """Whether round17 of it is finite."""
    return (coef.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F7FFFC0


@triton.jit
def powers(largest):
    """2^-e and 2^e as in reference.fp16_coefs, from the bits of the largest |coef|."""
    exponent = tl.minimum(tl.maximum((largest.to(tl.uint32) + 0x7FFFFF) >> 23, 1), 253)
    down, up = (254 - exponent) << 23, exponent << 23
    down = tl.where(largest > 0x7E800000, 0x7FC00000, down)
    up = tl.where(largest > 0x7E800000, 0x7FC00000, up)
    return down.to(tl.float32, bitcast=True), up.to(tl.float32, bitcast=True)


@triton.jit
def mul_wide(a, m: tl.constexpr, ASM: tl.constexpr):
    """High and low half of the 64-bit product, by one IMAD.WIDE.

    Triton's umulhi would need another instruction for the low half.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .u64 t; mul.wide.u32 t, $2, $3; mov.b64 {$1, $0}, t;}",
            "=r,=r,r,r",
            [a, tl.full((), m, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        t = a.to(tl.uint64) * m
        return (t >> 32).to(tl.uint32), (t & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def philox(
    q,
    stream,
    seed_hash,
    KEY0: tl.constexpr,
    KEY1: tl.constexpr,
    ROUNDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Philox4x32 of the counter (q, stream, low half of seed_hash, high half)."""
    c0, c1 = q, stream
    c2, c3 = (seed_hash & 0xFFFFFFFF).to(tl.uint32), ((seed_hash >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for r in tl.static_range(ROUNDS):
        h0, l0 = mul_wide(c0, 0xD2511F53, ASM)
        h1, l1 = mul_wide(c2, 0xCD9E8D57, ASM)
        c0 = h1 ^ c1 ^ ((KEY0 + r * 0x9E3779B9) & 0xFFFFFFFF)
        c1 = l1
        c2 = h0 ^ c3 ^ ((KEY1 + r * 0xBB67AE85) & 0xFFFFFFFF)
        c3 = l0
    return c0, c1, c2, c3


@triton.jit
def swap_bytes(w, ASM: tl.constexpr):
    """Swap the two bytes of each half."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x2301;", "=r,r", [w], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return ((w & 0x00FF00FF) << 8) | ((w >> 8) & 0x00FF00FF)


@triton.jit
def mask_or(w, mask: tl.constexpr, ones: tl.constexpr, ASM: tl.constexpr):
    """(w & mask) | ones."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [w, tl.full((), mask, tl.uint32), tl.full((), ones, tl.uint32)],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        return (w & mask) | ones


@triton.jit
def halves(a, ASM: tl.constexpr):
    """The two fp16 numbers in a word, as fp32.

    Without the asm, LLVM repacks the halves first, with an instruction for each.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .f16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
            "=f,=f,r",
            [a],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = (a & 0xFFFF).to(tl.uint16), (a >> 16).to(tl.uint16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(
            tl.float16, bitcast=True
        ).to(tl.float32)


@triton.jit
def patterns(w, mask: tl.constexpr, ones: tl.constexpr, ASM: tl.constexpr):
    """The four half-precision patterns that one word makes."""
    return halves(mask_or(w, mask, ones, ASM), ASM) + halves(
        mask_or(swap_bytes(w, ASM), mask, ones, ASM), ASM
    )


@triton.jit
def half_coef(coef, ASM: tl.constexpr):
    """An fp32 number that fp16 holds, in both halves of a word."""
    if ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [coef], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        half = coef.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return (half << 16) | half


@triton.jit
def fma_halves(a, b, c, ASM: tl.constexpr):
    """a * b + c in both fp16 halves of words, rounded once.

    The twin is right because fp32 holds these sums exactly; see `pseuzo_kernels.reference`.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        a_low, a_high = halves(a, ASM)
        b_low, b_high = halves(b, ASM)
        c_low, c_high = halves(c, ASM)
        low = tl.fma(a_low, b_low, c_low).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = (
            tl.fma(a_high, b_high, c_high).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        )
        return (high << 16) | low


@triton.jit
def box_muller(w, coef, ASM: tl.constexpr):
    """coef * radius / sqrt(2 log 2), and cosine and sine of the angle, from 16 bits each.

    The radius is in these units because the GPU computes binary logarithms. The asm uses the fast
    form of each function.
    """
    if ASM:
        # 0x4300xxxx is 128 + x / 65536 in fp32: one permute and one exact sum make u, another
        # permute and an fma make the angle
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h, l; .reg .f32 u, a, r;
            prmt.b32 h, $3, 0x43000000, 0x7632;
            prmt.b32 l, $3, 0x43000000, 0x7610;
            add.rn.f32 u, h, 0fC2FFFFFF;
            lg2.approx.ftz.f32 r, u;
            neg.f32 r, r;
            sqrt.approx.ftz.f32 r, r;
            mul.rn.f32 $0, r, $4;
            fma.rn.f32 a, l, 0f40C90FDB, 0fC449D8EA;
            cos.approx.ftz.f32 $1, a;
            sin.approx.ftz.f32 $2, a;
            }""",
            "=f,=f,=f,r,f",
            [w, coef],
            dtype=(tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        u = ((w >> 16).to(tl.float32) + 0.5) * (1.0 / 65536)
        # pi / 32768
        angle = (
            (w & 0xFFFF).to(tl.float32) - 32768.0
        ) * 9.587379924285257e-05 + 5.2213668823242188e-05
        return tl.sqrt(-tl.log2(u)) * coef, tl.cos(angle), tl.sin(angle)


@triton.jit
def butterfly(a, H: tl.constexpr):
    """One stage of the Walsh-Hadamard transform of 16 tensors."""
    out = ()
    for j in tl.static_range(16):
        if j & H:
            out = out + (a[j - H] - a[j],)
        else:
            out = out + (a[j] + a[j + H],)
    return out


@triton.jit
def rounding_dither(words, J: tl.constexpr, ASM: tl.constexpr):
    """The 16 bits that round plane J: a byte of its word, above that byte of the next word."""
    high, low, byte = words[J // 4], words[(J // 4) ^ 1], J % 4
    if ASM:
        # One permute puts both bytes into the upper half. The shift that takes them down is free,
        # as it fuses with the next addition.
        return (
            tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [low, high, tl.full((), 0x4000 + 0x1100 * byte, tl.uint32)],
                dtype=tl.uint32,
                is_pure=True,
                pack=1,
            )
            >> 16
        )
    else:
        return (((high >> (8 * byte)) & 0xFF) << 8) | ((low >> (8 * byte)) & 0xFF)


@triton.jit
def takes_noise(x, words, J: tl.constexpr, limit, RANDOM: tl.constexpr, ASM: tl.constexpr):
    """masks.takes_noise for plane J. words: the random words of a mask."""
    if RANDOM:
        return rounding_dither(words, J, ASM).to(tl.float32) < limit * 65536.0
    else:
        return tl.abs(widen(x, ASM)) <= limit


@triton.jit
def widen(x, ASM: tl.constexpr):
    """dtype -> fp32. The interpreter's own conversion gets the subnormals of bf16 wrong."""
    if x.dtype == tl.bfloat16 and not ASM:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def cast(
    y, words, J: tl.constexpr, dtype: tl.constexpr, STOCHASTIC: tl.constexpr, ASM: tl.constexpr
):
    """fp32 -> dtype, to nearest or stochastically, with the bits of plane J."""
    if STOCHASTIC:
        return cast_by(y, rounding_dither(words, J, ASM), dtype, True, ASM)
    else:
        return cast_by(y, 0, dtype, False, ASM)


@triton.jit
def cast_by(y, dither, dtype: tl.constexpr, STOCHASTIC: tl.constexpr, ASM: tl.constexpr):
    """fp32 -> dtype, to nearest or stochastically, with 16 bits for each element."""
    if STOCHASTIC and dtype == tl.float16:
        bits = y.to(tl.uint32, bitcast=True)
        u = bits & 0x7FFFFFFF
        normal = (u - 0x38000000 + (dither >> 3)) >> 13
        tiny = u < 0x38800000
        # 2^40; < 2^26 then
        small = tl.where(tiny, u, 0).to(tl.float32, bitcast=True) * 1099511627776.0
        out = tl.where(tiny, (small.to(tl.int32).to(tl.uint32) + dither) >> 16, normal)
        out = tl.where(u >= 0x47800000, 0x7C00, out)
        out = tl.where(u > 0x7F800000, 0x7E00, out)
        return (out | ((bits >> 16) & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16 and (STOCHASTIC or not ASM):  # the cast of the interpreter truncates
        bits = y.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            up = dither
        else:
            up = 0x7FFF + ((bits >> 16) & 1)
        finite = (bits & 0x7F800000) != 0x7F800000
        out = tl.where(finite, bits + up, bits)
        out = tl.where(y == y, out, 0x7FC00000)
        return (out >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(dtype)
