"""The model: it cannot see the future, its cache changes nothing, and it samples what it says."""

import math
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import ROOT

from gpt import (
    GPT,
    Cache,
    GPTConfig,
    InputError,
    ScalarModel,
    fingerprint,
    generate,
    load_checkpoint,
    load_model,
    sample,
    save_checkpoint,
)
from kernels import linear_logprobs


def test_future_tokens_do_not_change_past_hidden_states(tiny):
    idx = torch.randint(50, (2, 10))
    changed = idx.clone()
    changed[:, 6:] = torch.randint(50, (2, 4))
    assert torch.equal(tiny(idx)[:, :6], tiny(changed)[:, :6])


def test_forward_equals_the_formulas_written_out_for_one_token_at_a_time(tiny):
    tiny = tiny.double()
    idx = torch.randint(50, (7,))

    def attention(block, x):  # x (T, C), one head and one query at a time
        q, k, v = block.c_attn(x).chunk(3, dim=1)
        out = torch.zeros_like(x)
        for head in (slice(0, 8), slice(8, 16)):
            for t in range(len(x)):
                scores = [q[t, head] @ k[s, head] / math.sqrt(8) for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                out[t, head] = sum(w * v[s, head] for s, w in enumerate(weights))
        return block.c_proj(out)

    x = tiny.wte.weight[idx] + tiny.wpe.weight[:7]
    for block in tiny.h:
        x = x + attention(block.attn, block.ln_1(x))
        h = block.mlp.c_fc(block.ln_2(x))
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + block.mlp.c_proj(gelu)
    torch.testing.assert_close(tiny(idx[None])[0], tiny.ln_f(x))


def test_attention_is_the_four_lines_of_its_comment(tiny):
    layer, (B, T, nh, hs) = tiny.h[0].attn, (3, 9, 2, 8)
    x = torch.randn(B, T, nh * hs)
    heads = (part.view(B, T, nh, hs).transpose(1, 2) for part in layer.c_attn(x).chunk(3, dim=2))
    q, k, v = heads  # (B, nh, T, hs)
    scores = q @ k.transpose(2, 3) / math.sqrt(hs)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    p = scores.masked_fill(later, -math.inf).softmax(3)
    y = p @ v
    assert (p[:, :, later] == 0).all() and torch.allclose(p.sum(3), torch.ones(B, nh, T))
    side_by_side = torch.cat([y[:, head] for head in range(nh)], dim=2)  # (B, T, C)
    torch.testing.assert_close(layer.c_proj(side_by_side), layer(x))


def test_initial_weights_have_the_deviations_of_gpt2():
    model = GPT(GPTConfig(vocab_size=500, context=64, n_layer=8, n_head=4, n_embd=128))
    assert abs(model.wte.weight.std().item() - 0.02) < 5e-4
    assert abs(model.h[3].attn.c_attn.weight.std().item() - 0.02) < 5e-4
    for layer in (model.h[3].attn, model.h[3].mlp):
        assert abs(layer.c_proj.weight.std().item() - 0.02 / math.sqrt(16)) < 2e-4
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_the_token_table_has_no_more_padding_than_it_needs():
    sizes = [GPTConfig(n, 8, 1, 1, 8).padded_vocab for n in (1, 63, 64, 65, 1152, 50257)]
    assert sizes == [64, 64, 64, 128, 1152, 50304]


def test_no_attention_makes_a_plan_for_every_new_length():
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # which says so without a GPU, too


def test_the_cache_is_as_long_as_the_longest_row_can_become(tiny, monkeypatch):
    lengths = []

    class Noted(Cache):
        def __init__(self, model, n_rows, length):
            lengths.append(length)
            super().__init__(model, n_rows, length)

    monkeypatch.setattr("gpt.Cache", Noted)
    generate(tiny, [[1], [1, 2, 3]], 5)
    generate(tiny, [[1, 2, 3]], 500)
    assert lengths == [8, tiny.config.context]


@pytest.mark.parametrize("bf16", [False, True])
def test_tokens_are_drawn_from_logits_that_are_not_rounded_to_bfloat16(tiny, monkeypatch, bf16):
    given, tiny.bf16 = [], bf16

    def noted(logits, **how):
        given.append(logits)
        return sample(logits, **how)

    monkeypatch.setattr("gpt.sample", noted)
    (response,), _ = generate(tiny, [[1, 2, 3]], 1, temperature=0.0)
    with torch.no_grad():
        wanted = tiny(torch.tensor([[1, 2, 3]]))[0, -1].float() @ tiny.head.T
    assert given[0].dtype == torch.float32 and len(response) == 1
    torch.testing.assert_close(given[0][0], wanted, atol=1e-5, rtol=0)


def test_a_progress_bar_is_shown_if_it_has_a_name(tiny, monkeypatch):
    bars = []
    monkeypatch.setattr("gpt.tqdm", lambda x, name, disable: bars.append((name, disable)) or x)
    for name in ("", "sampling"):
        generate(tiny, [[1]], 1, progress=name)
    assert bars == [("", True), ("sampling", None)]  # None: not where nobody looks, in a file


def test_cached_and_uncached_hidden_states_agree_for_rows_of_mixed_length(tiny):
    lengths = [3, 9, 6]
    rows = [torch.randint(50, (n + 5,)) for n in lengths]
    cache = Cache(tiny, 3, 14)
    prompt = torch.zeros(3, 9, dtype=torch.int64)
    for row, n, ids in zip(prompt, lengths, rows):
        row[:n] = ids[:n]  # padded on the right with an ordinary token
    with torch.no_grad():
        tiny(prompt, cache)
        for step in range(5):
            positions = torch.tensor(lengths) + step
            ids = torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None]
            hidden = tiny(ids, cache, positions)
            for i, n in enumerate(lengths):
                alone = tiny(rows[i][None, : n + step + 1])[0, -1]
                torch.testing.assert_close(hidden[i, 0], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_samples_equal_those_of_a_second_reading(tiny, temperature):
    prompts = [torch.randint(50, (n,)).tolist() for n in (1, 7, 3, 12, 3)]
    replies, logprobs = generate(tiny, prompts, 8, stop=5, temperature=temperature)
    for prompt, reply, given in zip(prompts, replies, logprobs):
        logits = tiny(torch.tensor([prompt + reply]))[0] @ tiny.head.T / temperature
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(reply)[:, None]
        )
        torch.testing.assert_close(torch.tensor(given), expected.flatten(), atol=1e-4, rtol=1e-4)


