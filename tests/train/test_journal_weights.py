"""The journal notices writes to the weights by anything other than the optimizer."""

import copy

import pytest
import torch
from journal_cases import MAKERS, same, train, unchanged_after, without_head
from pseuzo import Journal, MeZO, PseuZO, replay
from pseuzo.train.journal_file import JournalError
from tiny_models import batch_of, causal_lm


@torch.no_grad()
def add_one(model):
    next(model.parameters()).view(-1)[3] += 1


WRITES = {
    "in place": (add_one, "were written"),
    "loaded": (lambda m: m.load_state_dict(m.state_dict()), "were written"),
    "converted": (lambda m: m.to(torch.float16), "were moved or converted"),
    "there and back": (lambda m: m.half().float(), "were moved or converted"),
    "replaced": (
        lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.clone()),
        "were moved or converted",
    ),
    "frozen": (
        lambda m: torch.nn.init.zeros_(m.model.layers[0].mlp.up_proj.weight),
        "were written",
    ),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_weight_that_somebody_else_wrote_is_noticed(write, steps, tmp_path):
    model, path = causal_lm("llama"), tmp_path / "run.pzj"
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    opt = PseuZO([p for p in model.parameters() if p is not frozen], 1e-3, 1e-2, 3, model=model)
    opened = Journal(path, opt)
    train(opt, model, range(steps))
    size = path.stat().st_size
    WRITES[write][0](model)
    unchanged_after(
        lambda: train(opt, model, [steps]),
        model,
        JournalError,
        f"run.pzj: weights {WRITES[write][1]}",
    )
    assert opt.steps == steps and path.stat().st_size == size
    opened.close()
    if steps:  # a journal that is opened again remembers the write
        with pytest.raises(
            JournalError, match=r"load a checkpoint|of another model or of other settings"
        ):
            Journal(path, opt)
    base = copy.deepcopy(model)
    with Journal(tmp_path / "new.pzj", opt):
        train(opt, model, [steps])
    replay(tmp_path / "new.pzj", base)
    assert same(base, model)


def test_no_other_weights_get_the_addresses_of_the_watched_ones(tmp_path):
    """Otherwise weights converted there and back could pass for untouched ones."""
    model = causal_lm("opt")
    places = {p.data_ptr() for p in model.parameters()}
    opened = Journal(tmp_path / "run.pzj", MAKERS["mezo"](model))
    model.half().float()
    assert {storage.data_ptr() for storage in opened._weights._storages} == places
    opened.close()
    assert not opened._weights._storages, "the journal keeps the memory of the weights"


@pytest.mark.parametrize("between", ["steps", "estimate and step"])
def test_a_write_to_bare_parameters_is_noticed(between, tmp_path):
    """The optimizer itself also writes them, to perturb them and to put them back."""
    x, path = torch.nn.Parameter(torch.randn(50).bfloat16()), tmp_path / "run.pzj"
    base = {"parameter 0": x.detach().clone()}
    opt = MeZO([x], 1e-2, 1e-2)
    loss = lambda: x.float().square().sum()  # noqa: E731

    def fails():
        raise RuntimeError("no loss")

    with Journal(path, opt):
        opt.step(loss)
        opt.estimate(loss)
        opt.estimate(loss)
        opt.step()
        with pytest.raises(RuntimeError, match="no loss"):
            opt.step(fails)
        opt.step(loss)
        before = x.detach().clone()
        if between == "estimate and step":
            opt.estimate(loss)
        with torch.no_grad():
            x[7] += 1
        with pytest.raises(JournalError, match="weights were written since the last step"):
            opt.step() if between == "estimate and step" else opt.step(loss)
        changed = x.detach() != before
        assert changed.sum() == 1 and changed[7] and opt.steps == 3
    assert replay(path, base) == 3 and torch.equal(base["parameter 0"], before)


def test_what_leaves_the_weights_alone_is_no_write(tmp_path):
    path, model = tmp_path / "run.pzj", causal_lm("llama")
    base = copy.deepcopy(model)
    opt = without_head(model)
    with Journal(path, opt):
        for step in range(3):
            train(opt, model, [step])
            model.to("cpu").float().train().eval()
            model.requires_grad_(False).requires_grad_(True)
            model(**batch_of(), labels=batch_of()["input_ids"]).loss.backward()
            model.zero_grad()
            model.save_pretrained(tmp_path / "saved")
            copy.deepcopy(model)
            with torch.inference_mode():
                model(**batch_of())
    assert replay(path, base) == 3 and same(base, model)
