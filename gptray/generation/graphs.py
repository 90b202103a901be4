"""The decoder for GPUs: each part of a step is one CUDA graph over a fixed number of rows.

A step first reads prompts, all but each piece's last token, in some passes; then it takes one token
of every sequence through the network. Each kind of pass always runs over the same number of rows,
most of them padding at times: so a row's numbers are the same whatever else the step holds. The
sampler leaves its tokens where the pass that decodes reads them. So where a batch has not changed
since the step before, its next step begins while the host takes the tokens in; if the host then
asks for another, that work is dropped.

Shapes: S slots, N rows of a pass, H heads, E = head width, P positions, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gptray.generation.adapted_rows import PackedAdapter
from gptray.generation.decoder import Network, Piece, StepRows
from gptray.generation.gpu_kernels import attend
from gptray.generation.graph_sampler import GraphSampler, token_of
from gptray.generation.packed import PackedGPT
from gptray.generation.recording import Graphs, Mirror
from gptray.generation.sampling import Drawn, Row
from gptray.model.adapter_files import LowRank
from gptray.model.gpt import GPT

# Rows of the pass that reads prompts, and how many a step begins.
PROMPT_ROWS, PROMPT_PASSES = 1024, 8


class GraphDecoder(Network):
    """The network in `dtype` for S = `slots` sequences, on the model's device.

    quantize: what `gptray.model.quantized` makes of the weights of linear layers and head.
    Memory: keys and values take 2 x n_layer x (S + 1) x n_positions x n_embd numbers of `dtype`.
    """

    piece_tokens = PROMPT_ROWS
    prompt_tokens = PROMPT_PASSES * PROMPT_ROWS

    def __init__(
        self, model: GPT, slots: int, *, dtype: torch.dtype, quantize: str = "none"
    ) -> None:
        config = model.config
        self._network = PackedGPT(model, dtype, rows=slots, quantize=quantize)
        device = self._network.device
        self._spare = slots  # where padding's keys and values go
        H, P = config.n_head, config.n_positions
        shape = (config.n_layer, slots + 1, H, P, config.n_embd // H)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        graphs = Graphs(device)
        # One more for the last piece that a step begins.
        self._reading = _Rows(PROMPT_ROWS, self._spare, device, passes=PROMPT_PASSES + 1)
        self._read = graphs.recorded(lambda: self._hidden(self._reading))
        self._decoding = _Rows(slots, self._spare, device)
        self._decode = graphs.recorded(lambda: self._network.logits(self._hidden(self._decoding)))
        self._read()
        self._logits = self._decode()
        self._sampler = GraphSampler(self._logits, self._decoding.columns[0], graphs)
        self._positions: list[int] = []  # of the step's rows
        self._is_steady = False  # whether no prompt joined and no row left since the step before
        self._begun = False  # whether the step after has begun
        self._ahead: tuple[list[int], list[int]] | None = None  # its tokens and positions

    def logits(self, rows: StepRows) -> Tensor:
        """See `Network`; slots never disturb each other here."""
        assert not any(rows.adapters), "graphs take no adapters"
        decoding, pieces = rows.decoding, rows.pieces
        read = StepRows([], [replace(piece, tokens=piece.tokens[:-1]) for piece in pieces])
        if pieces:
            rows = StepRows(decoding, [_last(piece) for piece in pieces])
        ahead, self._ahead = self._ahead, None
        is_scored = any(piece.scored for piece in pieces)
        passes = self._reading.passes(read)
        hidden = [self._read().clone() if is_scored else self._read() for _ in passes]
        if pieces or ahead != (rows.tokens, rows.positions):
            for _ in self._decoding.passes(rows):
                self._logits = self._decode()
        self._is_steady = not pieces and len(rows.positions) == len(self._positions)
        self._positions = rows.positions
        logits = self._logits[: len(rows.tokens)]
        if not is_scored:
            return logits
        # Of a scored piece also the logits after the tokens before its last.
        logits = logits.float()
        states = torch.cat(hidden) if hidden else logits  # of one token each, none has any
        parts, start = [logits[: len(decoding)]], 0
        for row, piece in enumerate(pieces, start=len(decoding)):
            count = len(piece.tokens) - 1
            if piece.scored and count:
                parts.append(self._network.logits(states[start : start + count]).float())
            parts.append(logits[row : row + 1])
            start += count
        return torch.cat(parts)

    def pack(self, layers: Mapping[str, LowRank]) -> PackedAdapter:
        """Not here: an engine with adapters runs another decoder."""
        raise AssertionError("graphs take no adapters")

    def draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn | None]:
        self._begun = False
        drawn = self._sampler.draw(logits, rows, self._begin_next if self._is_steady else None)
        if self._begun:
            tokens = [one.token if one else -1 for one in drawn]
            self._ahead = tokens, [position + 1 for position in self._positions]
        return drawn

    def move(self, source: int, target: int, tokens: int) -> None:
        for memory in (self._keys, self._values):
            memory[:, target, :, :tokens] = memory[:, source, :, :tokens]

    def _begin_next(self) -> None:
        """Run the step in which all rows go on by what is drawn."""
        self._decoding.columns[1].add_(1).clamp_(max=self._keys.size(3) - 1)
        self._logits = self._decode()
        self._begun = True

    def _hidden(self, rows: _Rows) -> Tensor:
        codes, positions, slots = rows.columns
        return self._network.hidden(
            token_of(codes),
            positions,
            lambda layer, qkv: attend(
                qkv, self._keys[layer], self._values[layer], slots, positions
            ),
        )


def _last(piece: Piece) -> Piece:
    """The part of a piece that has its last token alone."""
    return replace(piece, start=piece.start + len(piece.tokens) - 1, tokens=piece.tokens[-1:])


class _Rows:
    """The tokens, positions and slots that a pass reads, (3, N); padding is in slot `spare`."""

    def __init__(self, count: int, spare: int, device: torch.device, *, passes: int = 1) -> None:
        self._mirror, self._spare = Mirror(3, count, device, pages=passes), spare
        self._mirror.numbers[0, 2] = spare
        self._mirror.send()
        self.columns = self._mirror.sent

    def passes(self, rows: StepRows) -> Iterator[None]:
        """Have each of the next passes read its part of these rows; the rest is padding."""
        N, count = len(rows.tokens), self.columns.size(1)
        self._mirror.wait()
        for page, start in enumerate(range(0, N, count)):
            numbers, part = self._mirror.numbers[page], slice(start, start + count)
            numbers[:, N - start :] = [[0], [0], [self._spare]]
            columns = rows.tokens[part], rows.positions[part], rows.slots[part]
            numbers[:, : len(columns[0])] = columns
            self._mirror.send(page)
            yield
