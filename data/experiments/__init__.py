"""What alignment does, measured: how far one can get, what it costs, how it fails.

    python -m data.experiments --quick            one seed, fewer settings: about half an hour
    python -m data.experiments                    three seeds: about three hours on two cores
    python -m data.experiments --only tasks,broken            one or some of these:

    frontier           PPO, DPO and best-of-n on a plot of gold against KL, under the best that any
                       policy can do; from the same runs their safety, what they cost, and how DPO
                       fails at a small beta              (frontier.*, safety.png, cost*.*, dpo.*)
    overoptimisation   without a KL penalty, against weak reward models, the score keeps rising
                       while gold peaks and falls                   (overoptimisation.*, peaks.csv)
    tasks              does SFT on more kinds of task help on unseen ones?                (tasks.*)
    critics            PPO beside RLOO and GRPO, which need none; RL that finds out that thinking
                       pays, and RL that cannot              (critics.*, thinking.csv, longer.csv)
    broken             PPO with one thing wrong at a time, to know it by its curves      (broken.*)

The README's commands must have run before: their folder, out/ or --base, is the base of seed 0. The
bases of other seeds are trained here. Every experiment is a handful of runs of the scripts with
other options, one after another. What is done is not done again, what was stopped is resumed, so
Ctrl-C loses nothing. On a busy machine, OMP_NUM_THREADS=1 in front of the command is far faster.

README.md tells what came out; its CSV and PNG files are in results/. In this folder:

    __main__.py           the command line
    base.py               the models of every seed, and how a policy is measured
    frontier.py           the experiments; in the first also the exact frontier and best-of-n
    overoptimisation.py
    mixtures.py
    critics.py
    broken.py
    plots.py              tables and pictures
    jobs.py               runs of the scripts, also of a copy with a bug planted
    bugs.py               the bugs, and how to plant one
    expected.py           makes expected/, the reference curves that --check compares with
"""
