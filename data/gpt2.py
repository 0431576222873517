"""GPT-2 and `transformers`: reading and writing model folders in Hugging Face's format.

    --init gpt2            downloaded once into downloads/gpt2 (also gpt2-medium, -large, -xl)
    --init some/folder     config.json and model.safetensors or pytorch_model.bin, in one file or in
                           shards with an index, as `save_pretrained` writes them
    python gpt.py --export some/folder
                           writes one of our models for AutoModelForCausalLM and AutoTokenizer, with
                           its chat template

Our modules have GPT-2's names, so only three things happen to the weights: matrices are transposed
(GPT-2 stores them as (in, out), nn.Linear as (out, in)), the prefix "transformer." is dropped, and
the token table gets four more rows, for the chat tokens after GPT-2's own 50257.

A file is memory-mapped and copied into the model tensor by tensor, so there is never a second copy
of all the weights in memory. Nothing but tensors is unpickled.

Exporting loses one guarantee: in `transformers`, a message that spells "<|end|>" ends its turn.

**What GPT-2's size needs** (124 million parameters, `--no-bf16`). One step of each stage has been
run on a CPU, with random weights; the last column is arithmetic for the README's commands.

    stage          models                                           peak, at              on a GPU
    pretraining    1 trained                                        3.9 GB, 4 x 1024      6 GB
    SFT            1 trained                                        3.7 GB, 8 x 260       6 GB
    reward model   1 trained, SFT for samples                       5.4 GB, 8 x 2 x 260   12 GB
    PPO            policy, critic trained; reference, reward model  5.8 GB, 8 x 128       20 GB
    DPO            policy trained; reference                        5.9 GB, 8 x 2 x 260   12 GB

A trained model costs 2.0 GB (weights, gradients and AdamW's two moments), a frozen one 0.5 GB, a
token in training about 0.4 MB, a token in PPO's cache 74 kB. On several GPUs every process holds
the same models and its shard of the batch. A forward pass takes 0.25 GFLOP per token and a backward
pass twice that. With `--bf16` one H100 trains on 384,000 tokens a second (15 GB for 32 x 1024 at a
time) and needs 3.5 seconds for an iteration of PPO of 512 responses of 128 tokens (16.5 GB): see
"Speed" in data/experiments/README.md.
"""

import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from data.download import File, fetch
from data.tokenizer import PATTERN, SPECIALS, load_tokenizer
from gpt import GPT, GPTConfig, InputError, fingerprint, load_model

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
DOWNLOADS = Path("downloads")
N_VOCAB = 50257  # ids of GPT-2's tokenizer, the last of which is end-of-text

# The entries of config.json that our model can honour, GPT-2's own value first. A folder with any
# other value would load without an error and compute something wrong.
EXPECTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # mathematically the same
    "tie_word_embeddings": (True,),
    "vocab_size": (N_VOCAB, N_VOCAB + 4),  # + 4: exported by us, with the chat tokens
    "bos_token_id": (N_VOCAB - 1, None),
    "eos_token_id": (N_VOCAB - 1, N_VOCAB + 3, None),  # + 3: <|end|>, in what we have exported
}
# What gpt.fingerprint says of GPT-2's 50257 tokens in the order of their ids, as vocab.json spells
# them, and of its 50000 merges, each in the form of a line of merges.txt.
TOKENS, MERGES = "04846f5af2d017ab", "5644e5e4a5585f9b"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_gpt2(path: str | Path) -> bool:
    """Whether a path is a folder, or the name of a model that can be downloaded."""
    return str(path) in NAMES or Path(path).is_dir()


def load_init(path: str | Path, device="cpu") -> tuple[GPT, dict]:
    """The language model that --init names, in evaluation mode, and its checkpoint's other entries.

    path: a checkpoint of ours, a folder with GPT-2's weights, or a name in NAMES. Raises InputError
    if there is no such model, or if it cannot be loaded.
    """
    if is_gpt2(path):
        return load_gpt2(path, device)
    model, checkpoint = load_model(path, device)
    try:
        n_vocab = load_tokenizer(checkpoint["tokenizer"]).n_vocab
        if n_vocab != model.config.vocab_size:
            raise InputError(f"model_config has another vocab_size than its tokenizer, {n_vocab}")
    except InputError as error:
        raise InputError(f"{path}: {error}")
    return model, checkpoint


