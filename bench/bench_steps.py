"""Training steps of OPT models at random initialisation, beside what people run today.

python bench/bench_steps.py [--model opt-125m ...] [--tokens 64 256] [--rows 16] [--dtype bfloat16] [--device cuda|cpu]
    [--ways ours published backward] [--no-check]

Parts whose work is ours are timed on the GPU alone; steps and forwards as they are, with their Python.
"two forwards" is the floor: inference, and nothing else; "captured" is with the passes recorded as CUDA graphs, the
floor too. "one forward of twice the rows" is the least that the clean and the perturbed pass could cost if they ran as
one. pseuzo's step is also timed in parts, of which "perturb" is what a perturbed pass launches to make its weights, all
of it, and no forward. The published ways are written here after what that code does: MeZO makes three passes
over the weights to perturb and restore them and one to update, each with torch.normal after a reseed, and rebinds the
weights; PseuZO perturbs, restores and makes one pass per entry of its window, with a number fetched from the device for
each (weight decay left out, and the output head runs once, where that code runs it twice). FO: backward through the
model. peak_gb: what torch allocated on the GPU at most during a call. reserved_gb: what torch held of the GPU at most
since the way began; that counts the memory of graphs, which is allocated only while they are recorded. device_gb: what
was in use on the GPU after a call, by whomever. ops: operations in a call that compute something, about the launches
(of "perturb": launches); syncs: numbers that Python waits for (two of ours on a CPU are from pinned memory on a GPU,
and wait for nothing).
"""

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import MODELS, QUANTILES, Table, captured, floor_of, parser
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.perturb.module import forget_passes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, OPTForCausalLM

from pseuzo_kernels import EmaWindow, perturb_, reference, update_

LABEL_WORDS = [17, 4]
DOUBLED = "one forward of twice the rows"
LR, EPS, WINDOW = 1e-7, 1e-3, 14
COLUMNS = (
    "model", "params", "dtype", "rows", "tokens", "impl", "part", *QUANTILES, "peak_gb", "ops", "syncs", "reserved_gb",
    "device_gb",
)  # fmt: skip
WAYS = ("ours", "published", "backward")
Parts = Iterator[
    tuple
]  # a name, what to time, after what it needs was made, and maybe how many launches that is


def make_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layers, width, heads, embedding = MODELS[name]
    config = OPTConfig(
        vocab_size=1000 if name == "tiny" else 50272, hidden_size=width, num_hidden_layers=layers, ffn_dim=4 * width,
        num_attention_heads=heads, word_embed_proj_dim=embedding, do_layer_norm_before=name != "opt-350m",
        max_position_embeddings=2048, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_batch(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    device = model.lm_head.weight.device
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), device=device)
    return {"input_ids": ids, "labels": torch.arange(rows, device=device) % 2}


