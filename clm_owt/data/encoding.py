"""Texts to token ids: by gigatoken, checked against `tokenizers`.

A document is encoded as ordinary text: a literal `<|endoftext|>` in it is text, not a control token.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from clm_owt.data.tokenizer_files import TokenizerFolder
from clm_owt.errors import InputError
from clm_owt.formatting import format_value

if TYPE_CHECKING:
    import gigatoken
    from tokenizers import Tokenizer

# Of a document that both encoders encode: 0.1 % of the text, at one such document for each call of `Encoder.encode`.
CHECKED_CHARACTERS = 4096


class Encoder:
    """Texts to ids with `gigatoken`, or with the reference, `tokenizers`, which is some 30 times slower.

    backend: "gigatoken" or "tokenizers"; by default what CLM_OWT_ENCODER in the environment says, else gigatoken.
    Where gigatoken does not implement a kind of tokenizer, `tokenizers` encodes, and `backend` becomes "tokenizers".
    parallel: whether gigatoken uses its pool of threads (RAYON_NUM_THREADS, by default one a core); None leaves it to
    gigatoken, which does except in worker processes of `multiprocessing`.

    gigatoken remembers the words that it has seen: an encoder is fast after the first some 30 MB of text.
    """

    def __init__(self, tokenizer: TokenizerFolder, backend: str | None = None, parallel: bool | None = None):
        self.tokenizer = tokenizer
        self.reference = tokenizer.tokenizer
        self.backend = backend or os.environ.get("CLM_OWT_ENCODER", "gigatoken")
        self.parallel = parallel
        if self.backend == "gigatoken":
            try:
                self.fast = plain_gigatoken(tokenizer.folder / "tokenizer.json")
            except Exception:  # a kind of tokenizer that it does not implement; it raises several classes
                self.backend = "tokenizers"

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, uint32 [n], and how many each text has, int64 [len(texts)].

        Raises `InputError` where gigatoken and tokenizers differ on a sample of `texts`.
        """
        if self.backend == "tokenizers":
            return encode_with_tokenizers(self.reference, texts)
        ids, lengths = encode_with_gigatoken(self.fast, texts, self.parallel)
        if len(texts):
            self.check(texts[len(texts) // 2].as_py()[:CHECKED_CHARACTERS])
        return ids, lengths

    def check(self, text: str) -> None:
        """Raises `InputError` where gigatoken and tokenizers encode `text` differently."""
        sample = pa.array([text], pa.large_string())
        fast, _ = encode_with_gigatoken(self.fast, sample)
        reference, _ = encode_with_tokenizers(self.reference, sample)
        if not np.array_equal(fast, reference):
            raise InputError(
                f"gigatoken and tokenizers encode this text differently: {format_value(text)}\n"
                f"gigatoken: {format_value(fast.tolist())}; tokenizers: {format_value(reference.tolist())}\n"
                "please report it to the project; CLM_OWT_ENCODER=tokenizers encodes with tokenizers alone"
            )


def plain_gigatoken(tokenizer_json: Path) -> "gigatoken.Tokenizer":
    """gigatoken's tokenizer without special tokens, which it would recognise inside a text."""
    import gigatoken

    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if not token.get("special")]
    return gigatoken.Tokenizer.from_json(json.dumps(content))


def encode_with_gigatoken(
    tokenizer: "gigatoken.Tokenizer", texts: pa.LargeStringArray, parallel: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """ids and lengths as `Encoder.encode` returns them, from the texts where Arrow holds them: no Python object is
    made for a document or a token."""
    import awkward as ak

    if not len(texts):
        return np.empty(0, np.uint32), np.empty(0, np.int64)
    _, offsets, characters = texts.buffers()
    offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    characters = np.frombuffer(characters or b"", np.uint8)
    strings = ak.contents.ListOffsetArray(
        ak.index.Index64(offsets),
        ak.contents.NumpyArray(characters, parameters={"__array__": "char"}),
        parameters={"__array__": "string"},
    )
    layout = tokenizer.encode_batch(ak.Array(strings), parallel=parallel).layout
    bounds = np.asarray(layout.offsets)
    return np.asarray(layout.content.data)[bounds[0] : bounds[-1]], np.diff(bounds)


def encode_with_tokenizers(tokenizer: "Tokenizer", texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """ids and lengths as `Encoder.encode` returns them."""
    encodings = tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
    return np.concatenate(ids) if ids else np.empty(0, np.uint32), lengths
