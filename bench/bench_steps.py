"""Training steps of OPT models at random initialisation, beside what people run today.

python bench/bench_steps.py [--model opt-125m ...] [--tokens 64 256] [--rows 16] [--dtype bfloat16] [--device cuda|cpu]

pseuzo's steps are also timed in parts; "two forwards" is the floor: inference, and nothing else. The other ways are
written here after what the published code does: MeZO perturbs in place, three times a step, with torch.normal after a
reseed; PseuZO makes one such pass per entry of its window, and fetches a number from the device for each. FO: backward
through the model. Memory: the peak of what torch allocated on the GPU during a call.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import QUANTILES, Table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from transformers import OPTConfig, OPTForCausalLM

from pseuzo_kernels import EmaWindow, perturb_, reference, update_

# layers, width, heads, width of the embedding
MODELS = {
    "tiny": (2, 64, 4, 64), "opt-125m": (12, 768, 12, 768), "opt-350m": (24, 1024, 16, 512),
    "opt-1.3b": (24, 2048, 32, 2048), "opt-2.7b": (32, 2560, 32, 2560), "opt-6.7b": (32, 4096, 32, 4096),
    "opt-13b": (40, 5120, 40, 5120), "opt-30b": (48, 7168, 56, 7168),
}  # fmt: skip
LABEL_WORDS = [17, 4]
LR, EPS, WINDOW = 1e-7, 1e-3, 14
COLUMNS = ("model", "params", "dtype", "rows", "tokens", "impl", "part", *QUANTILES, "peak_gb")


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
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows, device=device) % 2}


class MeZOInPlace:
    """MeZO as published: x + eps z, x - eps z, x, and the update, each a loop over the weights with fresh normals."""

    def __init__(self, model: nn.Module):
        self.params = [p for p in model.parameters() if p.requires_grad]

    def shift(self, seed: int, by: float) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            p.data.add_(torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype), alpha=by)

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor], seed: int) -> None:
        self.shift(seed, EPS)
        plus = loss().item()
        self.shift(seed, -2 * EPS)
        minus = loss().item()
        self.shift(seed, EPS)
        self.shift(seed, -LR * (plus - minus) / (2 * EPS))


class PseuZOInPlace(MeZOInPlace):
    """PseuZO as published: a list of output changes and seeds, and a pass over the weights for each of them."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.window: list[tuple[int, Tensor]] = []

    def step(self, output: Callable[[], Tensor], head: Callable[[Tensor], Tensor], seed: int) -> None:
        with torch.no_grad():
            o0 = output()
        o = o0.clone().requires_grad_()
        (e,) = torch.autograd.grad(head(o), o)
        with torch.no_grad():
            self.shift(seed, EPS)
            change = output() - o0
            self.shift(seed, -EPS)
            self.window = [*self.window[-(WINDOW - 1) :], (seed, change)]
            for old_seed, old in self.window:
                self.shift(old_seed, -LR * (old * e).sum().item() / EPS)


def check(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """A perturbed forward is the forward of perturbed weights; an update is the reference's; both to the bit."""
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        with perturbed(model, 3, EPS):
            got = forward()
        assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True)), "a forward changed the weights"
        perturb_(params, 3, EPS)
        assert torch.equal(forward(), got), "the perturbed forward is not that of perturbed weights"
        some = params[2].view(-1)[:5000].cpu()
        seeds, coefs = list(range(WINDOW)), [0.5 + k for k in range(WINDOW)]
        update_(params, seeds, coefs, lr=1e-3, rounding="stochastic", rounding_seed=3)
        reference.update_(some, seeds, coefs, lr=1e-3, streams=[2], rounding="stochastic", rounding_seed=3)
        assert torch.equal(params[2].view(-1)[:5000].cpu(), some), "the update differs from the reference"
        for p, was in zip(params, before, strict=True):
            p.copy_(was)


