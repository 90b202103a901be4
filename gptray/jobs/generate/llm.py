"""A model to call from Python: prompts in, texts out, in this process and without Ray."""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import NoReturn, Unpack

from gptray.config import Config, RunFailed, SampleConfig, UserError, override
from gptray.data.chat_template import ChatTemplate, Message, messages_of
from gptray.generation.loading import open_engine
from gptray.generation.sequence import FinishReason, Sequence
from gptray.generation.settings import Sampling, check_stop_ids, numbered_seed
from gptray.jobs.generate.arguments import (
    OPTIONS,
    SETTINGS,
    Options,
    Prompt,
    Settings,
    chats_of,
    prompts_of,
    values_of,
)
from gptray.jobs.generate.checked import CheckedModel, check_model
from gptray.jobs.generate.forks import check_not_forked, note_opening
from gptray.jobs.progress.doing import doing
from gptray.model.gpu_faults import memory_told
from gptray.model.usage import Usage


@dataclass(frozen=True)
class Output:
    """The output for a prompt.

    prompt: its text, also if it was given as token ids. text: without the prompt, as in the batch
    job's column `output`. tokens: the ids of `text`, without a token that ended it. seed:
    reproduces this text for this prompt alone. error: why finish_reason is "error", otherwise None;
    `text` is then incomplete. prompt_token_ids: `prompt_tokens` of them. stop_reason: the stop
    string or the token of `stop_token_ids` that ended the text, if one did.
    """

    prompt: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    tokens: list[int]
    seed: int
    error: str | None = None
    prompt_token_ids: abc.Sequence[int] = field(default_factory=list)
    stop_reason: str | int | None = None


