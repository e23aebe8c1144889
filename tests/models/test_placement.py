"""Patterns, presets and groups choose the weights that get noise, for several architectures. The
probe is tested on losses whose answer is known."""

import copy
import math
import re
from itertools import islice

import pytest
import torch
from pseuzo import CausalLMObjective, MeZO, PseuZO
from pseuzo.models.placement import candidates, groups_of, halves, param_groups, place
from pseuzo.models.probe import Row, equal_change, first_outliers, probe
from pseuzo.perturb.module import known_passes
from tiny_models import ALL_KINDS, batch_of, causal_lm
from torch import nn
from transformers import RobertaConfig, RobertaForMaskedLM

ATTENTION_OUT = {
    "opt": ["self_attn.v_proj.weight", "self_attn.out_proj.weight"],
    "opt-projected": ["self_attn.v_proj.weight", "self_attn.out_proj.weight"],
    "gpt2": ["attn.c_attn.weight", "attn.c_proj.weight"],
    "llama": ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
    "qwen2": ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
    "qwen3": ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
    "mistral": ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
    "gemma": ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
    "neox": ["attention.query_key_value.weight", "attention.dense.weight"],
    "roberta": ["attention.self.value.weight", "attention.output.dense.weight"],
}


assert set(ATTENTION_OUT) == {*ALL_KINDS, "roberta"}


def make(kind):
    if kind != "roberta":
        return causal_lm(kind)
    sizes = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return RobertaForMaskedLM(RobertaConfig(**sizes))


def names(model, placement):
    name_of = {p: n for n, p in model.named_parameters()}
    return [name_of[p] for p in placement]


@pytest.mark.parametrize("kind", ATTENTION_OUT)
def test_presets_know_the_architectures(kind):
    model = make(kind)
    got = names(model, place(model, ["attention-out"]))
    assert sorted(re.split(r"\.1\.", name)[1] for name in got) == sorted(ATTENTION_OUT[kind])
    assert len(got) == 2  # the first of the two layers gets no noise
    every = [n for n, _ in model.named_parameters()]
    assert names(model, place(model, ["all"])) == every
    assert names(model, place(model, ["last-half"])) == [n for n in every if ".1." in n]


@pytest.mark.parametrize("kind", ATTENTION_OUT)
def test_groups_of_cover_each_parameter_once_and_know_it(kind):
    model = make(kind)
    groups = groups_of(model)
    found = [id(p) for ps in groups.values() for p in ps]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    roles = {name.split(":")[0] for name in groups}
    fused = kind in ("gpt2", "neox")
    assert roles >= {"embedding", "out", "mlp-in", "mlp-out", "small"} | (
        {"qkv"} if fused else {"q", "k", "v"}
    )
    assert ("head" in roles) == (kind in ("llama", "qwen3", "mistral", "neox", "roberta"))
    other = names(model, groups.get("other", []))
    projections = ["model.decoder.project_out.weight", "model.decoder.project_in.weight"]
    assert other == (projections if kind == "opt-projected" else [])
    assert {n.split(":")[1] for n in groups if ":" in n} == {"early", "middle"}
    for name, params in groups.items():
        assert set(place(model, [name])) == set(params)


