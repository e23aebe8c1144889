"""Base weights + journal = the weights of the run, to the bit."""

import copy

import pytest
import torch
from click.testing import CliRunner
from journal_cases import MAKERS, journal_of, parts, same, train, unchanged_after
from pseuzo import Journal, MeZO, PseuZO, replay
from pseuzo.cli.commands import main
from pseuzo.train import replay as replaying
from pseuzo.train.journal_file import JournalError, read_journal
from tiny_models import batch_of, causal_lm
from transformers import AutoModelForCausalLM

from pseuzo_kernels import reference


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", MAKERS)
def test_replay_gives_the_bits_of_the_run(method, dtype, kind, tmp_path, monkeypatch):
    model = causal_lm(kind).to(dtype)
    base, half, whole = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    opt = MAKERS[method](model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(4))
        halfway = copy.deepcopy(model)
        torch.optim.lr_scheduler.ConstantLR(opt, 0.3)  # the rate changes during the run
        train(opt, model, range(4, 8), poison=(5,))
    train(opt, copy.deepcopy(model), [])
    assert opt.journal is None and opt.skipped_steps == 1
    bars = []
    assert replay(tmp_path / "run.pzj", half, until=4) == 4
    assert replay(tmp_path / "run.pzj", whole) == 8
    # The second replay uses another backend, the reference in place of C++, and other batches.
    monkeypatch.setattr(replaying, "add_noise_steps_", reference.add_noise_steps_)
    monkeypatch.setattr(replaying, "STEPS_AT_ONCE", 3)
    assert replay(tmp_path / "run.pzj", base, progress=bars.append) == 8 and len(bars) == 8
    for want, got in ((halfway, half), (model, whole), (model, base)):
        assert all(
            torch.equal(p, q) for p, q in zip(want.parameters(), got.parameters(), strict=True)
        )
    assert any(
        not torch.equal(p, q) for p, q in zip(halfway.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_group_whose_update_overflows_is_left_alone_in_the_replay_too(order, tmp_path):
    model = causal_lm("opt")
    base, before = copy.deepcopy(model), copy.deepcopy(model)
    params = list(model.parameters())
    # The rates are multiplied by a slope of 1e11.
    groups = [
        {"params": params[:3], "lr": 1e-12},
        {"params": params[3:], "lr": 1e30},
    ]
    opt = MeZO([groups[i] for i in order], 1e-3, 1e-2, weight_decay=1e-31, model=model)
    losses = iter([1e9, -1e9, 1e9, -1e9])
    with Journal(tmp_path / "run.pzj", opt):
        for _ in range(2):
            opt.step(lambda: model(**batch_of()).logits.sum() * 0 + next(losses))
    for p, was in zip(params, before.parameters(), strict=True):
        assert torch.equal(p, was) == any(p is q for q in groups[1]["params"])
    assert opt.skipped_steps == 0 and replay(tmp_path / "run.pzj", base) == 2
    assert all(torch.equal(p, q) for p, q in zip(params, base.parameters(), strict=True))


@pytest.mark.parametrize("where", ["a frozen layer", "an untied head"])
def test_other_frozen_weights_are_another_base(where, tmp_path):
    """Updates do not depend on frozen weights, but the outputs of the model do."""
    model = causal_lm("llama")
    if where == "a frozen layer":
        frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    else:
        frozen = model.lm_head.weight
    base = copy.deepcopy(model)
    opt = PseuZO([p for p in model.parameters() if p is not frozen], 1e-3, 1e-2, 3, model=model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(2))
    other = copy.deepcopy(base)
    with torch.no_grad():
        dict(other.named_parameters())[next(n for n, p in model.named_parameters() if p is frozen)][
            0, 0
        ] += 1
    unchanged_after(
        lambda: replay(tmp_path / "run.pzj", other),
        other,
        JournalError,
        "weights that the run did not train differ",
    )
    with torch.no_grad():
        frozen[0, 0] += 1
    with pytest.raises(JournalError, match="another model or of other settings"):
        Journal(tmp_path / "run.pzj", opt)
    assert replay(tmp_path / "run.pzj", base) == 2
    frozen.data[0, 0] -= 1
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.parameters(), base.parameters(), strict=True)
        if p is not frozen
    )