def test_greedy_reply_equals_taking_the_best_token_again_and_again(tiny):
    prompts = [torch.randint(50, (n,)).tolist() for n in (4, 1, 9)]
    replies, _ = generate(tiny, prompts, 10, stop=7, temperature=0, batch_size=2)
    for prompt, reply in zip(prompts, replies):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int((tiny(torch.tensor([ids]))[0, -1] @ tiny.head.T).argmax()))
            if ids[-1] == 7:
                break
        assert reply == ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_follow_the_temperature(temperature):
    torch.manual_seed(1)
    logits = torch.randn(1, 6)
    ids, logprobs = sample(logits.expand(40_000, 6), temperature)
    expected = (logits[0] / temperature).softmax(0)
    found = torch.bincount(ids, minlength=6) / len(ids)
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / len(ids))  # 4 standard errors
    torch.testing.assert_close(logprobs, expected.log()[ids])


class LikeAppleGPU(torch.Tensor):
    """A tensor that cannot be float64, as those of Apple's GPUs cannot (device mps)."""

    is_mps = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return result


def test_sampling_needs_no_float64_where_there_is_none():
    logits = torch.tensor([[0.5, 0.1, 0.0, 0.4]]).log().expand(40_000, 4)
    ids, _ = sample(logits.as_subclass(LikeAppleGPU))
    found = torch.bincount(ids.as_subclass(torch.Tensor), minlength=4) / len(ids)
    assert found[2] == 0 and (found - logits[0].exp()).abs().max() < 0.01  # 4 standard errors


