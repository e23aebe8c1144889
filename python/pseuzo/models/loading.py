"""Loads language models, classifiers and their tokenizers, and adapters that `peft` saved.

    model, tokenizer = load_model("facebook/opt-1.3b", dtype="bf16")

If a model cannot be loaded, one sentence says why, and what to do instead.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pseuzo.machine import holds_codes, usable_device
from pseuzo.models.kinds import KINDS, auto_class, kind_of, name_classes, without_adapter
from pseuzo.sentences import first_line, one_line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "fp32",
    device: str | torch.device | None = None,
    need_tokenizer: bool = True,
    kind: str = "auto",
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple:
    """Load (model, tokenizer) of a language model: a name on the hub, a folder, or a folder of
    adapters that `peft` saved.

    kind: "causal", "masked" or "classifier", see `kinds`; "auto" is what the architectures in its
    config say, causal if they say neither. A classifier has a class for each of labels; if the
    checkpoint has no such head, a new one is drawn by seed, and its classes get these names.

    dtype: "fp32", "fp16" or "bf16"; in a quantised model it applies to the weights that are not
    quantised (with bitsandbytes, those stay as they were saved). device: by default cuda if there
    is one. Weights are read from safetensors alone, and no code of the model is run. The tokenizer
    of a causal model pads on the left, any other on the right; one without a padding token pads
    with its end of text. need_tokenizer=False: the tokenizer is None if there is none.

    ValueError if there is no such model or device, if it is not of that kind, if its weights are
    pickled or some are missing, or if it has no tokenizer.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load_model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if kind not in ("auto", *KINDS):
        raise ValueError(f"load_model: kind must be one of auto, {', '.join(KINDS)}, got {kind!r}")
    try:
        where = usable_device(device)
    except ValueError as error:
        raise ValueError(f"load_model: {error}") from None
    name = str(name_or_path)
    folder = _folder(name)
    adapter = folder / "adapter_config.json" if folder else None
    if adapter and adapter.is_file():
        _check_weights(folder, "adapter_model", "give the adapter saved anew by peft")
        base = _base_of(adapter)
        classes = _classes_of(folder)
        try:
            _check_bases(folder)
            model, tokenizer = load_model(
                base,
                dtype=dtype,
                device=where,
                need_tokenizer=need_tokenizer,
                kind="classifier" if classes and kind == "auto" else kind,
                labels=labels or classes,
            )
        except ValueError as error:
            reason = str(error).removeprefix("load_model: ")
            raise ValueError(
                f"load_model: {name} is an adapter for the model {base}, and {reason} "
                f"(base_model_name_or_path in {adapter} says where that is)"
            ) from None
        model = _load_adapter(model, name, folder)
        return model, _load_tokenizer(name, model) if any(folder.glob("tokenizer*")) else tokenizer
    try:
        model = _load_base(name, folder, DTYPES[dtype], kind, labels, seed).to(where)
    except (ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config of wrong types may fail in any way
        raise ValueError(f"load_model: {name} cannot be loaded: {one_line(error)}") from error
    if not need_tokenizer and folder and not any(folder.glob("tokenizer*")):
        return model, None
    return model, _load_tokenizer(name, model)


def quantised(model: nn.Module) -> list[str]:
    """List the names of quantised weights, which can take neither noise nor gradients."""
    return [name for name, p in model.named_parameters() if holds_codes(p)]


def keep_as_loaded(model: nn.Module) -> None:
    """Make a quantised model compute with and save the weights that were loaded, at any time.

    For some processors bitsandbytes repacks 4-bit weights in a forward, with rounded scales, and
    unpacks them when they are saved: then the outputs differ from those of the model that was
    loaded, and differ again after a checkpoint. Transformers cannot write quantised weights in
    their original format. It also calls a model quantised if it dequantised the weights when it
    loaded them (GGUF).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks them, if they are packed
    base = without_adapter(model)
    if not getattr(base, "is_quantized", False):
        return
    if quantised(base):
        kept = [
            conversion
            for conversion in getattr(base, "_weight_conversions", None) or ()
            if _reverts(conversion)
        ]
        # Transformers has no public way to leave conversions out of every save.
        base._weight_conversions = kept or None
    else:
        base.hf_quantizer.remove_quantization_config(base)


def _reverts(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    return first_line(error).rstrip(".")


def _folder(name: str) -> Path | None:
    """Return the folder of this name, or None if it is a name on the hub."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        if path.suffix == ".gguf":
            raise ValueError(f"load_model: {_packed(path)}")
        raise ValueError(
            f"load_model: {name} is a file; give the folder of a model, or a name on the hub"
        )
    if name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1 or not name:
        raise ValueError(f"load_model: there is no folder {name or 'of an empty name'}")
    return None


def _base_of(adapter: Path) -> str:
    """Return the model that the adapter of this adapter_config.json is for."""
    try:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f"load_model: {adapter} does not say which model the adapter is for")
    return base


