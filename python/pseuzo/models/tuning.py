"""The functions that the rows of `pseuzo.models.modes` name: what a tuning mode does to a model.

The modes full, lora, prefix and head, the values of r and alpha, and the start of a prefix from
real activations follow MeZO (Malladi et al. 2023), scales follow QZO (Shang et al. 2025). `peft`
makes adapters, prefixes and prompts.
"""

import copy
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.machine import holds_codes
from pseuzo.models.groupwise import layers_in_groups, quantise
from pseuzo.models.kinds import kind_of, without_adapter
from pseuzo.models.loading import quantised, reason_of
from pseuzo.models.placement import ROLES
from pseuzo.models.split import output_head
from pseuzo.perturb.contexts import frozen_mode

# Names of the layers in which attention makes its queries and values. The first pair that a model
# has is used.
QUERY_VALUE = (*zip(ROLES["q"], ROLES["v"], strict=True), *((name,) for name in ROLES["qkv"]))

_log = logging.getLogger(__name__)


def tune_full(model: nn.Module, *, seed: int) -> nn.Module:
    """Train every weight. ValueError if some are quantised, since no step can change those."""
    if names := quantised(model):
        raise ValueError(
            f"tune: {len(names)} weights of {type(model).__name__} are quantised, {names[0]} being "
            "the first, and no step can change them; use mode lora, prefix, prompt or head, or a "
            "model that is not quantised"
        )
    _refuse_codes(model, "full")
    return model.requires_grad_(True)


def tune_scales(model: nn.Module, *, group_size: int, seed: int) -> nn.Module:
    """Train the scales of the layers of GroupwiseLinear that `quantise` makes, if the model has
    none yet (QZO, Shang et al. 2025). The modules of a classifier behind its layers are trained
    with them, in the dtype of the model."""
    if names := quantised(model):
        raise ValueError(
            f"tune: {len(names)} weights of {type(model).__name__} are quantised by another "
            f"library, {names[0]} being the first; mode scales quantises the weights itself, so "
            "give it the model in fp32, bf16 or fp16, or use mode lora"
        )
    layers = layers_in_groups(model)
    if not layers:
        quantise(model, group_size)
        layers = layers_in_groups(model)
    elif sizes := {layer.group_size for layer in layers.values()} - {group_size}:
        raise ValueError(
            f"tune: the weights of {type(model).__name__} are in groups of {min(sizes)} already, "
            f"got group_size {group_size}; give {min(sizes)}, or the model before it was quantised"
        )
    model.requires_grad_(False)
    for layer in layers.values():
        layer.scales.requires_grad_(True)
    if kind_of(model) == "classifier":
        behind = _behind_layers(model)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in behind:
                module.requires_grad_(True)
    return model


def _refuse_codes(model: nn.Module, mode: str) -> None:
    if layers_in_groups(model):
        raise ValueError(
            f"tune: the weights of {type(model).__name__} are 4-bit codes, which mode {mode} "
            "cannot train; use mode scales, prefix, prompt or head, or the model before it was "
            "quantised"
        )


def tune_head(model: nn.Module, *, seed: int) -> nn.Module:
    """Train the output head. One that is tied to the embedding becomes a copy of its own."""
    head = own_head(model)
    model.requires_grad_(False)
    head.requires_grad_(True)
    return model


def own_head(model: nn.Module) -> nn.Linear:
    """Return the output head, as a copy of its own if it was tied to the embedding. ValueError if
    it is no Linear, or quantised."""
    head = output_head(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"tune: {type(model).__name__} has no Linear output head to train; use another mode"
        )
    if holds_codes(head.weight):
        raise ValueError(
            f"tune: the output head of {type(model).__name__} is quantised, and no step can change "
            "it; leave it out of the quantisation (llm_int8_skip_modules, modules_to_not_convert), "
            "or use mode lora, prefix or prompt"
        )
    if head.weight is getattr(model.get_input_embeddings(), "weight", None):
        head = copy.deepcopy(head)
        model.set_output_embeddings(head)
        _unshare(model, head)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        if hasattr(model, "all_tied_weights_keys"):
            # Transformers made this list with the model, and decides by it what to save.
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        _log.warning(
            "The output head of %s was the embedding's weight; it is now a copy of its own, which "
            "is trained apart from it and saved with the model (%d weights more).",
            type(model).__name__,
            head.weight.numel(),
        )
    return head


