"""Starts the ranks of a run on this machine, watches them, and says which one failed first and why.

Stands alone: it imports nothing of the engine, and no torch outside the ranks and their fork server. Three processes
deep: the launching process (the command the user typed), one fork server that has imported torch but run no op, and
its children, the ranks. Linux only: it relies on the kernel to end the ranks when the launching process dies.
"""

from __future__ import annotations

from trilith_launcher.context import RankContext
from trilith_launcher.elastic import JoinedRank, join_from_environment, run_joined
from trilith_launcher.local import launch

__all__ = ["JoinedRank", "RankContext", "join_from_environment", "launch", "run_joined"]
