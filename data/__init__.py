"""Text in, tokens and masks out. Where to find what:

    town.py         the world: residents, words, facts, and the documents a model is pretrained on
    tasks.py        what people ask: one function per kind of task, and the crowd's demonstrations
    gold.py         the gold reward, exact match, F1, and the annotators
    tokenizer.py    BPE (trained here), characters, GPT-2's
    chat.py         conversation -> token ids and loss mask; padding, batches, sampled replies
    files.py        your own text, JSON and JSONL
    preferences.py  pairs of sampled replies, labelled by annotators or by you
    evaluate.py     every checkpoint on the same held-out prompts
    experiments.py  what alignment does, in pictures; jobs.py runs the scripts for it
    expected.py     --check: what right curves look like; the bands are in expected/
    options.py      numbers on command lines, within limits
    gpt2.py         GPT-2's weights in, folders for transformers out
    download.py     public text, fetched by name
"""