def load_gpt2(path: str | Path, device="cpu") -> tuple[GPT, dict]:
    """A model with GPT-2's weights, and the entries that a checkpoint of pretraining would have.

    path: a folder, or a name in NAMES, which is downloaded. Raises InputError that names the
    file if anything is missing, damaged, or not GPT-2.
    """
    folder = download(str(path)) if str(path) in NAMES else Path(path)
    if (folder / "ckpt.pt").exists():
        raise InputError(f"{folder} is the folder of a run: name its checkpoint, {folder}/ckpt.pt")
    config, n_rows = read_config(folder)
    check_tokenizer(folder, n_rows)
    tensors = list(read_tensors(folder))  # mapped, and not yet read
    if config.n_parameters > 4 * sum(tensor.numel() for _, tensor, _ in tensors):
        # so many that they might not fit into memory; a smaller difference is named below
        raise InputError(f"{folder}/config.json is that of a far larger model")
    model = GPT(config)
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor, file in tensors:
            name = name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask, which some files store
            if name == "lm_head.weight":  # the token table again: the two are tied
                continue
            if name not in missing:
                raise InputError(f"{file}: {name} is not a tensor of GPT-2, or is there twice")
            parameter = missing.pop(name)
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.T
            if name == "wte.weight":
                parameter = parameter[:n_rows]
            if tensor.shape != parameter.shape:
                raise InputError(
                    f"{file}: {name} is {tuple(tensor.shape)}, but config.json asks for "
                    f"{tuple(parameter.shape)}"
                )
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise InputError(f"{file}: {name} is {tensor.dtype}, or holds nan or inf")
            parameter.copy_(tensor)
        if missing:
            raise InputError(f"{folder}: no {', '.join(sorted(missing)[:3])} in its files")
        wte = model.wte.weight
        wte[n_rows:] = 0  # no part of the fingerprint: what follows differs between CPUs
        checkpoint = {"stage": "pretrain", "tokenizer": {"kind": "gpt2"}}
        checkpoint["fingerprint"] = fingerprint(model.state_dict(), checkpoint["tokenizer"])
        # GPT-2's logits are all far below 0. Rows near 0, with logits near 0, would make the chat
        # tokens by far the likeliest. Rows near the mean of all rows make them as unlikely as most.
        noise = torch.randn(
            len(wte) - n_rows, wte.shape[1], generator=torch.Generator().manual_seed(0)
        )
        wte[n_rows:] = wte[:n_rows].mean(0) + 0.1 * wte[:n_rows].std(0) * noise
    return model.to(device).eval(), checkpoint


# ---------------------------------------------------------------------------------------------
# Reading folders


def read_config(folder: Path) -> tuple[GPTConfig, int]:
    """What config.json says of the model, and how many rows its token table has in the files.

    Missing entries have GPT-2's own values. Raises InputError for an entry that we cannot honour.
    """
    path = folder / "config.json"
    entries = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12} | read_json(path)
    for name, allowed in EXPECTED.items():
        value = entries.setdefault(name, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{path}: {name} is {value!r}, but only {' or '.join(map(repr, allowed))} can be "
                "loaded"
            )
    try:
        config = GPTConfig(
            vocab_size=N_VOCAB + 4,  # + 4 chat tokens: see GPT2Tokenizer
            context=entries["n_positions"],
            n_layer=entries["n_layer"],
            n_head=entries["n_head"],
            n_embd=entries["n_embd"],
        )
    except InputError as error:
        raise InputError(f"{path}: {str(error).replace('context', 'n_positions')}")
    if entries.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(f"{path}: n_inner is not 4 times n_embd")
    return config, int(entries["vocab_size"])


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError if it cannot be read, or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})")
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def check_tokenizer(folder: Path, n_rows: int = N_VOCAB):
    """Raises InputError if the folder has a file of another tokenizer than GPT-2's, the only one
    that we have for such folders. With its ids the model would read other words. n_rows: of the
    token table; those beyond GPT-2's have to be our chat tokens."""

    def by_id(ids: dict) -> list:
        tokens = {i: token for token, i in ids.items()}
        return [tokens.get(i) for i in range(N_VOCAB)]

    found = []  # (file, fingerprint that it should have, what it says)
    try:
        if (path := folder / "vocab.json").exists():
            found.append((path, TOKENS, by_id(read_json(path))))
        if (path := folder / "merges.txt").exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            found.append((path, MERGES, lines))
        if (path := folder / "tokenizer.json").exists():
            content = read_json(path)
            ids = {token["content"]: token["id"] for token in content["added_tokens"]}
            found.append((path, TOKENS, by_id(content["model"]["vocab"] | ids)))
            chat = [token for token in SPECIALS if token != "<|endoftext|>"]
            ours = dict(enumerate(chat, N_VOCAB)) if n_rows == N_VOCAB + len(chat) else {}
            if {i: token for token, i in ids.items() if i in ours} != ours:
                raise InputError(f"{path} has other tokens than {', '.join(ours.values())}")
            merges = content["model"]["merges"]  # "a b" or, since 2024, ["a", "b"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
            found.append((path, MERGES, merges))
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise InputError(f"{path} is not a tokenizer of GPT-2's kind: {error!r}")
    for path, expected, what in found:
        if fingerprint(what) != expected:
            raise InputError(f"{path} is another tokenizer than GPT-2's: it cannot be loaded")


