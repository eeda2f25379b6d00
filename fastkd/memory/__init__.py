"""Where synthetic images live: stores only. What has networks and an optimiser of its own is part of the method."""

from fastkd.memory.best import Best
from fastkd.memory.place import Places, host_memory, placed
from fastkd.memory.prioritised import Drawn, Prioritised
from fastkd.memory.store import Rows, Store

__all__ = ["Best", "Drawn", "Places", "Prioritised", "Rows", "Store", "host_memory", "placed"]
