"""On a GPU, public functions and optimizers give CUDA tensors the bits of the CPU."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import LABELS, MAKERS, run_steps
from pseuzo import CausalLMObjective, Journal, MeZO, PseuZO, perturbed, replay
from pseuzo.perturb.module import known_passes
from tiny_models import Tied, batch_of, causal_lm

import pseuzo_kernels as pk
from pseuzo_kernels import NOISES, reference
from pseuzo_kernels.ops import RepeatedPerturb

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("noise", ["hadamard", "hadamard-fp16", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_functions_give_the_bits_of_the_cpu(noise, dtype):
    sizes = (0, 1, 127, 2047, 2048, 2049, 5000, 8192, 300_000)
    host = [torch.randn(n).to(dtype) for n in sizes]
    device = [x.cuda() for x in host]
    for xs in (host, device):
        where = xs[0].device
        pk.perturb_(xs, 3, 0.5, noise=noise)
        pk.update_(
            xs,
            torch.arange(14, device=where),
            torch.linspace(-1, 1, 14, device=where),
            lr=0.3,
            noise=noise,
            weight_decay=0.1,
            rounding="stochastic",
            rounding_seed=2,
            noise_scale=0.7,
        )
        pk.restore_(xs[6][3:], 3, 0.5, noise=noise, rounding="stochastic", rounding_seed=4)
        xs.append(
            pk.add_noise(xs[6], list(range(1024)), [0.01] * 1024, 2**32 - 1, keep=0.5, noise=noise)
        )
        xs.append(pk.noise((3, 1000), -1, 5, dtype=dtype, noise=noise, device=where))
        out = torch.empty_like(xs[6])
        options = dict(keep=0.3, noise=noise, noise_scale=0.0)
        xs.append(pk.add_noise(xs[6], 1, 0.5, 2, **options, out=out))
    for h, d in zip(host, device, strict=True):
        assert torch.equal(h, d.cpu())


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("K", [1, 14])
def test_a_skipped_op_changes_no_bit_and_does_not_wait(noise, K):
    xs = [torch.randn(n, device="cuda").to(dtype) for n in (5000, 8193) for dtype in DTYPES]
    xs[0][:2] = torch.tensor([-0.0, float("nan")])
    seeds, coefs = torch.arange(K, device="cuda"), torch.ones(K, device="cuda")
    before, skipped = [x.clone() for x in xs], torch.zeros(1, device="cuda")
    kwargs = dict(lr=0.1, weight_decay=0.5, noise=noise, rounding="stochastic", rounding_seed=2)
    not_found = torch.zeros(1, device="cuda")
    pk.update_([x.clone() for x in xs], seeds, coefs, **kwargs, found_inf=not_found)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for factor, found in ((float("nan"), 0.0), (float("inf"), 0.0), (1.0, 1.0)):
            found_inf = torch.full((1,), found, device="cuda")
            pk.update_(xs, seeds, coefs * factor, **kwargs, found_inf=found_inf)
            skipped += found_inf
        pk.update_(xs, seeds, coefs * float("nan"), **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert skipped == 3
    assert all(
        torch.equal(x.view(torch.uint8), was.view(torch.uint8))
        for x, was in zip(xs, before, strict=True)
    )


def test_normal_is_close():
    z = pk.noise((1 << 20,), 3, 1, noise="normal", device="cuda").cpu()
    want = reference.noise((1 << 20,), 3, 1, noise="normal")
    assert (z - want).abs().max() < 5e-5  # the error of lg2.approx near 1
    far = want.abs() > 0.1
    assert ((z - want)[far].abs() < 4e-6).float().mean() > 0.999


def test_large_tensor_beyond_32_bit_offsets():
    n = (1 << 31) + 5000
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 10 GB of GPU memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    pk.perturb_(x, 1, 1.0)
    assert (x[-5000:] != 0).float().mean() > 0.99
    chunk = n // 2048 * 2048
    q, elements = reference.columns_of_chunks(n // 2048, n // 2048 + 1, torch.device("cpu"))
    z = reference.noise_sum(
        "hadamard", q, 0, reference.hash_seeds(torch.tensor([1])), torch.ones(1), 1.0
    )
    want = z[elements < n].to(torch.bfloat16)
    assert torch.equal(x[chunk:].cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbed_forward_equals_perturbed_weights(dtype):
    model = causal_lm("opt").to(dtype).cuda().eval()
    batch = {k: v.cuda() for k, v in batch_of().items()}
    before = [p.detach().clone() for p in model.parameters()]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    # Launches are rebuilt once the watch has turned itself off, and for each stream.
    for seed in range(10):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for i, p in enumerate(other.parameters()):
                pk.perturb_([p], seed, 1e-2, streams=[i])
        stream = streams[seed >= 6]
        stream.wait_stream(streams[0])
        with torch.cuda.stream(stream), torch.no_grad():
            with perturbed(model, seed, 1e-2):
                got = model(**batch).logits
            assert torch.equal(got, other(**batch).logits)
        torch.cuda.synchronize()
    assert known_passes(model).settled("any")
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_repeated_launches_are_those_of_the_op(noise, dtype):
    sizes, scales = (1, 2048, 5000, 130_000), [1.0, 0.5, 2.0, -1.0]
    xs = [torch.randn(n, device="cuda").to(dtype) for n in sizes]
    # One of the tensors is not aligned.
    outs = [torch.empty(n + 1, device="cuda", dtype=dtype)[n % 3 == 2 :][:n] for n in sizes]
    seeds, coefs = torch.empty(1, dtype=torch.int64, device="cuda"), torch.empty(1, device="cuda")
    perturb = RepeatedPerturb(xs, seeds, coefs, [3, 0, 7, 9], scales, noise, outs)
    for seed in range(3):
        seeds.fill_(seed)
        coefs.fill_(0.25 + seed)
        for x in xs:
            x += 1  # in place
        perturb()
        want = [torch.empty_like(x) for x in xs]
        torch.ops.pseuzo.add_noise_list_out(
            xs, seeds, coefs, [3, 0, 7, 9], [1.0] * 4, scales, noise, False, 0, None, out=want
        )
        assert all(torch.equal(y, w) for y, w in zip(outs, want, strict=True))


def recorded(opt) -> list[bool]:
    """Return for each kind of step that was made whether it is recorded as graphs."""
    return [not isinstance(known, int) for known in opt.passes._graphs._steps.values()]


def steps(opt, objective, device, n):
    losses = []
    for t in range(n):
        batch = {k: v.to(device) for k, v in {**batch_of(seed=t), "labels": LABELS}.items()}
        forward, head = objective(batch)
        if isinstance(opt, PseuZO):
            losses.append(opt.step(forward, head, groups=batch["labels"]))
        else:
            losses.append(opt.step(lambda f=forward, h=head: h(f())))
    return torch.stack(losses).cpu()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2),
        lambda m: MeZO(m, 1e-3, 1e-2, seed=2),
        lambda m: PseuZO(m.parameters(), 1e-3, 1e-2, 3, 0.9, 0.1, seed=2),
    ],
)
def test_optimizers_follow_the_cpu(make):
    model = causal_lm("opt").eval()
    twin = copy.deepcopy(model).cuda()
    host = steps(make(model), CausalLMObjective(model, [17, 4]), "cpu", 4)
    device = steps(make(twin), CausalLMObjective(twin, [17, 4]), "cuda", 4)
    # Matrix products round differently, so outputs about 1 have an error of 1e-6. It is divided by
    # eps and multiplied by lr, in four steps.
    torch.testing.assert_close(device, host, rtol=0, atol=1e-3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=0, atol=2e-3)


def test_a_step_does_not_wait_for_the_device():
    model = Tied().cuda().eval()
    ids = torch.randint(0, 300, (4, 5)).cuda()
    groups = torch.tensor([0, 1, 1, 0]).cuda()
    for opt in (
        PseuZO(model, 1e-4, 1e-2),
        MeZO(model, 1e-4, 1e-2),
        PseuZO(model.parameters(), 1e-4, 1e-2),
        PseuZO(model, 1e-4, 1e-2, window=3, clip_examples=2.0),
        MeZO(model, 1e-4, 1e-2, directions=2, momentum=0.5, window=3, clip_examples=2.0),
    ):

        def step(opt=opt):
            if isinstance(opt, PseuZO):
                return opt.step(lambda: model(ids), lambda o: o.square().mean(1), groups=groups)
            return opt.step(lambda: model(ids).square().mean(1))

        for _ in range(3):  # these steps compile, learn the model and make its tables
            step()
        torch.cuda.synchronize()
        memory = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() <= memory + 4096, "memory grows with the steps"


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("make", [PseuZO, MeZO])
def test_a_step_of_a_transformer_does_not_wait_for_the_device(make, kind, padding, capture):
    model = causal_lm(kind).cuda().eval()
    labels = LABELS.cuda()
    batch = {k: v.cuda() for k, v in batch_of().items() if padding or k != "attention_mask"}
    forward, head = CausalLMObjective(model, [17, 4])({**batch, "labels": labels})
    closure = lambda: head(forward())  # noqa: E731
    opt = make(model, 1e-4, 1e-2, capture=capture)
    step = partial(opt.step, closure)
    if make is PseuZO:
        step = partial(opt.step, forward, head, groups=labels)
    for _ in range(6):
        step()
    if capture:
        assert all(recorded(opt)), "not every kind of step was recorded"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_cuda_graphs_give_the_same_bits(make, padding):
    model = causal_lm("opt").to(torch.bfloat16).cuda().eval()
    twin = copy.deepcopy(model)
    want = run_steps(make(model), model, 10, (12, 9), padding=padding)
    opt = make(twin, capture=True)
    got = run_steps(opt, twin, 10, (12, 9), padding=padding)
    assert any(recorded(opt)), "nothing was recorded"
    assert torch.equal(got, want)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_capture_that_fails_leaves_the_gpu_as_it_was():
    model = causal_lm("opt").cuda().eval()
    batch = {k: v.cuda() for k, v in {**batch_of(), "labels": LABELS}.items()}
    forward, head = CausalLMObjective(model, [17, 4])(batch)
    opt, waits = MeZO(model, 1e-4, 1e-2, capture=True), [1.0]

    def closure():
        loss = head(forward())
        return loss * sum(float(loss.detach() < 1e9) for _ in waits) / len(waits) if waits else loss

    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"cannot hold.*leave capture off"):
        for _ in range(6):
            opt.step(closure)
    assert torch.cuda.current_stream() == before
    assert torch.rand(1, device="cuda") >= 0  # the generator is not in a capture
    waits.clear()
    losses = torch.stack(
        [opt.step(lambda: closure()) for _ in range(3)] + [opt.step(closure) for _ in range(6)]
    )
    assert losses.isfinite().all() and any(recorded(opt))


def test_rows_out_of_range_are_an_error():
    """The error is the device's, as in torch's embedding: the process cannot use the device after
    it, so it is raised in another process."""
    code = """
