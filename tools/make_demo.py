"""Make the assets of the demo: a small task, and a small language model to fine-tune on it.

The task: is this line of the Python standard library code or docstring prose? A line becomes the
prompt `line + "\\n# kind:"`, and the next token, ` code` or ` prose`, is the answer. The lines are
those of demo_lines.py, which come from the interpreter that runs this script. The tokenizer and the
pretraining see training files alone.

Pretraining, in two phases. Zeroth-order fine-tuning wants a model that knows the prompt's format,
so part of the pretraining rows hold cards: lines of training files (none of the task's train lines)
in the prompt's format, followed by one of the two words. In the first phase the word is random on
nine cards of ten and tells the line's kind on the tenth, which is enough to be learned: after it,
the model answers about 85 % right. So the second phase trains on random words alone. They carry
nothing about the line, so the association fades while the format stays. From UNLEARN_STEPS
on, every CHECK_STEPS steps, the task's train lines are answered; the phase ends when the accuracy
is within START: a model that knows the format, with most of the task left to learn. The rule
looks at train lines only; the accuracy on val and test is recorded in about.json.
"""

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo_lines import LABEL_WORDS, TEMPLATE, make_cards, make_splits, read_library
from pseuzo.tasks.words import label_token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

PAD, EOS, VOCAB, POSITIONS = 1, 2, 2048, 128

# First phase: the share of rows that hold cards, and the share of cards that tell the kind.
CARDS, CARD_SHARE, TRUTH, LR = 40000, 0.25, 0.1, 2e-3
# Second phase: random words alone, at a constant rate.
RANDOM_CARDS, RANDOM_CARD_SHARE, RANDOM_LR = 12000, 0.5, 5e-4
UNLEARN_STEPS, CHECK_STEPS, MAX_UNLEARN_STEPS = 150, 5, 600
START = (0.58, 0.65)

