"""Training: the run, its loop and its step.

    setup.py            from the options to a run
    run.py              a run, as the loop takes it
    loop.py             batch, step, log, checkpoint, stop
    step.py             loss, gradients, clipping, Adam
    optimizer.py        the optax chain and the learning rate
    schedule.py         steps, miniepochs and tokens of a run
    build.py            step and optimizer by the options
    initial_weights.py  the weights that a run begins with
    resume.py           where a run begins: a checkpoint, official weights, or fresh ones
    identity.py         what makes a run the same run, and what may change
    run_folder.py       what is in --proj_dir, and its lock
    saver.py            when checkpoints and .pth files are written, and in which order
    exports.py          rwkv-{n}.pth and rwkv-final.pth
    stopping.py         signals and --max_minutes
    report.py           the metrics of a step to the person, the logs and the trackers
    utilization.py      the FLOPs that MFU counts

The way of a run: `train.py` → `setup.setup_run` → `loop.train`.
"""