def tune_lora(
    model: nn.Module,
    *,
    lora_r: int,
    lora_alpha: float,
    lora_targets: list[str] | None,
    seed: int,
) -> nn.Module:
    """Train adapters of rank lora_r, scaled by lora_alpha / lora_r, on the layers named
    lora_targets; by default on those that make queries and values. The modules of a classifier
    behind its layers (a pooler and the head), which may be new, are trained and saved with them."""
    _need_peft("lora")
    _refuse_codes(model, "lora")
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if not (isinstance(lora_r, int) and lora_r >= 1 and lora_alpha > 0):
        raise ValueError(
            "tune: lora_r must be a whole number from 1 and lora_alpha above 0, got "
            f"{lora_r} and {lora_alpha}"
        )
    layers = {
        name.rpartition(".")[2]: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    }
    targets = lora_targets
    if targets is None:
        targets = next((list(names) for names in QUERY_VALUE if layers.keys() >= set(names)), None)
    if not targets or not layers.keys() >= set(targets):
        asked = (
            f"no layers named {', '.join(targets)}"
            if targets
            else "no attention layers of a known name"
        )
        raise ValueError(
            f"tune: {type(model).__name__} has {asked}; give lora_targets, some of "
            f"{', '.join(sorted(layers))}"
        )
    tasks = {"causal": TaskType.CAUSAL_LM, "classifier": TaskType.SEQ_CLS}
    kind = kind_of(model)
    config = LoraConfig(
        task_type=tasks.get(kind),  # peft has none for masked language models
        modules_to_save=_behind_layers(model) if kind == "classifier" else None,
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in targets),
    )
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:  # B is zero, so that the outputs of the model do not change
                start = torch.empty(p.shape, dtype=torch.float32, device="cpu")
                p.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
    return model


def _unshare(model: nn.Module, head: nn.Module) -> None:
    """Make copies of the head's weights that other modules have too: BERT's has its bias under two
    names, which are one weight only where the embedding's is shared as well."""
    own = set(head.parameters())
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if module is not head and p in own:
                setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=False))


def _behind_layers(model: nn.Module) -> list[str]:
    """The names of the modules with weights that a classifier has behind its layers."""
    own = [(name, m) for name, m in model.named_children() if name != model.base_model_prefix]
    poolers = [(name, m) for name, m in model.base_model.named_children() if name == "pooler"]
    return [name for name, m in (*own, *poolers) if list(m.parameters())]


@torch.no_grad()
def tune_prefix(
    model: nn.Module, *, prefix_tokens: int, prefix_from: list[int] | None, seed: int
) -> nn.Module:
    """Train the keys and values of prefix_tokens tokens in every layer. They start as the model's
    own for the tokens prefix_from, by default random ones of its vocabulary."""
    _need_peft("prefix")
    from peft import PrefixTuningConfig, TaskType

    prefix, text = _start_and_text(model, "prefix", prefix_tokens, prefix_from, seed)
    with frozen_mode(model):
        cache = getattr(model(input_ids=prefix, use_cache=True), "past_key_values", None)
    layers = [
        x
        for layer in getattr(cache, "layers", ())
        for x in (layer.keys, getattr(layer, "values", None))
    ]
    if not layers or not all(isinstance(x, Tensor) and x.dim() == 4 for x in layers):
        raise ValueError(_refused(model, "prefix", "it keeps no past keys and values"))
    if {x.shape for x in layers} != {layers[0].shape} or layers[0].shape[2] != prefix_tokens:
        raise ValueError(_refused(model, "prefix", "its past keys and values are not of one shape"))
    heads, width = layers[0].shape[1], layers[0].shape[3]
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=prefix_tokens,
        num_layers=len(layers) // 2,
        token_dim=heads * width,
        num_attention_heads=heads,
    )
    # peft has a row per token, which holds, layer by layer, the key of each head, then the value.
    rows = [x[0].to(layers[0].device) for x in layers]  # a model may be on several devices
    start = torch.stack(rows).permute(2, 0, 1, 3).reshape(prefix_tokens, -1)
    unlike = "it does not see past keys and values as the tokens they were made of"
    return _before_text(model, config, "prefix", start, prefix, text, unlike)


