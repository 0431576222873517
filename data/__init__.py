"""Everything besides the model, its kernels and the five scripts. Where to find what:

    town/           the world: words and documents, tasks, the gold reward and the annotators
    tokenizer.py    BPE (trained here), characters, GPT-2's
    chat.py         conversation -> token ids and loss mask; padding, batches, sampled responses
    files.py        your own text, JSON and JSONL; files of token ids
    preferences.py  pairs of sampled responses, labelled by annotators or by you
    run.py          one run of a script: options, device, processes, log, plot, progress, resume
    alarms.py       what a run that cannot learn looks like
    check.py        --check: what the curves of a correct run look like
    metrics.py      intervals, calibration, rank correlation; how good a reward model is
    gpt2.py         GPT-2's weights in, folders for transformers out
    download.py     public text, fetched by name
    talk.py         ask one model, or all of them
    trace.py        what PPO, DPO and the reward model see of every token of a reply
    evaluate.py     every model on the same held-out prompts
    experiments/    what alignment does, in pictures; the results and the expected curves

Imports go one way only, from right to left:

    gpt, kernels  <  the first eleven of these  <  train_*.py  <  talk, trace, evaluate, experiments
"""