import torch, pseuzo_kernels
x, coefs = torch.ones(40, 128, device="cuda"), torch.ones(1).cuda()
seeds = torch.ones(1, dtype=torch.int64).cuda()
for wrong in ([39, 0], [3, 40]):
    torch.ops.pseuzo.add_noise_rows(x, torch.tensor(wrong).cuda(), seeds, coefs, 0, 1.0, "hadamard")
    torch.cuda.synchronize()
    print("fine", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("fine") == 1 and done.returncode != 0, done.stderr[-2000:]
    assert "an index is out of range" in done.stdout + done.stderr
    assert "device-side assert" in done.stderr


def test_state_dict_resumes_to_the_bit():
    model = causal_lm("opt").to(torch.bfloat16).cuda().eval()
    opt = PseuZO(model, 1e-3, 1e-2, 3, 0.9, seed=2)
    steps(opt, CausalLMObjective(model, [17, 4]), "cuda", 5)
    twin = copy.deepcopy(model)
    again = PseuZO(twin, 1e-3, 1e-2, 3, 0.9, seed=2)
    again.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, again)):
        steps(o, CausalLMObjective(m, [17, 4]), "cuda", 5)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("run_on, replay_on", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_replay_on_another_device(run_on, replay_on, tmp_path):
    """Each of 50 steps must leave the same bits, since otherwise all later steps differ."""
    model = causal_lm("opt").to(torch.bfloat16).eval()
    base = copy.deepcopy(model).to(replay_on)
    model.to(run_on)
    opt = PseuZO(model, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2)
    with Journal(tmp_path / "run.pzj", opt):
        assert steps(opt, CausalLMObjective(model, [17, 4]), run_on, 50).isfinite().all()
    assert replay(tmp_path / "run.pzj", base) == 50
    assert all(
        torch.equal(p.cpu(), q.cpu())
        for p, q in zip(model.parameters(), base.parameters(), strict=True)
    )
