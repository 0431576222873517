"""Damaged files of every format that is loaded: a model that works, or a message with its file."""

import copy
import json
import math
import random
import shutil

import pytest
import torch

from data.gpt2 import N_VOCAB, load_gpt2, load_init, write_safetensors
from data.tokenizer import load_tokenizer
from gpt import GPT, GPTConfig, InputError, save_checkpoint

DEEP = json.loads("[" * 100 + "]" * 100)
STRANGE = [None, True, False, -1, 0, 1, 3, 10**9, 10**18, 10**30, 2.0, 0.5, math.inf, math.nan, ""]
STRANGE += ["12", "../x", "gpt2", "\0", "\ud800", [], {}, [0], [[3, 4]], {"a": 1}, DEEP]


def damaged_bytes(rng: random.Random, whole: bytes) -> bytes:
    """Bits flipped, the end cut off, bytes inserted, left out, or overwritten."""
    start = rng.choice([rng.randrange(len(whole)), rng.randrange(min(len(whole), 300))])
    end = min(len(whole), start + rng.choice([1, 8, 100]))
    noise = rng.randbytes(rng.choice([1, 8, 100]))
    flipped = bytes([whole[start] ^ 1 << rng.randrange(8)])
    middle = rng.choice([flipped + whole[start + 1 : end], noise + whole[start:end], b"", noise])
    return whole[:start] + middle + (whole[end:] if rng.random() < 0.8 else b"")


def damaged_values(rng: random.Random, value):
    """The same nested dicts and lists, but for one entry: another value, gone, or twice."""
    value = copy.copy(value)
    names = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not names:
        return rng.choice(STRANGE)
    name = rng.choice(names)
    if isinstance(value[name], (dict, list)) and rng.random() < 0.8:
        value[name] = damaged_values(rng, value[name])
    elif rng.random() < 0.8:
        value[name] = rng.choice([*STRANGE, *(value[n] for n in names)])
    elif isinstance(value, dict):
        value["more"] = value.pop(name)
    else:
        value.insert(name, value[name])
    return value


def small_checkpoint(kind: str) -> dict:
    tokenizer = {"kind": "bpe", "merges": [[32, 108], [111, 119], [256, 257]]}
    if kind == "char":
        tokenizer = {"kind": "char", "characters": "abc "}
    n_vocab = load_tokenizer(tokenizer).n_vocab
    config = GPTConfig(n_vocab, context=8, n_layer=1, n_head=1, n_embd=4)
    parts = {"stage": "sft", "model_config": dict(config.__dict__), "tokenizer": tokenizer}
    return {**parts, "model": dict(GPT(config).state_dict())}


def try_checkpoint(path):
    """Load it as every script does, and use what was loaded."""
    model, checkpoint = load_init(path)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    assert tokenizer.decode(list(range(tokenizer.n_vocab))) is not None
    assert model(torch.arange(2)[None]).isfinite().all()


def checkpoint_bytes(rng, folder):
    path = folder / "ckpt.pt"
    save_checkpoint(path, small_checkpoint(rng.choice(["bpe", "char"])))
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return path, try_checkpoint


def checkpoint_values(rng, folder):
    checkpoint = small_checkpoint(rng.choice(["bpe", "char"]))
    part = rng.choice([*checkpoint, "tokenizer", None])
    strange = [torch.zeros(3), torch.zeros(4).half(), torch.full((4,), math.nan), *STRANGE]
    if part is None:
        checkpoint = damaged_values(rng, checkpoint)
    elif part == "model":
        checkpoint["model"][rng.choice(list(checkpoint["model"]))] = rng.choice(strange)
    elif part == "stage":
        checkpoint["stage"] = rng.choice([*strange, "rm", "dpo"])
    else:
        checkpoint[part] = damaged_values(rng, checkpoint[part])
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder / "ckpt.pt", try_checkpoint


def gpt2_folder(folder):
    """A model of GPT-2's vocabulary and 2 channels, in two files with an index."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 2, "n_positions": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    model = GPT(GPTConfig(N_VOCAB, context=8, n_layer=1, n_head=1, n_embd=2))
    weights = {}
    for name, tensor in model.state_dict().items():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name] = tensor.T if turned else tensor
    large, files = {"wte.weight": weights.pop("wte.weight")[:N_VOCAB]}, {}
    for file, part in (("large.safetensors", large), ("small.safetensors", weights)):
        write_safetensors(folder / file, part)
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def try_folder(folder):
    model, _ = load_gpt2(folder)
    # perhaps not finite: safetensors has no checksum, and a weight of 1e38 is a number
    assert model(torch.arange(2)[None]).shape == (1, 2, model.config.n_embd)


def safetensors_bytes(rng, folder):
    gpt2_folder(folder)
    path = folder / "small.safetensors"
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    return folder, try_folder


def safetensors_header(rng, folder):
    gpt2_folder(folder)
    path = folder / "small.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps(damaged_values(rng, json.loads(whole[8:end]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    return folder, try_folder


def folder_json(rng, folder):
    gpt2_folder(folder)
    path = folder / rng.choice(["config.json", "model.safetensors.index.json", "tokenizer.json"])
    tokenizer = {"model": {"vocab": {"a": 0}, "merges": ["a a"]}, "added_tokens": []}
    text = path.read_text() if path.exists() else json.dumps(tokenizer)
    if rng.random() < 0.7:
        text = json.dumps(damaged_values(rng, json.loads(text)))
        text = text.replace("Infinity", "1e400")
    else:
        text = damaged_bytes(rng, text.encode())
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return folder, try_folder


FORMATS = [checkpoint_bytes, checkpoint_values, safetensors_bytes, safetensors_header, folder_json]


def check(damage, cases, tmp_path):
    refused = 0
    for case in cases:
        folder = tmp_path / f"case{case}"
        folder.mkdir()
        path, load = damage(random.Random(f"{damage.__name__} {case}"), folder)
        try:
            load(path)
        except InputError as error:
            assert str(path) in str(error), (case, error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{damage.__name__}, case {case}: {error!r}") from error
        shutil.rmtree(folder)
    assert refused > len(cases) / 2  # else hardly anything was damaged


@pytest.mark.parametrize("damage", FORMATS)
def test_damaged_file_is_refused_by_name_or_works(damage, tmp_path):
    check(damage, range(12), tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("damage", FORMATS)
def test_many_damaged_files_are_refused_by_name_or_work(damage, tmp_path):
    check(damage, range(12, 412), tmp_path)
