"""Models, a tokenizer and samples small enough to make within a test."""

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
# Of each family the configuration, and what its sizes need besides `SIZES`.
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-bias": (transformers.LlamaConfig, {"mlp_bias": True}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 16, "pad_token_id": 0}),
    "gemma-untied": (
        transformers.GemmaConfig,
        {"head_dim": 16, "pad_token_id": 0, "tie_word_embeddings": False},
    ),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "pad_token_id": 0}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 16, "pad_token_id": 0}),
    "phi3": (transformers.Phi3Config, {"pad_token_id": 0}),
}


def make_model(kind="llama", *, dtype=torch.float32, seed=0, **changes):
    """A causal language model with random weights and biases, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config, more = FAMILIES[kind]
        config = config(**{**SIZES, **more, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):  # made as zeros, which would prove nothing
                torch.nn.init.normal_(parameter, std=0.1)
        return model


@functools.cache
def make_tokenizer():
    """Bytes as tokens: 256 of them, then the marks of beginning and end, the first added."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SIZES["bos_token_id"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )


def make_words(single="<s> $A", *, spaced=False, **options):
    """Words as tokens, between such marks as are wanted.

    Args:
        single: What stands around a text, ``"$A"`` for nothing.
        spaced: Put a blank before every text and keep blanks within the words, as sentencepiece.
        options: Of the tokenizer, such as a chat template.
    """
    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [f"{blank}{c}" for blank in (" ▁" if spaced else " ") for c in "abcdefghij"]
    vocabulary = [*marks, "▁", "\n", *(word.strip() for word in words)]
    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(ids, [("▁", c) for c in "abcdefghij"] if spaced else []))
    if spaced:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(mark, ids[mark]) for mark in marks if mark in single]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{**named, **options})


def make_ids(n_samples, n_tokens, *, seed=0):
    """Token ids of random plain texts."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (1, n_tokens), generator=draw) for _ in range(n_samples)]


def scale_channels(model, *, factor=64.0, channels=(0, 1, 2, 3)):
    """Give the FFN inputs massive channels without changing what the model computes.

    The gain of the norm before each FFN grows by a power of two on a few channels, and the columns
    of gate and up that read them shrink by it.
    """
    where = list(channels)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[where] *= factor
            layer.mlp.gate_proj.weight[:, where] /= factor
            layer.mlp.up_proj.weight[:, where] /= factor