def test_top_k_and_top_p_keep_just_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log().expand(2000, 4)
    ids, logprobs = sample(logits, top_k=2)
    assert set(ids.tolist()) == {0, 2}
    torch.testing.assert_close(logprobs[ids == 0][0].exp(), torch.tensor(0.5 / 0.8))
    ids, _ = sample(logits, top_p=0.5)  # the first token alone has 0.5
    assert set(ids.tolist()) == {0}
    ids, _ = sample(logits, top_p=0.6)
    assert set(ids.tolist()) == {0, 2}
    ids, _ = sample(logits, top_p=0.85)  # the first two have 0.8, so one of the others comes too
    assert len(set(ids.tolist())) == 3


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1e-39},  # logits over it are infinite in float32
        {"temperature": 1e-46},  # which is 0 in float32
        {"top_p": 1e-46},
        {"top_k": 1, "top_p": 1e-8, "temperature": 1e-8},
    ],
)
def test_sampling_that_leaves_nothing_to_chance_takes_the_likeliest(how):
    torch.manual_seed(0)
    logits = 20 * torch.randn(50, 30)
    logits[::2, :10] = -math.inf  # tokens that somebody has ruled out
    ids, logprobs = sample(logits, **how)
    assert torch.equal(ids, logits.argmax(1)) and (logprobs == 0).all()


def test_the_one_likeliest_token_is_left_by_top_k_1():
    logits = torch.randn(50, 30)
    ids, logprobs = sample(logits, top_k=1)
    assert ids.tolist() == logits.argmax(1).tolist() and (logprobs == 0).all()


def test_top_p_counts_probabilities_after_temperature():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(2000, 1)
    # At temperature 2 they are in proportion to the square roots: 0.42, 0.32, 0.26.
    ids, _ = sample(logits, temperature=2.0, top_p=0.6, generator=torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 1}
    ids, _ = sample(logits, temperature=2.0, top_p=0.8, generator=torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 1, 2}


def test_a_token_of_probability_1e_9_can_be_drawn(monkeypatch):
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    highest = torch.tensor([[1 - 1e-12]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **how: highest.to(dtype))
    assert sample(logits)[0].tolist() == [1]


def test_tokens_that_are_ruled_out_are_never_sampled():
    logits = torch.zeros(2000, 6)
    logits[:, [0, 3, 5]] = -math.inf
    for how in ({}, {"top_k": 100}, {"top_k": 4}, {"top_p": 0.99}, {"temperature": 3.0}):
        ids, logprobs = sample(logits, **how)
        assert set(ids.tolist()) == {1, 2, 4}, how
        torch.testing.assert_close(logprobs.exp(), torch.full((2000,), 1 / 3))


def test_padding_rows_of_the_token_table_have_no_probability_in_any_loss(tiny):
    tiny.wte.weight.data[50:] = 100 * tiny.wte.weight.data[:14].sign()
    hidden = tiny(torch.tensor([[1, 2, 3]]))[0, -1].expand(50, -1)  # (50, C), all the same
    logprobs = linear_logprobs(hidden, tiny.head, torch.arange(50))
    torch.testing.assert_close(logprobs.exp().sum(), torch.tensor(1.0))


def test_padding_rows_of_the_token_table_are_never_sampled(tiny):
    assert tiny.wte.weight.shape[0] == 64 and tiny.config.vocab_size == 50
    tiny.wte.weight.data[50:] = 100 * tiny.wte.weight.data[:14].sign()  # would win every argmax
    replies, _ = generate(tiny, [[1]] * 200, 5)
    assert max(max(reply) for reply in replies) < 50


def test_rows_that_have_ended_are_not_computed_any_more(tiny, monkeypatch):
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, idx, *rest: (seen.append(idx.numel()), forward(self, idx, *rest))[1],
    )
    replies, _ = generate(tiny, [[1], [2], [3], [4]] * 10, 15, stop=5)
    fed_back = sum(len(reply) for reply in replies) - len(replies)  # all but each row's last token
    assert sum(seen) == 4 + fed_back  # each prompt is read once


def test_replies_to_more_prompts_than_are_read_at_a_time_equal_those_to_each_alone(tiny):
    for parameter in tiny.h.parameters():
        parameter.data *= 3  # so that hardly two prompts have the same reply
    rng = random.Random(0)
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 9))] for _ in range(70)]
    replies, logprobs = generate(tiny, prompts, 5, stop=7, temperature=0)
    assert len(set(map(tuple, replies))) > 60
    for prompt, reply, given in zip(prompts, replies, logprobs):
        (alone,), (expected,) = generate(tiny, [prompt], 5, stop=7, temperature=0)
        assert reply == alone
        assert given == pytest.approx(expected, abs=1e-4)


