"""CausalLMObjective keeps its promise for every type of model and of adapter. The loss is the
model's own, for a row alone and in a padded batch, or one sentence refuses the model. The tables of
docs/methods.md say which types are refused."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import peft
import pseuzo
import pytest
import torch
from helpers import Waits, perturbed_copy
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.models.positions import padded, padded_on_the_right
from pseuzo.models.split import head_parameters
from pseuzo.optim.seeds import step_seed
from pseuzo.tasks import Example, Task, TaskData, evaluate
from pseuzo.tasks.evaluation import generate
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import OF_AN_ADAPTER, adapted, tiny
from torch.nn import functional as F
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
AS_IS, RIGHT, ALONE = "as they are", "padded on the right", "without padding only"
WORDS, REFUSED, UNTESTED = "label words and options only", "refused", "not tested"
QUICK = ("opt", "gpt2", "llama", "granite", "rwkv", "bart")
QUICK_ADAPTERS = ("LORA", "PROMPT_TUNING", "PREFIX_TUNING")
IDS = [torch.randint(3, 120, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 13)]
TOKENS = [2, 9, 40]
# Losses are about 5 and logits about 1, in fp32. Sums in another shape round differently, some tens
# of times by 2^-24.
CLOSE = dict(rtol=4e-6, atol=1e-5)


@cache
def table(heading: str) -> dict[str, str]:
    """Return what docs/methods.md says about each name in the table under a heading."""
    part = DOCS.read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (\w[\w ]+) \| (`.+`) \|$", part, re.MULTILINE)
    return {name: what for what, names in rows for name in re.findall(r"`([^`]+)`", names)}


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((2,), -100), ids[2:]])


def batch_padded(side: str) -> dict[str, torch.Tensor]:
    def rows(parts, fill):
        pads = [len(IDS[1]) - len(x) for x in parts]
        sides = [(n, 0) if side == "left" else (0, n) for n in pads]
        return torch.stack([F.pad(x, n, value=fill) for x, n in zip(parts, sides, strict=True)])

    return {
        "input_ids": rows(IDS, 1),
        "attention_mask": rows([torch.ones_like(x) for x in IDS], 0),
        "labels": rows(list(map(labels_of, IDS)), -100),
    }


def outcome(call: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Return the result of the call, or None if one sentence refuses it."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith("CausalLMObjective: ") or "\n" in str(error):
            raise
        return None


@torch.no_grad()
def loss_of(objective: CausalLMObjective, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    forward, head = objective(batch)
    return head(forward())


@torch.no_grad()
def support(model: torch.nn.Module, **more: torch.Tensor) -> str:
    """Return what the objective does for this model, after checking its numbers.

    more: other inputs of each row.
    """

    def extra(rows: int) -> dict[str, torch.Tensor]:
        return {name: x.expand(rows) for name, x in more.items()}

    logits = [model(input_ids=ids[None], **extra(1)).logits[0, -1, TOKENS] for ids in IDS]
    objective, words = CausalLMObjective(model), CausalLMObjective(model, TOKENS)
    one = {"input_ids": IDS[1][None], "labels": labels_of(IDS[1])[None]}
    alone = outcome(lambda: loss_of(objective, one | extra(1)))
    sides = [batch_padded(side) | extra(2) for side in ("left", "right")]
    left, right = (outcome(lambda batch=batch: loss_of(objective, batch)) for batch in sides)
    prompts = sides[0] | {"labels": torch.tensor([0, 2])}
    scores = outcome(lambda: words.scores(prompts))
    if scores is not None:
        torch.testing.assert_close(scores, torch.stack(logits).float(), **CLOSE)
    if alone is None:
        assert left is None and right is None
        return REFUSED if scores is None else WORDS
    own = [model(input_ids=ids[None], labels=labels_of(ids)[None], **extra(1)).loss for ids in IDS]
    torch.testing.assert_close(alone, own[1].float(), **CLOSE)
    assert (left is None) == (right is None) == (scores is None)
    if left is None:
        return ALONE
    for got in (left, right):
        torch.testing.assert_close(got, (3 * own[0] + 11 * own[1]).float() / 14, **CLOSE)
    return {"anywhere": AS_IS, "right": RIGHT}[objective.padding]


def marked(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", marked(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, QUICK))
def test_the_loss_is_the_models_own(model_type):
    said = table("Model types").get(model_type)
    if said == UNTESTED:
        pytest.skip("these tests have no tiny model of this type")
    if said is None:  # Transformers has more types from version to version
        pytest.skip("docs/methods.md does not have this type; add it")
    assert support(tiny(model_type)) == said


ADAPTERS = [name for name in peft.PeftType.__members__ if name != "XLORA"]
TASK_IDS = dict.fromkeys(("POLY", "MULTITASK_PROMPT_TUNING"), True)


@pytest.mark.parametrize("name", marked(ADAPTERS, QUICK_ADAPTERS))
def test_the_loss_is_the_adapted_models_own(name):
    said = table("Adapters").get(name)
    if said in (None, UNTESTED):
        pytest.skip(f"docs/methods.md says of it: {said}")
    if name == "ADAMSS":
        pytest.importorskip("sklearn", reason="peft makes its adapters with scikit-learn")
    more = {"task_ids": torch.tensor(1)} if name in TASK_IDS else {}
    model = adapted(tiny("llama"), name)
    assert support(model, **more) == said
    check_perturbed(model, more)


def check_perturbed(model: torch.nn.Module, more: dict[str, torch.Tensor]) -> None:
    """Check that passes at x + eps z of the adapter are those of a model that has these weights."""
    batch = {"input_ids": IDS[1][None], "labels": torch.tensor([1])} | {
        k: x.expand(1) for k, x in more.items()
    }
    want, plain = (
        CausalLMObjective(m, TOKENS).scores(batch) for m in (perturbed_copy(model, 7, 0.5), model)
    )
    assert (want - plain).abs().max() > 1e-4, "the adapter has no effect"
    objective = CausalLMObjective(model, TOKENS)
    for _ in range(3):  # the first pass learns which weights are used where
        with perturbed(model, 7, 0.5):
            torch.testing.assert_close(objective.scores(batch), want, **CLOSE)
    torch.testing.assert_close(objective.scores(batch), plain, rtol=0, atol=0)


VARIANTS = {
    "of the head": dict(target_modules=["q_proj", "lm_head"]),
    "of the head, DoRA": dict(target_modules=["q_proj", "lm_head"], use_dora=True),
    "and the head": dict(modules_to_save=["lm_head"]),
    "of the embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "and both ends": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "and some tokens": dict(trainable_token_indices=[3, 4, 5]),
    "and biases": dict(bias="all", target_modules="all-linear"),
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("what", VARIANTS)
def test_the_loss_of_lora_in_other_places(what, tied):
    model = adapted(tiny("qwen2", tie_word_embeddings=tied), "LORA", **VARIANTS[what])
    assert support(model) == AS_IS
    check_perturbed(model, {})


def test_mezo_trains_an_adapter_of_the_head():
    """The step is compared with the formula, in weights that are written."""
    model = adapted(tiny("llama"), "LORA", target_modules=["lm_head"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = batch_padded("left")
    forward, head = CausalLMObjective(model)(batch)
    opt = MeZO(model, 1e-2, 1e-1, seed=3)
    seed = step_seed(3, 0)
    losses = [
        loss_of(CausalLMObjective(perturbed_copy(model, seed, eps)), batch) for eps in (0.1, -0.1)
    ]
    opt.step(lambda: head(forward()))
    torch.testing.assert_close(
        opt.stats["projected_grad"][0], (losses[0] - losses[1]) / 0.2, rtol=0, atol=2e-4
    )
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n} and moved


def test_pseuzo_trains_an_adapter_of_the_head_by_its_exact_gradient():
    model = adapted(tiny("llama"), "LORA", target_modules=["q_proj", "lm_head"])
    head = [p for p in head_parameters(model) if p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is h for h in head)]
    assert len(head) == 2 and others
    row = {"input_ids": IDS[1][None], "labels": labels_of(IDS[1])[None]}
    want = torch.autograd.grad(model(**row).loss, head)
    before = [p.detach().clone() for p in head]
    groups = [{"params": others}, {"params": head, "exact_gradient": True, "lr": 0.1}]
    PseuZO(groups, lr=1e-6, model=model).step(*CausalLMObjective(model)(row))
    for p, x, gradient in zip(head, before, want, strict=True):
        torch.testing.assert_close(x - p.detach(), 0.1 * gradient, rtol=1e-4, atol=1e-7)


def test_a_mixture_of_two_passes_is_refused(tmp_path):
    """X-LoRA runs the model, its head included, twice."""
    for name in "01":
        adapted(tiny("llama"), "LORA", r=4).save_pretrained(tmp_path / name)
    base = tiny("llama", use_cache=False)
    adapters = {name: str(tmp_path / name) for name in "01"}
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters
    )
    assert (
        table("Adapters")["XLORA"] == REFUSED == support(peft.get_peft_model(base, config).eval())
    )


def test_the_tables_name_what_there_is():
    assert {*OF_AN_ADAPTER, "XLORA"} <= set(table("Adapters"))
    assert {AS_IS, RIGHT, WORDS, REFUSED, UNTESTED} == set(table("Model types").values())


def test_what_is_no_sum_over_next_tokens_is_refused():
    batch = {"input_ids": IDS[1][None], "labels": labels_of(IDS[1])[None]}
    experts = tiny("mixtral", output_router_logits=True)
    with pytest.raises(ValueError, match="output_router_logits=False"):
        CausalLMObjective(experts)(batch)
    assert (
        CausalLMObjective(experts, TOKENS)
        .scores({**batch, "labels": torch.tensor([1])})
        .isfinite()
        .all()
    )
    with pytest.raises(ValueError, match="orth_reg_weight=0"):
        CausalLMObjective(adapted(tiny("llama"), "ADALORA"))(batch)
    assert support(adapted(tiny("llama"), "ADALORA", orth_reg_weight=0)) == AS_IS
    whole = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=4)
    )
    with pytest.raises(TypeError, match="T5ForConditionalGeneration has an encoder"):
        CausalLMObjective(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type, padding", [
    ("opt", "anywhere"),
    ("llama", "anywhere"),
    ("mixtral", "anywhere"),
    ("gemma2", "anywhere"),
    ("mamba", "anywhere"),
    ("rwkv", "right"),
    ("recurrent_gemma", "right"),
    ("roberta", "right"),
])  # fmt: skip
def test_where_padding_may_be_is_seen_in_half_precision(model_type, padding, dtype):
    objective = CausalLMObjective(tiny(model_type).to(dtype))
    loss_of(objective, batch_padded("left"))
    assert objective.padding == padding


def test_moved_padding():
    """Rows are moved to the first column, with all inputs that belong to their tokens. A row of
    padding alone does not change."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    ids = torch.arange(16).view(4, 4)
    plan = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": ids + 1,
        "more": torch.arange(4),
    }
    plan |= {
        "positions": torch.tensor([[-1, 3], [0, 2], [1, 3], [-1, 0]]),
        "targets": torch.arange(8).view(4, 2),
    }
    with Waits() as waits:
        moved = padded_on_the_right(plan)
    assert waits.seen == []
    assert moved["input_ids"].tolist() == [
        [2, 3, 0, 1],
        [4, 5, 6, 7],
        [9, 10, 11, 8],
        [12, 13, 14, 15],
    ]
    assert moved["attention_mask"].tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 0],
    ]
    assert torch.equal(moved["position_ids"], moved["input_ids"] + 1)
    assert moved["positions"].tolist() == [[-1, 1], [0, 2], [0, 2], [-1, 0]]
    assert moved["targets"] is plan["targets"] and moved["more"] is plan["more"]
    assert padded_on_the_right(moved)["input_ids"].tolist() == moved["input_ids"].tolist()


