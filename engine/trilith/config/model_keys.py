"""Keys of the sections `model` and `data`."""

from __future__ import annotations

from typing import Literal

from trilith.config.base import Auto, BelowOne, Bool, ConfigModel, Count, CountOrZero, NotNegative, Positive, Text, key


class ModelConfig(ConfigModel):
    """The transformer to train."""

    family: Literal["gpt2", "llama"] = key(
        ..., "Architecture: gpt2 (learned positions, LayerNorm, GELU) or llama (RoPE, RMSNorm, SwiGLU, GQA)."
    )
    num_layers: Count = key(..., "Transformer blocks (L).", "blocks")
    hidden_size: Count = key(..., "Width of the residual stream (H); a multiple of num_heads.", "features")
    num_heads: Count = key(..., "Query heads (N).", "heads")
    num_kv_heads: Auto[Count] = key("auto", "Key/value heads (K); divides num_heads. auto: num_heads.", "heads")
    ffn_hidden_size: Auto[Count] = key(
        "auto",
        "Inner width of the feed-forward layer (F). auto: 4 x hidden_size for gpt2; for llama 8/3 x hidden_size "
        "rounded up to a multiple of 8, of 256 from hidden_size 1024 on.",
        "features",
    )
    sequence_length: Count = key(..., "Tokens of one sample (S).", "tokens")
    vocab_size: Auto[Count] = key("auto", "Rows of the embedding (V). auto: data.tokenizer.vocab_size.", "tokens")
    tie_embeddings: Auto[Bool] = key(
        "auto", "The output layer shares the embedding's weight. auto: true for gpt2, false for llama."
    )
    dropout: BelowOne = key(
        0.0, "Dropout probability of embeddings and residual branches.", "probability, 0 to below 1"
    )
    attention_dropout: Auto[BelowOne] = key(
        "auto",
        "Dropout probability of attention weights. auto: dropout for gpt2, 0 for llama.",
        "probability, 0 to below 1",
    )
    norm_eps: Auto[Positive] = key("auto", "Added to the variance in LayerNorm and RMSNorm. auto: 1e-5.")
    rope_theta: Positive = key(10000.0, "Base of the rotary position frequencies; llama only.")
    init_std: Positive = key(0.02, "Standard deviation of the initial weights.")
    activation: Auto[Literal["gelu_tanh", "gelu", "swiglu"]] = key(
        "auto", "Non-linearity of the feed-forward layer. auto: gelu_tanh for gpt2, swiglu for llama."
    )
    linear_bias: Auto[Bool] = key("auto", "Linear layers have a bias. auto: true for gpt2, false for llama.")


class TokenizerConfig(ConfigModel):
    """The tokenizer that is trained on the corpus, or read from a file."""

    type: Literal["bpe"] = key("bpe", "Kind of tokenizer: bpe is byte-level byte-pair encoding.")
    vocab_size: Count = key(4096, "Size of the vocabulary: trained to it, or what the file at path has.", "tokens")
    path: Text | None = key(
        None, "File of a ready tokenizer (tokenizers' JSON); null: train one on the corpus and cache it."
    )


class DataConfig(ConfigModel):
    """Where samples come from: a corpus that the machine holds, or Megatron data sets; one of the two."""

    corpus: Literal["python-stdlib", "synthetic"] | None = key(
        None,
        "python-stdlib: the source files of Python's standard library; synthetic: random tokens from the seed.",
    )
    paths: tuple[Text, ...] = key((), "Prefixes of Megatron data sets (P for P.bin and P.idx), read in this order.")
    split: tuple[NotNegative, NotNegative, NotNegative] = key(
        (969.0, 30.0, 1.0), "Shares of training, evaluation and test documents.", "any; only the ratios count"
    )
    seed: Auto[CountOrZero] = key("auto", "Seed of the sample order. auto: training.seed.")
    cache_directory: Text = key(
        ".cache/trilith", "Directory where trained tokenizers, tokenised corpora and index maps are kept."
    )
    tokenizer: TokenizerConfig = key(TokenizerConfig(), "The tokenizer.")
    loss_mask: Literal["none", "eod"] = key(
        "none", "Labels left out of the loss: none, or those that are the end-of-document token (eod)."
    )
    reset_attention_mask: Bool = key(
        False, "Tokens see their own document only, up to and with its end-of-document token; positions count through."
    )
    eod_token: CountOrZero | None = key(
        None, "End-of-document token; null: the tokenizer's, where there is one.", "token id"
    )
    max_corpus_bytes: Count | None = key(None, "Read at most this much of the corpus; null: all.", "bytes")
