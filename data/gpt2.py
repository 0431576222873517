"""GPT-2 and `transformers`: folders in the form of Hugging Face, in and out.

    --init gpt2            downloaded once into downloads/gpt2 (also gpt2-medium, -large, -xl)
    --init some/folder     config.json and model.safetensors or pytorch_model.bin, in one file or in
                           shards with an index, as `save_pretrained` writes them
    python gpt.py --export some/folder
                           a model of ours as a folder that AutoModelForCausalLM and AutoTokenizer,
                           with its chat template, load

Our modules have GPT-2's names, so only three things are done to the weights: matrices are turned
round (GPT-2 stores them as (in, out), nn.Linear as (out, in)), the prefix "transformer." is
dropped, and the token table gets rows for the chat tokens behind GPT-2's own 50257.

A file is mapped into memory and copied tensor by tensor into the model, so there is never a second
copy of all weights. Nothing is unpickled but tensors.

One thing is lost on the way out: in `transformers` a message that spells "<|end|>" ends its turn.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from data.download import File, fetch
from data.tokenizer import PATTERN, SPECIALS
from gpt import GPT, GPTConfig

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
DOWNLOADS = Path("downloads")
N_VOCAB = 50257  # ids of GPT-2's tokenizer; end-of-text is the last

# What our model computes. A folder that asks for anything else would load and then be wrong.
EXPECTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # the same numbers, in another order
    "tie_word_embeddings": (True,),
    "vocab_size": (N_VOCAB, N_VOCAB + 4),  # + 4: exported here, with the chat tokens
}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_gpt2(path: str | Path) -> bool:
    """Whether a path is a folder, or one of the names that can be downloaded."""
    return str(path) in NAMES or Path(path).is_dir()


def load_gpt2(path: str | Path, device="cpu") -> tuple[GPT, dict]:
    """The model in a folder (or of a name), and what a checkpoint of pretraining would say.

    Exits with a message that names the file if anything is missing, damaged, or not GPT-2.
    """
    folder = download(str(path)) if str(path) in NAMES else Path(path)
    if (folder / "ckpt.pt").exists():
        raise SystemExit(f"{folder} is the folder of a run: name its checkpoint, {folder}/ckpt.pt")
    config = read_config(folder)
    checkpoint = {"stage": "pretrain", "tokenizer": {"kind": "gpt2"}}
    model = GPT(
        GPTConfig(
            vocab_size=N_VOCAB + 4,  # and the chat tokens: see GPT2Tokenizer
            context=config["n_positions"],
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
        )
    )
    wanted = dict(model.named_parameters())
    n_rows = config["vocab_size"]  # rows of the token table that the file has
    with torch.no_grad():
        for name, tensor, file in read_tensors(folder):
            name = name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask, which some files store
            if name == "lm_head.weight":  # the token table once more
                continue
            if name not in wanted:
                raise SystemExit(f"{file}: {name} is no tensor of GPT-2, or is there twice")
            parameter = wanted.pop(name)
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.T
            if name == "wte.weight":
                parameter = parameter[:n_rows]
            if tensor.shape != parameter.shape:
                raise SystemExit(
                    f"{file}: {name} is {tuple(tensor.shape)}, and config.json asks for "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)
        if wanted:
            raise SystemExit(f"{folder}: no {', '.join(sorted(wanted)[:3])} in its files")
        # All logits of GPT-2 are far below 0, so rows near 0 would make the chat tokens the
        # likeliest of all. As the mean of the others they start as unlikely as any.
        wte = model.wte.weight
        noise = torch.randn(
            len(wte) - n_rows, wte.shape[1], generator=torch.Generator().manual_seed(0)
        )
        wte[n_rows:] = wte[:n_rows].mean(0) + 0.1 * wte[:n_rows].std(0) * noise
    return model.to(device).eval(), checkpoint


# ---------------------------------------------------------------------------------------------
# In


def read_config(folder: Path) -> dict:
    """config.json, with GPT-2's own values where it is silent, checked against what we compute."""
    config = read_json(folder / "config.json")
    for name, allowed in EXPECTED.items():
        value = config.get(name, allowed[0])
        if value not in allowed:
            raise SystemExit(
                f"{folder}/config.json: {name} is {value!r}, and only "
                f"{' or '.join(map(repr, allowed))} can be loaded"
            )
    usual = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    config = usual | {"vocab_size": N_VOCAB} | config
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise SystemExit(f"{folder}/config.json: n_inner is not 4 times n_embd")
    return config


