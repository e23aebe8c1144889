"""A save that would fail raises before the first step."""

from types import SimpleNamespace

import pytest
import torch
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import causal_lm
from torch.nn import functional as F
from trainer_cases import Rows, arguments
from transformers import (
    TrainerCallback,
)
from transformers.trainer_callback import ExportableState

pytestmark = pytest.mark.slow


def spoil_generation_config(model, trainer):
    model.generation_config.temperature = (
        0.9  # without do_sample, which Transformers accepts when it loads a model
    )


def share_weights(model, trainer):
    first, second = model.model.decoder.layers
    second.fc1.weight = first.fc1.weight


def spoil_config(model, trainer):
    model.config.kept = {1, 2}


def spoil_arguments(model, trainer):
    trainer.args.kept = lambda: None


def spoil_tokenizer(model, trainer):
    def save_pretrained(folder):
        raise NotImplementedError("This tokenizer cannot be saved.")

    trainer.data_collator.tokenizer = SimpleNamespace(save_pretrained=save_pretrained)


def spoil_callback(model, trainer):
    class Kept(TrainerCallback, ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"seen": torch.ones(2)}}

    trainer.add_callback(Kept())


UNSAVABLE = {
    spoil_generation_config: "`temperature`",
    share_weights: "shared tensors",
    spoil_config: "set is not JSON",
    spoil_arguments: "lambda",
    spoil_tokenizer: "This tokenizer cannot be saved",
    spoil_callback: "Tensor is not JSON",
}


@pytest.mark.parametrize("spoil", UNSAVABLE)
@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_what_can_only_fail_at_a_save_fails_before_the_first_step(
    tmp_path, spoil, save_strategy, caplog
):
    model, words = causal_lm("opt"), UNSAVABLE[spoil]
    args = arguments(tmp_path, method="mezo", max_steps=1, save_strategy=save_strategy)
    trainer = PseuZOTrainer(model, args, train_dataset=Rows(7))
    spoil(model, trainer)
    if save_strategy == "no":  # perhaps nothing will be saved
        trainer.train()
        assert (
            trainer.state.global_step == 1
            and words in caplog.text
            and "save_model() would fail" in caplog.text
        )
    else:
        with pytest.raises(ValueError, match=f"could not be saved, so no step is made: .*{words}"):
            trainer.train()
        assert trainer.state.global_step == 0
    assert not list(tmp_path.iterdir())


class TiedModule(torch.nn.Module):
    """This is no Transformers model, and safetensors refuses tied weights."""

    def __init__(self):
        super().__init__()
        self.body, self.out = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
        self.out.weight = self.body.weight


def test_tied_weights_of_any_module_are_refused_before_the_first_step(tmp_path):
    model = TiedModule()
    args = arguments(tmp_path, method="mezo", max_steps=1, save_strategy="steps")
    rows = [{"x": torch.ones(5), "labels": torch.ones(5)}] * 8

    def objective(batch):
        return lambda: model.out(model.body(batch["x"])), lambda o: F.mse_loss(o, batch["labels"])

    trainer = PseuZOTrainer(model, args, train_dataset=rows, objective=objective)
    with pytest.raises(ValueError, match=r"could not be saved, so no step is made: .*share memory"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    tmp_path, monkeypatch
):
    model = causal_lm("opt")
    weights = 4 * sum(p.numel() for p in model.parameters())  # the head is the embedding
    # Adam keeps two moments.
    for method, needed in {
        "mezo": weights,
        "fo-adam": 3 * weights,
    }.items():

        def trainer(free: int, method: str = method) -> PseuZOTrainer:
            monkeypatch.setattr(
                "pseuzo.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=free)
            )
            args = arguments(tmp_path / method, method=method, max_steps=1, save_strategy="steps")
            return PseuZOTrainer(causal_lm("opt"), args, train_dataset=Rows(7))

        short = trainer(needed - 1)
        with pytest.raises(ValueError, match="left: make room, or choose a folder on another disk"):
            short.train()
        assert short.state.global_step == 0
        trainer(needed).train()
        assert (tmp_path / method / "checkpoint-1" / "trainer_state.json").exists()