def ways(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """impl, part, and what to time. One at a time: what a way holds is gone before the next is made."""
    objective = CausalLMObjective(model, LABEL_WORDS)
    forward, head = objective(batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    labels, params = batch["labels"], list(model.parameters())
    groups = labels.cpu()

    def published_loss() -> Tensor:  # logits of all tokens, as the published code has them
        return F.cross_entropy(model(**inputs).logits[:, -1, LABEL_WORDS].float(), labels)

    def inference() -> None:
        with torch.no_grad():
            head(forward())

    def perturbed_forward() -> None:
        with torch.no_grad(), perturbed(model, 3, EPS):
            forward()

    def plain_forward() -> None:
        with torch.no_grad():
            forward()

    yield "inference", "two forwards", lambda: (inference(), inference())
    check(model, forward) if sum(p.numel() for p in params) < 3e9 else None

    opt = PseuZO(model, LR, EPS, WINDOW)
    for _ in range(WINDOW):
        opt.step(forward, head, groups=groups)
    yield "pseuzo PseuZO", "step", lambda: opt.step(forward, head, groups=groups)
    yield "pseuzo PseuZO", "forward", plain_forward
    yield "pseuzo PseuZO", "perturbed forward", perturbed_forward
    with torch.no_grad():
        o = forward()
    window = EmaWindow(WINDOW, eps=EPS)
    for seed in range(WINDOW):
        seeds, coefs = window.step(seed, o, o, o, groups)
    yield "pseuzo PseuZO", "window", lambda: window.step(1, o, o, o, groups)
    yield "pseuzo PseuZO", "update", lambda: update_(params, seeds, coefs, lr=LR, rounding="stochastic")
    opt = window = None
    mezo = MeZO(model, LR, EPS)
    yield "pseuzo MeZO", "step", lambda: mezo.step(lambda: head(forward()))
    mezo = None
    in_place = MeZOInPlace(model)
    yield "MeZO in place", "step", lambda: in_place.step(published_loss, 1)
    list_way = PseuZOInPlace(model)
    hidden = lambda: model.model(**inputs).last_hidden_state  # noqa: E731

    def list_head(o: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(o)[:, -1, LABEL_WORDS].float(), labels)

    def list_step() -> None:
        list_way.step(hidden, list_head, 1)

    for _ in range(WINDOW):
        list_step()
    yield "PseuZO in place", "step", list_step
    list_way = None
    for name, kind in (("FO SGD", torch.optim.SGD), ("FO Adam", torch.optim.Adam)):
        first_order = kind(params, lr=LR)

        def step(first_order=first_order) -> None:
            first_order.zero_grad()
            published_loss().backward()
            first_order.step()

        yield name, "step", step
        first_order.zero_grad()
        first_order.state.clear()


def measure(table: Table, name: str, dtype: torch.dtype, rows: int, lengths: list[int], device: torch.device) -> None:
    model = make_model(name, dtype, device)
    common = dict(model=name, params=sum(p.numel() for p in model.parameters()), dtype=str(dtype)[6:], rows=rows)
    for tokens in lengths:
        torch.manual_seed(tokens)
        impl, part, floor, todo = "setup", "", None, ways(model, make_batch(model, rows, tokens))
        while True:
            try:
                impl, part, call = next(todo)
                call()
                peak = ""
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    call()
                    peak = torch.cuda.max_memory_allocated() / 1e9
                ms = table.time(call)
            except StopIteration:
                break
            except torch.cuda.OutOfMemoryError:
                print(f"  {name} {tokens} {impl} {part}: does not fit", flush=True)
                table.add(**common, tokens=tokens, impl=impl, part=f"{part}: does not fit")
                model.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            floor = ms["ms_p50"] if floor is None else floor
            table.add(**common, tokens=tokens, impl=impl, part=part, **ms, peak_gb=peak)
            if part == "step":
                print(
                    f"    -> {ms['ms_p50'] - floor:.3f} ms beyond two forwards, {ms['ms_p50'] / floor:.2f} times them"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="*", choices=MODELS, default=None, help="default: all that fit; tiny on a CPU")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    gpu = [name for name in MODELS if name not in ("tiny", "opt-30b")]
    table = Table("steps", device, COLUMNS)
    for name in args.model or (["tiny"] if device.type == "cpu" else gpu):
        try:
            measure(table, name, getattr(torch, args.dtype), args.rows, args.tokens, device)
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: does not fit", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
