"""The batch rule: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x parallel.data.

Any of the three that is open is derived by exact division; a remainder is a violation that names working numbers.
"""

from __future__ import annotations

from trilith.config.draft import Draft

TOTAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
STEPS = "gradient_accumulation_steps"
DATA = "parallel.data"
RULE = f"{TOTAL} = {MICRO} x {STEPS} x {DATA}"


def derive_batch(draft: Draft) -> None:
    """Derives what is open of the three numbers from the others and the data degree."""
    if draft.is_open(DATA):
        return
    data = draft.get(DATA)
    total, micro, steps = (None if draft.is_auto(key) else draft.get(key) for key in (TOTAL, MICRO, STEPS))
    if total is None and micro is None:
        what = f"{STEPS} {steps} alone does not say" if steps is not None else "nothing says"
        draft.refuse(TOTAL, f"{what} how large a batch is", f"Give {TOTAL} or {MICRO}. Rule: {RULE}.")
    elif total is None:
        draft.derive(STEPS, 1, f"1, because {TOTAL} is open, too")
        steps = draft.get(STEPS)
        draft.derive(TOTAL, micro * steps * data, f"micro {micro} x accumulation {steps} x data {data}")
    elif micro is not None and steps is not None:
        if micro * steps * data != total:
            _refuse_product(draft, total, micro, steps, data)
    elif micro is None:
        if steps is None:
            draft.derive(STEPS, 1, f"1, because {MICRO} is open, too")
            steps = 1
        _divide(draft, (MICRO, "samples"), total, (STEPS, steps), data)
    else:
        _divide(draft, (STEPS, "microbatches"), total, (MICRO, micro), data)


def _divide(draft: Draft, wanted: tuple[str, str], total: int, known: tuple[str, int], data: int) -> None:
    """Derives `wanted` = total / (known x data), or refuses with numbers that would work."""
    key, value = known
    unit = value * data
    if total % unit == 0:
        short = "micro" if key == MICRO else "accumulation"
        draft.derive(wanted[0], total // unit, f"{TOTAL} {total} / ({short} {value} x data {data})")
        return
    rule = f"is no multiple of {key} {value} x {DATA} {data} = {unit}, so {wanted[0]} would be no whole number"
    draft.refuse(TOTAL, rule, f"Use {_alternatives(total, key, value, data)}. Rule: {RULE}.")


def _alternatives(total: int, key: str, value: int, data: int) -> str:
    """Numbers near the given ones for which the division has no remainder."""
    unit = value * data
    below = total // unit * unit
    totals = [str(number) for number in (below, below + unit) if number > 0]
    text = f"{TOTAL} {' or '.join(totals)}"
    if total % data == 0:
        per_rank = total // data
        near = sorted(_divisors_near(per_rank, value))
        text += f", or {key} {' or '.join(map(str, near))}"
    return text


def _divisors_near(number: int, value: int) -> set[int]:
    """The nearest divisor of `number` on either side of `value`."""
    below = next(d for d in range(min(value, number, 1 << 16), 0, -1) if number % d == 0)
    above = next((d for d in range(value, min(number, value + (1 << 16)) + 1) if number % d == 0), number)
    return {below, above}


def _refuse_product(draft: Draft, total: int, micro: int, steps: int, data: int) -> None:
    product = micro * steps * data
    rule = f"{MICRO} {micro} x {STEPS} {steps} x {DATA} {data} = {product}, which must be {TOTAL}"
    options = [f"{TOTAL} {product}"]
    if total % (micro * data) == 0:
        options.append(f"{STEPS} {total // (micro * data)}")
    if total % (steps * data) == 0:
        options.append(f"{MICRO} {total // (steps * data)}")
    draft.refuse(TOTAL, rule, f"Use {', or '.join(options)}, or leave one of the three out.")
