"""A resumed run that follows its journal has the bits of one that never stopped, for any record
after which it was killed, and measures no step again whose passes it does not need."""

import copy
import itertools
import os

import pytest
import torch
from journal_cases import LABELS, interrupted, parts, same
from pseuzo import CausalLMObjective, CyclicHyperbola, Evolution, Journal, MeZO, PseuZO, replay
from pseuzo.optim import MeZOSVRG, SparseMeZO
from pseuzo.train.journal_file import JournalError, read_journal
from tiny_models import batch_of, causal_lm

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped so far")

OURS = tuple(
    os.path.join("pseuzo", *name.split())
    for name in ("train journal", "train following", "optim base", "optim repeating")
)
STEPS, BETWEEN = 9, 3  # of a run, and after how many it saves its state

CASES = {
    "mezo": lambda m: MeZO(m, 1e-3, 1e-2, weight_decay=0.1, directions=2, seed=2),
    "momentum": lambda m: MeZO(m, 1e-3, 1e-2, directions=2, momentum=0.9, window=3, seed=2),
    "pseuzo": lambda m: PseuZO(m, 1e-3, 1e-2, 2, 0.9, 0.1, seed=2),
    "in cycles": lambda m: PseuZO(m, 1e-3, 1e-2, 2, CyclicHyperbola(8, pseuzo_epochs=3), seed=2),
    "curvature": lambda m: MeZO(m, 1e-3, 1e-2, momentum=0.9, window=3, curvature_window=4, seed=2),
    "curvature of pseuzo": lambda m: PseuZO(m, 1e-3, 1e-2, 2, 0.9, curvature_window=3, seed=2),
    "evolution": lambda m: Evolution(m, 1e-3, 1e-2, directions=3, seed=2),
    "small": lambda m: SparseMeZO(m, 1e-3, 1e-2, weight_decay=0.1, seed=2),
    "random": lambda m: SparseMeZO(m, 1e-3, 1e-2, mask="random", renew_mask=True, seed=2),
}


def make_steps(opt, steps, poisoned=4):
    """Make these steps; return the ones whose passes ran. A schedule sets lr."""
    objective, measured = CausalLMObjective(opt.model, [17, 4]), []
    for t in steps:
        batch = {**batch_of(rows=4, length=8, seed=t), "labels": LABELS}
        forward, head = objective(batch, reduction="none" if opt.curvature_window else "mean")
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


@pytest.fixture(scope="module")
def of_pseuzo(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("run"), CASES["pseuzo"], torch.float32)


def followed(run, path, saved=0, stop=STEPS, opt=None):
    opt = opt or run.after(saved)
    with Journal(path, opt, run="this run", follow=True):
        return opt, make_steps(opt, range(saved, stop))


def test_a_run_that_is_killed_as_it_follows_loses_nothing(of_pseuzo, tmp_path):
    path = of_pseuzo.killed(tmp_path / "run.pzj", 7, torn=0)
    whole = path.read_bytes()
    for stop in (1, 6):
        followed(of_pseuzo, path, stop=stop)
        assert path.read_bytes() == whole
    opt, _ = followed(of_pseuzo, path)
    assert same(opt.model, of_pseuzo.model) and path.read_bytes() == of_pseuzo.path.read_bytes()


def test_recorded_steps_keep_their_options_and_later_steps_have_the_new_ones(of_pseuzo, tmp_path):
    changed, path = copy.deepcopy(of_pseuzo), of_pseuzo.killed(tmp_path / "run.pzj", 7)
    changed.make = lambda m: PseuZO(m, 1e-3, 1e-2, 2, 0.9, 0.7, seed=2)  # another weight decay
    opt, _ = followed(changed, path)
    decays = [record.groups[0][1] for record in read_journal(path)[1]]
    assert decays == [0.1] * 7 + [0.7] * 2 and not same(opt.model, of_pseuzo.model)
    base = copy.deepcopy(of_pseuzo.base)
    assert replay(path, base) == STEPS and same(base, opt.model)


def test_a_run_goes_on_from_the_record_before_a_damaged_one(of_pseuzo, tmp_path):
    for damaged in (2, 7):
        path = of_pseuzo.killed(tmp_path / "run.pzj", STEPS, torn=0)
        content = bytearray(path.read_bytes())
        content[parts(path)[1 + damaged] + 40] ^= 1
        path.write_bytes(content)
        opt = of_pseuzo.after(3)
        if damaged == 2:  # the checkpoint is of a later step
            with pytest.raises(JournalError, match=r"is damaged .* resume from a checkpoint of s"):
                followed(of_pseuzo, path, 3, opt=opt)
            assert path.read_bytes() == content and opt.steps == 3
            continue
        with pytest.warns(UserWarning, match=r"is damaged .* measures step 7 and all after it"):
            _, measured = followed(of_pseuzo, path, 3, opt=opt)
        assert measured == [5, 6, 7, 8] and same(opt.model, of_pseuzo.model)
        assert path.read_bytes() == of_pseuzo.path.read_bytes()


