"""A resumed run that follows its journal has the bits of one that never stopped, for any record
after which it was killed, and measures no step again whose passes it does not need."""

import copy

import pytest
import torch
from journal_cases import LABELS, parts, same
from pseuzo import CausalLMObjective, CyclicHyperbola, Evolution, Journal, MeZO, PseuZO
from pseuzo.optim import SparseMeZO
from tiny_models import batch_of, causal_lm

STEPS, BETWEEN = 9, 3  # of a run, and after how many it saves its state

CASES = {
    "mezo": lambda m: MeZO(m, 1e-3, 1e-2, weight_decay=0.1, directions=2, seed=2),
    "momentum": lambda m: MeZO(m, 1e-3, 1e-2, directions=2, momentum=0.9, window=3, seed=2),
    "pseuzo": lambda m: PseuZO(m, 1e-3, 1e-2, 2, 0.9, 0.1, seed=2),
    "in cycles": lambda m: PseuZO(m, 1e-3, 1e-2, 2, CyclicHyperbola(8, pseuzo_epochs=3), seed=2),
    "evolution": lambda m: Evolution(m, 1e-3, 1e-2, directions=3, seed=2),
    "small": lambda m: SparseMeZO(m, 1e-3, 1e-2, weight_decay=0.1, seed=2),
    "random": lambda m: SparseMeZO(m, 1e-3, 1e-2, mask="random", renew_mask=True, seed=2),
}


def make_steps(opt, steps, poisoned=4):
    """Make these steps; return the ones whose passes ran. A schedule sets lr."""
    objective, measured = CausalLMObjective(opt.model, [17, 4]), []
    for t in steps:
        forward, head = objective({**batch_of(rows=4, length=8, seed=t), "labels": LABELS})
        factor = float("nan") if t == poisoned else 1.0

        def forward_of_step(t=t, f=forward):
            measured.append(t)
            return f()

        for group in opt.param_groups:
            group["lr"] = 1e-3 * (1 - t / 20)
        if isinstance(opt, PseuZO):
            opt.step(forward_of_step, lambda o, h=head, c=factor: h(o) * c, groups=LABELS)
        else:
            opt.step(lambda f=forward_of_step, h=head, c=factor: h(f()) * c)
    return sorted(set(measured))


def state_of(opt):
    """The state as plain values, without the window's own count of skipped steps."""
    own = copy.deepcopy(opt.state_dict()["state"]["zero_order"])
    if "window" in own:
        del own["window"]["skipped"]
    flat, todo = {}, [("", own)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}.{key}", v) for key, v in value.items()]
        else:
            flat[name] = value.tolist() if isinstance(value, torch.Tensor) else value
    return flat


class Undisturbed:
    """A run that nothing stopped: its journal, and its weights and states after some steps."""

    def __init__(self, folder, make, dtype):
        self.base, self.make = causal_lm("opt").to(dtype), make
        model = copy.deepcopy(self.base)
        opt = make(model)
        self.path, self.saved = folder / "whole.pzj", {0: (copy.deepcopy(model), None)}
        with Journal(self.path, opt, run="this run"):
            for step in range(STEPS):
                make_steps(opt, [step])
                if (step + 1) % BETWEEN == 0:
                    state = copy.deepcopy(opt.state_dict())
                    self.saved[step + 1] = copy.deepcopy(model), state
        self.model, self.state = model, state_of(opt)

    def after(self, steps):
        """The model and the optimizer of a run that starts from what was saved after so many."""
        model, state = copy.deepcopy(self.saved[steps][0]), self.saved[steps][1]
        opt = self.make(model)
        if state is not None:
            opt.load_state_dict(copy.deepcopy(state))
        return opt

    def killed(self, path, records, torn=17):
        """Write the file that a kill leaves after so many records and some bytes of the next."""
        path.write_bytes(self.path.read_bytes()[: parts(self.path)[1 + records] + torn])
        return path


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    dtype = torch.bfloat16 if request.param in ("momentum", "pseuzo", "small") else torch.float32
    return Undisturbed(tmp_path_factory.mktemp("run"), CASES[request.param], dtype)


@pytest.mark.filterwarnings("ignore:.*skipped so far")
@pytest.mark.parametrize("saved, recorded", [(0, 1), (0, 5), (0, STEPS), (6, 6), (6, 8)])
def test_a_killed_run_that_follows_its_journal_has_the_same_bits(run, saved, recorded, tmp_path):
    opt = run.after(saved)
    path = run.killed(tmp_path / "run.pzj", recorded)
    with Journal(path, opt, run="this run", follow=True):
        measured = make_steps(opt, range(saved, STEPS))
    assert same(opt.model, run.model)
    assert path.read_bytes() == run.path.read_bytes() and state_of(opt) == run.state
    assert measured == list(range(max(saved, recorded - opt.history), STEPS))
    assert opt.skipped_steps == 1 and opt.journal is opt.followed is None
