"""Models to tune, and which of their weights: all, LoRA adapters, a prefix of keys and values, or the output head.

    model, tokenizer = load_model("facebook/opt-1.3b", dtype="bf16")
    model = tune(model, "prefix")

Modes, r, alpha and the prefix's start from real activations are those of MeZO (Malladi et al. 2023), done by `peft`.
"""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.machine import holds_codes, usable_device
from pseuzo.models.placement import ROLES
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.train.methods import MODES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# where attention makes its queries and values, by the names of the layers; the first pair that a model has is taken
QUERY_VALUE = (*zip(ROLES["q"], ROLES["v"], strict=True), *((name,) for name in ROLES["qkv"]))

_log = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "fp32",
    device: str | torch.device | None = None,
    need_tokenizer: bool = True,
) -> tuple:
    """(model, tokenizer) of a causal LM: a name on the hub, a folder, or a folder of adapters that `peft` saved.

    dtype: "fp32", "fp16" or "bf16"; of a quantised model, that of what is not quantised (with bitsandbytes, that stays
    as it was saved). device: cuda where there is one, unless given. Weights come from safetensors alone, and no code of
    the model's is run. The tokenizer pads on the left; one without a padding token pads with its end of text;
    need_tokenizer False: None where there is none. ValueError: no such model, no causal LM, pickled weights, missing
    ones, no tokenizer, no such device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load_model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
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
        try:
            _check_bases(folder)
            model, tokenizer = load_model(
                base, dtype=dtype, device=where, need_tokenizer=need_tokenizer
            )
        except ValueError as error:
            reason = str(error).removeprefix("load_model: ")
            raise ValueError(
                f"load_model: {name} is an adapter for the model {base}, and {reason} (base_model_name_or_path in "
                f"{adapter} says where that is)"
            ) from None
        model = _load_adapter(model, name, folder)
        return model, _load_tokenizer(name, model) if any(folder.glob("tokenizer*")) else tokenizer
    try:
        model = _load_causal_lm(name, folder, DTYPES[dtype]).to(where)
    except (ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a config of wrong types makes of a model may fail in any way
        raise ValueError(
            f"load_model: {name} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    if not need_tokenizer and folder and not any(folder.glob("tokenizer*")):
        return model, None
    return model, _load_tokenizer(name, model)


def tune(
    model: nn.Module,
    mode: str = "full",
    *,
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_targets: list[str] | None = None,
    prefix_tokens: int = 5,
    prefix_from: list[int] | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model with the weights of a mode requiring grad and no others; in modes lora and prefix, a `peft` model.

    full: every weight. lora: adapters of rank lora_r, scaled by lora_alpha / lora_r, on the layers named lora_targets;
    by default those that make queries and values. prefix: the keys and values of prefix_tokens tokens in every layer,
    which start as the model's own for the tokens prefix_from, by default random ones of its vocabulary. head: the
    output head; one that is tied to the embedding becomes a copy of its own. Adapters and prefixes are fp32 whatever
    the model is. seed: of what is drawn at random; torch's own generator is not touched. The model given is changed.

    ValueError: an unknown mode, a model that has adapters already, or one in which the mode cannot be had.
    """
    if mode not in MODES:
        raise ValueError(f"tune: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if hasattr(model, "peft_type"):
        raise ValueError(
            "tune: the model has an adapter already; tune the model that it was made from"
        )
    if mode == "full":
        if names := quantised(model):
            raise ValueError(
                f"tune: {len(names)} weights of {type(model).__name__} are quantised, {names[0]} being the first, and "
                "no step can change them; use mode lora, prefix or head, or a model that is not quantised"
            )
        return model.requires_grad_(True)
    if mode == "head":
        return _tune_head(model)
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ImportError(f"tune: mode {mode!r} needs peft; pip install peft") from None
    if mode == "lora":
        return _tune_lora(model, lora_r, lora_alpha, lora_targets, seed)
    return _tune_prefix(model, prefix_tokens, prefix_from, seed)


def quantised(model: nn.Module) -> list[str]:
    """The names of quantised weights, which can take neither noise nor gradients."""
    return [name for name, p in model.named_parameters() if holds_codes(p)]


def keep_as_loaded(model: nn.Module) -> None:
    """Have a quantised model compute and save what was loaded, whatever is done between.

    For some processors bitsandbytes packs 4-bit weights anew at a forward, with rounded scales, and unpacks them at a
    save: other outputs than those of the model that was loaded, and others again after a checkpoint. Transformers
    cannot write in the original format what it quantised, or loaded so; and calls a model quantised whose weights it
    made numbers again when it loaded them (GGUF).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks them, if they are packed
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "is_quantized", False):
        return
    if quantised(base):
        kept = [
            conversion
            for conversion in getattr(base, "_weight_conversions", None) or ()
            if _reverts(conversion)
        ]
        base._weight_conversions = kept or None
    else:
        base.hf_quantizer.remove_quantization_config(base)


def _reverts(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the output head that the model uses nowhere else; [] if they are the embedding's, or if it is no
    Transformers model with a head of logits over tokens.

    PseuZO's perturbed passes end before the head: these can only be frozen, or trained by the exact gradient that the
    head's backward gives.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return []
    shared = set(model.get_input_embeddings().parameters())
    return [p for p in head.parameters() if p not in shared]


def _tune_head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"tune: {type(model).__name__} has no Linear output head to train; use another mode"
        )
    if holds_codes(head.weight):
        raise ValueError(
            f"tune: the output head of {type(model).__name__} is quantised, and no step can change it; leave it out of "
            "the quantisation (llm_int8_skip_modules, modules_to_not_convert), or use mode lora or prefix"
        )
    if head.weight is getattr(model.get_input_embeddings(), "weight", None):
        head = copy.deepcopy(head)
        model.set_output_embeddings(head)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        if hasattr(
            model, "all_tied_weights_keys"
        ):  # kept by Transformers since the model was made; it saves by them
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        _log.warning(
            "The output head of %s was the embedding's weight; it is now a copy of its own, which alone is trained "
            "and which is saved with the model (%d weights more).", type(model).__name__, head.weight.numel(),
        )  # fmt: skip
    model.requires_grad_(False)
    head.requires_grad_(True)
    return model


def _tune_lora(
    model: nn.Module, r: int, alpha: float, targets: list[str] | None, seed: int
) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if not (isinstance(r, int) and r >= 1 and alpha > 0):
        raise ValueError(
            f"tune: lora_r must be a whole number from 1 and lora_alpha above 0, got {r} and {alpha}"
        )
    layers = {
        name.rpartition(".")[2]: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }
    if targets is None:
        targets = next((list(names) for names in QUERY_VALUE if layers.keys() >= set(names)), None)
    if not targets or not layers.keys() >= set(targets):
        asked = (
            f"no layers named {', '.join(targets)}"
            if targets
            else "no attention layers of a known name"
        )
        raise ValueError(
            f"tune: {type(model).__name__} has {asked}; give lora_targets, some of {', '.join(sorted(layers))}"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets,
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in targets),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:  # B is zero: the model starts as it is
                start = torch.empty(p.shape, dtype=torch.float32, device="cpu")
                p.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
    return model


@torch.no_grad()
def _tune_prefix(model: nn.Module, count: int, tokens: list[int] | None, seed: int) -> nn.Module:
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"tune: prefix_tokens must be a whole number from 1, got {count}")
    if tokens is not None and (
        len(tokens) != count or not all(0 <= t < vocabulary for t in tokens)
    ):
        raise ValueError(
            f"tune: prefix_from must be {count} token ids below {vocabulary}, got {tokens}"
        )
    kind = type(model).__name__
    refused = f"tune: {kind} cannot be given a prefix ({{}}); use mode 'lora'"
    drawn = _random_tokens(model, count + 3, seed)
    prefix = drawn[:count] if tokens is None else torch.tensor(tokens)
    probe = drawn[count:]
    prefix, probe = prefix[None].to(model.device), probe[None].to(model.device)

    with frozen_mode(model):
        cache = getattr(model(input_ids=prefix, use_cache=True), "past_key_values", None)
        layers = [
            x
            for layer in getattr(cache, "layers", ())
            for x in (layer.keys, getattr(layer, "values", None))
        ]
        if not layers or not all(isinstance(x, Tensor) and x.dim() == 4 for x in layers):
            raise ValueError(refused.format("it keeps no past keys and values"))
        if {x.shape for x in layers} != {layers[0].shape} or layers[0].shape[2] != count:
            raise ValueError(refused.format("its past keys and values are not of one shape"))
        heads, width = layers[0].shape[1], layers[0].shape[3]
        want = model(input_ids=torch.cat([prefix, probe], 1), use_cache=False).logits[:, count:]

    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=count, num_layers=len(layers) // 2, token_dim=heads * width,
        num_attention_heads=heads,
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            model = get_peft_model(model, config)
        encoder = model.prompt_encoder[model.active_adapter].float()
        # peft's layout, a row a token: layer by layer, the key of each head, then the value of each
        start = torch.stack([x[0] for x in layers]).permute(2, 0, 1, 3).reshape(count, -1)
        encoder.embedding.weight.copy_(start)
        with frozen_mode(model):
            got = model(
                input_ids=probe, attention_mask=torch.ones_like(probe), use_cache=False
            ).logits
    except (
        Exception
    ) as error:  # peft knows fewer models than Transformers, and fails on others in many ways
        raise ValueError(refused.format(_first_line(error))) from None
    # The prefix must be to the model what those tokens are. Products of other shapes round differently: a few ulps; of
    # 8-bit numbers, a few of their roundings, as all rows decide which columns are left out of them.
    ulps = 2**-4 if quantised(model) else 32 * torch.finfo(want.dtype).eps
    limit = ulps * want.abs().max().float().clamp(min=1)
    if bool(want.isfinite().all()) and not bool(((got - want).abs() <= limit).all()):
        raise ValueError(
            refused.format("it does not see past keys and values as the tokens they were made of")
        )
    return model


def _random_tokens(model: nn.Module, count: int, seed: int) -> Tensor:
    """[count] ids of the vocabulary, none of them special."""
    config = model.config.get_text_config()
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    special = [i for ids in special for i in (ids if isinstance(ids, list) else [ids])]
    plain = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    return plain[torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(seed))]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _folder(name: str) -> Path | None:
    """The folder that is meant, or None if the name is one of the hub's."""
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
    """The model that the adapter of this adapter_config.json is for."""
    try:
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(f"load_model: {adapter} does not say which model the adapter is for")
    return base


def _check_bases(folder: Path) -> None:
    """ValueError if an adapter is, by way of others or not, for itself."""
    seen: list[Path] = []
    while folder and (folder / "adapter_config.json").is_file():
        if folder.resolve() in seen:
            raise ValueError("load_model: that is an adapter which in the end is for itself")
        seen.append(folder.resolve())
        folder = _folder(_base_of(folder / "adapter_config.json"))


def _check_weights(folder: Path, stem: str, instead: str = "") -> None:
    """ValueError unless the folder has weights in safetensors. instead: what to do, if not to convert the model."""
    if any(folder.glob(f"{stem}*.safetensors")):
        return
    pickles = sorted(p for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickles:
        raise ValueError(f"load_model: {_pickled(f'{pickles[0]} is', str(folder), instead)}")
    raise ValueError(f"load_model: {folder} has no weights ({stem}.safetensors)")


def _pickled(what: str, name: str, instead: str = "") -> str:
    """What to do about weights that are pickled: to open them may run what they contain."""
    refused = f"{what} a pickle, which may run code of its own, where safetensors is expected; "
    if instead:
        return refused + instead
    target = f"{Path(name).name}-safetensors"
    return (
        f'{refused}if you trust its source, convert it where nothing can be lost: python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False).save_pretrained({target!r}); "
        f't.AutoTokenizer.from_pretrained({name!r}).save_pretrained({target!r})", then give {target}'
    )


def _packed(file: Path) -> str:
    """What to do about the weights in a GGUF file."""
    target = f"{file.stem}-safetensors"
    given = f"{str(file.parent)!r}, gguf_file={file.name!r}"
    return (
        f'{file} is a GGUF file; make numbers of its weights: python -c "import transformers as t; from pseuzo.models.loading '
        f"import keep_as_loaded; m = t.AutoModelForCausalLM.from_pretrained({given}, quantization_config="
        f"t.GgufConfig(dequantize=True)); keep_as_loaded(m); m.save_pretrained({target!r}); "
        f't.AutoTokenizer.from_pretrained({given}).save_pretrained({target!r})", then give {target}'
    )


def _load_causal_lm(name: str, folder: Path | None, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if folder and not (folder / "config.json").is_file():
        inside = folder / "model"  # of a run
        hint = f"; did you mean {inside}?" if any(inside.glob("*config.json")) else ""
        if file := next(iter(sorted(folder.glob("*.gguf"))), None):
            raise ValueError(f"load_model: {_packed(file)}")
        raise ValueError(
            f"load_model: {name} has no config.json; it is not the folder of a Transformers model{hint}"
        )
    source = (
        folder.resolve() if folder else name
    )  # adapters are saved with it, and loaded in other directories
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"load_model: {_unreachable(name, error)}") from None
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    others = [a for a in config.architectures or () if ("For" in a or "LMHead" in a) and a != known]
    if known is None or others:
        what = others[0] if others else config.model_type
        raise ValueError(
            f"load_model: {name} is no causal language model but a {what}; use a ...ForCausalLM model"
        )
    if folder:
        _check_weights(folder, "model")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
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
        raise ValueError(f"load_model: {_unreachable(name, error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"load_model: {name} lacks {len(missing)} of the weights of {type(model).__name__}, the first being "
            f"{missing[0]}; they would be random"
        )
    keep_as_loaded(model)
    return model


def _load_adapter(model: nn.Module, name: str, folder: Path) -> nn.Module:
    """The model with the adapter of a folder, ready to be trained on: PeftModel.from_pretrained refuses that of a
    prefix."""
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
            f"load_model: the adapter in {name} cannot be loaded: {_first_line(error)}"
        ) from None
    if missing:
        raise ValueError(
            f"load_model: the adapter in {name} lacks {len(missing)} weights, the first being {missing[0]}"
        )
    return model.eval()


def _unreachable(name: str, error: Exception) -> str:
    text = str(error).lower()
    if "connect" in text or "offline" in text:
        return (
            f"{name} is no folder, is not in the cache of the hub's models, and the hub cannot be reached; check the "
            "name and the connection, or give a folder"
        )
    if "gated" in text:
        return f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`"
    if "not a valid model identifier" in text or "404" in text:
        return f"{name} is neither a folder nor a model on the hub"
    return f"{name} cannot be loaded: {_first_line(error)}"


def _load_tokenizer(name: str, model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, padding_side="left", trust_remote_code=False
        )
    except Exception as error:  # as many kinds as there are tokenizers
        raise ValueError(
            f"load_model: {name} has no tokenizer that can be loaded: {_first_line(error)}"
        ) from None
    if (
        len(tokenizer) - len(set(tokenizer.all_special_tokens)) < 2
    ):  # Transformers makes an empty one of nothing
        raise ValueError(f"load_model: {name} has no tokenizer; save the model's beside it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"load_model: the tokenizer of {name} has no padding token, and none that could serve"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"load_model: the tokenizer of {name} has {len(tokenizer)} tokens, its model only {rows} embeddings"
        )
    return tokenizer