class LLM:
    """A trained model, loaded once. Threads may call it concurrently; their prompts share a batch.

    >>> LLM("book").generate(["Once upon a time"], temperature=0.8)[0].text
    """

    def __init__(self, model: str | Path | None = None, **options: Unpack[Options]) -> None:
        """Open a model.

        model: as for generate.model: the name of a run in storage_path, the folder of a run or of a
        model, or a hub id; None: the newest run.

        Raises UserError for a wrong keyword or value, and for a model that does not exist or fails
        to load; RunFailed if the kernels of backend="native" fail to build.
        """
        named = {} if model is None else {"generate.model": str(model)}
        self._open(check_model(override(Config(), values_of(options, OPTIONS) | named)))

    @classmethod
    def of(cls, model: CheckedModel) -> LLM:
        """Open a checked model; its config has the defaults for settings that calls leave out."""
        llm = cls.__new__(cls)
        llm._open(model)
        return llm

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM cannot be pickled or copied; open one in each process")

    def _open(self, model: CheckedModel) -> None:
        note_opening()
        self.name, self.folder = model.name, model.folder
        self._config = model.config
        with doing("opening the model"):
            self._engine, self._tokenizer = open_engine(self.folder, self._config)
        self._turn = Lock()  # for stepping the engine, which also advances other threads' texts
        self._left = deque[Sequence]()  # to be cancelled before the next step

    def generate(
        self, prompts: Prompt | abc.Sequence[Prompt], **settings: Unpack[Settings]
    ) -> list[Output]:
        """Continue prompts, as many at a time as fit; returns one output each, in order.

        prompts: texts, or lists of token ids, to which the tokenizer adds nothing; vLLM's
        {"prompt_token_ids": ids}, too. settings: keys of the config's `sample` section. Prompts are
        independent draws: the first uses the seed itself, each other one a seed derived from it and
        its position, as in the terminal. If a prompt cannot run, such as one longer than the
        context, its `error` says why, and the others run. Raises UserError for a wrong setting or a
        prompt that is neither text nor token ids.
        """
        sample, given = self._sample(settings), prompts_of(prompts)
        rows = [self._sequence(prompt, sample, i) for i, prompt in enumerate(given)]
        return self._run(given, rows, sample)

    def chat(
        self,
        messages: abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]],
        **settings: Unpack[Settings],
    ) -> list[Output]:
        """Answer a chat, or several, formatted by the model's chat template.

        messages: each with `role` and `content`. settings and outputs: as for `generate`; the
        prompt is the text that the template renders. Also raises UserError for a model without a
        chat template, for messages that the template refuses and for anything but messages.
        """
        sample, chats = self._sample(settings), chats_of(messages)
        if self._template is None:
            raise UserError(f"{self.name} has no chat template; call generate")
        try:
            prompts = [self._template.prompt(messages_of(chat)) for chat in chats]
        except ValueError as error:
            raise UserError(str(error)) from None
        rows = [self._row(ids, sample, i) for i, (_, ids) in enumerate(prompts)]
        return self._run([text for text, _ in prompts], rows, sample)

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> Iterator[str]:
        """Continue a prompt; yield pieces of whole characters, which together are `Output.text`.

        prompt: one of those that `generate` takes. Raises UserError at once for a wrong setting or
        a prompt that cannot run, and RunFailed later if the model fails to generate a token.
        """
        sample, (given,) = self._sample(settings), prompts_of([prompt])
        return self._pieces(self._checked(given, sample, 0))

    def start(self, prompts: abc.Sequence[str], sample: SampleConfig) -> list[Sequence]:
        """Queue prompts like `generate`. Raises UserError if one of them cannot run."""
        sequences = [self._checked(prompt, sample, i) for i, prompt in enumerate(prompts)]
        return [self._engine.submit(sequence) for sequence in sequences]

    def pieces(self, sequence: Sequence) -> Iterator[str]:
        """Yield the text of a queued sequence as it is generated; the others advance too.

        Raises RunFailed if the model fails to generate a token.
        """
        shown = 0
        while not sequence.ended or shown < len(sequence.text):
            if piece := sequence.text[shown:]:
                shown += len(piece)
                yield piece
            else:
                self._step()
        if sequence.error is not None:
            raise RunFailed(sequence.error)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        source = Usage.of(self.folder).chat_template
        return ChatTemplate(source, self._tokenizer) if source else None

    def _run(
        self,
        prompts: abc.Sequence[str | list[int]],
        rows: list[Sequence | str],
        sample: SampleConfig,
    ) -> list[Output]:
        """Run the sequences; a row that is a string is an error, which goes into its output."""
        rest = deque(row for row in rows if isinstance(row, Sequence))
        with self._under_way() as running:
            while rest or running:
                self._queue(rest, running)
                self._step()
                running[:] = [sequence for sequence in running if not sequence.ended]
        return [
            self._output(prompt, row, numbered_seed(sample.seed, i))
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def _output(self, prompt: str | list[int], row: Sequence | str, seed: int) -> Output:
        """The output of a sequence that has ended, or of a prompt that could not run."""
        if isinstance(row, str):
            text, ids = ("", prompt) if isinstance(prompt, list) else (prompt, [])
            return Output(text, "", "error", 0, [], seed, row, ids)
        assert row.finish_reason is not None
        return Output(
            prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt),
            row.text,
            row.finish_reason,
            row.prompt_tokens,
            row.tokens,
            seed,
            row.error,
            row.prompt,
            row.stop_reason,
        )

    def _pieces(self, sequence: Sequence) -> Iterator[str]:
        """Queue a sequence and yield its text; closing the generator cancels the sequence."""
        with self._under_way() as running:
            self._queue(deque([sequence]), running)
            yield from self.pieces(sequence)

    @contextmanager
    def _under_way(self) -> Iterator[list[Sequence]]:
        """A list of queued sequences; on exit, those that have not ended are cancelled."""
        running: list[Sequence] = []
        try:
            yield running
        finally:
            # Never wait here: Python may collect a stream while this thread makes a step.
            self._left.extend(sequence for sequence in running if not sequence.ended)
            if self._turn.acquire(blocking=False):
                try:
                    self._cancel_left()
                finally:
                    self._turn.release()

    def _queue(self, rest: deque[Sequence], running: list[Sequence]) -> None:
        """Queue as many as fit at a time, so that other threads' prompts find room."""
        if not rest or len(running) == self._engine.max_batch_size:
            return
        with self._turn:
            while rest and len(running) < self._engine.max_batch_size:
                running.append(rest.popleft())
                self._engine.submit(running[-1])

    def _step(self) -> None:
        with self._turn, memory_told("generate.max_batch_size", self._engine.max_batch_size):
            self._cancel_left()
            self._engine.step()

    def _cancel_left(self) -> None:
        while self._left:
            self._engine.cancel(self._left.popleft())

    def _checked(self, prompt: str | list[int], sample: SampleConfig, number: int) -> Sequence:
        row = self._sequence(prompt, sample, number, live_text=True)
        if isinstance(row, str):
            raise UserError(f"prompt={prompt!r:.60}: {row}")
        return row

    def _sequence(
        self, prompt: str | list[int], sample: SampleConfig, number: int, *, live_text: bool = False
    ) -> Sequence | str:
        """The sequence of prompt `number`, or why it cannot run."""
        ids = prompt
        if isinstance(ids, str):
            try:
                ids = self._tokenizer.prompt_ids(ids, parse_special=sample.parse_special)
            except ValueError as error:
                return str(error)
        return self._row(ids, sample, number, live_text=live_text)

    def _row(
        self, ids: list[int], sample: SampleConfig, number: int, *, live_text: bool = False
    ) -> Sequence | str:
        sampling = Sampling.of(sample, seed=numbered_seed(sample.seed, number))
        try:
            sequence = Sequence(ids, sampling, live_text=live_text)
            self._engine.check(sequence)
        except ValueError as error:
            return str(error)
        return sequence

    def _sample(self, settings: Settings) -> SampleConfig:
        check_not_forked()
        sample = override(self._config, values_of(settings, SETTINGS)).sample
        check_stop_ids(sample, self._engine.vocab_size)
        return sample
