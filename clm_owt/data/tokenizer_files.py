"""Where the tokenizer of a recipe comes from: a folder, the Hub, or the training documents themselves.

One from the Hub and one that is trained are kept in `data_cache_dir`/tokenizers.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clm_owt.data.corpus import Position
from clm_owt.data.documents import count_held_out_files, read_documents
from clm_owt.data.retries import with_retries
from clm_owt.data.sources import Source
from clm_owt.errors import InputError, one_line
from clm_owt.files import flush_to_disk
from clm_owt.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 100_000_000  # of text that a tokenizer is trained on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
GPT2_NAMES = ("openai-community/gpt2", "gpt2")
GPT2_VOCABULARY = 50_257


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
        """The end-of-text token that the configuration names, or GPT-2's where it names none. Raises `InputError`
        where the vocabulary lacks it."""
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


def tokenizer_folder(recipe: Recipe, source: Source) -> Path:
    """Where the tokenizer of `recipe` is, or will be once the builder has made it: the folder that the recipe names,
    or one in `data_cache_dir`/tokenizers. One from the Hub is downloaded once and kept; delete the folder to renew
    it."""
    if recipe.tokenizer_name is None:
        depends_on = source.identity() | {"validation_documents": recipe.validation_documents}
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        name = f"bpe-{recipe.train_tokenizer_vocab_size}-{digest}"
        return Path(recipe.data_cache_dir).expanduser() / "tokenizers" / name
    return named_tokenizer_folder(recipe)


def named_tokenizer_folder(recipe: Recipe) -> Path:
    """Where the tokenizer `tokenizer_name` is or will be."""
    if Path(recipe.tokenizer_name).expanduser().is_dir():
        return Path(recipe.tokenizer_name).expanduser().absolute()
    return Path(recipe.data_cache_dir).expanduser() / "tokenizers" / recipe.tokenizer_name.replace("/", "--")


def needs_download(recipe: Recipe) -> bool:
    """Whether the recipe's tokenizer is one of the Hub that is not here yet."""
    return recipe.tokenizer_name is not None and not (named_tokenizer_folder(recipe) / "tokenizer.json").is_file()


def known_vocab_size(recipe: Recipe) -> int:
    """The size of the recipe's vocabulary without a connection: of a tokenizer that is in a folder or was downloaded
    before, by the Hub's own client too; of one that is to be trained; of GPT-2's. Raises `InputError` for others."""
    from huggingface_hub import try_to_load_from_cache

    if recipe.train_tokenizer_vocab_size is not None:
        return recipe.train_tokenizer_vocab_size
    if not needs_download(recipe):
        return TokenizerFolder(named_tokenizer_folder(recipe)).vocab_size
    if isinstance(cached := try_to_load_from_cache(recipe.tokenizer_name, "tokenizer.json"), str):
        return TokenizerFolder(Path(cached).parent).vocab_size
    if recipe.tokenizer_name in GPT2_NAMES:
        return GPT2_VOCABULARY
    raise InputError(
        f"tokenizer_name: {recipe.tokenizer_name} was not downloaded yet, so its number of ids is not known"
    )


@contextlib.contextmanager
def provided_tokenizer(recipe: Recipe, source: Source) -> Iterator[tuple[TokenizerFolder, Callable[[], None]]]:
    """The recipe's tokenizer, downloaded or trained if there is none, and a function that moves a new one to
    `tokenizer_folder`. Until that is called it lies in a temporary folder, so that bad input leaves nothing behind."""
    folder = tokenizer_folder(recipe, source)
    if (folder / "tokenizer.json").is_file():
        yield TokenizerFolder(folder), lambda: None
        return
    with tempfile.TemporaryDirectory() as temporary:
        aside = Path(temporary)
        if recipe.tokenizer_name is not None:
            with_retries(lambda: download_tokenizer(recipe.tokenizer_name, aside))
        else:
            texts = training_texts(source, recipe.validation_documents)
            train_tokenizer(texts, recipe.train_tokenizer_vocab_size, aside)
        yield TokenizerFolder(aside), lambda: publish_tokenizer(aside, folder)


def publish_tokenizer(aside: Path, folder: Path) -> None:
    """`folder` becomes a copy of `aside` in one step; where another process was first, its copy stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(exist_ok=True)
        for file in aside.iterdir():
            flush_to_disk(Path(shutil.copyfile(file, partial / file.name)))
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not (folder / "tokenizer.json").is_file():
            raise


def download_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer files of the Hub repository `name` into the existing `folder`, with the commit that they are of.
    Raises `InputError` for a repository that is unknown or has no tokenizer.json, or where the Hub does not answer."""
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
        except Exception as error:  # an unknown repository, an impossible name, and the HTTP client's own classes
            raise InputError(
                f"tokenizer_name: {name!r} is no folder here and cannot be taken from the Hub ({one_line(error)})"
            ) from error
        shutil.copyfile(path, folder / file)
        (folder / "commit").write_text(path.parent.name)  # the cache's layout: snapshots/<commit>/<file>


def training_texts(source: Source, validation_documents: int | None, max_bytes: int = TRAINING_BYTES) -> Iterator[str]:
    """The documents after the validation ones, empty ones left out, until they are `max_bytes` long."""
    documents = size = 0
    for _, texts in read_documents(source, Position(count_held_out_files(source))):
        for text in filter(None, texts.to_pylist()):
            documents += 1
            if documents > (validation_documents or 0):
                yield text
                size += len(text.encode())
                if size >= max_bytes:
                    return


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE of `vocab_size` ids, `<|endoftext|>` being id 0, saved in `folder` as transformers saves one.

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
