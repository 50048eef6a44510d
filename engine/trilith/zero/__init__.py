"""Data parallelism: gradients reduced and states partitioned over data ranks (ZeRO, Rajbhandari et al. 2020).

`partition` is the pure arithmetic, `flat` the buffers, `gradients` the one path gradients take, `sharded` puts them
together for a pipeline rank's stages, `module` for any `nn.Module`. The only room that may register hooks.
"""
