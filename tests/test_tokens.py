"""Files of token ids, wherever they come from: read as they are meant, or refused by name."""

import json

import numpy as np
import pytest
import torch
from tiny_runs import run

import train_pretrain
from data.files import read_tokens, token_dtype, write_tokens
from data.tokenizer import CharTokenizer
from gpt import InputError
from train_pretrain import cut_documents, read_documents, validation_loss

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz")  # ids 0 to 25; end-of-text is 27


def shard(tokens, count=None) -> bytes:
    """A file of token ids as llm.c has them."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def test_documents_come_back_as_ids_each_after_its_end_of_text(tmp_path):
    write_tokens(["abc", "z"], LETTERS, tmp_path / "deep" / "train.bin")
    tokens = read_tokens(LETTERS, tmp_path / "deep" / "train.bin")
    assert tokens.tolist() == [27, 0, 1, 2, 27, 25] and tokens.dtype == np.uint16
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["train.bin"]


@pytest.mark.parametrize("n_vocab, size", [(2**16, 2), (2**16 + 1, 4)])
def test_ids_take_two_bytes_where_they_suffice(tmp_path, n_vocab, size):
    tokenizer = CharTokenizer("".join(map(chr, range(0x20000, 0x20000 + n_vocab - 5))))
    write_tokens([chr(0x20000 + n_vocab - 6)], tokenizer, tmp_path / "a.bin")
    assert np.dtype(token_dtype(tokenizer)).itemsize == size
    assert (tmp_path / "a.bin").stat().st_size == 2 * size
    assert read_tokens(tokenizer, tmp_path / "a.bin").tolist() == [tokenizer.eot, n_vocab - 6]


def test_whoever_has_the_file_mapped_keeps_what_he_mapped(tmp_path):
    """A second run that writes there would else change, or end, what the first one trains on."""
    path = tmp_path / "train.bin"
    write_tokens(["abc"], LETTERS, path)
    mapped = read_tokens(LETTERS, path)
    write_tokens(["z"], LETTERS, path)
    assert mapped.tolist() == [27, 0, 1, 2] and read_tokens(LETTERS, path).tolist() == [27, 25]
    with pytest.raises(InputError, match="the character '!' is not among"):
        write_tokens(["a", "!"], LETTERS, path)
    assert read_tokens(LETTERS, path).tolist() == [27, 25] and len(list(tmp_path.iterdir())) == 1


def test_shards_are_read_without_their_header(tmp_path):
    (tmp_path / "shard.bin").write_bytes(shard([5, 27, 3]))
    assert read_tokens(LETTERS, tmp_path / "shard.bin").tolist() == [5, 27, 3]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot read .*ids.bin as token ids: cannot mmap an empty file"),
        (b"\1\0\2", "cannot read .*ids.bin as token ids: .*not a multiple"),
        (b"\1\0\2\0\x1f\0\x20\0", "ids.bin: token 2 is 31, but this tokenizer has the ids 0 to 30"),
        (shard([1, 2, 31, 3]), "ids.bin: token 2 is 31, but this tokenizer has the ids 0 to 30"),
        (shard([]), "ids.bin: a header, and no tokens"),
        (shard([1, 2], count=3), "ids.bin: not as long as its header says; is it truncated"),
        (shard([1, 2], count=2**31 - 1), "ids.bin: not as long as its header says"),
        (shard([1, 2], count=-1), "ids.bin: not as long as its header says"),
        (shard([])[:500], "ids.bin: not as long as its header says"),
        (shard([])[:4], "ids.bin: not as long as its header says"),
    ],
)
def test_files_of_ids_that_cannot_be_right_are_named(tmp_path, content, message):
    (tmp_path / "ids.bin").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tokens(LETTERS, tmp_path / "ids.bin")


def test_files_of_ids_that_cannot_be_read_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.bin"):
        with pytest.raises(InputError, match=f"cannot read {path} as token ids: "):
            read_tokens(LETTERS, path)


# ---------------------------------------------------------------------------------------------
# Where to cut them, and the loss over them


TOKEN_FILES = {  # 9 is end-of-text: ids -> where a row may start, at a context of 4
    "end-of-text before each document": ([9, 1, 2, 9, 1, 2, 3, 4, 5], [0, 3, 7, 9]),
    "end-of-text after each document": ([1, 2, 9, 1, 2, 3, 4, 5, 9], [0, 2, 6, 8, 9]),
    "end-of-text between documents": ([1, 2, 9, 1, 2, 3, 4, 5, 6, 7], [0, 2, 6, 10]),
    "no end-of-text": ([1, 2, 3, 4, 5, 6, 7, 8, 1], [0, 4, 8, 9]),
    "nothing but end-of-text": ([9, 9, 9], [0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_every_token_is_in_one_piece_whatever_stands_between_documents(name):
    tokens, cuts = TOKEN_FILES[name]
    assert cut_documents(np.array(tokens), 9, 4).tolist() == cuts


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_validation_loss_is_a_mean_over_the_tokens_that_are_scored(tiny, name):
    tokens, cuts = np.array(TOKEN_FILES[name][0]), TOKEN_FILES[name][1]
    losses = []
    for t in range(1, len(tokens)):
        start = max(cut for cut in cuts if cut < t)  # of the piece that the token before it is in
        logits = tiny(torch.tensor(tokens[None, start:t]))[0, -1] @ tiny.head.T
        losses.append(-logits.log_softmax(0)[tokens[t]].item())
    found = validation_loss(tiny, tokens, np.array(cuts), 9)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    later = [loss for t, loss in enumerate(losses, 1) if t > cuts[1]]  # without the first piece
    found = validation_loss(tiny, tokens, np.array(cuts[1:]), 9)
    assert found == pytest.approx(sum(later) / len(later), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Documents of your own


def test_last_tenth_of_the_documents_or_of_the_only_one_is_for_validation(tmp_path, capsys):
    path = tmp_path / "a.txt"
    cfg = train_pretrain.Config(data=str(path))
    path.write_text("0123456789" * 2)
    assert read_documents(cfg) == (["012345678901234567"], ["89"])
    documents = [f"document {i % 19}" for i in range(20)]  # the last equals the first
    path.write_text("<|endoftext|>".join(documents))
    assert read_documents(cfg) == (documents[1:18], documents[18:])
    assert capsys.readouterr().out == ("left out 1 of 18 training rows: equal to held-out ones\n")


def write_documents(path, *texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return dict(data=str(path), tokenizer="char")


def test_a_text_of_just_one_row_is_trained_on_and_one_of_less_is_refused(tmp_path, monkeypatch):
    text = "abcdefgh" * 12  # and an end-of-text before it: 97 tokens, one row of 96 and its next
    for n_train, n_val in ((96, 96), (95, 96), (96, 95)):
        options = write_documents(tmp_path / "texts.jsonl", text[:n_train], text[::-1][:n_val])
        if n_train == n_val:
            run("pretrain", tmp_path, **options)
            continue
        message = f"texts.jsonl: {n_train + 1} training and {n_val + 1} validation tokens are too"
        with pytest.raises(InputError, match=message):
            run("pretrain", tmp_path, **options)


def test_characters_of_validation_text_alone_can_be_read_too(tmp_path):
    options = write_documents(tmp_path / "texts.jsonl", "abc " * 40, "xyz " * 40)
    assert run("pretrain", tmp_path, **options)["val_loss"] > 0


def test_pretraining_goes_on_from_weights_with_as_long_a_context(chain, tmp_path):
    run("pretrain", tmp_path, init=str(chain / "pretrain" / "ckpt.pt"))
    with pytest.raises(InputError, match="--context 97: .*ckpt.pt has 96"):
        run("pretrain", tmp_path, init=str(chain / "pretrain" / "ckpt.pt"), context=97)


def test_json_lines_are_read_as_documents_and_not_as_text(tmp_path):
    cfg = train_pretrain.Config(data=str(tmp_path / "a.jsonl"))
    rows = [{"text": f"document {i}"} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, validation = read_documents(cfg)
    assert train + validation == [row["text"] for row in rows] and len(validation) == 1
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}')
    with pytest.raises(InputError, match='a.jsonl:1: no field "text" .its fields: prompt, resp'):
        read_documents(cfg)
