"""Pipeline parallelism: schedules as values, passes that complete and prove them, and one executor that runs them.

`action` declares the value. `schedules`, `zero_bubble`, `v_shape` and `delayed` make it (pure generators), or
`schedule_file` reads it; `of_config` asks for what a config names. `passes` inserts communication, reductions and
validation, `check` proves it, `simulate` gives its timeline, bubbles and peak, `memory` its bytes. `partition` cuts a
model into stages, `search` chooses schedule and partition. `timeline`, `trace` and `trace_file` show what was run;
`stage`, `step`, `transport` and `executor` run it.
Only these four run with torch; all others are free of it.
"""