def _classes_of(folder: Path) -> list[str] | None:
    """Names for the classes of the head that an adapter was saved with; None if it is for no
    classifier."""
    from safetensors import SafetensorError, safe_open

    try:
        if json.loads((folder / "adapter_config.json").read_text()).get("task_type") != "SEQ_CLS":
            return None
        with safe_open(folder / "adapter_model.safetensors", "pt") as saved:
            shapes = [
                saved.get_slice(key).get_shape() for key in saved.keys() if "lora_" not in key
            ]
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"load_model: the adapter in {folder} cannot be loaded: {reason_of(error)}"
        ) from None
    # A head has the fewest rows: a class is one, and everything before it is as wide as the model.
    count = min((shape[0] for shape in shapes if len(shape) == 2), default=0)
    return [f"LABEL_{i}" for i in range(count)] or None


def _check_bases(folder: Path) -> None:
    """Raise ValueError if an adapter is for itself, directly or through other adapters."""
    seen: list[Path] = []
    while folder and (folder / "adapter_config.json").is_file():
        if folder.resolve() in seen:
            raise ValueError("load_model: the chain of adapters leads back to this adapter")
        seen.append(folder.resolve())
        folder = _folder(_base_of(folder / "adapter_config.json"))


def _check_weights(folder: Path, stem: str, instead: str = "") -> None:
    """Raise ValueError unless the folder has weights in safetensors.

    instead: what the error tells the user to do, other than to convert the model.
    """
    if any(folder.glob(f"{stem}*.safetensors")):
        return
    pickles = sorted(p for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickles:
        raise ValueError(f"load_model: {_pickled(f'{pickles[0]} is', str(folder), instead)}")
    raise ValueError(f"load_model: {folder} has no weights ({stem}.safetensors)")


def _pickled(what: str, name: str, instead: str = "") -> str:
    """Say what to do about pickled weights, which may run code when they are opened."""
    refused = f"{what} a pickle, which may run code of its own, where safetensors is expected; "
    if instead:
        return refused + instead
    target = f"{Path(name).name}-safetensors"
    return (
        f"{refused}if you trust its source, convert it where nothing can be lost: "
        'python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False)"
        f".save_pretrained({target!r}); "
        f't.AutoTokenizer.from_pretrained({name!r}).save_pretrained({target!r})", '
        f"then give {target}"
    )


def _packed(file: Path) -> str:
    """Say what to do about the weights in a GGUF file."""
    target = f"{file.stem}-safetensors"
    given = f"{str(file.parent)!r}, gguf_file={file.name!r}"
    return (
        f"{file} is a GGUF file; dequantise its weights: "
        'python -c "import transformers as t; from pseuzo.models.loading import keep_as_loaded; '
        f"m = t.AutoModelForCausalLM.from_pretrained({given}, "
        "quantization_config=t.GgufConfig(dequantize=True)); "
        f"keep_as_loaded(m); m.save_pretrained({target!r}); "
        f't.AutoTokenizer.from_pretrained({given}).save_pretrained({target!r})", '
        f"then give {target}"
    )


def _load_base(
    name: str,
    folder: Path | None,
    dtype: torch.dtype,
    kind: str,
    labels: Sequence[str] | None,
    seed: int,
) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    import pseuzo.models.groupwise_config  # noqa: F401  # such models can be loaded then

    if folder and not (folder / "config.json").is_file():
        inside = folder / "model"  # a run saves its model there
        hint = f"; did you mean {inside}?" if any(inside.glob("*config.json")) else ""
        if file := next(iter(sorted(folder.glob("*.gguf"))), None):
            raise ValueError(f"load_model: {_packed(file)}")
        raise ValueError(
            f"load_model: {name} has no config.json; it is not the folder of a Transformers "
            f"model{hint}"
        )
    # Adapters are saved with this path and loaded from other directories, so it is absolute.
    source = folder.resolve() if folder else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"load_model: {_why_not(name, folder, error)}") from None
    auto = auto_class(name, config, kind)
    if auto.__name__.endswith("Classification"):
        name_classes(name, config, labels)
    if folder:
        _check_weights(folder, "model")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of a new head
            model, info = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if folder is None and "safetensors" in str(error):
            raise ValueError(
                f"load_model: {_pickled(f'what the hub has of {name} is', name)}"
            ) from None
        raise ValueError(f"load_model: {_why_not(name, folder, error)}") from None
    inside, missing = f"{model.base_model_prefix}.", sorted(info["missing_keys"])
    if kind_of(model) == "classifier":  # a head, and the layer that some have before it, may be new
        missing = [key for key in missing if key.startswith(inside) and ".pooler." not in key]
    if missing:
        raise ValueError(
            f"load_model: {name} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"the first being {missing[0]}; they would be random"
        )
    keep_as_loaded(model)
    return model


