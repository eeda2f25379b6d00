"""Steps as CUDA graphs: the first calls of a step run eagerly, the next one is captured, all further ones are replayed by one launch.

A step can be captured because all that outlives it is state with an address that never changes (`Method`), its draws come from generators
that are seeded before it, and its arguments select a variant and are never data. What the engine does around a step on the device (copies
for the guards, masking what is not finite, counting) is captured with it, so that a replay costs the host next to nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from fastkd import ranks
from fastkd.engine.attributes import hanging
from fastkd.errors import no_memory
from fastkd.memory import Store
from fastkd.method import Method

EAGER = 2
"""Calls of a variant before it is captured: they make what lives on (sums of the log), load kernels and choose algorithms."""

VARIANTS = 16
"""Variants of one step that are captured. The methods of fastkd have one or two a resolution; more come from an argument that is data."""

Replay = Callable[[], None]


class Graphs:
    """Captured steps of a run.

    Args:
      method: prepared. wanted: False keeps every step eager.
      tell: is given one sentence where a step stays eager, because it cannot be captured or has too many variants.
    """

    def __init__(self, method: Method, wanted: bool, tell: Callable[[str], None]):
        self.method, self.tell = method, tell
        self.on = wanted and capturable(method)
        self._replays: dict[Hashable, Replay] = {}
        self._calls: Counter[Hashable] = Counter()
        self._variants: Counter[str] = Counter()
        self._eager: set[Hashable] = set()
        self._layout: object = None
        self._pool: Any = None

    def take(self, variant: Hashable, layout: object, body: Callable[[], None]) -> bool:
        """Do a step by replay, capturing it first where it is due; False: it is to be done eagerly.

        Args:
          variant: what the host code of the step depends on: its function and arguments.
          layout: an object that is replaced when buffers that `body` writes move; what was captured before is then dropped.
          body: the step with all that is done for it on the device; its draws are seeded.
        """
        if not self.on or variant in self._eager:
            return False
        if layout is not self._layout:
            self._drop()
            self._layout = layout
        replay = self._replays.get(variant)
        if replay is None:
            if variant not in self._calls and not self._counted(variant):
                return False
            self._calls[variant] += 1
            if self._calls[variant] <= EAGER:
                return False
            return self._captured(variant, body)
        replay()
        return True

    def give_up(self) -> bool:
        """Drop all graphs with their memory, and keep every step eager from here on; whether there were any."""
        held = bool(self._replays)
        if held:
            self._drop()
            self.on = False
        return held

    def _counted(self, variant: Hashable) -> bool:
        """Count a variant of the running step that is met for the first time; False: it is one too many, and stays eager."""
        name = self.method.log.prefix
        self._variants[name] += 1
        if self._variants[name] <= VARIANTS:
            return True
        self._eager.add(variant)
        if self._variants[name] == VARIANTS + 1:
            self.tell(
                f"step '{name}' was called with more than {VARIANTS} different arguments: those that come now stay eager;"
                " an argument selects a variant, data is kept in tensors that build() makes"
            )
        return False

    def _captured(self, variant: Hashable, body: Callable[[], None]) -> bool:
        """Capture a step and replay it for the first time; False: it is to be done eagerly, now and always."""
        if self._pool is None and self.method.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            replay = capture(lambda: self._watched(body), list(self.method.rng.generators()), self._pool)
            replay()  # a first launch takes memory too; one that fails has done nothing
        except Exception as problem:  # whatever it is, the step itself may still work
            self.method.step_ends()
            self._drop()
            self._eager.add(variant)
            why = "memory ran out" if no_memory(problem) else (str(problem).splitlines() or [type(problem).__name__])[0]
            self.tell(f"step '{self.method.log.prefix}' stays eager, it could not be captured in a CUDA graph: {why}")
            return False
        self._replays[variant] = replay
        return True

    def _watched(self, body: Callable[[], None]) -> None:
        """`body`, which must neither make what lives on (its making would be recorded, not done) nor draw on the CPU (once, for ever)."""
        sums, drawn = set(self.method.log.sums), torch.get_rng_state()
        body()
        if new := [name for name in self.method.log.sums if name not in sums]:
            for name in new:
                del self.method.log.sums[name]
            raise RuntimeError(f"it logs '{new[0]}', which its first {EAGER} calls did not")
        if not torch.equal(drawn, torch.get_rng_state()):
            raise RuntimeError("it draws random numbers on the CPU")

    def _drop(self) -> None:
        self._replays.clear()
        self._pool = None


def capturable(method: Method) -> bool:
    """Whether steps can be captured: on a GPU, as the only rank, with all images there; fetching them from elsewhere is host code."""
    stores = hanging(method, Store)
    return method.device.type == "cuda" and ranks.world() == 1 and all(store.ahead is None for store in stores)


def capture(body: Callable[[], None], generators: list[torch.Generator], pool: Any) -> Replay:
    """Capture what `body` launches, without executing it.

    Args:
      generators: those that it draws from, beside torch's own; they are seeded before each replay.
      pool: memory that the graphs of a run share: nothing but state lives from one to the next.
    Raises:
      RuntimeError: something in `body` cannot be captured. The generators can be used again.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.cuda.stream(_stream(torch.cuda.current_device())):
        # Other threads (heartbeat, files) may call CUDA meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            body()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            _renew(generators)
            raise
        try:
            graph.capture_end()
        except RuntimeError:
            _renew(generators)
            raise
    return graph.replay


def _renew(generators: list[torch.Generator]) -> None:
    """After a capture that failed generators still believe to be captured; a new state does not. Every step seeds them anyway."""
    own = torch.cuda.default_generators[torch.cuda.current_device()]
    for generator in (own, *generators):
        if generator.device.type == "cuda":
            generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device: their memory is reused among them."""
    return torch.cuda.Stream(device)
