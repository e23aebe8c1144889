"""EmaWindow and its op agree with the reference, and both with the formula of the method."""

import math

import pytest
import torch
from window_formula import DTYPES, NATIVE, U32, WINDOWS, Formula, assert_near, draw, needs_native

import pseuzo_kernels  # this import loads the C++ ops, if they were built
from pseuzo_kernels import reference, window


@pytest.fixture(params=WINDOWS)
def Window(request):
    return WINDOWS[request.param]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("capacity", "momentum", "eps"), [(1, 0.5, 1e-3), (4, 1.0, 1e-3), (5, 0.7, 0.25), (3, 0.0, 2.0)]
)
def test_formula(Window, grouped, capacity, momentum, eps):
    """Batches and lengths grow and shrink, while the ring is filled more than twice."""
    generator = torch.Generator().manual_seed(capacity)
    got, want = Window(capacity, momentum=momentum, eps=eps), Formula(capacity, momentum, eps)
    for step in range(2 * capacity + 6):
        rows = int(torch.randint(1, 5 + step, (), generator=generator))
        positions = int(torch.randint(1, 4 + step // 2, (), generator=generator))
        groups = torch.randint(-2, 2, (rows,), generator=generator) if grouped else None
        outputs = draw(generator, rows, positions, 37)
        seeds, coefs = got.step(step - 3, *outputs, groups)
        want_seeds, want_coefs, sizes = want.step(step - 3, *outputs, groups)
        assert (
            seeds.tolist() == want_seeds
            and seeds.dtype is torch.int64
            and coefs.dtype is torch.float32
        )
        assert_near(coefs, want_coefs, sizes)
        assert len(got) == len(seeds) == min(step + 1, capacity)
    assert got.skipped == 0 and got.found_inf.tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1023), (6, 1, 1025), (2, 3, 2048)], ids=str)
