"""NAYER's generators (CVPR 2024): label-text embeddings through noisy linear layers that are re-drawn for every synthesis loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import ranks
from fastkd.errors import ConfigError, unknown

from .generators import Generator, Shape, conv_tail, deep_tail, grid, head, leaky, reinitialise
from .layers import ToMap


class NoisyLinear(nn.Module):
    """n = ceil(B / C) independent linear layers; row r of the global batch of B goes through layer r // C.

    So each layer serves C rows (each class once, where labels run 0 … C - 1), and the last one the remainder. Computed as one
    batched product over this rank's rows, padded by a fixed index map to equally many a layer.

    Args:
      inputs:  width d_e of a row.
      hidden:  width of the result.
      classes: rows of a layer, C.
      batch:   rows of the global batch, B; a multiple of the number of ranks.
    """

    def __init__(self, inputs: int, hidden: int, classes: int, batch: int):
        super().__init__()
        layers = -(-batch // classes)
        self.weight = nn.Parameter(torch.empty(layers, hidden, inputs))
        self.bias = nn.Parameter(torch.empty(layers, hidden))
        layer = [row // classes for row in ranks.rows(batch)]  # ascending, since the rows are
        counts = [layer.count(i) for i in range(layers)]
        self.most, self.rows = max(counts), len(layer)
        places = [i * self.most + k for i in range(layers) for k in range(counts[i])]
        slots = [0] * (layers * self.most)  # unused places repeat row 0; nothing reads their result
        for row, at in enumerate(places):
            slots[at] = row
        place, slot = torch.tensor(places, dtype=torch.int64), torch.tensor(slots, dtype=torch.int64)
        # No buffers: a checkpoint holds what any number of ranks can load, and these maps are one rank's own.
        self._place, self._slot = place, slot
        self.padded = self.rows != layers * self.most
        self.redraw(None)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NoisyLinear:
        super()._apply(fn, recurse)
        self._place, self._slot = fn(self._place), fn(self._slot)
        return self

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None) -> None:
        """Weights N(0, 1) from `generator` (None: torch's global one), biases 0, in place."""
        self.weight.normal_(generator=generator)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """This rank's rows [b, d_e] of the global batch, in order → [b, hidden].

        Raises:
          ValueError: `x` has another number of rows than this rank's part of the batch.
        """
        if x.shape[0] != self.rows:
            raise ValueError(f"expected this rank's {self.rows} rows of the batch, found {x.shape[0]}")
        layers = self.weight.shape[0]
        grouped = (x.index_select(0, self._slot) if self.padded else x).view(layers, self.most, -1)
        y = torch.baddbmm(self.bias.unsqueeze(1), grouped, self.weight.mT).flatten(0, 1)
        return y.index_select(0, self._place) if self.padded else y


class NoisyGenerator(Generator):
    """e = table[y] → BatchNorm1d → noisy linear → Linear → convolutions: `g_nl` (two doublings), `g_nl_deep` (four).

    Args:
      embeddings: the table [C, d_e], floating; kept as a buffer in the default dtype.
      batch:      rows of the global batch.
      shape:      (c, H, W); H and W multiples of 4, with g_nl_deep of 16.
      hidden:     width between the noisy layer and the Linear.
    """

    table: Tensor

    def __init__(
        self,
        embeddings: Tensor,
        batch: int,
        shape: Shape,
        hidden: int = 1000,
        name: str = "g_nl",
        *,
        out: str = "sigmoid",
        init: str = "default",
    ):
        super().__init__(init)
        if embeddings.dim() != 2 or len(embeddings) < 2:
            raise ConfigError(f"an embedding table has the shape [classes, width], found {list(embeddings.shape)}.")
        if name not in ("g_nl", "g_nl_deep"):
            raise ConfigError(unknown("generator", name, ("g_nl", "g_nl_deep")))
        if batch < 1:
            raise ConfigError(f"{name} needs a global batch of at least 1 row, found {batch}.")
        deep = name == "g_nl_deep"
        size = grid(name, shape, 16 if deep else 4)
        classes, width = embeddings.shape
        self.latent = ()
        self.register_buffer("table", embeddings.detach().clone().to(torch.get_default_dtype()))
        self.bn = nn.BatchNorm1d(width)
        self.noisy = NoisyLinear(width, hidden, classes, batch)
        self.l0 = nn.Linear(hidden, 128 * size[0] * size[1])
        self.unflatten = ToMap((128, *size))
        self.conv0 = nn.Conv2d(128, 128, 3, padding=1, bias=False) if deep else nn.Identity()
        self.bn0 = nn.BatchNorm2d(128)
        body = [leaky(), *deep_tail(shape[0])] if deep else conv_tail(128, shape[0])
        self.body = nn.Sequential(*body)
        self.head = nn.Sequential(*head(out, shape[0]))
        self.reinit()

    def forward(self, labels: Tensor) -> Tensor:
        """Labels [b] int64, this rank's rows of the global batch → images [b, c, H, W]."""
        x = self.l0(self.noisy(self.bn(self.table[labels])))
        return self.head(self.body(self.bn0(self.conv0(self.unflatten(x)))))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Noisy weights N(0, 1) from `generator`, their biases 0; nothing else changes."""
        self.noisy.redraw(generator)

    def reinit(self, init: str | None = None) -> None:
        """Everything but the table and the noisy layers (see `redraw`), as `Generator.reinit`."""
        reinitialise(self, init or self.init)  # NoisyLinear is none of the layer kinds that it draws
