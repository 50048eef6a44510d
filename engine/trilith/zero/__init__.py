"""Data parallelism: gradients reduced and states partitioned over data ranks (ZeRO, Rajbhandari et al. 2020).

Pure: `partition` and `owners` lay units out, `residency` plans which are whole when, `placement` where they lie, `budget`
predicts it all. `flat` has the buffers of a unit, `flights` and `gradients` the one path gradients take, `gathers` brings
weights, `offload`, `swap` and `disk*` what lies elsewhere; `sharded` puts them together for a pipeline rank's stages
(`delayed`: in several versions), `module` for any `nn.Module`. The only room that may register hooks.
"""
