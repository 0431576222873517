"""What alignment does, measured: how far one can get, what it costs, how it fails.

    python -m data.experiments --quick            one seed, fewer settings: 25 minutes on two cores
    python -m data.experiments                    three seeds: three to four hours on two cores
    python -m data.experiments --only tasks,broken            one or some of these:

    frontier           PPO, RLOO, DPO, IPO and best-of-n on a plot of gold against KL, under the
                       best that any policy can do; from the same runs their safety, what they
                       cost, and how DPO fails            (frontier.*, safety.png, cost*.*, dpo.*)
    critics            PPO beside RLOO and GRPO, which need no critic, and every estimator of KL;
                       RL that finds out that thinking pays  (critics.*, thinking.csv, longer.csv)
    overoptimisation   without a KL penalty the reward model's score keeps rising while gold peaks
                       and falls; its causes and cures   (overoptimisation.*, peaks.csv, c*s.png)
    pairs              how many preferences it takes, and how right they must be          (pairs.*)
    tasks              does SFT on more kinds of task help on unseen ones?                (tasks.*)
    broken             PPO with one thing wrong at a time, to know it by its curves      (broken.*)

The README's commands must have run before: their folder, out/ or --base, is the base of seed 0. The
bases of other seeds are trained here. Every experiment is a handful of runs of the scripts with
other options, one after another. What is done is not done again, what was stopped is resumed, so
Ctrl-C loses nothing. On a busy machine, OMP_NUM_THREADS=1 in front of the command is far faster.

README.md tells what came out; its CSV and PNG files are in results/. In this folder:

    __main__.py           the command line
    base.py               the models of every seed, and how a policy is measured
    frontier.py           the experiments; in the first also the exact frontier and best-of-n
    critics.py
    overoptimisation.py
    pairs.py
    mixtures.py
    broken.py
    plots.py              tables and pictures
    jobs.py               runs of the scripts, also of a copy with a bug planted
    bugs.py               the bugs, and how to plant one
    expected.py           makes expected/, the reference curves that --check compares with
"""
