"""Optimizers with a journal, for its tests."""

import copy
import sys

import pytest
import torch
from pseuzo import CausalLMObjective, CyclicHyperbola, Journal, MeZO, PseuZO
from pseuzo.train.journal_file import read_journal
from tiny_models import batch_of, causal_lm

LABELS = torch.tensor([0, 1, 1, 0])


def same(left, right):
    return all(
        torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True)
    )


MAKERS = {
    "pseuzo": lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2),
    "fp16 sums": lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, noise="hadamard-fp16", seed=2),
    "mezo": lambda m: MeZO(
        m, 1e-3, 1e-2, weight_decay=0.1, seed=2, noise="rademacher", maximize=True
    ),
    "groups": lambda m: PseuZO(
        [
            {"params": list(m.parameters())[:3], "lr": 1e-2, "noise_scale": 0.5},
            {"params": list(m.parameters())[3:]},
        ],
        1e-3,
        1e-2,
        3,
        CyclicHyperbola(8),
        seed=2,
        rounding="nearest",
        model=m,
    ),
}


def without_head(model):
    """Return PseuZO of all weights except those of the output head."""
    body = [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    return PseuZO(body, 1e-3, 1e-2, 3, model=model)


def train(opt, model, steps, poison=()):
    objective = CausalLMObjective(model, [17, 4])
    for t in steps:
        forward, head = objective({**batch_of(seed=t), "labels": LABELS})
        factor = float("nan") if t in poison else 1.0
        if isinstance(opt, PseuZO):
            opt.step(forward, lambda o, h=head, c=factor: h(o) * c, groups=LABELS)
        else:
            opt.step(lambda f=forward, h=head, c=factor: h(f()) * c)


def journal_of(tmp_path, steps=4):
    model = causal_lm("opt")
    base = copy.deepcopy(model)
    opt = MAKERS["pseuzo"](model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(steps))
    return tmp_path / "run.pzj", base, model, opt


def resumed(path, opt, model, steps):
    """Bring opt and model to where a resume from a checkpoint after these steps would bring them.

    path: the journal of the run that saved the checkpoint.
    """
    train(opt, model, steps)
    state = copy.deepcopy(opt.state_dict())
    state["state"]["zero_order"]["journal"] = read_journal(path)[0]["run"]
    opt.load_state_dict(state)
    return opt


def unchanged_after(call, model, error, sentence):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=sentence):
        call()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def parts(path):
    """Where the header and the records begin, and where the file ends."""
    whole, starts = path.read_bytes(), [8]
    while starts[-1] < len(whole):
        starts.append(
            starts[-1] + 12 + int.from_bytes(whole[starts[-1] : starts[-1] + 4], "little")
        )
    return starts


def interrupted(line, call, where):
    """Interrupt call() before the given line that it runs in files whose paths contain `where` (or
    one of these); return whether it did."""
    where = (where,) if isinstance(where, str) else where
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if not any(part in frame.f_code.co_filename for part in where):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