def test_dtypes_and_sizes(Window, dtype, g_dtype, shape):
    generator = torch.Generator().manual_seed(0)
    got, want = Window(3, momentum=0.9), Formula(3, momentum=0.9)
    for step in range(4):
        outputs = draw(generator, *shape, dtype, g_dtype)
        groups = [i % 2 for i in range(shape[0])]
        _, coefs = got.step(step, *outputs, groups)
        assert_near(coefs, *want.step(step, *outputs, groups)[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(Window, dtype):
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    got = Window(1)
    bits[bits.isnan()] = math.inf
    assert got.step(0, None, bits.view(1, 1, -1), torch.zeros(1, 1, 1 << 16))[1] == 0
    assert got.skipped == int(bits.isinf().any())
    bits[bits.isinf()] = 0
    got.step(0, None, bits.view(1, 1, -1), torch.zeros(1, 1, 1 << 16))
    assert torch.equal(got.state_dict()["values"].view(-1), bits.float()) and got.skipped == 1


def test_mixed_output_dtypes_and_double(Window):
    generator = torch.Generator().manual_seed(0)
    o0, o1, grad = draw(generator, 3, 2, 5)
    got, want = Window(2), Formula(2)
    for a, b, g in ((o0.half(), o1.bfloat16(), grad), (o0.double(), o1.half(), grad.double())):
        assert_near(got.step(1, a, b, g)[1], *want.step(1, a, b, g)[1:])


@needs_native
@pytest.mark.parametrize("grouped", [False, True])
def test_matches_reference(grouped):
    """Both ops are called once on the same state. The test compares outputs, and all rows of the
    new entry that are read."""
    generator = torch.Generator().manual_seed(5)
    capacity, rows_max, positions_max, width = 4, 9, 3, 700
    for used, slot, rows, positions in (
        (1, 0, 9, 3),
        (3, 2, 7, 1),
        (4, 1, 4, 2),
        (4, 3, 0 if grouped else 1, 3),
    ):
        rows = max(rows, 1)
        values = torch.randn(capacity, rows_max, positions_max, width, generator=generator)
        counts = torch.randint(0, 3, (capacity, rows_max), generator=generator, dtype=torch.int32)
        groups = torch.arange(rows_max).repeat(capacity, 1)
        values[counts == 0] = math.nan  # these rows are not read
        state = [values, torch.arange(capacity), groups, counts, torch.tensor(3)]
        group = torch.randint(0, 5, (rows,), generator=generator) if grouped else None
        inputs = [
            *draw(generator, rows, positions, width),
            group,
            torch.tensor(0.5),
            77,
            slot,
            used,
            0.5,
            1e-2,
        ]
        states = [[t.clone() for t in state] for _ in range(3)]
        got = torch.ops.pseuzo.window_step.default(*states[0], *inputs)
        want = reference.window_step(*states[1], *inputs)
        states[2][0].abs_()
        change = (inputs[1] - inputs[0]).abs()
        sizes = reference.window_step(*states[2], None, change, inputs[2].abs(), *inputs[3:])[1]
        assert_near(got[1], want[1], sizes)
        assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
        for a, b in zip(states[0][1:], states[1][1:], strict=True):
            if a is not states[0][2]:
                assert torch.equal(a, b)
        assert torch.equal(states[0][2][slot, :rows], states[1][2][slot, :rows])
        kept = states[1][3][slot] > 0
        # Two fp64 means are each rounded to fp32.
        torch.testing.assert_close(
            states[0][0][slot][kept], states[1][0][slot][kept], rtol=2 * U32, atol=0
        )
        others = [k for k in range(capacity) if k != slot]
        torch.testing.assert_close(
            states[0][0][others], values[others], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("where", ["o0", "o1", "grad", "loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(Window, grouped, where, bad):
    """The coefficients are zero, the step is counted, and later steps do not see its entry."""
    generator = torch.Generator().manual_seed(1)
    got, want = Window(3, momentum=0.9), Formula(3, momentum=0.9)
    for step in range(7):
        o0, o1, grad = draw(generator, 4, 2, 9)
        groups = [0, 1, 0, step % 3] if grouped else None
        loss = torch.tensor(0.25)
        if step in (2, 3):
            if where == "loss":
                loss.fill_(bad)
            else:
                {"o0": o0, "o1": o1, "grad": grad}[where][3, 1, 8] = bad
        seeds, coefs = got.step(step, o0, o1, grad, groups, loss)
        want_seeds, want_coefs, sizes = want.step(step, o0, o1, grad, groups, loss)
        assert seeds.tolist() == want_seeds
        if step in (2, 3):
            assert (coefs == 0).all() and got.found_inf == 1
        else:
            assert_near(coefs, want_coefs, sizes)
            assert got.found_inf == 0 and coefs[-1] != 0
        assert got.skipped == max(0, min(step, 3) - 1)


def test_two_dimensions_and_difference(Window):
    """[B, D] is treated as [B, 1, D]. If o0 is None, o1 is the difference."""
    generator = torch.Generator().manual_seed(2)
    windows = [Window(2, momentum=0.5) for _ in range(3)]
    for step in range(4):
        o0, o1, grad = draw(generator, 5, 1, 33)
        results = [
            windows[0].step(step, o0, o1, grad)[1],
            windows[1].step(step, o0[:, 0], o1[:, 0], grad[:, 0])[1],
            windows[2].step(step, None, o1 - o0, grad)[1],
        ]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_views_and_autograd(Window):
    """Outputs may be strided and require grad. Autograd records nothing."""
    generator = torch.Generator().manual_seed(2)
    o0, o1, grad = draw(generator, 4, 3, 8)
    want = Window().step(1, o0, o1, grad)[1]
    o1 = o1.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    coefs = Window().step(1, o0, o1, grad)[1]
    assert torch.equal(coefs, want) and not coefs.requires_grad


def test_deterministic(Window):
    """The bits are the same in a second run and with another number of threads."""
    threads = torch.get_num_threads()
    runs = []
    try:
        for n_threads in (1, 1, 2, 3):
            torch.set_num_threads(n_threads)
            generator = torch.Generator().manual_seed(3)
            got = Window(4, momentum=0.9)
            coefs = [
                got.step(step, *draw(generator, 16, 4, 1500), [i % 3 for i in range(16)])[1]
                for step in range(6)
            ]
            runs.append((torch.cat(coefs), got.state_dict()["values"]))
    finally:
        torch.set_num_threads(threads)
    if Window is window.EmaWindow and NATIVE:  # torch's einsum does not promise this
        for coefs, values in runs[1:]:
            assert torch.equal(coefs, runs[0][0]) and torch.equal(values, runs[0][1])
    else:
        assert torch.equal(runs[1][0], runs[0][0])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_state_dict(Window, grouped, at):
    generator = torch.Generator().manual_seed(4)
    inputs = [
        (*draw(generator, 2 + step % 3, 1 + step % 2, 10), [0, 1, 1, 0][: 2 + step % 3])
        for step in range(9)
    ]
    inputs = [(*outputs, groups if grouped else None) for *outputs, groups in inputs]
    whole = Window(4, momentum=0.6, eps=0.1)
    for step in range(at):
        bad = math.nan if step == 1 else 1.0
        whole.step(step, *inputs[step], torch.tensor(bad))
    state = whole.state_dict()
    again = Window(7)
    again.load_state_dict(state)
    assert (again.capacity, again.momentum, again.eps, again.skipped) == (4, 0.6, 0.1, int(at > 1))
    for step in range(at, 9):
        (seeds, coefs), (want_seeds, want_coefs) = (
            again.step(step, *inputs[step]),
            whole.step(step, *inputs[step]),
        )
        assert torch.equal(seeds, want_seeds) and torch.equal(coefs, want_coefs)
    for name, want in whole.state_dict().items():
        got = again.state_dict()[name]
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want, name
    if at:
        assert not torch.equal(state["values"], whole.state_dict()["values"]), (
            "a state_dict shares memory with the window"
        )


def test_clear(Window):
    generator = torch.Generator().manual_seed(6)
    got = Window(3)
    got.clear()
    for _ in range(4):
        got.step(1, *draw(generator, 3, 2, 8), [0, 1, 0], torch.tensor(math.inf))
    got.clear()
    assert len(got) == 0 and got.skipped == 4
    for width in (8, 5):  # another width needs a new ring
        fresh = Window(3)
        for step in range(3):
            outputs = draw(generator, 2, 1, width)
            (seeds, coefs), (want_seeds, want_coefs) = (
                got.step(step, *outputs),
                fresh.step(step, *outputs),
            )
            assert torch.equal(seeds, want_seeds) and torch.equal(coefs, want_coefs)
        got.clear()


def test_bad_input(Window):
    o = torch.ones(3, 2, 4)
    for arguments in (
        {"capacity": 0},
        {"capacity": 2.0},
        {"momentum": 1.5},
        {"eps": 0.0},
        {"eps": math.nan},
    ):
        with pytest.raises(ValueError, match="EmaWindow: "):
            Window(**arguments)
    got = Window(2)
    bad_calls = [
        (TypeError, "o1 must be a floating-point", (1, o, o.long(), o)),
        (ValueError, r"o1 must be \[B, P, D\]", (1, o, o[0, 0], o)),
        (ValueError, "grad must be like o1", (1, o, o, o[:2])),
        (ValueError, "o0 must be like o1", (1, o[:, :1], o, o)),
        (ValueError, "groups must be 3 integers", (1, o, o, o, [0, 1])),
        (ValueError, "groups must be 3 integers", (1, o, o, o, [0.0, 1.0, 1.0])),
        (ValueError, "loss must be a scalar", (1, o, o, o, None, torch.ones(2))),
        (TypeError, "a seed must be an int", (1.0, o, o, o)),
        (ValueError, "a seed must fit", (1 << 64, o, o, o)),
    ]
    for error, match, arguments in bad_calls:
        with pytest.raises(error, match=match):
            got.step(*arguments)
    assert len(got) == 0
    got.step((1 << 64) - 1, o, 2 * o, o)  # this is -1 as a signed number
    for match, arguments in (
        ("without groups", (1, o, o, o, [0, 1, 2])),
        ("width 4", (1, o[..., :3], o[..., :3], o[..., :3])),
    ):
        with pytest.raises(ValueError, match=match):
            got.step(*arguments)
    assert len(got) == 1
    seeds, coefs = got.step(5, None, o, o)
    assert seeds.tolist() == [-1, 5] and coefs.tolist() == [24000, 24000]  # 3 * 2 * 4 / eps


@needs_native
def test_op_protects_memory():
    """The C++ op itself refuses arguments with which it would read or write outside a tensor."""
    o = torch.zeros(2, 1, 4)
    state = [
        torch.zeros(3, 2, 1, 4),
        torch.zeros(3).long(),
        torch.zeros(3, 2).long(),
        torch.zeros(3, 2).int(),
    ]
    good = [*state, torch.tensor(0), None, o, o, None, None, 1, 0, 1, 1.0, 1.0]
    torch.ops.pseuzo.window_step(*good)
    replacements = {
        0: state[0].double(),
        1: state[1][:2],
        2: state[2][:, :1],
        3: state[3].long(),
        4: torch.zeros(1).long(),
        5: o[:1],
        6: torch.zeros(3, 1, 4),
        7: torch.zeros(2, 1, 8)[..., ::2],
        8: torch.zeros(3).long(),
        9: torch.zeros(2),
        11: 3,
        12: 4,
    }
    for at, value in replacements.items():
        with pytest.raises(RuntimeError, match="window_step: "):
            torch.ops.pseuzo.window_step(*good[:at], value, *good[at + 1 :])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("difference", [False, True])
def test_opcheck(grouped, with_loss, difference):
    generator = torch.Generator().manual_seed(8)
    o0, o1, grad = draw(generator, 3, 2, 4)
    counts = torch.tensor([[1, 1, 1]] * 4, dtype=torch.int32)
    state = [
        torch.randn(4, 3, 2, 4, generator=generator),
        torch.arange(4),
        torch.arange(3).repeat(4, 1),
        counts,
        torch.tensor(0),
    ]
    group = torch.tensor([1, 1, 0]) if grouped else None
    loss = torch.tensor(1.0) if with_loss else None
    args = (*state, None if difference else o0, o1, grad, group, loss, 9, 1, 3, 0.5, 1e-2)
    torch.library.opcheck(pseuzo_kernels.EmaWindow._op, args)