def test_a_header_that_was_cut_short_is_written_again(of_pseuzo, tmp_path):
    path = tmp_path / "run.pzj"
    for size in (0, 3, 8, 40):
        path.write_bytes(of_pseuzo.path.read_bytes()[:size])
        followed(of_pseuzo, path, stop=1)
        assert path.read_bytes() == of_pseuzo.path.read_bytes()[: parts(of_pseuzo.path)[2]]
    path.write_bytes(b"PSEUD")
    with pytest.raises(JournalError, match="is not a journal of pseuzo"):
        followed(of_pseuzo, path)
    assert path.read_bytes() == b"PSEUD"


def test_the_journal_of_another_world_is_refused(of_pseuzo, tmp_path):
    """Other weights, another model, other settings or another run: nothing changes."""
    whole, path = of_pseuzo.path.read_bytes(), tmp_path / "run.pzj"
    path.write_bytes(whole)
    base = of_pseuzo.base
    nearly = copy.deepcopy(base)
    with torch.no_grad():
        next(nearly.parameters()).view(-1)[3] += 1
    for model, options, run, sentence in (
        (nearly, {}, None, "is the journal of a run from other weights; choose a new file"),
        (
            copy.deepcopy(base).half(),
            {},
            None,
            "is the journal of another model or of other settings; choose a",
        ),
        (base, {"noise": "rademacher"}, None, "of another model or of other settings"),
        (base, {}, "mine", "is the journal of another run: the optimizer did not write it"),
    ):
        opt = PseuZO(model, 1e-3, 1e-2, 2, **options)
        with pytest.raises(JournalError, match=sentence):
            Journal(path, opt, run=run, follow=True)
        assert path.read_bytes() == whole and opt.followed is opt.journal is None


def test_an_estimator_whose_state_is_not_in_the_journal_does_not_follow(tmp_path):
    class Counts(MeZO):
        history = None

    model = causal_lm("opt")
    base, path, opt = copy.deepcopy(model), tmp_path / "run.pzj", Counts(model, 1e-3, 1e-2)
    with Journal(path, opt):
        make_steps(opt, range(3))
    assert MeZO(model).history == Evolution(model).history == 0 and MeZOSVRG(model).history is None
    with pytest.raises(JournalError, match="holds 3 step"):
        Journal(path, Counts(base, 1e-3, 1e-2), follow=True)


def test_states_are_whole_where_checkpoints_are_due(of_pseuzo, tmp_path):
    """The window is measured again before each of them, and only there."""
    opt, path = of_pseuzo.after(0), of_pseuzo.killed(tmp_path / "run.pzj", STEPS)
    with Journal(path, opt, run="this run", follow=True):
        opt.followed.plan_states(6, 8)
        assert make_steps(opt, range(6)) == [4, 5]
        saved = copy.deepcopy(opt.state_dict())
        assert make_steps(opt, [6, 7, 8]) == [6, 7, 8]
    want = of_pseuzo.saved[6][1]["state"]["zero_order"]["window"]
    got = saved["state"]["zero_order"]["window"]
    assert got["used"] == want["used"] == 2 and torch.equal(got["values"], want["values"])


def test_weights_that_some_batches_do_not_use(tmp_path):
    """What passes have used so far is known again, although no pass is made."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, step):
            return self.experts[min(step, 2) % 2 or 2 * (step == 1)](torch.ones(1, 4)).sum()

    def train(opt, steps):
        for step in steps:
            opt.step(lambda step=step: opt.model(step))

    torch.manual_seed(0)
    base = Experts()
    whole, path = copy.deepcopy(base), tmp_path / "run.pzj"
    opt = MeZO(whole, 1e-2, 1e-2, seed=1)
    with Journal(path, opt):
        train(opt, range(6))
    assert [len(record.unused) for record in read_journal(path)[1]] == [4, 2, 2, 2, 2, 2]
    content = path.read_bytes()
    path.write_bytes(content[: parts(path)[5]])
    opt = MeZO(base, 1e-2, 1e-2, seed=1)
    with Journal(path, opt, follow=True):
        train(opt, range(6))
    assert same(base, whole) and path.read_bytes() == content


@pytest.mark.slow
def test_an_interrupt_as_a_step_is_made_again_leaves_it_undone_or_done(tmp_path):
    def train(opt, upto):
        while opt.steps < upto:
            opt.step(lambda: opt.model(torch.ones(1, 3)).square().sum())

    torch.manual_seed(0)
    base = torch.nn.Linear(3, 2)
    make = lambda: MeZO(copy.deepcopy(base), 1e-2, 1e-2, momentum=0.5, window=2)  # noqa: E731
    path, opt = tmp_path / "run.pzj", make()
    with Journal(path, opt):
        train(opt, 4)
    whole, want, done = path.read_bytes(), opt, set()
    for line in itertools.count(1):
        opt = make()
        with Journal(path, opt, follow=True):
            train(opt, 1)
            came = interrupted(line, lambda opt=opt: train(opt, 2), OURS)
            done.add(opt.steps)
            train(opt, 4)
        assert same(opt.model, want.model) and state_of(opt) == state_of(want), line
        assert path.read_bytes() == whole
        if not came:
            break
    assert done == {1, 2} and line > 60