def test_a_prompt_that_gets_several_responses_is_read_once(tiny, monkeypatch):
    """Three responses each, interleaved, as RLOO and best-of-n ask for them; all begin alike."""
    rng = random.Random(0)
    three = [[rng.randrange(50) for _ in range(6)] for _ in range(20)] * 3
    three[5], three[25], three[45] = three[45], three[25][:4], three[5][::-1]
    seen, forward = [], GPT.forward

    def counting(self, idx, *rest):
        seen.append(idx.shape)
        return forward(self, idx, *rest)

    monkeypatch.setattr(GPT, "forward", counting)
    together, logprobs = generate(tiny, three, 8, stop=7, temperature=0)
    assert sum(rows for rows, width in seen if width > 1) == len(set(map(tuple, three))) == 22
    for prompt, reply, given in zip(three, together, logprobs):
        (alone,), (expected,) = generate(tiny, [prompt], 8, stop=7, temperature=0)
        assert reply == alone and given == pytest.approx(expected, abs=1e-4)
    sampled, _ = generate(tiny, three, 8, generator=torch.Generator().manual_seed(0))
    assert len(set(map(tuple, sampled))) == len(three)  # each draws for itself


def test_generate_stops_at_the_end_of_the_context(tiny):
    replies, _ = generate(tiny, [[1] * 20, [1] * 3], 30)
    assert tiny.config.context == 24  # which prompt and reply may fill together
    assert [len(reply) for reply in replies] == [24 - 20, 24 - 3]


@pytest.mark.parametrize("prompt", [[], [1] * 24])
def test_prompt_without_room_is_an_error(tiny, prompt):
    with pytest.raises(ValueError, match="has room for 1 to 23"):
        generate(tiny, [prompt], 5)


def test_same_seed_samples_the_same_replies(tiny):
    first, second = (
        generate(tiny, [[1, 2], [3]], 10, generator=torch.Generator().manual_seed(4)) for _ in "12"
    )
    assert first == second


def test_scalar_model_with_all_layers_reads_the_same_hidden_states(tiny):
    model = ScalarModel.from_gpt(tiny)
    idx = torch.randint(50, (2, 9))
    assert torch.equal(model.gpt(idx), tiny(idx))
    assert (model(idx) == 0).all()  # the head starts at zero


def test_scalar_model_with_fewer_layers_equals_the_bottom_of_the_model(tiny):
    model = ScalarModel.from_gpt(tiny, n_layer=1)
    idx = torch.randint(50, (2, 9))
    x = tiny.wte(idx) + tiny.wpe(torch.arange(9))
    assert torch.equal(model.gpt(idx), tiny.ln_f(tiny.h[0](x)))
    with pytest.raises(ValueError):
        ScalarModel.from_gpt(tiny, n_layer=3)


def test_normalised_scores_have_mean_0_and_sd_1(tiny):
    model = ScalarModel.from_gpt(tiny)
    model.score.weight.data.normal_()
    idx = torch.randint(50, (64, 9))
    raw = model(idx)[:, -1]
    model.reward_mean.fill_(raw.mean())
    model.reward_sd.fill_(raw.std())
    scores = model(idx)[:, -1]
    assert abs(scores.mean()) < 1e-5 and abs(scores.std() - 1) < 1e-5


def checkpoint_of(model) -> dict:
    """What a run saves, as far as it is read again here."""
    tokenizer = {"kind": "char", "characters": "".join(map(chr, range(65, 65 + 45)))}
    config = dict(model.config.__dict__)
    parts = {"stage": "sft", "model": model.state_dict(), "model_config": config}
    return {**parts, "tokenizer": tokenizer}


def test_saved_model_computes_the_same_after_loading(tiny, tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(tiny))
    model, checkpoint = load_model(tmp_path / "ckpt.pt")
    idx = torch.randint(50, (2, 9))
    assert torch.equal(model(idx), tiny(idx)) and checkpoint["stage"] == "sft"
    again = fingerprint(tiny.state_dict(), checkpoint["tokenizer"])
    assert checkpoint["fingerprint"] == again
    with torch.no_grad():
        tiny.wpe.weight[3, 3] += 1e-6
    assert fingerprint(tiny.state_dict(), checkpoint["tokenizer"]) != again


