import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest

from clm_owt.data.encoding import Encoder
from clm_owt.data.tokenizer_files import TokenizerFolder, load_tokenizer, train_tokenizer
from clm_owt.errors import InputError


def difficult_texts() -> list[str]:
    """All Unicode planes, control characters, very long words, white space, literal special tokens."""
    draw = random.Random(0)
    planes = [[code for code in range(p << 16, (p + 1) << 16) if not 0xD800 <= code <= 0xDFFF] for p in range(17)]
    texts = ["".join(map(chr, draw.choices(plane, k=200))) for plane in planes for _ in range(20)]
    texts += ["".join(chr(code) for code in range(0x180)), "\x00\x01\x1f\x7f\x85\u2028\ufeff"]
    texts += [
        "a" * 100_000,
        "é" * 50_000,
        "ab" * 30_000 + " end",
        "1234567890" * 5_000,
        " " * 10_000,
        "\n\t \r\n" * 500,
    ]
    texts += [
        "<|endoftext|>",
        "a<|endoftext|>b <|endoftext|> <|endoftext|",
        "",
        " ",
        "don't we'll I'VE",
        "👩‍👩‍👧‍👦🇩🇪e\u0301",
    ]
    letters = [chr(c) for c in range(32, 127)] + list("éßñ中文字кириллицаعربي \n\t'’s")
    texts += ["".join(draw.choices(letters, k=draw.randrange(300))) for _ in range(2000)]
    return texts


@pytest.fixture(scope="module")
def gpt2(gpt2_tokenizer_folder):
    return TokenizerFolder(gpt2_tokenizer_folder)


def test_gigatoken_tokenizers_and_tiktoken_agree(gpt2, gpt2_vocabulary_files):
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    encoder_json, vocab_bpe = map(str, gpt2_vocabulary_files)
    tiktoken_gpt2 = tiktoken.Encoding(
        "gpt2",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json),
        special_tokens={"<|endoftext|>": 50256},
    )
    texts = difficult_texts()
    column = pa.array(texts, pa.large_string())
    fast, reference = Encoder(gpt2), Encoder(gpt2, backend="tokenizers")
    assert (fast.backend, reference.backend) == ("gigatoken", "tokenizers")
    ids, lengths = fast.encode(column)
    reference_ids, reference_lengths = reference.encode(column)
    assert np.array_equal(lengths, reference_lengths)
    assert np.array_equal(ids, reference_ids)
    by_tiktoken = [tiktoken_gpt2.encode_ordinary(text) for text in texts]
    assert np.array_equal(ids, np.concatenate([np.array(one, np.uint32) for one in by_tiktoken]))
    assert lengths.tolist() == [len(one) for one in by_tiktoken]


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_a_literal_end_of_text_is_text(gpt2, backend):
    ids, _ = Encoder(gpt2, backend).encode(pa.array(["a<|endoftext|>"], pa.large_string()))
    assert 50256 not in ids
    assert gpt2.tokenizer.decode(ids.tolist()) == "a<|endoftext|>"


@pytest.mark.parametrize("backend", ["gigatoken", "tokenizers"])
def test_slices_and_empty_batches_encode_like_copies(gpt2, backend):
    encoder = Encoder(gpt2, backend)
    texts = pa.array(["zero", "one two", "", "three"], pa.large_string())
    ids, lengths = encoder.encode(texts.slice(1, 3))
    copied, _ = encoder.encode(pa.array(["one two", "", "three"], pa.large_string()))
    assert np.array_equal(ids, copied) and lengths.tolist() == [2, 0, 1]
    ids, lengths = encoder.encode(texts.slice(0, 0))
    assert len(ids) == len(lengths) == 0


def test_a_difference_between_the_encoders_is_an_error_that_shows_the_text(gpt2, tmp_path):
    encoder = Encoder(gpt2)
    content = json.loads((gpt2.folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:100]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    encoder.reference = TokenizerFolder(tmp_path).tokenizer
    with pytest.raises(InputError, match="differently: 'the people of'"):
        encoder.encode(pa.array(["the people of"], pa.large_string()))


def test_a_tokenizer_without_end_of_text_is_an_error(gpt2, tmp_path):
    content = json.loads((gpt2.folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no end-of-text token"):
        TokenizerFolder(tmp_path)


def test_gpt2s_end_of_text_is_found_without_a_configuration(gpt2, tmp_path):
    shutil.copy(gpt2.folder / "tokenizer.json", tmp_path)
    assert TokenizerFolder(tmp_path).eos_token_id == 50256


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_readable_tokenizer_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TokenizerFolder(tmp_path)


def test_a_trained_tokenizer_is_the_same_every_time_and_loads_in_transformers(tmp_path):
    texts = [f"The {word} of {word}s is {i}." for i, word in enumerate(["king", "queen", "gradient", "token"] * 50)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_tokenizer(iter(texts), 300, tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    trained = TokenizerFolder(tmp_path / "a")
    assert (trained.eos_token, trained.eos_token_id, trained.vocab_size) == ("<|endoftext|>", 0, 300)
    tokenizer = load_tokenizer(tmp_path / "a")
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 0
    ids, _ = Encoder(trained).encode(pa.array(["any bytes: é中👍"], pa.large_string()))
    assert tokenizer.decode(ids.tolist()) == "any bytes: é中👍"


def test_vocabularies_above_65536_ids_are_known(gpt2, tmp_path):
    content = json.loads((gpt2.folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70_000, "content": "<|far|>"})
    content["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert TokenizerFolder(tmp_path).vocab_size == 70_001