def read_tensors(folder: Path):
    """Yield (name, tensor, file) for every tensor in a folder, one file after the other.

    Raises InputError if there is no file of tensors, or if a shard is missing.
    """
    for stem, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = folder / f"{stem}.index.json"
        files = [folder / stem]
        if index.exists():
            shards = read_json(index).get("weight_map")
            names = [*shards.values()] if isinstance(shards, dict) else []
            # such as model-1.safetensors, and not ../model-1.safetensors, which is elsewhere
            plain = all(isinstance(name, str) and Path(name).name == name for name in names)
            if not names or not plain:
                raise InputError(f"{index}: weight_map must give a file of this folder per tensor")
            files = [folder / name for name in dict.fromkeys(names)]
            missing = [str(file) for file in files if not file.is_file()]
            if missing:
                raise InputError(f"{index} names files that are not there: {', '.join(missing)}")
        if files[0].exists():
            for file in files:
                for name, tensor in read(file).items():
                    yield name, tensor, file
            return
    raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file: name -> tensor, memory-mapped.

    The format (https://github.com/huggingface/safetensors): the length of a JSON header in 8 bytes;
    the header, with dtype, shape and position of every tensor; the numbers, without gaps. Raises
    InputError if the file is truncated, or not in this format.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 8 + length <= size else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}")
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: truncated, or not a safetensors file")
    header.pop("__metadata__", None)
    numbers = np.empty(0, np.uint8)
    if size > 8 + length:
        numbers = np.memmap(path, mode="c", offset=8 + length)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
            if min(start, end, *shape) < 0 or bool in map(type, (start, end, *shape)):
                raise ValueError
            if end > len(numbers):
                raise InputError(f"{path}: truncated in the middle of {name}")
            tensors[name] = torch.from_numpy(numbers[start:end]).view(DTYPES[dtype]).view(shape)
        except InputError:
            raise
        except Exception:  # text for a number, bytes that are too few for the shape, ...
            raise InputError(f"{path}: {name} cannot be read as {str(entry)[:200]}")
        spans.append((start, end))
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(start for start, _ in spans), len(numbers)]:
        raise InputError(f"{path}: its tensors overlap, or there are gaps between them")
    return tensors


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file written by torch.save: name -> tensor, memory-mapped."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("a checksum is wrong")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(x, torch.Tensor) for x in tensors.values()):
            raise ValueError("it has other entries")
    except Exception as error:  # truncated, or a pickle with code in it
        reason = str(error).partition(". ")[0]
        raise InputError(f"{path}: cannot be read as a dict of tensors: {reason}")
    return tensors


def download(name: str) -> Path:
    """The folder of one of OpenAI's models, downloaded unless it is there. name: one in NAMES."""
    folder = DOWNLOADS / name
    is_distributed = distributed.is_initialized()
    if is_distributed and distributed.get_rank() > 0:
        distributed.barrier()  # rank 0 downloads, and all other ranks wait until it is done
    for file in ("config.json", "model.safetensors"):
        fetch(File(URL.format(name=name, file=file)), folder / file)
    if is_distributed and distributed.get_rank() == 0:
        distributed.barrier()
    return folder


# ---------------------------------------------------------------------------------------------
# Writing folders

CHAT_TEMPLATE = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}<|user|>{{ ns.system + m['content'] }}"
    "{% set ns.system = '' %}"
    "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # the chat format of data/chat.py, in Jinja


