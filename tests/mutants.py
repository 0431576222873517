"""Find the bug: one-line mistakes that real repositories have made, and the tests that catch them.

Each mutant is this project with one line changed. None of them crashes; most of them train, and
some even look as if they worked. The test that is named for a mutant must fail on it.

    python tests/mutants.py                    plant each in a copy, and see its test fail
    python tests/mutants.py --only 12 13       just these
    python tests/mutants.py --homework         the symptoms, without the solutions
    python tests/mutants.py --plant 12 DIR     a copy of the project with that bug, to be searched

Seen in: repositories in which a bug of this kind has been (peers are named where it was read in
their code or issue threads), or "common" where every course meets it.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    file: str
    right: str  # a piece of the file, which must occur in it exactly once
    wrong: str  # what stands there instead
    symptom: str  # what somebody would notice, sooner or later
    seen_in: str
    test: str  # the test that must fail: file::name, in tests/


MUTANTS = [
    # ---- the model
    Mutant(
        "gpt.py",
        'F.gelu(self.c_fc(x), approximate="tanh")',
        "F.gelu(self.c_fc(x))",
        "GPT-2's weights load and write good text, but its logits are off in the third digit.",
        "nanoGPT (#274)",
        "test_gpt.py::test_forward_equals_the_formulas_written_out_for_one_token_at_a_time",
    ),
    Mutant(
        "gpt.py",
        "attn_mask=mask, is_causal=mask is None)",
        "attn_mask=mask, is_causal=mask is None, scale=1.0)",
        "Training is less stable the wider the heads are; attention looks at single tokens only.",
        "common",
        "test_gpt.py::test_forward_equals_the_formulas_written_out_for_one_token_at_a_time",
    ),
    Mutant(
        "gpt.py",
        "is_causal=mask is None)",
        "is_causal=False)",
        "The training loss falls to almost nothing within minutes, and samples are nonsense.",
        "common",
        "test_gpt.py::test_future_tokens_do_not_change_past_hidden_states",
    ),
    Mutant(
        "gpt.py",
        "std=0.02 / math.sqrt(2 * self.config.n_layer))",
        "std=0.02)",
        "Deep models start with larger activations than GPT-2 and need a lower learning rate.",
        "common",
        "test_gpt.py::test_initial_weights_have_the_deviations_of_gpt2",
    ),
    Mutant(
        "gpt.py",
        "return self.wte.weight[: self.config.vocab_size]",
        "return self.wte.weight",
        "Once in a while decoding crashes on an id that no tokenizer knows.",
        "build-nanogpt (#81)",
        "test_gpt.py::test_padding_rows_of_the_token_table_are_never_sampled",
    ),
    Mutant(
        "gpt.py",
        "x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C)",
        "x = F.dropout(self.wte(idx) + self.wpe.weight[:T], 0.1)",
        "Log-probabilities of the same tokens under the same weights differ from call to call.",
        "common: dropout left on while PPO or DPO compares two models",
        "test_ppo.py::test_sampling_and_scoring_agree_on_log_probabilities",
    ),
    Mutant(
        "gpt.py",
        "later = index > positions[:, None]",
        "later = index > positions.max()",
        "Replies change with the other prompts in the batch; alone, each is fine.",
        "minimind (#540)",
        "test_gpt.py::test_cached_and_uncached_hidden_states_agree_for_rows_of_mixed_length",
    ),
    Mutant(
        "gpt.py",
        "hidden[torch.arange(len(idx)), lengths[group] - 1]",
        "hidden[:, -1]",
        "The longest prompt of a batch is answered well, shorter ones as if they were garbled.",
        "minimind (#541)",
        "test_gpt.py::test_greedy_reply_equals_taking_the_best_token_again_and_again",
    ),
    Mutant(
        "gpt.py",
        "        positions = lengths  #",
        "        positions = lengths.max().expand(len(rows))  #",
        "Short prompts get worse answers the longer their neighbours are.",
        "direct-preference-optimization (#26): positions counted through the padding",
        "test_gpt.py::test_greedy_reply_equals_taking_the_best_token_again_and_again",
    ),
    Mutant(
        "gpt.py",
        "return ids, probs.gather(1, ids[:, None]).squeeze(1).log()",
        "return ids, (logits * temperature).log_softmax(1).gather(1, ids[:, None]).squeeze(1)",
        "PPO's first ratios are not 1 when it samples at another temperature than 1.",
        "minimind (train_ppo.py:93 and 134), train-llm-from-scratch (rollout.py:136)",
        "test_gpt.py::test_log_probabilities_of_samples_equal_those_of_a_second_reading",
    ),
    Mutant(
        "gpt.py",
        "scatter(1, order, before >= top_p)",
        "scatter(1, order, before >= 1 - top_p)",
        "top_p 0.9 makes a model repeat itself, as if it were 0.1.",
        "common",
        "test_gpt.py::test_top_k_and_top_p_keep_just_the_likeliest_tokens",
    ),
    # ---- text and tokens
    Mutant(
        "data/tokenizer.py",
        "pairs[pair] -= counts[index]",
        "pairs[pair] -= 1",
        "The tokenizer works, but cuts words into more tokens than it needs.",
        "common",
        "test_tokenizer.py::test_training_merges_what_a_recount_of_the_whole_text_would_merge",
    ),
    Mutant(
        "data/tokenizer.py",
        "self.pad, self.eot, self.user, self.assistant, self.end = range(n_ordinary, self.n_vocab)",
        "self.eot, self.user, self.assistant, self.end = range(n_ordinary, self.n_vocab - 1); "
        "self.pad = self.end",
        "Masks that are made by comparing ids with the padding lose the end of every reply.",
        "train-llm-from-scratch (rollout.py:103): pad_id is end-of-text",
        "test_tokenizer.py::test_special_tokens_are_five_different_ids_beyond_all_text",
    ),
    Mutant(
        "data/chat.py",
        "add(encode_reply(tokenizer, text), 1)",
        "add(encode_reply(tokenizer, text)[:-1], 1), add([tokenizer.end], 0)",
        "The model answers well and then goes on and on.",
        "LLMs-from-scratch (dpo notebook), minimind (#266), nanochat (#570)",
        "test_chat.py::test_just_the_replies_and_their_ends_are_supervised",
    ),
    Mutant(
        "data/chat.py",
        "add([tokenizer.user] + tokenizer.encode(system + text), 0)",
        "add([tokenizer.user] + tokenizer.encode(system + text), 1)",
        "The loss looks low, and the model likes to ask questions.",
        "nanochat (#20), verl (#3287)",
        "test_chat.py::test_just_the_replies_and_their_ends_are_supervised",
    ),
    Mutant(
        "data/chat.py",
        "add([tokenizer.assistant], 0)",
        "add([tokenizer.assistant], 1)",
        "Nothing, for a long time: the model also learns to open a turn that is opened for it.",
        "minimind (lm_dataset.py:129): the mask covers tokens of the template",
        "test_chat.py::test_just_the_replies_and_their_ends_are_supervised",
    ),
    Mutant(
        "data/files.py",
        "return rows[:cut], rows[cut:]",
        "return rows, rows[cut:]",
        "Held-out accuracy is as high as that on the training rows. It is the same rows.",
        "vallari24/llm-from-first-principles: accuracy on its own training pairs",
        "test_files.py::test_the_last_tenth_is_held_out",
    ),
    # ---- pretraining, and what all scripts share
    Mutant(
        "train_pretrain.py",
        "target = tokens[:, 1:]",
        "target = tokens[:, :-1]",
        "The training loss is 0.00 after a few hundred steps: the model repeats what it reads.",
        "common: labels not shifted",
        "test_scripts.py::test_characters_and_a_single_text_can_be_pretrained_on",
    ),
    Mutant(
        "train_pretrain.py",
        "bits = val_loss / math.log(2) *",
        "bits = val_loss *",
        "Bits per byte are better than anybody else's, by a third.",
        "common",
        "test_scripts.py::test_characters_and_a_single_text_can_be_pretrained_on",
    ),
    Mutant(
        "train_pretrain.py",
        '{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}',
        '{"params": [p for p in rest if p.ndim < 2], "weight_decay": cfg.weight_decay}',
        "Slightly worse losses, and norms whose gain shrinks.",
        "common",
        "test_losses.py::test_only_matrices_and_tables_are_decayed",
    ),
    Mutant(
        "train_pretrain.py",
        'ahead = p.grad.lerp(state["mean"], momentum)',
        'ahead = state["mean"]',
        "Muon needs a few percent more steps than elsewhere.",
        "common: Nesterov's look ahead forgotten",
        "test_losses.py::test_muon_is_torchs_muon_but_for_its_bfloat16",
    ),
    Mutant(
        "train_pretrain.py",
        "x = x / x.norm().clamp(min=1e-7)",
        "x = x / x.abs().max().clamp(min=1e-7)",
        "The loss is nan after one step with Muon.",
        "common: the iteration only converges for singular values up to 1",
        "test_losses.py::test_orthogonalising_keeps_directions_and_makes_singular_values_alike",
    ),
    Mutant(
        "data/run.py",
        "        optimizer.zero_grad()\n",
        "        pass\n",
        "The gradient norm grows from step to step, and the loss stops falling.",
        "common",
        "test_losses.py::test_a_step_uses_a_fraction_of_the_peak_rate_and_clears_the_gradients",
    ),
    Mutant(
        "data/run.py",
        "up = (step + 1) / max(warmup, 1)",
        "up = step / max(warmup, 1)",
        "The first step changes nothing: its learning rate is 0.",
        "common",
        "test_losses.py::test_learning_rate_rises_then_falls_to_its_floor",
    ),
    Mutant(
        "data/run.py",
        "vector_to_parameters(flat / WORLD, gradients)",
        "vector_to_parameters(flat, gradients)",
        "On 8 GPUs the gradient norm is 8 times as large, and clipping cuts almost every step.",
        "common: the loss scaled by the number of ranks",
        "test_ranks.py::test_two_ranks_reach_the_weights_of_one_process",
    ),
    Mutant(
        "data/run.py",
        "self.folder = run_path(cfg.out, self.name)",
        "self.folder = run_path(cfg.out, stage)",
        "A second experiment overwrites the first.",
        "common",
        "test_variants.py::test_a_variant_has_its_own_folder_and_leaves_all_others_as_they_are",
    ),
    # ---- SFT
    Mutant(
        "train_sft.py",
        "target, counts = tokens[:, 1:], mask[:, 1:]",
        "target, counts = tokens[:, :-1], mask[:, :-1]",
        "The loss falls to 0, and the model repeats the last token of the question for ever.",
        "common: labels not shifted, or shifted by both the data and the model",
        "test_losses.py::test_sft_loss_is_the_mean_over_supervised_tokens",
    ),
    Mutant(
        "train_sft.py",
        "mask[:, 1:]  # ...",
        "mask[:, :-1]  # ...",
        "First tokens of replies are weak, and the model stops late or not at all.",
        "minimind (#388): mask off by one",
        "test_losses.py::test_sft_loss_is_the_mean_over_supervised_tokens",
    ),
    Mutant(
        "train_sft.py",
        "linear_cross_entropy(hidden[counts], model.head, target[counts], reduction=reduction)",
        "linear_cross_entropy(hidden.flatten(0, 1), model.head, target.flatten(), "
        "reduction=reduction)",
        "The loss is lower than expected, since padding is easy to predict.",
        "minimind (#416): prompt and padding not masked",
        "test_losses.py::test_prompt_tokens_get_zero_gradient",
    ),
    Mutant(
        "train_sft.py",
        'reduction="sum") / tokens_per_rank',
        'reduction="sum") / mask.sum()',
        "With two microbatches to a batch the gradient is twice as large.",
        "transformers (#34191): every microbatch divided by its own number of tokens",
        "test_speed.py::test_microbatches_add_up_to_the_batch",
    ),
    # ---- reward model
    Mutant(
        "train_rm.py",
        "-F.logsigmoid(chosen_scores - rejected_scores).mean()",
        "-F.logsigmoid(rejected_scores - chosen_scores).mean()",
        "Held-out accuracy is well below one half.",
        "common",
        "test_losses.py::test_preference_loss_is_bradley_terry",
    ),
    Mutant(
        "train_rm.py",
        "-F.logsigmoid(chosen_scores - rejected_scores).mean()",
        "-torch.sigmoid(chosen_scores - rejected_scores).log().mean()",
        "Training is fine until one pair is very wrong; then everything is nan.",
        "common",
        "test_losses.py::test_extreme_scores_give_finite_losses_and_gradients",
    ),
    Mutant(
        "train_rm.py",
        "return scores.gather(1, last[:, None]).squeeze(1)",
        "return scores[:, -1]",
        "Scores depend on how long the neighbours in the batch are.",
        "minimind (#541): the last token under padding",
        "test_losses.py::test_score_is_read_at_the_last_token_whatever_stands_beside_it",
    ),
    Mutant(
        "train_rm.py",
        "model.reward_mean.fill_(scores.mean())",
        "model.reward_mean.fill_(0.0)",
        "The same beta is too strong with one reward model and too weak with the next.",
        "train-llm-from-scratch: PPO on raw scores",
        "test_scripts.py::test_scores_of_sft_samples_have_mean_0_and_sd_1",
    ),
    # ---- PPO
    Mutant(
        "train_ppo.py",
        "        temperature=temperature,\n        return_entropy=True,",
        "        temperature=1.0,\n        return_entropy=True,",
        "Sampling at 0.7, the policy loses its variety within a few iterations.",
        "minimind, rlhf-book (utils.py:264): sampled at one temperature, scored at another",
        "test_ppo.py::test_sampling_and_scoring_agree_on_log_probabilities",
    ),
    Mutant(
        "train_ppo.py",
        "asked, longest, seed, temperature))",
        "asked, longest, seed, 1.0))",
        "With --temperature 0.7 PPO learns from samples that its policy would hardly draw.",
        "common: the sampler does not get the option",
        "test_scripts.py::test_sampling_colder_than_scoring_is_noticed_at_the_first_iteration",
    ),
    Mutant(
        "train_ppo.py",
        "assert worst < rounding, (",
        "assert worst >= 0, (",
        "A sampler with another temperature, or old weights, is believed without a check.",
        "common: PPO compares its log-probabilities with themselves, not with the sampler's",
        "test_scripts.py::test_sampling_colder_than_scoring_is_noticed_at_the_first_iteration",
    ),
    Mutant(
        "train_ppo.py",
        "proxy = proxy_reward(cfg, batch, replies,",
        "proxy = proxy_reward(cfg, batch[::-1], replies[::-1],",
        "Proxy and gold stay where they were, though all losses fall.",
        "common: rows are sorted between scoring and training",
        "test_scripts.py::test_every_response_is_paid_its_own_score_at_its_last_token",
    ),
    Mutant(
        "train_ppo.py",
        "pg = pg - cfg.entropy_bonus * new_entropy",
        "pg = pg + cfg.entropy_bonus * new_entropy",
        "The larger the entropy bonus, the sooner all responses are the same.",
        "common: a bonus added to a loss",
        "test_scripts.py::test_an_entropy_bonus_keeps_the_policy_from_settling",
    ),
    Mutant(
        "train_ppo.py",
        "    ref.requires_grad_(False)\n",
        "    ref = policy\n",
        "KL stays exactly 0, whatever beta is, and the policy runs away.",
        "common: the reference is trained along, or is the same object",
        "test_scripts.py::test_policy_leaves_its_reference",
    ),
    Mutant(
        "train_ppo.py",
        "ratio = (logprobs - old_logprobs).exp()",
        "ratio = (logprobs - logprobs).exp()",
        "Every ratio is exactly 1 for ever, clipfrac is 0, and the policy hardly moves.",
        "common: the old log-probabilities are those of the new policy, and not detached",
        "test_ppo.py::test_policy_gradient_at_ratio_1_is_minus_the_advantage",
    ),
    Mutant(
        "train_ppo.py",
        "loss = torch.max(-advantages * ratio,",
        "loss = torch.min(-advantages * ratio,",
        "clipfrac climbs, and the policy jumps away as if there were no clipping.",
        "common",
        "test_ppo.py::test_only_tokens_that_went_too_far_the_right_way_get_no_gradient",
    ),
    Mutant(
        "train_ppo.py",
        "return 0.5 * torch.max((values - returns) ** 2,",
        "return 0.5 * torch.min((values - returns) ** 2,",
        "Explained variance stays low: the critic gets no gradient where it is worst.",
        "common",
        "test_ppo.py::test_value_loss_is_the_larger_of_free_and_clipped",
    ),
    Mutant(
        "train_ppo.py",
        "    mean = masked_mean(x, mask)\n",
        "    mean = x.mean()\n",
        "Advantages of all tokens lean to one side, more so the more padding there is.",
        "minRLHF (buffer.py:129): whitening over padding",
        "test_ppo.py::test_whitening_is_blind_to_what_stands_outside_the_mask",
    ),
    Mutant(
        "train_ppo.py",
        "return advantages, (advantages + values) * mask",
        "return advantages, (whiten(advantages, mask) + values) * mask",
        "The value loss falls, yet explained variance does not rise: its targets are wrong.",
        "RLHF_in_notebooks (cell 46): returns from whitened advantages",
        "test_ppo.py::test_gae_is_the_sum_of_discounted_td_errors",
    ),
    Mutant(
        "train_ppo.py",
        "next_value = values[:, t] * mask[:, t]",
        "next_value = values[:, t]",
        "Advantages of last tokens depend on what the critic says about padding.",
        "common",
        "test_ppo.py::test_values_outside_the_response_change_no_advantage",
    ),
    Mutant(
        "train_ppo.py",
        "rewards = -beta * (logprobs - ref_logprobs) * mask",
        "rewards = beta * (logprobs - ref_logprobs) * mask",
        "KL explodes, the faster the larger beta is.",
        "rlhf-book (loss.py:23): the sign of k1",
        "test_ppo.py::test_rewards_add_up_to_score_minus_beta_times_kl",
    ),
    Mutant(
        "train_ppo.py",
        "rewards = -beta * (logprobs - ref_logprobs) * mask",
        "rewards = -beta * (logprobs - ref_logprobs).clamp(min=0) * mask",
        "KL falls below what beta should give: the penalty is biased upwards.",
        "common: KL estimates cut off at 0",
        "test_ppo.py::test_rewards_add_up_to_score_minus_beta_times_kl",
    ),
    Mutant(
        "train_ppo.py",
        "device=mask.device)).argmax(1)\n",
        "device=mask.device)).argmax(1).add(1).clamp(max=mask.shape[1] - 1)\n",
        "The policy learns nothing from the reward model: its score lands on a padding token.",
        "common: the score one token behind the end",
        "test_ppo.py::test_score_stands_on_the_last_token_of_the_response",
    ),
    Mutant(
        "train_ppo.py",
        "torch.where(ended, proxy, cfg.no_end_score)",
        "proxy + torch.where(ended, 0.0, cfg.no_end_score)",
        "Replies grow and never end, as soon as rambling scores more than the fine costs.",
        "TRL and others subtract a fine instead of replacing the score",
        "test_scripts.py::test_first_losses_are_those_of_models_that_have_learned_nothing_yet",
    ),
    Mutant(
        "train_ppo.py",
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(log_ratio) - log_ratio",
        "The KL in the log does not agree with the exact one.",
        "rlhf-book (loss.py:59), trlx (accelerate_ppo_trainer.py:457): k3 upside down",
        "test_ppo.py::test_k1_and_k3_have_the_exact_kl_as_their_mean",
    ),
    Mutant(
        "train_ppo.py",
        "((pg * m).sum() / n_tokens).backward()",
        "((pg * m).sum() / m.sum()).backward()",
        "Halving the microbatch doubles the gradient, and the best learning rate changes.",
        "common: gradient accumulation without the right denominator",
        "test_scripts.py::test_the_size_of_a_microbatch_does_not_change_what_ppo_learns",
    ),
    Mutant(
        "train_ppo.py",
        "self.beta *= 1 + 0.1 * error",
        "self.beta *= 1 - 0.1 * error",
        "With --target_kl, beta goes to 0 while KL goes up, or the other way round.",
        "common",
        "test_ppo.py::test_beta_stays_fixed_or_follows_its_target",
    ),
    # ---- DPO
    Mutant(
        "train_dpo.py",
        "return logprobs.view_as(target).sum(1)",
        "return logprobs.view_as(target).sum(1) / mask.sum(1)",
        "Margins are tiny and the loss stays near ln 2, since beta is divided by the length.",
        "LLMs-from-scratch (dpo notebook): means under DPO's equation 7",
        "test_losses.py::test_sequence_logprob_is_the_sum_over_the_reply",
    ),
    Mutant(
        "train_dpo.py",
        "~mask[:, 1:], -100",
        "~mask[:, :-1], -100",
        "The end of a reply is not compared, and the last token of the prompt is.",
        "train-llm-from-scratch, LLMs-from-scratch: end-of-text outside the mask",
        "test_losses.py::test_sequence_logprob_is_the_sum_over_the_reply",
    ),
    Mutant(
        "train_dpo.py",
        "chosen, rejected = logprobs - ref_logprobs\n",
        "chosen, rejected = logprobs\n",
        "The first loss is not ln 2, and long replies die out.",
        "common: the reference is missing",
        "test_losses.py::test_loss_is_known_when_policy_equals_reference",
    ),
    Mutant(
        "train_dpo.py",
        "loss = (h - 1 / (2 * beta)) ** 2",
        "loss = (h - 1 / beta) ** 2",
        "IPO's margins end twice as far out as the paper says.",
        "common",
        "test_losses.py::test_ipo_is_smallest_at_its_target_margin",
    ),
    Mutant(
        "train_dpo.py",
        "-F.logsigmoid(beta * (chosen_mean - rejected_mean) - cfg.simpo_margin)",
        "-F.logsigmoid(beta * (chosen - rejected) - cfg.simpo_margin)",
        "SimPO prefers long replies, which it was made not to do.",
        "common",
        "test_losses.py::test_simpo_compares_means_and_ignores_the_reference",
    ),
    Mutant(
        "train_dpo.py",
        'len(row["chosen_ids"]) + len(row["rejected_ids"]) for row',
        '2 * row["length"] for row',
        "DPO looks a little dearer than the reward model that learns from the same pairs.",
        "common: padding counted in one stage and not in the other",
        "test_costs.py::test_dpo_costs_the_same_and_one_pass_of_the_reference_over_all_pairs",
    ),
    # ---- the fused head
    Mutant(
        "kernels.py",
        "scale = 1 / max(len(target), 1)",
        "scale = 1 / (len(target) or float('nan'))",
        "Every few thousand steps the loss is nan, when all of a batch is masked.",
        "nanochat (#590, #618, #803)",
        "test_kernels.py::test_all_rows_ignored_gives_zero_not_nan",
    ),
    Mutant(
        "kernels.py",
        "v = torch.full_like(g[rows], 1 / ctx.temperature)",
        "v = torch.ones_like(g[rows])",
        "The gradient is too small at temperatures below 1.",
        "common",
        "test_kernels.py::test_logprobs_and_entropy_take_any_upstream_gradient",
    ),
    Mutant(
        "kernels.py",
        "dz -= h[:, None] * p * (log_p + entropy[:, None])",
        "dz -= h[:, None] * p * log_p",
        "An entropy bonus also pushes all logits in one direction.",
        "common",
        "test_kernels.py::test_logprobs_and_entropy_take_any_upstream_gradient",
    ),
    Mutant(
        "kernels.py",
        "    p = z.softmax(1)\n",
        "    p = z.exp() / z.exp().sum(1, keepdim=True)\n",
        "nan as soon as one logit passes 88.",
        "common: exponentials without subtracting the maximum",
        "test_kernels.py::test_large_logits_stay_finite",
    ),
    # ---- preferences and gold
    Mutant(
        "data/preferences.py",
        "rows = end_with_a_tenth(rows, {task.prompt for task in test_tasks})",
        "pass",
        "A few prompts of the evaluation have been trained on; nobody notices.",
        "common: rows are dropped after they were split",
        "test_preferences.py::test_prompts_of_the_last_tenth_are_held_out_of_all_training",
    ),
    Mutant(
        "data/preferences.py",
        "if rng.random() < p:",
        "if rng.random() > p:",
        "The reward model is far better than chance, at being wrong.",
        "common: chosen and rejected swapped",
        "test_preferences.py::test_annotated_rows_say_how_likely_their_label_was",
    ),
    Mutant(
        "data/town/gold.py",
        "-1.0 * max(courtesies - 1, 0)",
        "1.0 * max(courtesies - 1, 0)",
        "Gold rises for ever in PPO: the gold reward itself can be hacked.",
        "common: a bug in the measure, not in the method",
        "test_town.py::test_one_phrase_of_courtesy_pays_and_a_second_costs",
    ),
]


def plant(mutant: Mutant, folder: Path):
    """Copy the project, and nothing that runs have left in it, to a new folder, with this bug."""
    folder.mkdir(parents=True)
    for name in ("data", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "requirements.txt"]:
        shutil.copy(file, folder)
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.right) != 1:
        raise SystemExit(f"{mutant.file} has {text.count(mutant.right)} times: {mutant.right}")
    path.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")


def verdict(mutant: Mutant) -> str:
    """What the test of a mutant says about it: "killed", "SURVIVED", or that it did not run.

    Runs in a process of its own, which has the libraries but nothing of this project loaded.
    """
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        plant(mutant, copy)
        os.chdir(copy)
        sys.path[0] = str(copy)
        with open(f"{folder}/log", "w") as log:
            os.dup2(log.fileno(), 1)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{mutant.test}"])
        os.chdir(ROOT)
    names = {pytest.ExitCode.OK: "SURVIVED", pytest.ExitCode.TESTS_FAILED: "killed"}
    return names.get(code, f"did not run ({code})")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="just these mutants")
    parser.add_argument("--homework", action="store_true", help="print the symptoms")
    parser.add_argument("--plant", nargs=2, metavar=("N", "DIR"), help="copy the project, with bug")
    args = parser.parse_args()
    numbered = list(enumerate(MUTANTS, 1))
    if args.homework:
        for number, mutant in numbered:
            print(f"{number:3d}  {mutant.symptom}")
        return
    wanted = [int(args.plant[0])] if args.plant and args.plant[0].isdigit() else args.only or []
    if any(not 1 <= n <= len(MUTANTS) for n in wanted) or (args.plant and not wanted):
        parser.error(f"mutants have numbers from 1 to {len(MUTANTS)}")
    if args.plant:
        if Path(args.plant[1]).exists():
            parser.error(f"{args.plant[1]} exists already")
        plant(MUTANTS[wanted[0] - 1], Path(args.plant[1]))
        print(f"planted in {args.plant[1]}: {MUTANTS[wanted[0] - 1].symptom}")
        return
    if args.only:
        numbered = [numbered[i - 1] for i in args.only]
    # Loaded once, and there in every fork: starting Python anew takes longer than most tests.
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    survivors = 0
    fork = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    with fork.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for (number, mutant), result in zip(numbered, pool.imap(verdict, [m for _, m in numbered])):
            survivors += result != "killed"
            change = " ".join(mutant.wrong.split())[:60]
            print(f"{number:3d}  {result:9s} {mutant.file:18s} {change:60s}  {mutant.test}")
    print(f"{len(numbered) - survivors} of {len(numbered)} mutants killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
