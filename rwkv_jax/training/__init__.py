"""Training: the run, its loop and its step.

build.py            from the options to the step
step.py             loss, gradients, clipping, Adam
optimizer.py        the optax chain and the learning rate
schedule.py         steps, miniepochs and tokens of a run
initial_weights.py  the weights that a run begins with
resume.py           where a run begins: a checkpoint, official weights, or fresh ones
identity.py         what makes a run the same run, and what may change
run_folder.py       what lies in --proj_dir, and who holds it
saver.py            when a checkpoint is written
stopping.py         signals and --max_minutes
report.py           the metrics of a step to the person, the logs and the trackers
utilization.py      the FLOPs that MFU counts
"""