@torch.no_grad()
def tune_prompt(
    model: nn.Module, *, prompt_tokens: int, prompt_from: list[int] | None, seed: int
) -> nn.Module:
    """Train the embeddings of prompt_tokens tokens before the text (prompt tuning, Lester et al.
    2021). They start as the model's own for the tokens prompt_from, by default random ones of its
    vocabulary."""
    _need_peft("prompt")
    from peft import PromptTuningConfig, TaskType

    prompt, text = _start_and_text(model, "prompt", prompt_tokens, prompt_from, seed)
    # Call the module, since some embeddings scale the rows of their weight.
    start = model.get_input_embeddings()(prompt)[0]
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=prompt_tokens, token_dim=start.shape[-1]
    )
    unlike = "it does not see embeddings as the tokens they are of"
    return _before_text(model, config, "prompt", start, prompt, text, unlike)


def _start_and_text(
    model: nn.Module, mode: str, count: int, tokens: list[int] | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens [1, count] that a prefix or prompt starts as, and a text [1, 3] to compare
    outputs on."""
    if kind_of(model) != "causal":
        raise ValueError(_refused(model, mode, "it is not a causal language model"))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"tune: {mode}_tokens must be a whole number from 1, got {count}")
    if tokens is not None and (
        len(tokens) != count or not all(0 <= t < vocabulary for t in tokens)
    ):
        raise ValueError(
            f"tune: {mode}_from must be {count} token ids below {vocabulary}, got {tokens}"
        )
    drawn = _random_tokens(model, count + 3, seed)
    start = drawn[:count] if tokens is None else torch.tensor(tokens)
    return start[None].to(model.device), drawn[None, count:].to(model.device)


def _before_text(
    model: nn.Module,
    config: Any,
    mode: str,
    start: Tensor,
    tokens: Tensor,
    text: Tensor,
    unlike: str,
) -> nn.Module:
    """Return the model with what peft's `config` learns before the text, initialised to `start`.

    ValueError if peft cannot make it for this model. ValueError with the reason `unlike` if the
    logits of the text after it differ from those after the tokens themselves.
    """
    from peft import get_peft_model

    with frozen_mode(model):
        whole = torch.cat([tokens, text], 1)
        want = model(input_ids=whole, use_cache=False).logits[:, tokens.shape[1] :]
    try:
        with torch.random.fork_rng(devices=[]):
            model = get_peft_model(model, config)
        encoder = model.prompt_encoder[model.active_adapter].float()
        encoder.embedding.weight.copy_(start)
        with frozen_mode(model):
            mask = torch.ones_like(text)
            got = model(input_ids=text, attention_mask=mask, use_cache=False).logits
    except Exception as error:  # peft fails in many ways on models that Transformers alone knows
        raise ValueError(_refused(model, mode, reason_of(error))) from None
    got = got[:, -text.shape[1] :]  # leaves out the logits of a prompt
    # Products of other shapes round differently, by a few ulps. With 8-bit weights the difference
    # is a few of their roundings, since all rows decide which columns are not quantised.
    ulps = 2**-4 if quantised(model) else 32 * torch.finfo(want.dtype).eps
    limit = ulps * want.abs().max().float().clamp(min=1)
    if bool(want.isfinite().all()) and not bool(((got - want).abs() <= limit).all()):
        raise ValueError(_refused(model, mode, unlike))
    return model


def _refused(model: nn.Module, mode: str, why: str) -> str:
    base = without_adapter(model)
    return f"tune: {type(base).__name__} cannot be given a {mode} ({why}); use mode 'lora'"


def _need_peft(mode: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ImportError(f"tune: mode {mode!r} needs peft; pip install peft") from None


def _random_tokens(model: nn.Module, count: int, seed: int) -> Tensor:
    """Draw [count] ids of the vocabulary, none of them special."""
    config = model.config.get_text_config()
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    special = [i for ids in special for i in (ids if isinstance(ids, list) else [ids])]
    plain = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    return plain[torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(seed))]
