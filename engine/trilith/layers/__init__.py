"""The parallel layers: linear, embedding, norm, MLP, attention, loss. Each is handed the group it communicates over.

Tensor parallelism after Shoeybi et al. 2019 (Megatron-LM, section 3), sequence parallelism after Korthikanti et al.
2022 (section 4.2). In the *sequence region* (norms, dropout, residual stream) a rank holds `(B, S/t, H)` under
sequence parallelism and `(B, S, H)` without; between a column and a row linear it holds all of S and 1/t of the
features. Parameters are created empty with their local shape, usually on the meta device; whoever builds the model
fills them.
"""
