"""Pipeline parallelism: schedules as values, passes that complete and prove them, and one executor that runs them.

`action` declares the value, `schedules` makes it (pure generators), `passes` inserts communication and reductions and
checks it, `simulate` gives its timeline, bubble and peak, `partition` cuts a model into stages, `stage` and `executor`
run it, `timeline` draws it. All but `stage` and `executor` are free of torch.
"""
