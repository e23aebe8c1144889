"""Trains a model that accelerate has placed on two devices, beside the same model on the CPU.

    python on_two_devices.py FILE       # with the folders of the tests on the path

writes {case: largest difference of the losses and trained weights, or the error} as JSON. It is a
process of its own, because the devices stay registered with torch: see second_device.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import second_device  # noqa: F401  # registers the devices
import torch
from accelerate import dispatch_model
from objective_cases import OPTIONS
from optimizers import MAKERS, with_data
from pseuzo import CausalLMObjective, PseuZO, PseuZOTrainer, PseuZOTrainingArguments
from pseuzo.models.modes import MODES, tune
from pseuzo.train.replay import replay
from tiny_models import batch_of, causal_lm
from transformers import PrinterCallback
from tuned_models import LABELS

FIRST, SECOND = "elsewhere:0", "elsewhere:1"
MAP = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": SECOND,
    "model.norm": SECOND,
    "lm_head": SECOND,
}


def model_of(two: bool, mode: str = "full"):
    model = causal_lm("llama").eval()
    # The fused attention of the CPU rounds in another way than the one for unknown devices.
    model.set_attn_implementation("eager")
    # This hides that rows of the head can be multiplied alone, as the hooks of accelerate do.
    model.lm_head.forward = model.lm_head.forward
    model = dispatch_model(model, MAP, main_device=FIRST) if two else model
    return tune(model, mode)


def trained(model) -> list[torch.Tensor]:
    return [p.detach().cpu() for p in model.parameters() if p.requires_grad]


def in_a_loop(two: bool, maker: str, mode: str = "full", **options):
    """Two steps on the label words of a padded batch, which is on the CPU."""
    model = model_of(two, mode)
    batch = {**batch_of(), "labels": LABELS}
    reduction = "none" if "clip_examples" in options else "mean"
    forward, head = CausalLMObjective(model, OPTIONS)(batch, reduction=reduction)
    optimizer = MAKERS[maker](model, **options)
    for _ in range(2):
        if isinstance(optimizer, PseuZO):
            loss = optimizer.step(forward, head, LABELS)
        else:
            loss = optimizer.step(*with_data(optimizer, lambda: head(forward())))
    return [loss.cpu(), *trained(model)]


def by_trainer(two: bool):
    """Two steps and an evaluation of PseuZOTrainer, whose journal is replayed on the other one."""
    batch = batch_of(rows=8)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    columns = {**batch, "labels": labels}
    rows = [{name: x[i] for name, x in columns.items()} for i in range(8)]
    model, other = model_of(two), model_of(not two)
    with tempfile.TemporaryDirectory() as folder:
        args = PseuZOTrainingArguments(
            folder,
            journal=f"{folder}/run.pzj",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=2,
            learning_rate=1e-4,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer = PseuZOTrainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        replay(f"{folder}/run.pzj", other)
    assert all(map(torch.equal, trained(other), trained(model)))
    history = trainer.state.log_history
    losses = [row[k] for row in history for k in ("train_loss", "eval_loss") if k in row]
    assert len(losses) == 2
    return [torch.tensor(losses), *trained(model)]


CASES = {
    **{maker: (in_a_loop, maker) for maker in MAKERS if maker not in ("mezo", "pseuzo cyclic")},
    **{f"mezo, {mode}": (in_a_loop, "mezo", mode) for mode in MODES if mode != "full"},
    "clip_examples": (lambda two: in_a_loop(two, "pseuzo", clip_examples=1.0),),
    "trainer": (by_trainer,),
}


def difference(run, *given) -> float:
    pairs = zip(run(False, *given), run(True, *given), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


if __name__ == "__main__":
    found = {}
    for name, (run, *given) in CASES.items():
        try:
            found[name] = difference(run, *given)
        except Exception:
            found[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(found))