def test_patterns_and_scales():
    model = causal_lm("opt")
    every = dict(model.named_parameters())
    for pattern, want in (
        ("model.decoder.layers.0.fc1.bias", ["model.decoder.layers.0.fc1.bias"]),
        ("fc1.bias", [f"model.decoder.layers.{i}.fc1.bias" for i in (0, 1)]),
        ("layers.1.*.weight", [n for n in every if ".layers.1." in n and n.endswith("weight")]),
        ("q:*", [f"model.decoder.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]),
        ("layers.[0].fc?.weight", [f"model.decoder.layers.0.fc{i}.weight" for i in (1, 2)]),
    ):
        assert names(model, place(model, [pattern])) == want
    placement = place(model, ["all=0.5", "attention-out=2", "embedding=0", "fc2.bias=1e-2"])
    assert {s: names(model, [p for p in placement if placement[p] == s]) for s in (2.0, 0.01)} == {
        2.0: [f"model.decoder.layers.1.self_attn.{m}.weight" for m in ("v_proj", "out_proj")],
        0.01: [f"model.decoder.layers.{i}.fc2.bias" for i in (0, 1)],
    }
    assert set(every) - set(names(model, placement)) == {"model.decoder.embed_tokens.weight"}
    model.model.decoder.layers[1].requires_grad_(False)
    assert all(".layers.1." not in n for n in names(model, place(model, ["all"])))


def test_peft_models():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        causal_lm("opt"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    got = names(model, place(model, ["attention-out"]))
    base = "base_model.model.model.decoder.layers.1.self_attn.v_proj"
    assert got == [f"{base}.lora_A.default.weight", f"{base}.lora_B.default.weight"]
    assert set(groups_of(model)) == {"q:early", "q:middle", "v:early", "v:middle"}
    assert len(place(model, ["all"])) == 8
    prefix = peft.get_peft_model(
        causal_lm("opt"), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    assert len(place(prefix, ["all"])) == 1
    with pytest.raises(
        ValueError, match="trained matches 'attention-out', as some modes train few"
    ):
        place(prefix, ["attention-out"])


@pytest.mark.parametrize("patterns, sentence", [
    (["v_prj.weight"],
     r"no parameter that is trained matches 'v_prj.weight'; similar names: .*v_proj.weight"),
    (["attention_out"], "matches 'attention_out'; similar names: attention-out"),
    (["xyzzy"], "matches 'xyzzy'; some names: all, attention-out, last-half"),
    (["all=-1"], "the scale in 'all=-1' must be a number of at least 0, got '-1'"),
    (["all=two"], "got 'two'"),
    (["all=nan"], "got 'nan'"),
    (["all="], "got ''"),
    (["all", "all=0"], "no parameter is left to take noise after all all=0"),
    ([], "after no pattern"),
])  # fmt: skip
def test_bad_patterns(patterns, sentence):
    with pytest.raises(ValueError, match=sentence):
        place(causal_lm("opt"), patterns)


def test_presets_refuse_what_they_do_not_know():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Sequential has no attention weights of a known name"):
        place(model, ["attention-out"])
    with pytest.raises(ValueError, match="the layers of Linear are not known"):
        place(nn.Linear(3, 4), ["last-half"])
    assert names(model, place(model, ["last-half"])) == ["1.weight", "1.bias"]
    # A string is one pattern, not a list of letters.
    assert names(model, place(model, "0.*")) == [
        "0.weight",
        "0.bias",
    ]


def test_param_groups_spare_norms_and_biases_and_train():
    model = causal_lm("gpt2")
    before = {n: p.clone() for n, p in model.named_parameters()}
    placement = place(model, ["last-half", "attention-out=2", "small:*=0.5"])
    groups = param_groups(model, placement, lr=1e-3, weight_decay=0.1)
    seen = {(g["noise_scale"], g["weight_decay"]): names(model, g["params"]) for g in groups}
    assert set(seen) == {(1.0, 0.1), (2.0, 0.1), (0.5, 0.0)} and all(
        g["lr"] == 1e-3 for g in groups
    )
    assert all(n.endswith("bias") or ".ln_" in n for n in seen[0.5, 0.0])
    assert seen[2.0, 0.1] == [
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.1.attn.c_proj.weight",
    ]
    assert sum(map(len, seen.values())) == len(placement)
    opt = MeZO(groups, lr=9.0, eps=1e-3, model=model)
    forward, head = CausalLMObjective(model, [17, 4])(
        {**batch_of(), "labels": torch.tensor([0, 1, 1, 0])}
    )
    opt.step(lambda: head(forward()))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(names(model, placement))
    torch.optim.SGD(groups, lr=1e-3)  # torch's own optimizers also take these groups


@pytest.mark.parametrize("kind", ATTENTION_OUT)
def test_candidates_are_placements_of_the_architecture(kind):
    model = make(kind)
    layer = next(n for n, _ in model.named_modules() if re.fullmatch(r"\D+\.1", n))
    found = candidates(model, layer)
    assert list(found) == ["all", "attention-out", "last-half", "all but embeddings"], (
        "the second of two layers is the last half of them, which is not tried twice"
    )
    outside = set(names(model, place(model, found["all"])))
    outside -= set(names(model, place(model, found["all but embeddings"])))
    assert outside and all(re.search("emb|wte|wpe|lm_head", name) for name in outside)
    # The first layer is no preset.
    first = candidates(model, layer[:-1] + "0")
    assert all(f"{layer[:-1]}0." in n for n in names(model, place(model, first[layer[:-1] + "0"])))


def test_candidates_that_the_model_lacks_are_left_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    assert list(candidates(model)) == ["all", "last-half"]
    assert list(candidates(nn.Linear(3, 2))) == ["all"]
    model[0].requires_grad_(False)  # what is left is in the last half, so that both are the same
    assert list(candidates(model)) == ["all"]


def test_halves_divide_the_layers_of_a_placement():
    layers = [nn.ModuleDict({"v_proj": nn.Linear(2, 2)}) for _ in range(5)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "norm": nn.LayerNorm(2)})
    patterns = ["last-half", "norm.weight", "v_proj.weight=0.25"]
    whole = place(model, patterns)
    lower, upper = halves(model, patterns).items()
    assert (lower[0], upper[0]) == ("layers 0 to 1", "layers 2 to 4")  # v_proj is in all of them
    parts = [place(model, part) for _, part in (lower, upper)]
    assert not parts[0].keys() & parts[1].keys()
    both = parts[0] | parts[1]
    outside = names(model, {p: 1 for p in whole if p not in both})
    assert all(both[p] == whole[p] for p in both) and outside == ["norm.weight"]
    assert halves(model, ["layers.3.*"]) == {} == halves(model, ["norm.weight"])


def test_the_first_layer_with_outliers_is_found():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False) for _ in range(4)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward():
        h = torch.randn(3, 64)
        for layer in layers:
            h = layer(h / h.norm())
        return h

    with torch.no_grad():
        for i in (1, 2):  # the second one is larger, but not twice as large
            layers[i].weight[5] *= (200, 300)[i - 1]
    assert first_outliers(model, forward) == "layers.1"
    layers[1].requires_grad_(False)  # it takes no noise
    assert first_outliers(model, forward) == "layers.2"
    assert all(not layer._forward_hooks for layer in layers)
    assert first_outliers(nn.Linear(3, 2), lambda: None) is None


class Quadratic(nn.Module):
    """L(x) = sum over groups of (g . x + x^T diag(h) x / 2), so |g|^2 and tr H are known."""

    def __init__(self, sizes, slopes, curvatures):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.x = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in sizes)
        self.g = [torch.randn(n, generator=generator) for n in sizes]
        self.g = [g * s / g.norm() for g, s in zip(self.g, slopes, strict=True)]
        self.h = [torch.rand(n, generator=generator) for n in sizes]
        self.h = [h * t / h.sum() for h, t in zip(self.h, curvatures, strict=True)]

    def forward(self):
        terms = zip(self.x, self.g, self.h, strict=True)
        return sum((g * x).sum() + (h * x * x).sum() / 2 for x, g, h in terms)


def test_probe_on_a_quadratic():
    """The mean over directions of z^T H z is tr H. This also holds with noise scales."""
    model = Quadratic((500, 3000), (2.0, 1.0), (5.0, 40.0))
    before = [p.clone() for p in model.parameters()]
    calls = []

    def closure():
        calls.append(1)
        return model()

    a, b = model.x
    groups = {"a": [a], "b": [b], "both": [a, b], "scaled": {a: 2.0, b: 0.5}}
    rows = {r.name: r for r in probe(model, groups, [closure] * 300, eps=1e-2, seed=5)}
    assert len(calls) == 300 + 4 * 2 * 300
    want = {
        "a": (5.0, 500),
        "b": (40.0, 3000),
        "both": (45.0, 3500),
        "scaled": (4 * 5 + 0.25 * 40, 4 * 500 + 0.25 * 3000),
    }
    for name, (curvature, parameters) in want.items():
        row = rows[name]
        assert row.parameters == parameters
        assert abs(row.curvature - curvature) < 4 * row.curvature_error + 1e-3 * curvature
        assert row.curvature_error < 0.02 * curvature
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert known_passes(model) is None
    assert all(
        math.isnan(row.fisher) and row.cost == (row.curvature, row.curvature_error)
        for row in rows.values()
    )
    lr, eps, how = equal_change(1e-3, 1e-2, rows["both"], rows["a"])
    assert lr == pytest.approx(1e-3 * 9, rel=0.02) and eps == pytest.approx(1e-2 * 3, rel=0.01)
    assert "the curvature along the noise is 0.111 of that" in how


def test_probe_on_logistic_regression():
    """The probe agrees with autograd's Hessian and gradients of examples."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 3)).double().float()
    x, y = torch.randn(64, 40, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    losses = lambda: nn.functional.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    weight = model[0].weight
    of_examples = [
        float(torch.autograd.grad(loss, weight, retain_graph=True)[0].square().sum())
        for loss in losses()
    ]
    fisher = sum(of_examples) / 64
    hessian = torch.autograd.functional.hessian(
        lambda w: nn.functional.cross_entropy(nn.functional.linear(x, w, model[0].bias), y),
        weight.detach(),
    )
    trace = float(hessian.reshape(120, 120).trace())
    (row,) = probe(model, {"weight": [weight]}, [losses] * 400, eps=1e-2)
    # eps^2 z^T H z is about 1e-3, and the loss of 1 has an error of 1e-7. The fourth order is
    # smaller by eps^2.
    assert abs(row.curvature - trace) < 4 * row.curvature_error + 2e-3 * trace
    assert (
        abs(row.fisher - fisher) < 4 * row.fisher_error + 2e-3 * fisher
        and row.fisher_error < 0.05 * fisher
    )
    assert row.cost == (row.fisher, row.fisher_error)
    assert row.curvature_error < 0.05 * trace


def test_small_groups_are_probed_with_longer_noise():
    model = Quadratic((16, 48, 8000), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    seen = []

    def closure():
        seen.append([float(x.square().mean().sqrt()) for x in model.x])
        return model()

    a, b, c = model.x
    probe(model, {"a": [a], "b": [b], "c": [c]}, [closure], eps=1e-2)
    lengths = [max(s) for s in seen[1::2]]
    assert lengths[0] == pytest.approx(0.1, rel=0.5)  # at most 10 eps; sqrt(8064 / 16) = 22
    assert lengths[1] == pytest.approx(0.1, rel=0.5)
    assert lengths[2] == pytest.approx(1e-2, rel=0.1)


def row(name, curvature, curvature_error, parameters=100.0):
    return Row(name, parameters, curvature, curvature_error)


@pytest.mark.parametrize(
    "curvature, error", [(-3.0, 1.0), (3.0, 2.0), (math.nan, 1.0), (3.0, math.inf)]
)
def test_equal_change_falls_back_to_the_share_of_parameters(curvature, error):
    everywhere, here = (
        row("all", 100, 1, parameters=1000.0),
        row("here", curvature, error, 40.0),
    )
    lr, eps, how = equal_change(2e-3, 1e-3, everywhere, here)
    assert lr == pytest.approx(2e-3 * 25) and eps == pytest.approx(1e-3 * 5)
    assert "could not be measured" in how and "by the share of the parameters, 0.04" in how


def test_probe_refuses():
    model = Quadratic((5,), (1.0,), (1.0,))
    for groups, closures, arguments, sentence in (
        ({}, [model], {}, "at least one group"),
        ({"a": list(model.x)}, [], {}, "at least one group and one closure"),
        ({"a": []}, [model], {}, "a group has no parameters: a"),
        ({"a": list(model.x)}, [model], {"eps": 0.0}, "eps must be positive"),
    ):
        with pytest.raises(ValueError, match=sentence):
            probe(model, groups, closures, **arguments)


@pytest.mark.slow
def test_probe_on_the_demo_model_sees_what_its_documentation_says():
    """The value and output projections have a far better ratio than the embedding, whose slope is
    mostly noise. Training continues afterwards as if nothing had been probed."""
    from pseuzo.demo import run
    from transformers import AutoModelForCausalLM

    demo = run.load()
    model = AutoModelForCausalLM.from_pretrained(demo.model_folder)
    twin = copy.deepcopy(model)
    objective = CausalLMObjective(model, demo.train.options)
    batches = list(islice(run.batches(demo.train, 16, 0), 12))
    split = [objective(batch, reduction="none") for batch in batches]
    closures = [lambda f=f, h=h: h(f()) for f, h in split for _ in range(2)]  # losses of examples
    groups = {"all": place(model, ["all"]), "attention-out": place(model, ["attention-out"])}
    groups["embedding"] = groups_of(model)["embedding"]
    everywhere, attention, embedding = probe(model, groups, closures, eps=1e-3, seed=1)
    assert embedding.fisher > 10 * attention.fisher > 0
    assert abs(embedding.fisher - embedding.curvature) < 2 * embedding.curvature_error
    lr, eps, how = equal_change(4e-4, 1e-3, everywhere, attention)
    assert "the curvature along the noise is" in how
    assert 3e-3 < lr < 5e-2 and 3e-3 < eps < 1.2e-2  # the demo has 3.5e-3 and 5.2e-3
    for m in (model, twin):
        opt = PseuZO(m, 1e-4, 1e-3)
        for _ in range(2):
            opt.step(*CausalLMObjective(m, demo.train.options)(batches[0]))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