def test_parameters_are_counted_as_they_are(tiny):
    assert tiny.config.n_parameters == sum(p.numel() for p in tiny.parameters())
    gpt2 = GPTConfig(vocab_size=50257, context=1024, n_layer=12, n_head=12, n_embd=768)
    padding = (gpt2.padded_vocab - gpt2.vocab_size) * 768
    assert gpt2.n_parameters - padding == 124_439_808  # what everybody says GPT-2 has


@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("stage", None, "its stage is None"),
        ("stage", "rlhf", "its stage is 'rlhf'"),
        ("model", [1], "its model is missing, or no dict"),
        ("model_config", None, "its model_config is missing, or no dict"),
        ("tokenizer", None, "its tokenizer is missing, or no dict"),
        ("model_config.n_head", 0, "n_head is 0, not a whole number above 0"),
        ("model_config.n_head", 3, "n_head 3 must divide n_embd 16"),
        ("model_config.n_layer", "2", "n_layer is '2', not"),
        ("model_config.n_layer", True, "n_layer is True, not"),
        ("model_config.n_layer", 10**9, "model_config is that of a larger model"),
        ("model_config.vocab_size", 10**30, "model_config is that of a larger model"),
        ("model_config.vocab_size", math.inf, "vocab_size is inf, not"),
        (
            "model_config.context",
            23,
            r"wpe.weight: .*\[24, 16\].* in current model is .*\[23, 16\]",
        ),
        ("model_config.dropout", 0.1, "unexpected keyword argument 'dropout'"),
        ("model.wte.weight", 3, "wte.weight"),
        ("model.lm_head.weight", torch.zeros(50, 16), 'Unexpected key.* "lm_head.weight"'),
        ("model.ln_f.bias", torch.zeros(16).half(), "ln_f.bias is not float32"),
        ("model.ln_f.bias", torch.full((16,), math.nan), "ln_f.bias .* holds nan"),
    ],
)
def test_entry_that_fits_no_model_is_named_with_its_file(tiny, tmp_path, entry, value, message):
    checkpoint = checkpoint_of(tiny)
    first, _, rest = entry.partition(".")
    if rest:
        checkpoint[first][rest] = value
    else:
        checkpoint[first] = value
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=f"(?s){tmp_path}/ckpt.pt.*{message}"):
        load_model(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("name", ["stage", "model", "model_config", "tokenizer"])
def test_entry_that_is_missing_is_named_with_its_file(tiny, tmp_path, name):
    checkpoint = checkpoint_of(tiny)
    del checkpoint[name]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for mmap in (False, True):
        with pytest.raises(InputError, match=f"{tmp_path}/ckpt.pt is not .* its {name} is"):
            load_checkpoint(tmp_path / "ckpt.pt", mmap=mmap)


def test_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        InputError, match="run `python train_sft.py --out .*` first, or name another"
    ):
        load_checkpoint(tmp_path / "sft" / "ckpt.pt")
    with pytest.raises(InputError, match="`python train_rm.py --out .*` first.* checkpoint$"):
        load_checkpoint(tmp_path / "rm" / "ckpt.pt")


def test_in_the_default_folder_that_command_needs_no_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run `python train_sft.py` first"):
        load_checkpoint("out/sft/ckpt.pt")


def test_two_savers_of_one_checkpoint_are_not_in_each_others_way(tmp_path, monkeypatch):
    save, path = torch.save, tmp_path / "ckpt.pt"

    def save_twice(checkpoint, file):
        monkeypatch.setattr(torch, "save", save)
        save_checkpoint(path, {"by": "the other"})  # another process, in the middle of this one
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", save_twice)
    save_checkpoint(path, {"by": "this one"})
    assert torch.load(path, weights_only=True) == {"by": "this one"}
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


