"""Frozen weights are read from the files that they were loaded from, and take no memory."""

import json
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from offload_cases import CPU, Run, assert_same, llm
from pseuzo import MeZO, offload
from pseuzo.models import offloading
from pseuzo.models.modes import tune
from pseuzo.perturb.mapped import FileMaps, map_frozen, saved_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in several files. Its output head is the embedding's weight, which is saved once."""
    folder = tmp_path_factory.mktemp("saved")
    llm("opt").save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def loaded(folder: Path, mode: str, copied: bool = False, dtype=torch.float32) -> nn.Module:
    """The model in a tuning mode. copied: all of its weights are in memory of their own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = tune(model, mode).eval()
    for p in model.parameters() if copied else ():
        with torch.no_grad():
            p.set_(p.clone())
    return model


def frozen(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not p.requires_grad]


def private_kib(folder: Path) -> int:
    """The memory that this process's maps of the files in folder take beyond the files' own."""
    kib, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(":")[0].split()[0]:
            within = str(folder) in line
        elif within and line.startswith("Anonymous:"):
            kib += int(line.split()[1])
    return kib


def anonymous_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


@pytest.mark.parametrize("mode", ["lora", "prefix", "head"])
def test_copies_become_maps_with_the_same_bits(folder, mode):
    model = loaded(folder, mode, copied=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert not any(map(FileMaps().hold, model.parameters()))
    assert map_frozen(model, folder) == []
    maps = FileMaps()
    assert all(map(maps.hold, frozen(model)))
    assert not any(maps.hold(p) for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in frozen(model)}) == len(frozen(model))


def test_memory_is_given_back(tmp_path):
    """glibc returns blocks of more than 32 MiB to the system as they are freed."""
    model = nn.ParameterDict({"x": torch.full((10, 1 << 20), 3.0)}).requires_grad_(False)
    save_file({"x": model["x"]}, tmp_path / "model.safetensors")
    before = anonymous_kib()
    assert map_frozen(model, tmp_path) == []
    assert before - anonymous_kib() > 38 << 10
    assert private_kib(tmp_path) == 0
    assert (model["x"] == 3).all()


def test_a_run_from_maps_has_the_same_bits_and_writes_to_none(folder):
    """Transformers itself leaves weights in maps; offloading copies none."""
    runs = []
    for offloads in (False, True):
        model = loaded(folder, "lora", copied=not offloads)
        if offloads:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                offload(model, "cpu")
        runs.append(Run(model, lambda m: MeZO(m, lr=1e-2, eps=1e-2)))
    for run in runs:
        run.steps(range(2))
        run.evaluate()
    assert_same(*runs)
    assert all(map(FileMaps().hold, frozen(runs[1].model)))
    assert private_kib(folder) == 0


def test_only_weights_that_are_no_maps_of_files_are_page_locked(folder, monkeypatch):
    """One that cannot be does not keep the others from it, and is told of."""
    locked, failures = [], [1]

    def lock(address, *rest):
        locked.append(address)
        return failures.pop() if failures else 0

    cudart = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=lambda address: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    from pseuzo.perturb.offload import _lock_pages

    model = loaded(folder, "lora")
    with pytest.warns(UserWarning, match="offload: 1 weights cannot be page-locked"):
        _lock_pages(model, CPU)
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert set(locked) == trained


def test_what_the_files_do_not_hold_stays(folder, tmp_path):
    """Another dtype, bits, shape or place, or no entry at all: said once by offload."""
    model = loaded(folder, "lora", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"frozen weights, the first being .*dtype and form") as w:
        offload(model, "cpu")
    assert len(w) == 1
    assert not any(map(FileMaps().hold, model.parameters()))
    names = "abcde"
    weights = {name: torch.ones(2, 8) for name in names}
    model = nn.ParameterDict({name: torch.ones(2, 8) for name in names}).requires_grad_(False)
    weights["b"][1, 7] = -1
    weights["c"] = torch.ones(8, 2)
    weights["e"] = torch.ones(2, 8, dtype=torch.float16)
    del weights["d"]
    save_file(weights, tmp_path / "model.safetensors")
    assert map_frozen(model, tmp_path) == ["b", "c", "d", "e"]
    assert FileMaps().hold(model["a"]) and not FileMaps().hold(model["b"])
    # One whose bytes do not begin on a multiple of four.
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} '
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0))
    assert len(header) % 4
    one = nn.ParameterDict({"a": torch.ones(1)}).requires_grad_(False)
    assert map_frozen(one, tmp_path) == ["a"]


def test_headers_say_what_the_files_hold(folder):
    saved = saved_weights(folder)
    for file in folder.glob("*.safetensors"):
        for name, x in load_file(file).items():
            data = file.read_bytes()[saved[name].begin : saved[name].end]
            assert data == x.numpy().tobytes() and saved[name].shape == tuple(x.shape)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert saved.keys() == index["weight_map"].keys()


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, struct.pack("<Q", 2) + b"[]"])
def test_a_broken_file_is_refused_in_a_sentence(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); give the folder"):
        saved_weights(tmp_path)


def test_weights_that_stay_in_files_need_no_memory(folder, monkeypatch):
    monkeypatch.setattr(offloading, "available_memory", lambda: 1 << 16)
    check = offloading.check_before_loading
    check(str(folder), torch.float32, few=True)
    for dtype, few, other in (
        (torch.float32, False, "bf16 or fp16 if it is not"),
        (torch.bfloat16, True, "the dtype of its files"),
    ):
        with pytest.raises(ValueError, match=f"GiB of host memory, .* load it in {other}"):
            check(str(folder), dtype, few=few)
