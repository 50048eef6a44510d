"""A user's own layers (`PipelineModel`) trained under any schedule, ZeRO stage and data degree.

`layout` decides which layers lie where and in what order stages work, `feed` brings microbatches and agrees on shapes,
`engine` holds it together.
"""