class Unpickled:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_damaged_checkpoint_is_a_clear_error(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    torch.save({**checkpoint_of(tiny), "more": Unpickled()}, path)
    code = path.read_bytes()
    torch.save([checkpoint_of(tiny)], path)
    other = path.read_bytes()
    save_checkpoint(path, checkpoint_of(tiny))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint", code, other):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match="ckpt.pt is not a checkpoint of this project"
        ) as error:
            load_checkpoint(path)
        assert len(str(error.value)) < len(str(path)) + 150  # none of torch's advice
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_flipped_bit_among_the_weights_is_noticed_unless_they_stay_on_disk(tiny, tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, checkpoint_of(tiny))
    whole = bytearray(path.read_bytes())
    weights = tiny.wte.weight.detach().numpy().tobytes()
    whole[whole.index(weights) + len(weights) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match="ckpt.pt is not .* damaged: a checksum is wrong"):
        load_checkpoint(path)
    assert load_checkpoint(path, mmap=True)["stage"] == "sft"  # it reads no weights


def test_failed_save_says_why_and_leaves_the_earlier_checkpoint(tiny, tmp_path):
    """torch.save itself says "enforce fail" and "unexpected pos"."""
    resource = pytest.importorskip("resource")  # not on Windows
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(tiny))
    before, limits = (tmp_path / "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # bytes per file
    try:
        with pytest.raises(InputError, match="cannot save .*ckpt.pt: .*File too large.*untouched"):
            save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of(tiny))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot save .*file/ckpt.pt"):
        save_checkpoint(tmp_path / "file" / "ckpt.pt", checkpoint_of(tiny))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "file"]


FULL_DISK = """
import os, torch, gpt
model = gpt.GPT(gpt.GPTConfig(vocab_size=50, context=24, n_layer=2, n_head=2, n_embd=64))
try:
    gpt.save_checkpoint("disk/ckpt.pt", {"model": model.state_dict()})
except gpt.InputError as error:
    print(error, os.listdir("disk"))
"""


def on_a_full_disk(folder, script: str) -> str:
    """What a script prints in a folder whose subfolder disk/ is a file system of 300 kB."""
    (folder / "disk").mkdir()
    mount = "mount -t tmpfs -o size=300k none disk"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=folder).returncode:
        pytest.skip("no file system can be mounted here")
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"']
    return subprocess.run(
        [*command, sys.executable, script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    ).stdout


def test_full_disk_is_called_by_its_name(tmp_path):
    said = on_a_full_disk(tmp_path, FULL_DISK)
    assert "cannot save disk/ckpt.pt: [Errno 28] No space left on device" in said
    assert said.endswith(" []\n")  # and the half file is gone


def test_tied_head_gets_gradient_from_both_of_its_uses(tiny):
    idx = torch.tensor([[1, 2, 3]])
    F.cross_entropy((tiny(idx) @ tiny.head.T)[0], torch.tensor([2, 3, 4])).backward()
    grad = tiny.wte.weight.grad
    assert (grad[:50].abs().sum(1) > 0).all()  # every token, through the softmax
    assert (grad[50:] == 0).all()  # but not the padding rows


def test_the_file_works_alone_in_an_empty_folder(tmp_path):
    """It may be copied into any project: nothing above its last block needs another file."""
    (tmp_path / "gpt.py").write_bytes((ROOT / "gpt.py").read_bytes())
    script = """
import sys, torch, gpt
model = gpt.GPT(gpt.GPTConfig(vocab_size=50, context=24, n_layer=2, n_head=2, n_embd=16))
idx = torch.randint(50, (2, 9))
assert model(idx).shape == gpt.ScalarModel.from_gpt(model).gpt(idx).shape == (2, 9, 16)
replies, _ = gpt.generate(model, [[1, 2], [3]], 5)
assert [len(reply) for reply in replies] == [5, 5]
config = model.config.__dict__
parts = {"stage": "sft", "model": model.state_dict(), "model_config": config}
gpt.save_checkpoint("x.pt", {**parts, "tokenizer": {"kind": "char", "characters": "ab"}})
again, _ = gpt.load_model("x.pt")
assert torch.equal(again(idx), model(idx))
assert not [name for name in sys.modules if name.split(".")[0] in ("data", "kernels")]
"""
    (tmp_path / "try.py").write_text(script)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "try.py"]  # whose own folder is all that Python adds to its path
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
