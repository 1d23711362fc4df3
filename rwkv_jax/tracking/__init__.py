"""The progress display, logs, trackers and loss curves of a run.

progress.py   the progress line and the detection of loss spikes
log_file.py   a log that a resumed run continues without duplicate lines
train_log.py  train_log.txt in the official format, one line per miniepoch
step_log.py   step_log.tsv, one line per step
trackers.py   wandb, TensorBoard, the live plot
curves.py     the loss curve of a run, and the official reference
charts.py     curves as HTML, SVG and PNG
"""