@pytest.mark.parametrize("model_type", ["gpt2", "rwkv"])
def test_a_plan_that_is_padded_to_a_shape_has_the_same_loss(model_type):
    """Recorded passes pad every batch to one of a few shapes, even a batch without padding."""
    objective = CausalLMObjective(tiny(model_type))
    batch = {"input_ids": IDS[1][None], "labels": labels_of(IDS[1])[None]}
    plan = objective.checked(padded(objective.plan(batch), 16, 4))
    assert plan["input_ids"].shape == (1, 16) and plan["positions"].shape == (1, 12)
    forward, head = objective.functions(plan)
    with torch.no_grad():
        torch.testing.assert_close(head(forward()), loss_of(objective, batch), **CLOSE)


def test_a_model_is_verified_once_where_that_is_asked_for():
    model, forwards = tiny("rwkv"), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    want = loss_of(CausalLMObjective(model), batch_padded("left"))
    verified = len(forwards)
    for verify, most in (("once", 1), (False, 1), (True, verified)):
        forwards.clear()
        again = CausalLMObjective(model, verify=verify)
        assert torch.equal(loss_of(again, batch_padded("left")), want)
        assert len(forwards) == most and again.padding == "right"
    other = tiny("rwkv")
    objective = CausalLMObjective(other, verify=False)
    loss_of(objective, batch_padded("left"))
    assert objective.padding is None, "the padding was looked at"


