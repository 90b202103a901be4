"""The decoder for GPUs: each part of a step is one CUDA graph over a fixed number of rows.

A step first reads prompts, all but each piece's last token, then takes one token of every sequence
through the network. Both passes always run over the same number of rows, most of them padding at
times: so a row's numbers are the same whatever else the step holds.

Shapes: S slots, N rows of a pass, H heads, E = head width, P positions, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptray.generation.choosing import top_candidates
from gptray.generation.decoder import PIECE_TOKENS, Piece
from gptray.generation.gpu import attend
from gptray.generation.graph_sampler import GraphSampler
from gptray.generation.packed import PackedGPT
from gptray.generation.sampling import Drawn, Row
from gptray.model.gpt import GPT

# Rows of the pass that reads prompts.
PROMPT_ROWS = 1024


class GraphDecoder:
    """The network in `dtype` for S = `slots` sequences, on the model's device.

    Memory: keys and values take 2 x n_layer x (S + 1) x n_positions x n_embd numbers of `dtype`.
    """

    # The last piece that a step begins fits too.
    prompt_tokens = PROMPT_ROWS - PIECE_TOKENS

    def __init__(self, model: GPT, slots: int, *, dtype: torch.dtype) -> None:
        config = model.config
        self._network = PackedGPT(model, dtype)
        device = self._network.device
        self._spare = slots  # where padding's keys and values go
        H, P = config.n_head, config.n_positions
        shape = (config.n_layer, slots + 1, H, P, config.n_embd // H)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        graphs = Graphs(device)
        self._reading = _Rows(PROMPT_ROWS, self._spare, device)
        self._read = graphs.recorded(lambda: self._hidden(self._reading))
        self._decoding = _Rows(slots, self._spare, device)
        self._logits = torch.empty(slots, self._network.logits_width, device=device)
        self._decode = graphs.recorded(
            lambda: self._network.logits(self._hidden(self._decoding), out=self._logits)
        )
        self._sampler = GraphSampler(self._logits, graphs)
        self._read(), self._decode()

    @torch.no_grad()
    def step(
        self,
        decoding: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        *,
        alone: bool = False,
    ) -> Tensor:
        """See `gptray.generation.decoder.Network`; slots never disturb each other here."""
        tokens = [token for token, _ in decoding]
        positions = [position for _, position in decoding]
        slots = list(range(len(decoding)))
        begun: tuple[list[int], list[int], list[int]] = [], [], []
        for piece in pieces:
            *first, last = piece.tokens
            stop = piece.start + len(first)
            for column, numbers in zip(
                begun, (first, range(piece.start, stop), [piece.slot] * len(first)), strict=True
            ):
                column += numbers
            tokens.append(last)
            positions.append(stop)
            slots.append(piece.slot)
        if begun[0]:
            self._reading.fill(*begun)
            hidden = self._read()
        self._decoding.fill(tokens, positions, slots)
        logits = self._decode()[: len(tokens)]
        if not any(piece.scored for piece in pieces):
            return logits
        # Of a scored piece also the logits after the tokens before its last.
        parts, read = [logits[: len(decoding)]], 0
        for row, piece in enumerate(pieces, start=len(decoding)):
            count = len(piece.tokens) - 1
            if piece.scored and count:
                parts.append(self._network.logits(hidden[read : read + count]))
            parts.append(logits[row : row + 1])
            read += count
        return torch.cat(parts)

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        """See `gptray.generation.decoder.Network`."""
        return self._sampler.draw(logits, rows)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `gptray.generation.decoder.Network`."""
        return top_candidates(logits, k)

    def move(self, source: int, target: int, tokens: int) -> None:
        """See `gptray.generation.decoder.Network`."""
        for memory in (self._keys, self._values):
            memory[:, target, :, :tokens] = memory[:, source, :, :tokens]

    def _hidden(self, rows: _Rows) -> Tensor:
        tokens, positions, slots = rows.columns
        return self._network.hidden(
            tokens,
            positions,
            lambda layer, qkv: attend(
                qkv, self._keys[layer], self._values[layer], slots, positions
            ),
        )


class _Rows:
    """The tokens, positions and slots that a pass reads, (3, N) int64, where a graph finds them."""

    def __init__(self, count: int, spare: int, device: torch.device) -> None:
        # Not pinned: so a copy to the device has read it by the time that the call returns.
        self._host = torch.zeros(3, count, dtype=torch.int64)
        self._numbers, self._spare = self._host.numpy(), spare
        self._numbers[2] = spare
        self.columns = self._host.to(device)

    def fill(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> None:
        """Have the next pass read these rows; the rest is padding."""
        N = len(tokens)
        self._numbers[:, N:] = [[0], [0], [self._spare]]
        for column, numbers in zip(self._numbers, (tokens, positions, slots), strict=True):
            column[:N] = numbers
        self.columns.copy_(self._host, non_blocking=True)


class Graphs:
    """Records functions of no arguments as CUDA graphs that share memory for what lies between.

    A function may read and write tensors that outlive it, must not wait for the device, and gives a
    result whose memory stays its own. Elsewhere than on a GPU it is simply called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def recorded(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The same function; from the first call on a graph of it runs."""
        if self._device.type != "cuda":
            return body
        return _Graph(body, self._device, self._pool)


class _Graph:
    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        self._body, self._device, self._pool = body, device, pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        if self._graph is None:
            self._record()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _record(self) -> None:
        # Outside of a graph first: libraries prepare what they keep at their first call.
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream(self._device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            self._body()
        now.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, self._pool, capture_error_mode="thread_local"):
            self._result = self._body()
