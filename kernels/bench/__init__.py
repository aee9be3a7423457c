"""How fast the kernels are on this GPU: against its own ceilings, and against named peers.

    afferent bench suite=attention,decode budget=600 out=experiments/kernels/results/h200.json

    cases.py, suites/   what is timed: a problem, its floating-point operations and bytes, our call,
                        its peers, the oracle, the targets
    measure.py          one case: check, see which GPU kernels ran, time in turn
    timing.py           samples, their order, their statistics
    ceilings.py         what this machine can do at most, measured in the same call
    worker.py           the process with the GPU; supervise.py survives its crashes and hangs
    results.py          rows, ratios, targets, what a second call may skip
    table.py, plot.py   the results file as markdown, and as a roofline

Nothing here runs without a GPU except the checks: a CPU's time is not a kernel's.
"""

SUITES = (
    "attention", "decode", "cascade", "append", "compaction", "loss", "fast_weights", "sigreg",
    "splats",
)  # fmt: skip
"Each a module of `suites`, in the order in which they are run."
