"""The documents of a source as a stream in their fixed order, which can be resumed at any batch.

The stream is a row of sections: the files in their order. What `validation_files` or `validation_share` hold out comes
first in it, so that the validation set is the head of the stream whatever key names it.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute

from clm_owt.data.corpus import Position, checked_texts, input_errors, missing_column, open_corpus
from clm_owt.data.retries import READ_PAUSES, pause_or_raise
from clm_owt.data.sources import Source
from clm_owt.errors import InputError

ROWS_PER_BATCH = 1000  # a row group of OpenWebText; some 5 MB of text

START = Position()


@dataclass(frozen=True)
class Section:
    """A stretch of the stream: one file, from `start` (None: its beginning) to `stop` (None: its end). Both are places
    in the text: the rows before it, and the bytes before it in that row."""

    file: int
    start: tuple[int, int] | None = None
    stop: tuple[int, int] | None = None

    def cut(self, texts: pa.LargeStringArray, first_row: int) -> pa.LargeStringArray:
        """What lies in this section of `texts`, which begin at row `first_row` of the file."""
        if self.stop is not None:
            row, byte = self.stop[0] - first_row, self.stop[1]
            if row < len(texts):
                texts = pa.concat_arrays([texts[: max(row, 0)], part_of_text(texts, row, slice(0, byte))])
        if self.start is not None:
            row, byte = self.start[0] - first_row, self.start[1]
            if row >= 0:
                texts = pa.concat_arrays([part_of_text(texts, row, slice(byte, None)), texts[row + 1 :]])
        return texts


def part_of_text(texts: pa.LargeStringArray, row: int, part: slice) -> pa.LargeStringArray:
    """The bytes `part` of the text at `row`, as an array of one text; of none where there are none."""
    content = texts[row].as_buffer().to_pybytes()[part] if 0 <= row < len(texts) else b""
    return pa.array([content.decode()] if content else [], pa.large_string())


class Stream:
    """The sections of a source in their order. The first `held_out` of them are the validation set; 0 where
    `validation_documents` counts it instead. For a `validation_share` all of the text is read once to find its end."""

    def __init__(self, source: Source):
        self.source, self.corpus = source, open_corpus(source)
        files = range(len(self.corpus.files))
        self.sections, self.held_out = [Section(file) for file in files], source.validation_files
        if source.validation_share is not None:
            file, place = self.find_start(source.validation_share)
            held_out = [Section(file, start=place), *self.sections[file + 1 :]]
            self.sections = [*held_out, *self.sections[:file], Section(file, stop=place)]
            self.held_out = len(held_out)

    def read(self, start: Position, rows: int, stop: int) -> Iterator[tuple[Position, pa.LargeStringArray]]:
        """As `read_documents`, to the end of the section before `stop`."""
        column = self.source.text_column
        for index in range(start.file, stop):
            section = self.sections[index]
            name = self.corpus.files[section.file]
            position = start if index == start.file else Position(index)
            pauses = iter(READ_PAUSES)
            while position is not None:
                try:
                    for table, after in self.corpus.batches(section.file, position, rows):
                        if section.stop is not None and position.row > section.stop[0]:
                            break
                        if column not in table.column_names:
                            raise missing_column(name, column, table.column_names)
                        with input_errors(name):
                            texts = checked_texts(table.column(column), name, column, position.row)
                        texts = section.cut(texts, position.row)
                        if len(texts):
                            yield position, texts
                        position, pauses = after, iter(READ_PAUSES)
                    position = None
                except InputError as error:
                    pause_or_raise(error, pauses)

    def find_start(self, share: float) -> tuple[int, tuple[int, int]]:
        """The file and the place in it where the last `share` of the text's bytes begins: moved on to the next line,
        or to the next word where the document has none."""
        positions, sizes = [], [np.zeros(0, np.int64)]
        for position, texts in self.read(START, ROWS_PER_BATCH, len(self.sections)):
            positions.append(position)
            sizes.append(pa.compute.binary_length(texts).to_numpy(zero_copy_only=False))
        ends = np.cumsum(np.concatenate(sizes))
        if not len(ends) or not ends[-1]:
            return 0, (0, 0)
        place = int(ends[-1]) - max(1, round(share * int(ends[-1])))
        document = int(np.searchsorted(ends, place, side="right"))
        ends_of_batches = np.cumsum([len(batch) for batch in sizes])
        batch = int(np.searchsorted(ends_of_batches, document, side="right"))
        position, texts = next(self.read(positions[batch - 1], ROWS_PER_BATCH, len(self.sections)))
        index = document - int(ends_of_batches[batch - 1])
        text, row = texts[index].as_buffer().to_pybytes(), position.row + index
        byte = next_break(text, place - (int(ends[document]) - len(text)))
        return position.file, (row, byte) if byte < len(text) else (row + 1, 0)


def next_break(text: bytes, place: int) -> int:
    """The beginning of the first line that begins at or after `place`; of the first word, where no line does; the end
    of the text, where no word does."""
    if place == 0:
        return 0
    found = (text.find(separator, place - 1) for separator in (b"\n", b" "))
    return next((at + 1 for at in found if at >= 0), len(text))


@functools.lru_cache(maxsize=1)
def open_stream(source: Source) -> Stream:
    return Stream(source)


def read_documents(
    source: Source, start: Position = START, rows_per_batch: int = ROWS_PER_BATCH, end_file: int | None = None
) -> Iterator[tuple[Position, pa.LargeStringArray]]:
    """Pairs of (the position before a batch, its texts), from `start` to the end of the stream, or to the end of the
    section before `end_file`. No text is invalid UTF-8; some may be empty, and one that is null is given as empty.

    Documents come in the order of the sections and, in them, of the rows. The rows of a text file are its paragraphs,
    separated by blank lines, as `datasets` gives them with `sample_by="paragraph"`, or the whole file. Where a
    connection fails, the file is opened again at the last batch, after READ_PAUSES. Raises `InputError`.
    """
    stream = open_stream(source)
    yield from stream.read(start, rows_per_batch, len(stream.sections) if end_file is None else end_file)


def count_files(source: Source) -> int:
    """The number of sections of the stream, which can be read independently of each other: of its files, the one in
    which a `validation_share` begins counting twice."""
    return len(open_stream(source).sections)


def count_held_out_files(source: Source) -> int:
    """How many sections, the first ones of the stream, are the validation set; 0 where `validation_documents` counts
    it."""
    return open_stream(source).held_out