CHOICES = Task(name="c", kind="choice", prompt="{{ q }}", options="options", answer="answer")
WRITES = Task(name="w", kind="generation", prompt="{{ q }}", answers="answers", max_new_tokens=4)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(pseuzo.__file__).parent / "demo" / "assets" / "model")


@pytest.mark.parametrize(
    "what", ["gpt2", "gemma2", "hyperclovax", "mixtral", "roberta", "rwkv", "LORA", "PROMPT_TUNING"]
)
def test_the_trainer_and_an_evaluation_have_the_models_own_loss(tmp_path, tokenizer, what):
    if what in OF_AN_ADAPTER or what == "LORA":
        more = dict(target_modules=["q_proj", "lm_head"]) if what == "LORA" else {}
        model = adapted(tiny("llama", vocab=2048), what, **more)
    else:
        model = tiny(what, vocab=2048)
    texts = [
        ("a = b", (" x", " y")),
        ("return", (" value of it", " x")),
        ("if a and b and c", (" x", " y")),
    ]
    data = TaskData(
        [Example(q, o, 0, (o[0],)) for q, o in texts], CHOICES, tokenizer, max_length=60
    )
    rows = [data.token_rows(i, "answer")[0] for i in range(3)]
    total, count = 0.0, sum(len(row.answer) for row in rows)
    for row in rows:
        ids = torch.tensor([row.tokens])
        labels = torch.tensor([[-100] * len(row.prompt) + row.answer])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(row.answer)
    want = pytest.approx(total / count, rel=4e-6, abs=1e-5)  # the tolerances are CLOSE's
    assert len({len(row.tokens) for row in rows}) > 1 and count > 3
    assert evaluate(model, data, batch_size=3)["loss"] == want
    args = PseuZOTrainingArguments(
        str(tmp_path),
        method="mezo",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_eval_batch_size=3,
        save_strategy="no",
    )
    trainer = PseuZOTrainer(model, args, train_dataset=data, eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == want
    batch = data.collate([data[i] for i in range(3)])
    with torch.no_grad():
        assert float(trainer.compute_loss(model, batch)) == want
    plain = [
        {"input_ids": row.tokens, "labels": [-100] * len(row.prompt) + row.answer} for row in rows
    ]
    trainer = PseuZOTrainer(model, args, DataCollatorForSeq2Seq(tokenizer), eval_dataset=plain)
    assert trainer.evaluate()["eval_loss"] == want


@pytest.mark.parametrize("what", ["gpt2", "recurrent_gemma", "PROMPT_TUNING"])
def test_what_is_written_does_not_depend_on_padding(tokenizer, what):
    model = (
        adapted(tiny("llama", vocab=2048), what)
        if what in OF_AN_ADAPTER
        else tiny(what, vocab=2048)
    )
    questions = ("a", "return value of it", "if a and b and c or d", "while a", "b")
    data = TaskData(
        [Example(q, (), None, ("x",)) for q in questions], WRITES, tokenizer, max_length=60
    )
    alone = [generate(model, data, [i], batch_size=1)[0] for i in range(5)]
    assert generate(model, data, range(5), batch_size=5) == alone and len(set(alone)) > 1