def read_json(path: Path) -> dict:
    """The object in a JSON file. Exits if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error}")
    except ValueError as error:
        raise SystemExit(f"{path}: not valid JSON ({error})")


def read_tensors(folder: Path):
    """Yield (name, tensor, file) of every tensor in a folder, one file after the other."""
    for stem, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = folder / f"{stem}.index.json"
        files = [folder / stem]
        if index.exists():
            shards = read_json(index).get("weight_map", {})
            files = [folder / name for name in dict.fromkeys(shards.values())]
            missing = [str(file) for file in files if not file.exists()]
            if missing:
                raise SystemExit(f"{index} names files that are not there: {', '.join(missing)}")
        if files and files[0].exists():
            for file in files:
                for name, tensor in read(file).items():
                    yield name, tensor, file
            return
    raise SystemExit(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, mapped into memory.

    The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON
    header, the header with dtype, shape and place of every tensor, then the numbers.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise SystemExit(f"{path}: cut short, or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise SystemExit(f"{path}: no safetensors file")
    header.pop("__metadata__", None)
    numbers = np.memmap(path, mode="c", offset=8 + length) if size > 8 + length else b""
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if end > len(numbers):
            raise SystemExit(f"{path}: cut short in the middle of {name}")
        if entry["dtype"] not in DTYPES:
            raise SystemExit(f"{path}: {name} has the unknown type {entry['dtype']}")
        flat = torch.from_numpy(numbers[start:end]).view(DTYPES[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])
    return tensors


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """Tensors that torch.save has written, mapped into memory."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a cut file, a pickle with code in it
        raise SystemExit(f"{path}: cannot be read as a dict of tensors: {str(error)[:200]}")


def download(name: str) -> Path:
    """The folder of a model of OpenAI's, downloaded if it is not there yet."""
    folder = DOWNLOADS / name
    many = distributed.is_initialized()
    if many and distributed.get_rank() > 0:
        distributed.barrier()  # the first of several processes downloads, the others wait
    for file in ("config.json", "model.safetensors"):
        fetch(File(URL.format(name=name, file=file)), folder / file)
    if many and distributed.get_rank() == 0:
        distributed.barrier()
    return folder


# ---------------------------------------------------------------------------------------------
# Out

CHAT_TEMPLATE = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}<|user|>{{ ns.system + m['content'] }}"
    "{% set ns.system = '' %}"
    "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # the chat format of data/chat.py, in Jinja


def export(model: GPT, tokenizer, folder: str | Path):
    """Write a folder that `transformers` loads, with its tokenizer and chat template."""
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.end}
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
        **{f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")},
        **ids,
    }
    specials = [tokenizer.pad, tokenizer.eot, tokenizer.user, tokenizer.assistant, tokenizer.end]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": c.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    fast = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, text in sorted(zip(specials, SPECIALS))
        ],
        **fast_tokenizer(tokenizer),
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ids),
        ("tokenizer_config.json", settings),
        ("tokenizer.json", fast),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "wte.weight":
            tensor = model.head.detach()
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        tensors[f"transformer.{name}"] = tensor.T if turned else tensor
    write_safetensors(folder / "model.safetensors", tensors)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]):
    """Write float32 tensors, one after the other."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = place + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.float().cpu().contiguous().numpy().tobytes())


def fast_tokenizer(tokenizer) -> dict:
    """Model, pre-tokenizer and decoder of a tokenizer.json that does what ours does."""
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
        pieces = sorted(ranks, key=ranks.get)
        merges = [halves(piece, ranks) for piece in pieces if len(piece) > 1]
        steps = {"pre_tokenizer": byte_level | {"use_regex": True}, "decoder": byte_level}
    else:
        pieces = [bytes([byte]) for byte in range(256)]
        merges = []
        for a, b in tokenizer.state["merges"]:
            merges.append((pieces[a], pieces[b]))
            pieces.append(pieces[a] + pieces[b])
        steps = {  # a space in front of every text, and off again: see BPETokenizer
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
    vocab = {spell(piece): i for i, piece in enumerate(pieces)}
    merges = [[spell(a), spell(b)] for a, b in merges]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, **steps}


def split(pattern: str) -> dict:
    """A pre-tokenizer that cuts a text into the matches of a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def halves(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were merged into this one: what all earlier merges make of it."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        rank = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        first = rank.index(min(rank))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return tuple(parts)


def spell(piece: bytes) -> str:
    """Bytes as GPT-2's files write them: printable ones as themselves, others from U+0100 on."""
    return "".join(BYTES[byte] for byte in piece)


printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in printable]
BYTES = {byte: chr(byte) for byte in printable}
BYTES |= {byte: chr(256 + i) for i, byte in enumerate(others)}
