"""Make the assets of the demo: a small task, and a small language model to fine-tune on it.

The task: is this line of the Python standard library code or docstring prose? A line becomes the
prompt `line + "\\n# kind:"`, and the next token, ` code` or ` prose`, is the answer. The lines come
from the interpreter that runs this script; `ast` and `tokenize` say which line is which.

Honest splits. Source files, not lines, are divided into train, val and test. The tokenizer and the
pretraining see training files alone, and a val or test line that occurs anywhere in a training file
is dropped.

Pretraining, in two phases. Zeroth-order fine-tuning wants a model to which the prompt is no news,
so part of the pretraining rows hold cards: lines of training files (none of the task's train lines)
in the prompt's format, followed by one of the two words. In the first phase the word is random on
nine cards of ten and tells the line's kind on the tenth, which is enough to be learned: after it,
the model answers about 85 % right. The second phase therefore goes on with random words alone. They
carry nothing about the line, so the association fades while the format stays. From UNLEARN_STEPS
on, every CHECK_STEPS steps, the task's train lines are answered; the phase ends when the accuracy
is within START: a model that knows the format, with most of the task left to learn. The rule
looks at train lines only; the accuracy on val and test is recorded in about.json.
"""

import argparse
import ast
import io
import json
import math
import platform
import random
import re
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pseuzo.tasks.words import label_token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{text}\n# kind:"
LABEL_WORDS = {"code": " code", "prose": " prose"}
SIZES = {"train": 1000, "val": 400, "test": 1000}
FILE_SHARES = {"train": 0.60, "val": 0.12, "test": 0.28}
# What is left out: tests and tools, tables of data, third-party code, and files that name the
# machine they were built on.
SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "idle_test", "site-packages", "lib2to3", "ensurepip", "encodings",
    "turtledemo", "pydoc_data", "__pycache__", "__phello__", "msilib",
}  # fmt: skip
SKIPPED_FILES = re.compile(r"(_sysconfigdata.*|this|antigravity|__phello__.*|.*_test|test_.*)\.py")
# An assignment, the head of a block, or a call, within a docstring.
EXAMPLE = re.compile(r"^\w[\w.]* ?=|[:{]$|^[\w.]+\(")
MIN_CHARS, MAX_CHARS = 20, 90
LINES_PER_FILE = 20  # per label, so that no long file makes up a split

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
files of the same library, by `pseuzo.demo.build`.
"""


def split_lines(source: str) -> tuple[list[str], list[str]]:
    """Return the stripped code lines and docstring lines of a Python source file.

    A code line holds tokens of the grammar and no comment, and touches no string of several lines.
    A docstring line holds at least four words and is no part of a doctest or an indented example.
    """
    # Not splitlines(): a form feed ends no line for ast and tokenize.
    rows = source.split("\n")
    code, banned = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and last > first):
            banned.update(range(first, last + 1))
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            code.add(first)

    docs = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0].value
        # A docstring of one line carries tokens of no grammar but itself.
        code.difference_update(range(text.lineno, text.end_lineno + 1))
        docs.extend(_docstring_prose(rows[text.lineno - 1 : text.end_lineno]))
    return [rows[i - 1].strip() for i in sorted(code - banned)], docs


def _docstring_prose(rows: list[str]) -> Iterator[str]:
    margin = min((len(r) - len(r.lstrip()) for r in rows[1:] if r.strip()), default=0)
    doctest = False
    for i, row in enumerate(rows):
        line = row.strip()
        if i == 0:
            line = re.sub(r"^[rRuUbB]*('''|\"\"\"|'|\")", "", line)
        if i == len(rows) - 1:
            line = re.sub(r"('''|\"\"\"|'|\")$", "", line)
        line = line.strip()
        # A doctest runs from >>> to the next blank line.
        doctest = line.startswith(">>>") or (doctest and bool(line))
        indent = len(row) - len(row.lstrip())
        example = (i > 0 and indent > margin + 4) or EXAMPLE.search(line)
        words = re.findall(r"[A-Za-z]{2,}", line)
        if not doctest and not example and len(words) >= 4:
            yield line


def read_library(root: Path) -> dict[str, tuple[str, list[str], list[str]]]:
    """Read every usable file below `root`: relative path -> (source, code lines, prose lines)."""
    library = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or SKIPPED_FILES.fullmatch(path.name):
            continue
        if any(part.startswith("config-") for part in relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code, prose = split_lines(source)
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
        library[relative.as_posix()] = (source, code, prose)
    return library


def make_splits(
    library: dict[str, tuple[str, list[str], list[str]]], seed: int
) -> tuple[dict[str, list[dict[str, str]]], list[str]]:
    """Return the rows {"text", "label", "file"} of train, val and test, and the training files.

    Each split is half code, half prose, and no file and no line is in two of them.
    """
    rng = random.Random(seed)
    files = sorted(library)
    rng.shuffle(files)
    n_train, n_val = (round(len(files) * FILE_SHARES[s]) for s in ("train", "val"))
    parts = {
        "train": files[:n_train],
        "val": files[n_train : n_train + n_val],
        "test": files[n_train + n_val :],
    }
    # As they stand in the file, and as docstring lines without their quotes.
    seen = {
        row.strip()
        for file in parts["train"]
        for rows in (library[file][0].splitlines(), *library[file][1:])
        for row in rows
    }
    splits = {}
    for name, members in parts.items():
        pools: dict[str, list[dict[str, str]]] = {label: [] for label in LABEL_WORDS}
        taken: set[str] = set()
        for file in members:
            for label, lines in zip(LABEL_WORDS, library[file][1:], strict=True):
                # Training lines are in `seen` by nature: they need only differ from each other.
                fresh = [
                    t
                    for t in dict.fromkeys(lines)
                    if MIN_CHARS <= len(t) <= MAX_CHARS
                    and t not in taken
                    and (name == "train" or t not in seen)
                ]
                rng.shuffle(fresh)
                taken.update(fresh[:LINES_PER_FILE])
                pools[label] += [
                    {"text": t, "label": label, "file": file} for t in fresh[:LINES_PER_FILE]
                ]
        seen |= taken
        half = SIZES[name] // 2
        short = {label: len(pool) for label, pool in pools.items() if len(pool) < half}
        if short:
            raise ValueError(f"make_splits: {name} needs {half} lines per label, got {short}")
        rows = [row for pool in pools.values() for row in rng.sample(pool, half)]
        rng.shuffle(rows)
        splits[name] = rows
    return splits, sorted(parts["train"])


def make_cards(
    library: dict[str, tuple[str, list[str], list[str]]],
    files: list[str],
    exclude: set[str],
    count: int,
    truth: float,
    seed: int,
) -> list[str]:
    """Return `count` pretraining documents: a line of `files`, in the prompt's format, and a word.

    The word is the line's own kind with probability `truth`, and a random one otherwise.
    """
    rng = random.Random(seed)
    pools = [
        sorted(
            {
                t
                for file in files
                for t in library[file][k]
                if MIN_CHARS <= len(t) <= MAX_CHARS and t not in exclude
            }
        )
        for k in (1, 2)
    ]
    cards = []
    for _ in range(count):
        kind = rng.randrange(2)
        text = rng.choice(pools[kind])
        if rng.random() >= truth:
            kind = rng.randrange(2)
        word = list(LABEL_WORDS.values())[kind]
        cards.append(TEMPLATE.format(text=text) + word)
    return cards


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
    second = pretrain(
        model, source_rows, rows, MAX_UNLEARN_STEPS, batch, RANDOM_CARD_SHARE, RANDOM_LR, 1.0,
        seed + 1, fair_start,
    )  # fmt: skip
    zero_shot = {s: round(score(model, tokenizer, part), 4) for s, part in splits.items()}
    if second[0] == MAX_UNLEARN_STEPS:
        print(f"build: train lines start at {zero_shot['train']}, outside {START}", file=sys.stderr)
    return save(out, splits, tokenizer, model, {
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
    })  # fmt: skip


def save(
    out: Path,
    splits: dict[str, list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    model: OPTForCausalLM,
    about: dict,
) -> dict:
    """Write the files below `out` and return `about`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    _name_tokenizer_class(out / "model" / "tokenizer_config.json")
    (out / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    _write_json(out / "about.json", about)
    return about


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
