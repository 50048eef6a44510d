"""Communication: the only room that knows what a backend has and lacks. Import it as `from trilith import comm`.

Every function takes a `topology.Group`; a group of one rank communicates nothing, and that is decided here and nowhere
else. `collectives` moves tensors, `gloo` composes what gloo lacks or does slowly, `shared` does the same through the
memory of one machine (`meeting` finds it, `ring` orders it, `memory` asks the system for it), `autograd` holds the
collectives that a gradient passes through, `objects` moves small values, `clock` aligns the ranks' clocks. All ranks of
a group must call in the same order.
"""

from trilith.comm.autograd import (
    concat_along,
    copy_to,
    gather_along,
    reduce_from,
    scatter_sum_along,
    split_along,
)
from trilith.comm.clock import clock_offset_s
from trilith.comm.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    is_lost_peer,
    receive,
    reduce_scatter,
    send,
    sum_in_rank_order,
)
from trilith.comm.handle import Handle
from trilith.comm.objects import broadcast_object, gather_objects

__all__ = [
    "Handle",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object",
    "clock_offset_s",
    "concat_along",
    "copy_to",
    "gather_along",
    "gather_objects",
    "is_lost_peer",
    "receive",
    "reduce_from",
    "reduce_scatter",
    "scatter_sum_along",
    "send",
    "split_along",
    "sum_in_rank_order",
]
