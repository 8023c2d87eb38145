"""Text to token ids: fast, and checked against `tokenizers`.

A document is encoded as ordinary text: a literal `<|endoftext|>` in it is text, not a control token.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from clm_owt.data.sources import Source
from clm_owt.errors import InputError, one_line
from clm_owt.formatting import show_value
from clm_owt.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 100_000_000  # text that a tokenizer is trained on
CHECKED_CHARACTERS = 4096  # of a document that both encoders encode: 0.1 % of the text, at one document per 4 MB
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class TokenizerFolder:
    """A folder with `tokenizer.json` and, mostly, `tokenizer_config.json`: what encoding depends on.

    tokenizer: tokenizers.Tokenizer that takes special tokens in a text as text; eos_token, eos_token_id; vocab_size:
    one more than the largest id; dtype that ids are stored in; sha256 of what ids depend on. Raises `InputError` for a
    folder without these.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                f"tokenizer_name: {folder} holds no tokenizer.json (a fast tokenizer saved by transformers)"
            )
        content = file.read_bytes()
        try:
            self.tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"tokenizer_name: {file} cannot be read ({one_line(error)})") from error
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.eos_token = self.find_eos_token(vocabulary)
        self.eos_token_id = vocabulary[self.eos_token]
        self.sha256 = hashlib.sha256(content + self.eos_token.encode()).hexdigest()

    def find_eos_token(self, vocabulary: dict[str, int]) -> str:
        """As the configuration names it; GPT-2's where it names none and the vocabulary holds it."""
        named = None
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = self.folder / name
            if named is None and file.is_file():
                named = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        if isinstance(named, dict):  # an AddedToken
            named = named["content"]
        named = named or END_OF_TEXT
        if named not in vocabulary:
            raise InputError(
                f"tokenizer_name: the tokenizer in {self.folder} has no end-of-text token ({named!r} is not in its "
                f"vocabulary); name one as eos_token in its tokenizer_config.json"
            )
        return named


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in `folder` as transformers' own, its `eos_token` set as the token store uses it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, eos_token=TokenizerFolder(folder).eos_token)


class Encoder:
    """Texts to ids with `gigatoken` ("tokenizers": the reference alone, some 30 times slower).

    Where gigatoken does not know this kind of tokenizer, `tokenizers` encodes; `backend` says which it is.
    """

    def __init__(self, tokenizer: TokenizerFolder, backend: str = "gigatoken"):
        self.reference = tokenizer.tokenizer
        self.backend = backend
        if backend == "gigatoken":
            try:
                self.fast = plain_gigatoken(tokenizer.folder / "tokenizer.json")
            except Exception:  # a kind of tokenizer that it does not implement; it raises several types
                self.backend = "tokenizers"

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """ids of all texts end to end, uint32 [n], and how many each text has, int64 [len(texts)].

        Raises `InputError` where gigatoken and tokenizers differ on a sample of `texts`.
        """
        if self.backend == "tokenizers":
            return encode_with_tokenizers(self.reference, texts)
        ids, lengths = encode_with_gigatoken(self.fast, texts)
        if len(texts):
            self.check(texts[len(texts) // 2].as_py()[:CHECKED_CHARACTERS])
        return ids, lengths

    def check(self, text: str) -> None:
        sample = pa.array([text], pa.large_string())
        fast, _ = encode_with_gigatoken(self.fast, sample)
        reference, _ = encode_with_tokenizers(self.reference, sample)
        if not np.array_equal(fast, reference):
            raise InputError(
                f"gigatoken and tokenizers encode this text differently: {show_value(text)}\n"
                f"gigatoken: {show_value(fast.tolist())}; tokenizers: {show_value(reference.tolist())}\n"
                "please report it to the project; CLM_OWT_ENCODER=tokenizers encodes with tokenizers alone"
            )


def plain_gigatoken(tokenizer_json: Path):
    """gigatoken's tokenizer without special tokens, which it would recognise inside a text."""
    import gigatoken

    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if not token.get("special")]
    return gigatoken.Tokenizer.from_json(json.dumps(content))


def encode_with_gigatoken(tokenizer, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the texts where Arrow holds them: no Python object per document or token."""
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
    layout = tokenizer.encode_batch(ak.Array(strings)).layout
    bounds = np.asarray(layout.offsets)
    return np.asarray(layout.content.data)[bounds[0] : bounds[-1]], np.diff(bounds)


def encode_with_tokenizers(tokenizer: "Tokenizer", texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    encodings = tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
    return np.concatenate(ids) if ids else np.empty(0, np.uint32), lengths


# Where the tokenizer of a recipe is, and how it gets there


def tokenizer_folder(recipe: Recipe, source: Source) -> Path:
    """Where the tokenizer of `recipe` is, or will be once the builder has made it: the folder that the recipe names,
    or one in `data_cache_dir`/tokenizers. One from the Hub is taken once and kept; delete the folder to renew it."""
    if recipe.tokenizer_name is None:
        depends_on = source.identity() | {"validation_documents": recipe.validation_documents}
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        name = f"bpe-{recipe.train_tokenizer_vocab_size}-{digest}"
    elif Path(recipe.tokenizer_name).expanduser().is_dir():
        return Path(recipe.tokenizer_name).expanduser().absolute()
    else:
        name = recipe.tokenizer_name.replace("/", "--")
    return Path(recipe.data_cache_dir).expanduser() / "tokenizers" / name


def fetch_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer files of the Hub repository `name` into the existing `folder`, with the commit they are of."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in (*TOKENIZER_FILES, "special_tokens_map.json"):
        try:
            path = Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # no connection, and not in the Hugging Face cache either
            if file == "special_tokens_map.json":  # few repositories have it
                continue
            raise InputError(f"tokenizer_name: {name!r} cannot be taken from the Hub ({one_line(error)})") from error
        except EntryNotFoundError as error:
            if file == "tokenizer.json":
                raise InputError(f"tokenizer_name: {name} on the Hub holds no tokenizer.json") from error
            continue
        except Exception as error:  # unknown repository, no name, and the HTTP client's own kinds
            raise InputError(
                f"tokenizer_name: {name!r} is no folder here and cannot be taken from the Hub ({one_line(error)})"
            ) from error
        shutil.copyfile(path, folder / file)
        (folder / "commit").write_text(path.parent.name)  # the cache's layout: snapshots/<commit>/<file>


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE of `vocab_size` ids, `<|endoftext|>` being id 0, saved as transformers saves a tokenizer.

    The same texts give the same file, whatever the number of threads.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def publish(aside: Path, folder: Path) -> None:
    """`aside` becomes `folder` in one step; where another machine was first with the same content, its one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(exist_ok=True)
        for file in aside.iterdir():
            shutil.copyfile(file, partial / file.name)
        os.rename(partial, folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not (folder / "tokenizer.json").is_file():
            raise
