"""GPT-2's weights from folders in Hugging Face's form, and what is said of folders that are not."""

import functools
import http.server
import json
import math
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import SCRIPTS, TINY

import data.gpt2
import train_pretrain
from data.chat import encode_chat, encode_prompt
from data.gpt2 import (
    N_VOCAB,
    check_tokenizer,
    download,
    export,
    fast_tokenizer,
    load_gpt2,
    load_init,
    read_bin,
    read_config,
    read_safetensors,
    write_safetensors,
)
from data.tokenizer import GPT2Tokenizer, make_tokenizer
from gpt import (
    GPT,
    GPTConfig,
    InputError,
    ScalarModel,
    fingerprint,
    generate,
    load_model,
    save_checkpoint,
)

CONFIG = dict(model_type="gpt2", n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=N_VOCAB)


def tensors():
    """What a file of GPT-2 with two layers holds: matrices are (in, out) in it."""
    torch.manual_seed(0)
    C = 16
    shapes = {"wte.weight": (N_VOCAB, C), "wpe.weight": (64, C)}
    for layer in range(2):
        block = f"h.{layer}"
        shapes |= {f"{block}.ln_{i}.{what}": (C,) for i in (1, 2) for what in ("weight", "bias")}
        shapes |= {f"{block}.attn.c_attn.weight": (C, 3 * C), f"{block}.attn.c_attn.bias": (3 * C,)}
        shapes |= {f"{block}.attn.c_proj.weight": (C, C), f"{block}.attn.c_proj.bias": (C,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (C, 4 * C), f"{block}.mlp.c_fc.bias": (4 * C,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (4 * C, C), f"{block}.mlp.c_proj.bias": (C,)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(folder / "model.safetensors", tensors())
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_matrices_are_turned_round_and_all_else_is_copied(folder):
    model, checkpoint = load_gpt2(folder)
    there = tensors()
    for name, parameter in model.named_parameters():
        if name == "wte.weight":
            parameter = parameter[:N_VOCAB]
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert torch.equal(parameter, there[name].T if turned else there[name]), name
    assert checkpoint["tokenizer"] == {"kind": "gpt2"} and model.config.vocab_size == N_VOCAB + 4
    model.wte.weight.data[N_VOCAB:] = 0  # the rows that are made here are no part of it
    expected = fingerprint(model.state_dict(), checkpoint["tokenizer"])
    assert checkpoint["fingerprint"] == expected


def test_chat_tokens_start_as_unlikely_as_any_other(folder, copy):
    """Even where all logits of the file lie far below 0, as GPT-2's do."""
    there = tensors()
    there["wte.weight"] -= 3.0  # with the bias below, every logit falls by 3 x 16 x 2
    there["ln_f.bias"] += 2.0
    write_safetensors(copy / "model.safetensors", there)
    model, _ = load_gpt2(copy)
    logits = model(torch.arange(20)[None])[0, -1] @ model.head.T
    assert logits[:N_VOCAB].max() < -50
    assert logits.softmax(0)[N_VOCAB:].sum() < 0.01


def test_chat_tokens_start_different_from_each_other(folder):
    """Equal rows have equal logits and equal gradients: no training could tell them apart."""
    model, _ = load_gpt2(folder)
    assert model.head[N_VOCAB:].unique(dim=0).shape == (4, 16)


def test_causal_masks_in_a_file_are_skipped(folder, copy):
    masks = {"bias": torch.ones(1, 1, 64, 64).tril().bool(), "masked_bias": torch.tensor(-1e4)}
    masks = {f"h.{i}.attn.{name}": mask for i in range(2) for name, mask in masks.items()}
    torch.save(tensors() | masks, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert load_gpt2(copy)[1] == load_gpt2(folder)[1]  # with the same fingerprint


def test_config_without_entries_is_that_of_the_smallest_gpt2(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    expected = GPTConfig(N_VOCAB + 4, context=1024, n_embd=768, n_layer=12, n_head=12)
    assert read_config(tmp_path) == (expected, N_VOCAB)


@pytest.mark.reference
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shard", ["10GB", "1MB"])
def test_logits_of_a_folder_are_those_of_transformers(tmp_path, safe, shard):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {name: CONFIG[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    if not safe:
        weights = theirs.state_dict()
        for file in tmp_path.glob("model*"):
            file.unlink()
        halves = list(weights)[::2], list(weights)[1::2]
        if shard == "1MB":
            where = {}
            for i, names in enumerate(halves):
                file = f"pytorch_model-{i}.bin"
                torch.save({name: weights[name] for name in names}, tmp_path / file)
                where |= dict.fromkeys(names, file)
            index = json.dumps({"weight_map": where})
            (tmp_path / "pytorch_model.bin.index.json").write_text(index)
        else:
            torch.save(weights, tmp_path / "pytorch_model.bin")
    files = len(list(tmp_path.glob("model*.safetensors")) + list(tmp_path.glob("*.bin")))
    assert (files > 1) == (shard == "1MB")
    ours, _ = load_init(tmp_path)
    idx = torch.randint(N_VOCAB, (2, 40))
    logits = ours(idx) @ ours.head.T
    torch.testing.assert_close(logits[..., :N_VOCAB], theirs(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="llama"), "config.json: model_type is 'llama', but only 'gpt2'"),
        (dict(vocab_size=32000), "vocab_size is 32000, but only 50257"),
        (dict(activation_function="gelu"), "activation_function is 'gelu', but only 'gelu_new'"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
        (dict(n_inner=100), "n_inner is not 4 times n_embd"),
        (dict(n_inner=16), "n_inner is not 4 times n_embd"),  # nor may it be n_embd itself
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06, but only 1e-05 can"),
        (dict(scale_attn_weights=False), "scale_attn_weights is False, but only True can"),
        (dict(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx is True, but only False"),
        (dict(n_layer=3), "no h.2.attn.c_attn.bias, .* in its files"),
        (dict(n_layer=1), "h.1.ln_1.weight is not a tensor of GPT-2"),
        (dict(n_layer="2"), "config.json: n_layer is '2', not a whole number above 0"),
        (dict(n_head=0), "config.json: n_head is 0, not a whole number above 0"),
        (dict(n_head=3), "config.json: n_head 3 must divide n_embd 16"),
        (dict(n_embd=None), "config.json: n_embd is None, not a whole number above 0"),
        (dict(n_positions=True), "config.json: n_positions is True, not a whole number above 0"),
        (dict(n_positions=math.inf), "config.json: n_positions is inf, not"),
        (dict(n_layer=10**9), "config.json is that of a far larger model"),
        (dict(vocab_size=[N_VOCAB]), r"config.json: vocab_size is \[50257\], but only"),
        (dict(eos_token_id=0), "config.json: eos_token_id is 0, but only 50256 or"),
        (dict(n_embd=32), r"wte.weight is \(50257, 16\), but config.json asks for \(50257, 32\)"),
    ],
)
def test_foreign_folder_is_named_with_what_is_foreign(copy, change, message):
    (copy / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(InputError, match=message):
        load_gpt2(copy)


def test_damaged_or_incomplete_folder_is_named_with_what_is_missing(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="model.safetensors: truncated in the middle of ln_f.bias"):
        load_gpt2(copy)
    weights.write_bytes(whole[:50])
    with pytest.raises(InputError, match="model.safetensors: truncated, or not a safetensors file"):
        load_gpt2(copy)
    weights.write_bytes((10).to_bytes(8, "little") + b"not a JSON")
    with pytest.raises(InputError, match="model.safetensors: truncated, or not a safetensors file"):
        load_gpt2(copy)
    weights.unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor pytorch_model.bin"):
        load_gpt2(copy)
    (copy / "pytorch_model.bin").write_bytes(b"half a file")
    with pytest.raises(InputError, match="pytorch_model.bin: cannot be read as a dict of tensors"):
        load_gpt2(copy)
    index = {"weight_map": {"wte.weight": "pytorch_model-1.bin"}}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="index.json names files that are not there: .*-1.bin"):
        load_gpt2(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not valid JSON"):
        load_gpt2(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json: not a JSON object"):
        load_gpt2(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match="cannot read .*config.json"):
        load_gpt2(copy)
    (copy / "ckpt.pt").touch()
    with pytest.raises(InputError, match="is the folder of a run: name its checkpoint, .*ckpt.pt"):
        load_gpt2(copy)


PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, message",
    [
        ([], "truncated, or not a safetensors file"),
        ("[" * 100_000, "truncated, or not a safetensors file"),
        ({"b": None}, "b cannot be read as None"),
        ({"b": {"dtype": "F32"}}, "b cannot be read as {'dtype'"),
        ({"b": PAIR | {"dtype": ["F32"]}}, "b cannot be read as"),
        ({"b": PAIR | {"dtype": "I2"}}, "b cannot be read as"),
        ({"b": PAIR | {"shape": [3]}}, "b cannot be read as"),
        ({"b": PAIR | {"shape": [-1]}}, "b cannot be read as"),
        ({"b": PAIR | {"shape": {}}}, "b cannot be read as"),
        ({"b": PAIR | {"shape": [0, 10**30], "data_offsets": [0, 0]}}, "b cannot be read as"),
        ({"b": PAIR | {"data_offsets": [8, 0]}}, "b cannot be read as"),
        ({"b": PAIR | {"data_offsets": [-16, -8]}}, "b cannot be read as"),
        ({"b": PAIR | {"data_offsets": ["0", "8"]}}, "b cannot be read as"),
        ({"b": PAIR | {"data_offsets": [False, 8]}}, "b cannot be read as"),
        ({"b": PAIR | {"data_offsets": [0]}}, "b cannot be read as"),
        ({"b": PAIR | {"data_offsets": [12, 20]}}, "truncated in the middle of b"),
        ({"b": PAIR, "c": PAIR | {"data_offsets": [4, 12]}}, "its tensors overlap, or there are"),
        ({"c": PAIR | {"data_offsets": [8, 16]}}, "or there are gaps between them"),
        ({"b": PAIR}, "or there are gaps between them"),  # 8 bytes that belong to nothing
    ],
)
def test_header_that_does_not_describe_the_file_is_named_with_its_entry(tmp_path, header, message):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        read_safetensors(path)


def test_numbers_of_every_dtype_are_read_as_what_they_are(tmp_path):
    there = {
        "F64": torch.tensor([1.5, -2.0, 1e-300], dtype=torch.float64),
        "F32": torch.tensor([1.5, -2.0, 1e-30], dtype=torch.float32),
        "F16": torch.tensor([1.5, -2.0, 1e-3], dtype=torch.float16),
        "BF16": torch.tensor([1.5, -2.0, 1e-30], dtype=torch.bfloat16),
        "U8": torch.tensor([0, 1, 255], dtype=torch.uint8),
        "BOOL": torch.tensor([True, False, True]),
    }
    header, numbers = {}, b""
    for name, tensor in there.items():
        start, numbers = len(numbers), numbers + tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": name, "shape": [3], "data_offsets": [start, len(numbers)]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    for name, tensor in read_safetensors(path).items():
        assert tensor.dtype == there[name].dtype and torch.equal(tensor, there[name]), name


def test_header_longer_than_any_memory_is_a_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((10**18).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=f"{path}: truncated, or not a safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": {}},
        {"weight_map": ["model-1.safetensors"]},
        {"weight_map": {"wte.weight": None}},
        {"weight_map": {"wte.weight": ["model-1.safetensors"]}},
        {"weight_map": {"wte.weight": "../model.safetensors"}},
        {"weight_map": {"wte.weight": "/etc/passwd"}},
        {"weight_map": {"wte.weight": ".."}},
        {"weight_map": {"wte.weight": "\0"}},
    ],
)
def test_index_that_leads_out_of_its_folder_or_nowhere_is_refused(copy, index):
    shutil.copy(copy / "model.safetensors", copy.parent)
    path = copy / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=str(path)):
        load_gpt2(copy)


def test_bin_of_other_things_than_tensors_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content in ([torch.zeros(2)], {"a": 1}, {"a": {"b": torch.zeros(2)}}, 3):
        torch.save(content, path)
        with pytest.raises(InputError, match=f"{path}: cannot be read as a dict of tensors"):
            read_bin(path)


def test_bin_with_one_wrong_bit_among_its_weights_is_refused(tmp_path):
    path, weight = tmp_path / "pytorch_model.bin", torch.arange(100.0)
    torch.save({"ln_f.bias": weight}, path)
    assert torch.equal(read_bin(path)["ln_f.bias"], weight)
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: cannot be read .* a checksum is wrong"):
        read_bin(path)


@pytest.mark.parametrize("value", [torch.full((16,), math.nan), torch.zeros(16).bool()])
def test_weights_that_are_no_finite_numbers_are_named(copy, value):
    torch.save(tensors() | {"ln_f.bias": value}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pytorch_model.bin: ln_f.bias is .*, or holds nan"):
        load_gpt2(copy)


def test_folder_with_another_tokenizer_of_the_same_size_is_refused(copy, monkeypatch):
    tokens = [f"t{i}" for i in range(99)] + ["<|endoftext|>"]
    merges = ["t1 t2", "t3 t4", "t12 t34"]
    monkeypatch.setattr(data.gpt2, "N_VOCAB", 100)  # as if GPT-2's were these
    monkeypatch.setattr(data.gpt2, "TOKENS", fingerprint(tokens))
    monkeypatch.setattr(data.gpt2, "MERGES", fingerprint(merges))

    def vocab_json(tokens):
        return json.dumps({token: i for i, token in enumerate(tokens)})

    def tokenizer_json(tokens, merges, end="<|endoftext|>"):
        vocab = {token: i for i, token in enumerate(tokens)}
        added = [{"content": end, "id": 99}, {"content": "<|user|>", "id": 101}]
        return json.dumps({"model": {"vocab": vocab, "merges": merges}, "added_tokens": added})

    swapped = [tokens[1], tokens[0], *tokens[2:]]
    pairs = [pair.split() for pair in merges]  # as new versions write them
    lines = ["#version: 0.2", *merges, ""]
    right = {
        "vocab.json": [vocab_json(tokens)],
        "merges.txt": ["\n".join(lines)],
        "tokenizer.json": [tokenizer_json(tokens, merges), tokenizer_json(tokens, pairs)],
    }
    wrong = {
        "vocab.json": [vocab_json(swapped), "[]", '{"a": []}'],
        "merges.txt": ["\n".join(lines[::-1]), ""],
        "tokenizer.json": [
            tokenizer_json(swapped, merges),
            tokenizer_json(tokens, merges[::-1]),
            tokenizer_json(tokens, merges, end="</s>"),
            '{"model": 3}',
            "{}",
        ],
    }
    for name in right:
        for text in right[name]:
            (copy / name).write_text(text)
            check_tokenizer(copy)
        for text in wrong[name]:
            (copy / name).write_text(text)
            with pytest.raises(InputError, match=f"{copy}/{name}"):
                load_gpt2(copy)
        (copy / name).write_text(right[name][0])


def test_a_merge_of_two_hash_signs_is_no_comment(tmp_path, monkeypatch):
    merges = ["a b", "# #", "## ##"]
    monkeypatch.setattr(data.gpt2, "MERGES", fingerprint(merges))  # as if GPT-2's were these
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    check_tokenizer(tmp_path)


def test_four_more_tokens_have_to_be_the_chat_tokens(tmp_path):
    """A model with <|im_start|> in the place of <|pad|> would read its own prompts wrongly."""
    tokens = {f"t{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
    for ours in (True, False):
        names = ["<|pad|>" if ours else "<|im_start|>", "<|user|>", "<|assistant|>", "<|end|>"]
        added = [{"content": name, "id": 50257 + i} for i, name in enumerate(names)]
        content = {"model": {"vocab": tokens, "merges": []}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        said = "another tokenizer than GPT-2's" if ours else "has other tokens than <.pad.>, <.user"
        with pytest.raises(InputError, match=said):
            check_tokenizer(tmp_path, 50261)
        with pytest.raises(InputError, match="another tokenizer than GPT-2's"):
            check_tokenizer(tmp_path)


def test_fingerprints_of_gpt2s_tokenizer_are_those_of_its_vocabulary(copy):
    if not gpt2_tokenizer_is_there():
        pytest.skip("GPT-2's vocabulary is not here: set TIKTOKEN_CACHE_DIR")
    content = fast_tokenizer(GPT2Tokenizer())
    content["added_tokens"] = [{"content": "<|endoftext|>", "id": 50256}]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    load_gpt2(copy)
    content["model"]["merges"][7:9] = content["model"]["merges"][8:6:-1]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json is another tokenizer than GPT-2's"):
        load_gpt2(copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "words"}, "its kind is 'words'"),
        ({"merges": None}, "its kind is 'bpe', or its merges or characters are missing"),
        ({"merges": [[32, 108], [256]]}, r"merge 1 is \[256\], not two ids below 257"),
        ({"merges": [[32, 257]]}, r"merge 0 is \[32, 257\], not two ids below 256"),
        ({"merges": [[-1, 32]]}, r"merge 0 is \[-1, 32\], not"),
        ({"merges": [[1.0, 32]]}, r"merge 0 is \[1.0, 32\], not"),
        ({"merges": [[97, 98], [98, 99], [256, 99], [97, 257]]}, "two merges make the same token"),
        ({"merges": [[97, 98]]}, "model_config has another vocab_size than its tokenizer, 262"),
        ({"kind": "char", "characters": [97]}, "or its merges or characters are missing"),
        ({"kind": "char", "characters": "aa"}, "characters has one of them twice"),
    ],
)
def test_tokenizer_that_fits_no_model_is_named_with_its_file(tiny, tmp_path, changes, message):
    parts = {"stage": "sft", "model": tiny.state_dict(), "model_config": tiny.config.__dict__}
    tokenizer = {"kind": "bpe", "merges": [[32, 108]], **changes}
    save_checkpoint(tmp_path / "ckpt.pt", {**parts, "tokenizer": tokenizer})
    with pytest.raises(InputError, match=f"{tmp_path}/ckpt.pt: .*{message}"):
        load_init(tmp_path / "ckpt.pt")


def test_weights_are_mapped_and_not_read_into_memory(folder):
    """A tensor of the file is a view of the file: it costs no memory until it is copied."""
    mapped = read_safetensors(folder / "model.safetensors")
    assert torch.equal(mapped["wte.weight"], tensors()["wte.weight"])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder / "model.safetensors") in maps.read_text()


def test_name_is_downloaded_once_and_a_failure_says_what_to_fetch(
    folder, tmp_path, monkeypatch, capsys
):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data.gpt2, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(data.gpt2, "URL", f"http://127.0.0.1:{server.server_port}/{{file}}")
    model, _ = load_init("gpt2")
    assert model.config.n_layer == 2
    server.shutdown()
    server.server_close()
    load_init("gpt2")  # from the folder now
    assert sorted(os.listdir(tmp_path / "gpt2")) == ["config.json", "model.safetensors"]
    with pytest.raises(InputError, match="cannot download http.*by hand.*gpt2-medium/config.json"):
        load_init("gpt2-medium")
    assert not list((tmp_path / "gpt2-medium").iterdir())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_process_downloads_and_the_others_wait_for_it(rank, monkeypatch):
    done = []
    ranks = SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: rank, barrier=lambda: done.append("barrier")
    )
    monkeypatch.setattr(data.gpt2, "distributed", ranks)
    monkeypatch.setattr(data.gpt2, "fetch", lambda file, path: done.append(path.name))
    download("gpt2")
    files = ["config.json", "model.safetensors"]
    assert done == (["barrier", *files] if rank else [*files, "barrier"])


def gpt2_tokenizer_is_there() -> bool:
    try:
        GPT2Tokenizer()
    except InputError:
        return False
    return True


def test_every_stage_runs_from_gpt2_on_files_of_your_own(folder, tmp_path):
    if not gpt2_tokenizer_is_there():
        pytest.skip("GPT-2's vocabulary is not here: set TIKTOKEN_CACHE_DIR")
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question. " * 60)
    rows = [
        {"instruction": f"Say {i}.", "output": f"{i}!", "chosen": f"{i}!", "rejected": "No."}
        for i in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = {"pretrain": "book.txt"} | dict.fromkeys(("sft", "rm", "ppo", "dpo"), "rows.json")
    for stage, file in files.items():
        options = {**TINY[stage], "data": str(tmp_path / file), "out": str(tmp_path / "out")}
        for name in ("vocab_size", "documents", "n_layer", "n_head", "n_embd"):
            options.pop(name, None)
        options["init"] = str(folder)
        if stage == "pretrain":
            options["context"] = 32
        script = SCRIPTS[stage]
        assert script.main(script.Config(**options))
        kind = ScalarModel if stage == "rm" else GPT
        _, checkpoint = load_model(tmp_path / "out" / stage / "ckpt.pt", kind=kind)
        assert checkpoint["tokenizer"] == {"kind": "gpt2"}
    with pytest.raises(InputError, match="--context 96: .* has 64"):
        book = str(tmp_path / "book.txt")
        train_pretrain.main(train_pretrain.Config(init=str(folder), data=book, out=str(tmp_path)))


def test_pretraining_reads_files_of_token_ids(tmp_path):
    options = {**TINY["pretrain"], "data": str(tmp_path / "train.bin"), "out": str(tmp_path)}
    if not gpt2_tokenizer_is_there():
        pytest.skip("GPT-2's vocabulary is not here: set TIKTOKEN_CACHE_DIR")
    tokenizer = GPT2Tokenizer()
    ids = [tokenizer.eot] + tokenizer.encode("To be, or not to be, that is the question. " * 30)
    for name in ("train", "val"):
        np.array(ids, np.uint16).tofile(tmp_path / f"{name}.bin")
    with pytest.raises(InputError, match="holds ids of GPT-2: add --tokenizer gpt2"):
        train_pretrain.main(train_pretrain.Config(**options))
    options["tokenizer"] = "gpt2"
    result = train_pretrain.main(train_pretrain.Config(**options))
    text_bytes = len("To be, or not to be, that is the question. " * 30)
    expected = result["val_loss"] / math.log(2) * (len(ids) - 1) / text_bytes
    assert result["bits_per_byte"] == pytest.approx(expected)
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(InputError, match="cannot read .*val.bin as token ids"):
        train_pretrain.main(train_pretrain.Config(**options))


# ---------------------------------------------------------------------------------------------
# Out

TEXTS = ["Otto's lantern, 12-5 is 7.", "  two  spaces\n\tand a tab ", "Zürich 🙂", "<|end|>x_y"]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 4-2?"},
    {"role": "assistant", "content": "4-2 is 2."},
    {"role": "user", "content": "And 3-1?"},
]


def check_export(model, tokenizer, out, is_base=False):
    """transformers computes the same logits, tokens, conversation and greedy reply."""
    transformers = pytest.importorskip("transformers")
    export(model, tokenizer, out, is_base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    fast = transformers.AutoTokenizer.from_pretrained(out)
    idx = torch.randint(model.config.vocab_size, (2, 20))
    torch.testing.assert_close(model(idx) @ model.head.T, theirs(idx).logits, atol=1e-5, rtol=1e-5)
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text)
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert fast.decode(ids) == text
    stop = tokenizer.eot if is_base else tokenizer.end
    assert fast.eos_token_id == theirs.generation_config.eos_token_id == stop
    if is_base:
        assert fast.chat_template is None
        prompt = [tokenizer.eot] + tokenizer.encode(TEXTS[0])
        with torch.no_grad():  # <|endoftext|> changes places with its third token, to be met
            (ours,), _ = generate(model, [prompt], 3, temperature=0)
            for each in (model.wte, theirs.transformer.wte):
                each.weight[[stop, ours[2]]] = each.weight[[ours[2], stop]]
        reply = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
        (ours,), _ = generate(model, [prompt], 8, stop=stop, temperature=0)
        assert reply[0].tolist() == prompt + ours and ours[-1] == stop and len(ours) < 8
        return
    prompt = fast.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_prompt(tokenizer, CHAT)
    assert fast.apply_chat_template(CHAT, return_dict=False) == encode_chat(tokenizer, CHAT)[0]
    reply = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0].tolist()
    ours, _ = generate(model, [prompt], 8, stop=tokenizer.end, temperature=0)
    assert reply[len(prompt) :] == ours[0]


@pytest.mark.reference
@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_exported_model_talks_the_same_in_transformers(tokenizer, tmp_path, kind, is_base):
    if kind == "char":
        tokenizer = make_tokenizer("char", TEXTS + [message["content"] for message in CHAT], 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, context=96, n_layer=2, n_head=2, n_embd=16)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    check_export(model, tokenizer, tmp_path, is_base)


@pytest.mark.reference
def test_exported_gpt2_talks_the_same_in_transformers_and_comes_back(folder, tmp_path):
    if not gpt2_tokenizer_is_there():
        pytest.skip("GPT-2's vocabulary is not here: set TIKTOKEN_CACHE_DIR")
    model, _ = load_gpt2(folder)
    check_export(model, GPT2Tokenizer(), tmp_path)
    again, _ = load_gpt2(tmp_path)
    assert torch.equal(again.head, model.head)
    assert torch.equal(again.h[1].mlp.c_fc.weight, model.h[1].mlp.c_fc.weight)


def test_export_that_fails_leaves_the_earlier_one_or_nothing_that_loads(tiny, tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    tokenizer = make_tokenizer("char", ["".join(map(chr, range(65, 65 + 45)))], 0)
    assert tokenizer.n_vocab == tiny.config.vocab_size
    export(tiny, tokenizer, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with torch.no_grad():
        tiny.wte.weight += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (200, 10_000):  # bytes per file: the first fails at config.json, or at the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            for name in ("old", "new"):
                with pytest.raises(InputError, match=f"cannot export to .*{name}: .*too large"):
                    export(tiny, tokenizer, tmp_path / name, is_base=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
        assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot export to .*file"):
        export(tiny, tokenizer, tmp_path / "file")


@pytest.mark.parametrize("n_files", range(5))  # that take their place before the disk fails
def test_export_that_ends_between_two_files_leaves_no_weights(tiny, tmp_path, monkeypatch, n_files):
    """The weights take their place last: without them no folder loads."""
    tokenizer = make_tokenizer("char", ["".join(map(chr, range(65, 65 + 45)))], 0)
    replace, taken = os.replace, []

    def failing(source, to):
        if len(taken) == n_files:
            raise OSError("the disk has failed")
        taken.append(to.name)
        replace(source, to)

    monkeypatch.setattr(data.gpt2.os, "replace", failing)
    with pytest.raises(InputError, match="the disk has failed"):
        export(tiny, tokenizer, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(taken)
    assert len(taken) == n_files and "model.safetensors" not in taken


def test_export_into_the_folder_of_a_run_is_refused(tiny, tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(InputError, match="is the folder of a run: export to another"):
        export(tiny, make_tokenizer("char", ["ab"], 0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("is_base", [False, True])
def test_exported_model_ends_where_its_texts_end(tiny, tmp_path, is_base):
    """A base model has never seen <|end|>: it would never stop."""
    tokenizer = make_tokenizer("char", ["".join(map(chr, range(65, 65 + 45)))], 0)
    export(tiny, tokenizer, tmp_path, is_base)
    files = ("config", "generation_config", "tokenizer_config")
    config, generation, settings = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in files
    )
    end = tokenizer.eot if is_base else tokenizer.end
    assert config["eos_token_id"] == generation["eos_token_id"] == end
    assert settings["eos_token"] == ("<|endoftext|>" if is_base else "<|end|>")
    assert ("chat_template" in settings) == (not is_base)


def test_exported_settings_are_those_of_our_model_where_the_defaults_are_not(tiny, tmp_path):
    """transformers would train with dropout, read too long texts, or remove spaces before dots."""
    export(tiny, make_tokenizer("char", ["".join(map(chr, range(65, 65 + 45)))], 0), tmp_path)
    config, settings, tokenizer = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "tokenizer")
    )
    assert [config[f"{place}_pdrop"] for place in ("resid", "embd", "attn")] == [0, 0, 0]
    assert config["n_positions"] == settings["model_max_length"] == 24
    assert settings["clean_up_tokenization_spaces"] is False
    assert [token["special"] for token in tokenizer["added_tokens"]] == [True] * 5


@pytest.mark.parametrize("length", range(1, 9))
def test_written_numbers_start_at_a_multiple_of_8_whatever_the_names(tmp_path, length):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w" * length: torch.arange(3.0)})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0 and len(content) == start + 12
    assert torch.equal(read_safetensors(path)["w" * length], torch.arange(3.0))


def test_an_exported_folder_has_gpt2s_layout_and_its_ends(tokenizer, tmp_path):
    """Matrices as (in, out), which only one that is not square shows; no rows of mere padding."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, context=24, n_layer=2, n_head=2, n_embd=16))
    for is_base, end in ((False, tokenizer.end), (True, tokenizer.eot)):
        export(model, tokenizer, tmp_path / str(is_base), is_base)
        config = json.loads((tmp_path / str(is_base) / "config.json").read_text())
        there = read_safetensors(tmp_path / str(is_base) / "model.safetensors")
        assert config["eos_token_id"] == end and config["pad_token_id"] == tokenizer.pad
        assert config["vocab_size"] == tokenizer.n_vocab == len(there["transformer.wte.weight"])
        for name, weight in model.named_parameters():
            stored = there[f"transformer.{name}"]
            if name.startswith("h.") and weight.ndim == 2:
                weight = weight.T
            assert torch.equal(stored, weight[: len(stored)]), name