NOTICE = """\
# Notice

The lines in `train.jsonl`, `val.jsonl` and `test.jsonl` are excerpts of the Python standard
library, Copyright (c) Python Software Foundation, used under the
[PSF License Agreement](https://docs.python.org/3/license.html). Each row names the file it comes
from, and `about.json` the version of Python. The model in `model/` was trained from scratch on
files of the same library, by `tools/make_demo.py`.
"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose special tokens have OPT's ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=POSITIONS,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Tokenize, join the documents, each with its </s>, and cut: [rows, POSITIONS] int64."""
    ids = [i for text in tokenizer(texts, verbose=False)["input_ids"] for i in text]
    return torch.tensor(ids[: len(ids) // POSITIONS * POSITIONS]).view(-1, POSITIONS)


def make_model(seed: int) -> OPTForCausalLM:
    """Return an untrained OPT of 1.07M parameters."""
    torch.manual_seed(seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            word_embed_proj_dim=128,
            ffn_dim=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=PAD,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )


def pretrain(
    model: OPTForCausalLM,
    source: Tensor,
    cards: Tensor,
    steps: int,
    batch: int,
    card_share: float,
    lr: float,
    floor: float,
    seed: int,
    stop: Callable[[int], bool] | None = None,
) -> tuple[int, float]:
    """Train on next tokens with AdamW; of the `batch` rows of a step `card_share` hold cards.

    source, cards: [rows, POSITIONS] int64. The rate falls from `lr` to `floor * lr` on a cosine.
    `stop(steps done)` ends the training early. Returns the steps done and the mean loss of the
    last 20 of them.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 50)
        return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    n_cards = round(batch * card_share)

    def order(rows: Tensor, per_step: int) -> Iterator[Tensor]:
        queue = torch.empty(0, dtype=torch.int64)
        while True:
            while len(queue) < per_step:
                queue = torch.cat([queue, torch.randperm(len(rows), generator=generator)])
            yield rows[queue[:per_step]]
            queue = queue[per_step:]

    sources, carded = order(source, batch - n_cards), order(cards, n_cards)
    model.train()
    losses: list[float] = []
    bar = tqdm(range(steps), desc="pretrain", unit="step", disable=None, file=sys.stderr)
    for done in bar:
        if stop is not None and stop(done):
            break
        ids = torch.cat([next(sources), next(carded)])
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return len(losses), sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def score(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> float:
    """Return the share of rows whose label's word has the larger logit after the prompt."""
    code, prose = label_token_ids(tokenizer, list(LABEL_WORDS.values()))
    margins = []
    for i in range(0, len(rows), 100):
        prompts = [TEMPLATE.format(text=row["text"]) for row in rows[i : i + 100]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits[:, -1]
        margins.append(logits[:, code] - logits[:, prose])
    truth = torch.tensor([row["label"] == "code" for row in rows])
    return ((torch.cat(margins) > 0) == truth).float().mean().item()


def build(out: Path, seed: int, steps: int, batch: int) -> dict:
    """Make every asset below `out`; return what about.json holds."""
    started = time.perf_counter()
    library = read_library(Path(sysconfig.get_paths()["stdlib"]))
    splits, files = make_splits(library, seed)
    sources = [library[file][0] for file in files]
    train_lines = {row["text"] for row in splits["train"]}
    cards = make_cards(library, files, train_lines, CARDS, TRUTH, seed)
    random_cards = make_cards(library, files, train_lines, RANDOM_CARDS, 0.0, seed + 1)
    # A tenth of the cards is enough to make the label words tokens.
    tokenizer = make_tokenizer(sources + cards[: CARDS // 10])
    words = dict(
        zip(LABEL_WORDS, label_token_ids(tokenizer, list(LABEL_WORDS.values())), strict=True)
    )
    source_rows = pack(tokenizer, sources)

    model = make_model(seed)
    rows = pack(tokenizer, cards)
    first = pretrain(model, source_rows, rows, steps, batch, CARD_SHARE, LR, 0.05, seed)
    learned = score(model, tokenizer, splits["train"])

    def fair_start(done: int) -> bool:
        if done < UNLEARN_STEPS or done % CHECK_STEPS:
            return False
        return START[0] <= score(model, tokenizer, splits["train"]) <= START[1]

    rows = pack(tokenizer, random_cards)
    phase = (MAX_UNLEARN_STEPS, batch, RANDOM_CARD_SHARE, RANDOM_LR, 1.0)
    second = pretrain(model, source_rows, rows, *phase, seed + 1, fair_start)
    zero_shot = {s: round(score(model, tokenizer, part), 4) for s, part in splits.items()}
    if second[0] == MAX_UNLEARN_STEPS:
        print(f"build: train lines start at {zero_shot['train']}, outside {START}", file=sys.stderr)
    about = {
        "python": platform.python_version(),
        "seed": seed,
        "files": {s: len({row["file"] for row in part}) for s, part in splits.items()},
        "lines": {
            s: {label: sum(row["label"] == label for row in part) for label in LABEL_WORDS}
            for s, part in splits.items()
        },
        "tokenizer_size": len(tokenizer),
        "label_token_ids": words,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pretraining": {
            "files": len(files),
            "source_tokens": source_rows.numel(),
            "phases": [
                {"steps": n, "tokens": n * batch * POSITIONS, "loss": round(loss, 4)}
                for n, loss in (first, second)
            ],
            "train_accuracy_after_first_phase": round(learned, 4),
        },
        "zero_shot_accuracy": zero_shot,
        "seconds": round(time.perf_counter() - started, 1),
    }
    save(out, splits, tokenizer, model, about)
    return about


def save(
    out: Path,
    splits: dict[str, list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    model: OPTForCausalLM,
    about: dict,
) -> None:
    """Write the files below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    _name_tokenizer_class(out / "model" / "tokenizer_config.json")
    (out / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    _write_json(out / "about.json", about)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_tokenizer_class(path: Path) -> None:
    """Write the class name that Transformers 4 and 5 both know."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, config)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the first phase")
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {POSITIONS} tokens a step")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = build(args.out, args.seed, args.steps, args.batch)
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