def _load_adapter(model: nn.Module, name: str, folder: Path) -> nn.Module:
    """Return the model with the adapter of a folder, ready for more training.

    PeftModel.from_pretrained refuses to do this for the adapter of a prefix.
    """
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        with torch.random.fork_rng(devices=[]):
            model = get_peft_model(model, config)
        if getattr(config, "is_prompt_learning", False):
            model.prompt_encoder[model.active_adapter].float()
        missing = model.load_adapter(
            str(folder), model.active_adapter, is_trainable=True
        ).missing_keys
    except Exception as error:  # peft, safetensors and torch each raise their own
        raise ValueError(
            f"load_model: the adapter in {name} cannot be loaded: {reason_of(error)}"
        ) from None
    if missing:
        raise ValueError(
            f"load_model: the adapter in {name} lacks {len(missing)} weights, the first being "
            f"{missing[0]}"
        )
    return model.eval()


def _why_not(name: str, folder: Path | None, error: Exception) -> str:
    """Why a model could not be had: for a name on the hub, from what the hub's library says."""
    if folder is not None:
        return f"{name} cannot be loaded: {reason_of(error)}"
    text = str(error).lower().replace(str(name).lower(), "")  # which may itself contain 404
    if "connect" in text or "offline" in text:
        return (
            f"{name} is no folder, is not in the cache of the hub's models, and the hub cannot be "
            "reached; check the name and the connection, or give a folder"
        )
    if "gated" in text:
        return f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`"
    if "not a valid model identifier" in text or "404" in text:
        return f"{name} is neither a folder nor a model on the hub"
    return f"{name} cannot be loaded: {reason_of(error)}"


def _load_tokenizer(name: str, model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            padding_side="left" if kind_of(model) == "causal" else "right",
            trust_remote_code=False,
        )
    except Exception as error:  # each kind of tokenizer fails in its own ways
        raise ValueError(
            f"load_model: {name} has no tokenizer that can be loaded: {reason_of(error)}"
        ) from None
    # Transformers makes an empty tokenizer where there are no files of one.
    if len(tokenizer) - len(set(tokenizer.all_special_tokens)) < 2:
        raise ValueError(f"load_model: {name} has no tokenizer; save the model's beside it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"load_model: the tokenizer of {name} has no padding token, and none that "
                "could serve"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"load_model: the tokenizer of {name} has {len(tokenizer)} tokens, its model only "
            f"{rows} embeddings"
        )
    if kind_of(model) == "classifier" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # it looks for the last token by it
    return tokenizer