def export(model: GPT, tokenizer, folder: str | Path, is_base: bool = False):
    """Write a folder that `transformers` can load: weights, tokenizer and chat template.

    is_base: the model has never seen the chat format. So it stops at <|endoftext|>, where a
    document ends, and there is no chat template. The weights are stored as float32. Files of the
    same names are replaced, once all of the new ones are on the disk. Raises InputError if that
    is impossible, or if the folder is that of a run.
    """
    folder, c = Path(folder), model.config
    if (folder / "ckpt.pt").exists():
        raise InputError(f"{folder} is the folder of a run: export to another")
    ids = {
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot if is_base else tokenizer.end,
    }
    ids["pad_token_id"] = tokenizer.pad
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "vocab_size": c.vocab_size,
        "n_positions": c.context,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        **{f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")},
        **ids,
    }
    specials = [tokenizer.pad, tokenizer.eot, tokenizer.user, tokenizer.assistant, tokenizer.end]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>" if is_base else "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": c.context,
        "clean_up_tokenization_spaces": False,
    }
    if not is_base:
        settings["chat_template"] = CHAT_TEMPLATE
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, text in sorted(zip(specials, SPECIALS))
        ],
        **fast_tokenizer(tokenizer),
    }
    files = {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": settings,
        "tokenizer.json": tokenizer_json,
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "wte.weight":
            tensor = model.head.detach()  # without the rows that only pad the token table
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        tensors[f"transformer.{name}"] = tensor.T if transposed else tensor
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            for name, content in files.items():
                (Path(partial) / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
            write_safetensors(Path(partial) / "model.safetensors", tensors)
            for name in (*files, "model.safetensors"):  # without its weights no folder loads
                os.replace(Path(partial) / name, folder / name)
    except OSError as error:
        raise InputError(f"cannot export to {folder}: {error}")


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]):
    """Write name -> tensor as a safetensors file of float32 (its format: `read_safetensors`)."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format asks for numbers that start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.float().cpu().contiguous().numpy().tobytes())


def fast_tokenizer(tokenizer) -> dict:
    """The entries of tokenizer.json that make `transformers` encode and decode as tokenizer does:
    model, pre-tokenizer and decoder, and for our BPE a normalizer."""
    kind = tokenizer.state["kind"]
    if kind == "char":
        return {
            "model": {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": "<|pad|>"},
            "pre_tokenizer": split("[\\s\\S]"),
            "decoder": {"type": "Fuse"},
        }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    if kind == "gpt2":
        ranks = tokenizer.encoding._mergeable_ranks
        spellings = sorted(ranks, key=ranks.get)
        merges = [halves(spelling, ranks) for spelling in spellings if len(spelling) > 1]
        steps = {"pre_tokenizer": byte_level | {"use_regex": True}, "decoder": byte_level}
    else:
        spellings = [bytes([byte]) for byte in range(256)]  # id -> the bytes it stands for
        merges = []
        for a, b in tokenizer.state["merges"]:
            merges.append((spellings[a], spellings[b]))
            spellings.append(spellings[a] + spellings[b])
        steps = {  # a space before every text, which decoding removes: see BPETokenizer
            "normalizer": {"type": "Prepend", "prepend": " "},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split(PATTERN), byte_level | {"use_regex": False}],
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [byte_level, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
            },
        }
    vocab = {printed(spelling): i for i, spelling in enumerate(spellings)}
    merges = [[printed(a), printed(b)] for a, b in merges]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, **steps}


def split(pattern: str) -> dict:
    """An entry of tokenizer.json: a pre-tokenizer that splits text into the matches of pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def halves(spelling: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were merged into this one, such as b" low" -> (b" l", b"ow").

    tiktoken knows only the ranks of tokens, tokenizer.json wants the merges. Applying all earlier
    merges to the bytes of a token leaves the two that its own merge joined. ranks: bytes -> id.
    """
    tokens = [bytes([byte]) for byte in spelling]
    while len(tokens) > 2:
        rank = [ranks.get(a + b, len(ranks)) for a, b in zip(tokens, tokens[1:])]
        first = rank.index(min(rank))
        tokens[first : first + 2] = [tokens[first] + tokens[first + 1]]
    return tuple(tokens)


def printed(spelling: bytes) -> str:
    """Bytes in the notation of GPT-2's files: b" low" -> "Ġlow".

    A printable byte is its own character; the n-th of the others (from 0) is U+0100 + n.
    """
    return "".join(CHARACTERS[byte] for byte in spelling)


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTERS = {byte: chr(byte) for byte in PRINTABLE}
CHARACTERS |= {byte: chr(256 + n) for n, byte in enumerate(OTHER_BYTES)}