class Count(TorchDispatchMode):
    """Counts the operations that compute something, and those that wait for a number."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.ops, self.syncs = device, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        self.ops += not view and "empty" not in func.__name__
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.syncs += args[0].device.type == self.device.type
        return func(*args, **(kwargs or {}))


class PublishedMeZO:
    """x + eps z, x - eps z, x, and the update, each a loop over the weights with fresh normals."""

    def __init__(self, model: nn.Module):
        self.params = [p for p in model.parameters() if p.requires_grad]

    def shift(self, seed: int, factor: float, size: float) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
            p.data = p.data + factor * z * size

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor], seed: int) -> None:
        self.shift(seed, 1, EPS)
        plus = loss().item()
        self.shift(seed, -2, EPS)
        minus = loss().item()
        self.shift(seed, 1, EPS)
        self.shift(seed, (plus - minus) / (2 * EPS), -LR)


class PublishedPseuZO(PublishedMeZO):
    """A list of seeds and output changes of all positions, and a pass over the weights for each of them."""

    def __init__(self, model: nn.Module, output: Tensor):
        super().__init__(model)
        self.window = [(seed, torch.zeros_like(output)) for seed in range(WINDOW)]

    def step(
        self, output: Callable[[], Tensor], head: Callable[[Tensor], Tensor], seed: int
    ) -> None:
        with torch.no_grad():
            o0 = output()
        o = o0.clone().requires_grad_()
        (e,) = torch.autograd.grad(head(o), o)
        with torch.no_grad():
            self.shift(seed, 1, EPS)
            change = output() - o0
            self.shift(seed, -1, EPS)
            self.window = [*self.window[1:], (seed, change)]
            for old_seed, old in self.window:
                self.shift(old_seed, (old * e).sum().item() / EPS, -LR)


class Made(TorchDispatchMode):
    """Notes each call of our ops: in a perturbed pass, those that make its weights."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pseuzo":
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def perturb_alone(perturbed_forward: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """What a perturbed pass launches to make its weights, into the same memory, and how many launches that is."""
    for _ in range(3):  # from then on it is known which weights are made together
        perturbed_forward()
    with Made() as made:
        perturbed_forward()

    def call() -> None:
        with torch.no_grad():
            for again in made.calls:
                again()

    return call, len(made.calls)


def check(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """A perturbed forward is the forward of perturbed weights; an update is the reference's; both to the bit."""
    params = list(model.parameters())
    room = (
        params[0].device.type == "cpu"
        or 2.2 * sum(p.nbytes for p in params) < torch.cuda.mem_get_info()[1]
    )
    before = [p.detach().clone() if room else p.detach().cpu() for p in params]
    with torch.no_grad():
        with perturbed(model, 3, EPS):
            got = forward()
        assert all(
            torch.equal(p, was.to(p.device)) for p, was in zip(params, before, strict=True)
        ), "a forward wrote"
        perturb_(params, 3, EPS)
        assert torch.equal(forward(), got), "the perturbed forward is not that of perturbed weights"
        some = params[2].view(-1)[:5000].cpu()
        seeds, coefs = list(range(WINDOW)), [0.5 + k for k in range(WINDOW)]
        update_(params, seeds, coefs, lr=1e-3, rounding="stochastic", rounding_seed=3)
        reference.update_(
            some, seeds, coefs, lr=1e-3, streams=[2], rounding="stochastic", rounding_seed=3
        )
        assert torch.equal(params[2].view(-1)[:5000].cpu(), some), (
            "the update differs from the reference"
        )
        for p, was in zip(params, before, strict=True):
            p.copy_(was)


def ways(
    model: nn.Module, batch: dict[str, Tensor], checked: bool, kinds: tuple[str, ...] = WAYS
) -> dict[str, Callable[[], Parts]]:
    """The ways to make a step, by name: inference and those of some kinds. Each is gone with all that it holds before
    the next is made. checked: the forwards and the update are known to be right."""
    forward, head = CausalLMObjective(model, LABEL_WORDS)(batch)
    ids, labels, params = batch["input_ids"], batch["labels"], list(model.parameters())
    groups = labels.cpu()

    def loss() -> Tensor:
        return head(forward())

    def published_loss() -> Tensor:  # logits of all tokens, as the published code has them
        return F.cross_entropy(model(ids).logits[:, -1, LABEL_WORDS].float(), labels)

    def published_output() -> Tensor:
        return model.model(ids).last_hidden_state

    def published_head(o: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(o)[:, -1, LABEL_WORDS].float(), labels)

    def two_forwards() -> None:
        with torch.no_grad():
            loss(), loss()

    def inference() -> Parts:
        yield "two forwards", two_forwards
        forward, head = CausalLMObjective(model, LABEL_WORDS)(
            {k: torch.cat([x, x]) for k, x in batch.items()}
        )

        @torch.no_grad()
        def both_at_once() -> None:
            head(forward())

        yield DOUBLED, both_at_once

    def perturbed_forward() -> None:
        with torch.no_grad(), perturbed(model, 3, EPS):
            forward()

    def plain_forward() -> None:
        with torch.no_grad():
            forward()

    if not checked:
        check(model, forward)
    with torch.no_grad():
        close = dict(
            rtol=0, atol=4 * torch.finfo(params[0].dtype).eps + 1e-5
        )  # logits below 4, rounded
        want = loss()
        for other in (published_loss(), published_head(published_output())):
            torch.testing.assert_close(other, want, **close)

    def pseuzo(**options) -> Parts:
        opt = PseuZO(
            model, 0.0, EPS, WINDOW, **options
        )  # the weights stay until the losses have been compared
        for _ in range(WINDOW):
            torch.testing.assert_close(opt.step(forward, head, groups=groups), want, **close)
        opt.param_groups[0]["lr"] = LR
        yield "step", lambda: opt.step(forward, head, groups=groups)
        if options:
            return
        yield "forward", plain_forward
        yield "perturbed forward", perturbed_forward
        yield "perturb", *perturb_alone(perturbed_forward)
        with torch.no_grad():
            o = forward()
        leaf = o.detach().clone().requires_grad_()
        yield "head", lambda: torch.autograd.grad(head(leaf), leaf)
        window = EmaWindow(WINDOW, eps=EPS)
        for seed in range(WINDOW):
            seeds, coefs = window.step(seed, o, o, o, groups)
        yield "window", lambda: window.step(1, o, o, o, labels)
        yield (
            "update",
            lambda: update_(params, seeds, coefs, lr=LR, rounding="stochastic", rounding_seed=3),
        )

    def mezo(**options) -> Parts:
        opt = MeZO(model, LR, EPS, **options)
        for _ in range(3):
            opt.step(loss)
        yield "step", lambda: opt.step(loss)

    def published_mezo() -> Parts:
        way = PublishedMeZO(model)
        yield "step", lambda: way.step(published_loss, 1)

    def published_pseuzo() -> Parts:
        with torch.no_grad():
            way = PublishedPseuZO(model, published_output())
        yield "step", lambda: way.step(published_output, published_head, 1)

    def first_order(kind: type[torch.optim.Optimizer]) -> Parts:
        opt = kind(params, lr=LR)

        def step() -> None:
            opt.zero_grad()
            published_loss().backward()
            opt.step()

        yield "step", step

    graphs = labels.device.type == "cuda"
    ours = {
        "pseuzo PseuZO": pseuzo,
        **({"pseuzo PseuZO, captured": lambda: pseuzo(capture=True)} if graphs else {}),
        "pseuzo MeZO": mezo,
        **({"pseuzo MeZO, captured": lambda: mezo(capture=True)} if graphs else {}),
    }
    published = {"MeZO as published": published_mezo, "PseuZO as published": published_pseuzo}
    backward = {
        f"FO {kind.__name__}": partial(first_order, kind)
        for kind in (torch.optim.SGD, torch.optim.Adam)
    }
    return {
        "inference": inference,
        **(
            {"inference, captured": lambda: iter([("two forwards", captured(two_forwards))])}
            if graphs
            else {}
        ),
        **(ours if "ours" in kinds else {}),
        **(published if "published" in kinds else {}),
        **(backward if "backward" in kinds else {}),
    }


def measure(table: Table, name: str, args: argparse.Namespace) -> bool:
    """Rows of a model; a way that does not fit leaves a row that says so. False if one failed for another reason."""
    dtype, gpu, fine = getattr(torch, args.dtype), table.device.type == "cuda", True
    common = dict(model=name, dtype=args.dtype, rows=args.rows)

    def does_not_fit(tokens: int, impl: str, part: str) -> None:
        table.add(**common, tokens=tokens, impl=impl, part=f"{part}: does not fit")

    try:
        model = make_model(name, dtype, table.device)
        common["params"] = sum(p.numel() for p in model.parameters())
    except torch.cuda.OutOfMemoryError:
        does_not_fit(max(args.tokens), "inference", "setup")
        return fine
    for i, tokens in enumerate(args.tokens):
        torch.manual_seed(tokens)
        floors, memory = {}, {}
        try:
            batch = make_batch(model, args.rows, tokens)
            todo = ways(model, batch, args.no_check or i > 0, args.ways)
        except torch.cuda.OutOfMemoryError:
            does_not_fit(tokens, "inference", "setup")
            continue
        for impl, way in todo.items():
            part, whole = "setup", {"step", "two forwards"}
            gc.collect()
            if gpu:  # what others left is no part of what this way needs
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                for part, call, *launches in way():
                    call()
                    row = dict(zip(("ops",), launches, strict=False))
                    if gpu:
                        torch.cuda.synchronize()
                        row["reserved_gb"] = (
                            torch.cuda.max_memory_reserved() / 1e9
                        )  # before others are timed
                        torch.cuda.reset_peak_memory_stats()
                    if part in whole and "captured" not in impl and "FO" not in impl:
                        with Count(table.device) as count:
                            call()
                        row |= dict(ops=count.ops, syncs=count.syncs)
                    elif gpu:
                        call()
                    if gpu:
                        torch.cuda.synchronize()
                        if "captured" not in impl:  # a graph allocates when it is recorded
                            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                        free, total = torch.cuda.mem_get_info()
                        row["device_gb"] = (total - free) / 1e9
                    row |= table.time(call, kernel=part in ("perturb", "window", "update"))
                    table.add(**common, tokens=tokens, impl=impl, part=part, **row)
                    step, kind = row["ms_p50"], "reserved_gb" if "captured" in impl else "peak_gb"
                    if part == "two forwards":
                        floors[impl] = step
                        memory = memory or row
                    elif floor := part == "step" and floors.get(floor_of(impl)):
                        more = (
                            f", {row[kind] / memory[kind]:.3f} times the memory of inference"
                            if gpu
                            else ""
                        )
                        print(
                            f"    -> {step - floor:.3f} ms beyond two forwards, {step / floor:.2f} times them{more}"
                        )
            except torch.cuda.OutOfMemoryError:
                does_not_fit(tokens, impl, part)
            except Exception:
                traceback.print_exc()
                fine = False
            call = None
            forget_passes(model)  # frees their scratch
            model.zero_grad(set_to_none=True)
    return fine


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "--model", nargs="*", choices=MODELS, help="default: tiny on a CPU, all others on a GPU"
    )
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--tokens", type=int, nargs="*", default=[64, 256])
    p.add_argument(
        "--ways", nargs="*", choices=WAYS, default=WAYS, help="beside inference; default: all"
    )
    args = p.parse_args()
    table, fine = Table("steps", args, COLUMNS), True
    for name in args.model or (
        ["tiny"] if table.device.type == "cpu" else list(MODELS)[1:]
    ):  # the largest last
        fine &= measure(table, name, args)
        gc.collect()
        if table.device.type == "cuda":
            torch.cuda.empty_cache()
    sys.exit(not fine)


if __name__ == "__main__":
    main()