def test_more_seeds_than_65535_an_update(tmp_path):
    model = torch.nn.Linear(2, 2, bias=False)
    base = copy.deepcopy(model)
    opt = MeZO(model, 1e-3, 1e-2, directions=70, momentum=0.9, window=1000)
    opt._past = torch.arange(999 * 70).view(999, 70), torch.randn(999, 70) * 1e-3
    with Journal(tmp_path / "run.pzj", opt):
        for _ in range(2):
            opt.step(lambda: model(torch.ones(1, 2)).square().mean())
    assert [len(r.seeds) for r in read_journal(tmp_path / "run.pzj")[1]] == [70_000, 70_000]
    assert replay(tmp_path / "run.pzj", base) == 2
    assert torch.equal(model.weight, base.weight)


def test_replay_on_the_command_line(tmp_path):
    path, base, trained, _ = journal_of(tmp_path)
    base.save_pretrained(tmp_path / "base")
    trained.save_pretrained(tmp_path / "wrong")
    arguments = ["replay", "--journal", str(path), "--output"]

    def run(out, *rest):
        return CliRunner().invoke(main, [*arguments, str(tmp_path / out), *rest])

    result = run("out", "--base", str(tmp_path / "base"))
    assert result.exit_code == 0 and "4 steps replayed" in result.output, result.output
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(p, q) for p, q in zip(trained.parameters(), rebuilt.parameters(), strict=True)
    )
    assert {p.suffix for p in (tmp_path / "out").iterdir()} <= {".json", ".safetensors"}
    whole = path.read_bytes()
    for damaged, sentence in (
        (b"PK" + whole, "is not a journal of pseuzo"),
        (whole[:-30] + b"?" + whole[-29:], "is damaged"),
        (whole[:8] + bytes([whole[8] ^ 64]) + whole[9:], "is damaged"),
    ):
        path.write_bytes(damaged)
        result = run("new", "--base", str(tmp_path / "base"))
        assert result.exit_code == 2 and sentence in result.output, result.output
    path.write_bytes(whole[:-30])
    result = run("cut", "--base", str(tmp_path / "base"))
    assert result.exit_code == 0 and "3 steps replayed" in result.output
    assert "run.pzj: the last record is cut short, as by a crash; it is left out" in result.output
    path.write_bytes(whole)
    for out, base_folder, sentence in (
        ("out", "base", "is not empty"),
        ("new", "wrong", "not those that the run started from"),
        ("new", "nowhere", "there is no folder"),
    ):
        result = run(out, "--base", str(tmp_path / base_folder))
        assert result.exit_code == 2 and sentence in result.output, result.output
    assert not (tmp_path / "new").exists()


def test_salvage_of_a_whole_journal_loses_nothing(tmp_path, recwarn):
    path, base, model, _ = journal_of(tmp_path)
    assert replay(path, base, salvage=True) == 4 and same(base, model) and not recwarn.list


def test_salvage_on_the_command_line(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    base.save_pretrained(tmp_path / "base")
    whole, at = path.read_bytes(), parts(path)[3]
    path.write_bytes(whole[:at] + bytes(len(whole) - at))
    arguments = ["replay", "--journal", str(path), "--base", str(tmp_path / "base"), "--output"]

    def run(out, *rest):
        return CliRunner().invoke(main, [*arguments, str(tmp_path / out), *rest])

    result = run("out")
    assert (
        result.exit_code == 2
        and "what precedes step 2 can be replayed: --until 2, or --salvage" in result.output
    )
    result = run("out", "--salvage")
    assert result.exit_code == 0 and "2 steps replayed, up to step 2" in result.output, (
        result.output
    )
    assert result.output.count(f"damaged from byte {at} on: step 2 and all after it are lost") == 1
    assert "Warning" not in result.output
    result = run("until", "--until", "2")
    assert result.exit_code == 0 and "lost" not in result.output
    assert replay(path, base, until=2) == 2
    for out in ("out", "until"):
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / out), base)
