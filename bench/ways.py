"""Defines the ways of making a training step that bench_steps.py times."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import captured
from opt_models import LABEL_WORDS
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from published import EPS, LR, WINDOW, PublishedMeZO, PublishedPseuZO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pseuzo_kernels import EmaWindow, perturb_, reference, update_

DOUBLED = "one forward of twice the rows"
WAYS = ("ours", "published", "backward")
# A way prepares each part, then yields its name, the call to time, and maybe its number of
# launches.
Parts = Iterator[tuple]


class Made(TorchDispatchMode):
    """Records each call of our ops, which in a perturbed pass are those that make its weights."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pseuzo":
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def perturb_alone(perturbed_forward: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """Return a function that makes the launches by which a perturbed pass makes its weights, into
    the same memory, and their number."""
    for _ in range(3):  # these passes find which weights are made together
        perturbed_forward()
    with Made() as made:
        perturbed_forward()

    def call() -> None:
        with torch.no_grad():
            for again in made.calls:
                again()

    return call, len(made.calls)


def check(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Check, to the bit, that a perturbed forward is the forward of perturbed weights, and that an
    update is the reference's."""
    params = list(model.parameters())
    on_cpu = params[0].device.type == "cpu"
    room = on_cpu or 2.2 * sum(p.nbytes for p in params) < torch.cuda.mem_get_info()[1]
    before = [p.detach().clone() if room else p.detach().cpu() for p in params]
    with torch.no_grad():
        with perturbed(model, 3, EPS):
            got = forward()
        kept = (torch.equal(p, was.to(p.device)) for p, was in zip(params, before, strict=True))
        assert all(kept), "a forward wrote to the weights"
        perturb_(params, 3, EPS)
        assert torch.equal(forward(), got), "the perturbed forward is not that of perturbed weights"
        some = params[2].view(-1)[:5000].cpu()
        seeds, coefs = list(range(WINDOW)), [0.5 + k for k in range(WINDOW)]
        options = dict(lr=1e-3, rounding="stochastic", rounding_seed=3)
        update_(params, seeds, coefs, **options)
        reference.update_(some, seeds, coefs, streams=[2], **options)
        same = torch.equal(params[2].view(-1)[:5000].cpu(), some)
        assert same, "the update differs from the reference"
        for p, was in zip(params, before, strict=True):
            p.copy_(was)


def ways(
    model: nn.Module, batch: dict[str, Tensor], checked: bool, kinds: tuple[str, ...] = WAYS
) -> dict[str, Callable[[], Parts]]:
    """Return the ways of making a step, by name: inference and those of these kinds.

    A way is dropped with all that it holds before the next is made. checked: whether the forwards
    and the update are known to be right; if not, they are compared first."""
    case = Case(model, batch)
    if not checked:
        check(model, case.forward)
    case.compare_losses()
    graphs = batch["labels"].device.type == "cuda"
    found = {"inference": case.inference}
    if graphs:
        found["inference, captured"] = case.captured_inference
    if "ours" in kinds:
        found["pseuzo PseuZO"] = case.pseuzo
        if graphs:
            found["pseuzo PseuZO, captured"] = partial(case.pseuzo, capture=True)
        found["pseuzo MeZO"] = case.mezo
        if graphs:
            found["pseuzo MeZO, captured"] = partial(case.mezo, capture=True)
    if "published" in kinds:
        found["MeZO as published"] = case.published_mezo
        found["PseuZO as published"] = case.published_pseuzo
    if "backward" in kinds:
        for kind in (torch.optim.SGD, torch.optim.Adam):
            found[f"FO {kind.__name__}"] = partial(case.first_order, kind)
    return found


class Case:
    """A model and a batch, and each way of making a step on them."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]):
        self.model, self.batch = model, batch
        self.ids, self.labels = batch["input_ids"], batch["labels"]
        self.params, self.groups = list(model.parameters()), self.labels.cpu()
        self.forward, self.head = CausalLMObjective(model, LABEL_WORDS)(batch)

    def compare_losses(self) -> None:
        """Store the loss on which all ways must agree. AssertionError if they do not."""
        dtype = self.params[0].dtype
        # Logits are below 4, and are rounded.
        self.close = dict(rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-5)
        with torch.no_grad():
            self.want = self.loss()
            others = self.published_loss(), self.published_head(self.published_output())
        for other in others:
            torch.testing.assert_close(other, self.want, **self.close)

    def loss(self) -> Tensor:
        return self.head(self.forward())

    def published_loss(self) -> Tensor:
        """Return the loss from the logits of all tokens, as the published code computes it."""
        logits = self.model(self.ids).logits[:, -1, LABEL_WORDS]
        return F.cross_entropy(logits.float(), self.labels)

    def published_output(self) -> Tensor:
        return self.model.model(self.ids).last_hidden_state

    def published_head(self, o: Tensor) -> Tensor:
        logits = self.model.lm_head(o)[:, -1, LABEL_WORDS]
        return F.cross_entropy(logits.float(), self.labels)

    @torch.no_grad()
    def two_forwards(self) -> None:
        self.loss(), self.loss()

    @torch.no_grad()
    def plain_forward(self) -> None:
        self.forward()

    @torch.no_grad()
    def perturbed_forward(self) -> None:
        with perturbed(self.model, 3, EPS):
            self.forward()

    def inference(self) -> Parts:
        yield "two forwards", self.two_forwards
        twice = {k: torch.cat([x, x]) for k, x in self.batch.items()}
        forward, head = CausalLMObjective(self.model, LABEL_WORDS)(twice)

        @torch.no_grad()
        def both_at_once() -> None:
            head(forward())

        yield DOUBLED, both_at_once

    def captured_inference(self) -> Parts:
        yield "two forwards", captured(self.two_forwards)

    def pseuzo(self, **options) -> Parts:
        # With a rate of 0 the weights stay until the losses have been compared.
        opt = PseuZO(self.model, 0.0, EPS, WINDOW, **options)
        step = partial(opt.step, self.forward, self.head, groups=self.groups)
        for _ in range(WINDOW):
            torch.testing.assert_close(step(), self.want, **self.close)
        opt.param_groups[0]["lr"] = LR
        yield "step", step
        if not options:
            yield from self.parts_of_pseuzo()

    def parts_of_pseuzo(self) -> Parts:
        yield "forward", self.plain_forward
        yield "perturbed forward", self.perturbed_forward
        yield "perturb", *perturb_alone(self.perturbed_forward)
        with torch.no_grad():
            o = self.forward()
        leaf = o.detach().clone().requires_grad_()
        yield "head", lambda: torch.autograd.grad(self.head(leaf), leaf)
        window = EmaWindow(WINDOW, eps=EPS)
        for seed in range(WINDOW):
            seeds, coefs = window.step(seed, o, o, o, self.groups)
        yield "window", partial(window.step, 1, o, o, o, self.labels)
        options = dict(lr=LR, rounding="stochastic", rounding_seed=3)
        yield "update", partial(update_, self.params, seeds, coefs, **options)

    def mezo(self, **options) -> Parts:
        opt = MeZO(self.model, LR, EPS, **options)
        for _ in range(3):
            opt.step(self.loss)
        yield "step", partial(opt.step, self.loss)

    def published_mezo(self) -> Parts:
        way = PublishedMeZO(self.model)
        yield "step", partial(way.step, self.published_loss, 1)

    def published_pseuzo(self) -> Parts:
        with torch.no_grad():
            way = PublishedPseuZO(self.model, self.published_output())
        yield "step", partial(way.step, self.published_output, self.published_head, 1)

    def first_order(self, kind: type[torch.optim.Optimizer]) -> Parts:
        opt = kind(self.params, lr=LR)

        def step() -> None:
            opt.zero_grad()
            self.published_loss().backward()
            opt.step()

        yield "step", step
