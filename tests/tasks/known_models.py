"""Makes a model whose every probability is known, for figures worked out by hand."""

import itertools
import math

import torch
from torch import nn
from transformers import GenerationMixin, OPTConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB = 2048


class Pairs(PreTrainedModel, GenerationMixin):
    """The next token's logits depend on the last token alone: lm_head.weight[next, last]."""

    config_class = OPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, VOCAB)
        self.drop = nn.Dropout(0.9)
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(VOCAB))
            self.lm_head.weight.zero_()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.drop(self.embed(input_ids))))


def model_of(tokenizer, *texts, logits=10.0):
    """Return a model in which the next token of each text has this logit, or its own logit if
    several are given. All other tokens have 0."""
    model = Pairs(
        OPTConfig(vocab_size=VOCAB, pad_token_id=1, bos_token_id=2, eos_token_id=2)
    ).train()
    logits = logits if isinstance(logits, tuple) else (logits,) * len(texts)
    with torch.no_grad():
        for text, logit in zip(texts, logits, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for last, following in itertools.pairwise(ids):
                model.lm_head.weight[following, last] = logit
    return model


def logp(*logits, total=None):
    """Return the log-probability of the first of these logits among all VOCAB, of which the rest
    are 0."""
    return logits[0] - math.log(sum(map(math.exp, logits)) + VOCAB - len(logits))
