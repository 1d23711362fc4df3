"""Training: the run, its loop and its step.

    setup.py            a `Run` from resolved options
    run.py              the `Run` that the loop works on
    loop.py             batch, step, log, checkpoint, stop
    step.py             loss, gradients, clipping, Adam
    optimizer.py        the optax chain and the learning rate
    schedule.py         steps, miniepochs and tokens of a run
    build.py            step and optimizer from the options
    initial_weights.py  the weights that a run starts from
    resume.py           the start of a run: a checkpoint, official weights, or fresh weights
    identity.py         what identifies a run, and what may change on resume
    run_folder.py       the files of --proj_dir, and its lock
    saver.py            when and in which order checkpoints and .pth files are written
    exports.py          rwkv-{n}.pth and rwkv-final.pth
    stopping.py         signals and --max_minutes
    report.py           the metrics of each step for the terminal, the logs and the trackers
    utilization.py      the FLOPs that MFU counts

Call order: `train.py` → `setup.setup_run` → `loop.train`.
"""
