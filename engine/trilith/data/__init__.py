"""Data: token files, the order in which samples are consumed, and the batches a rank reads. numpy only, no torch.

`indexed` reads and writes Megatron's .bin/.idx pairs, `sampler` is the pure map from a consumed-sample index to tokens,
`batch` turns the `data` section of a configuration into arrays, `synthetic` makes learnable tokens without a file,
`tokenizer` is the byte-level BPE, `corpus` prepares the Python standard library, `build` writes a data set from text.
Nothing is imported here, so that `import trilith.data` costs nothing; import what you need from its module.
"""
