"""What a run shows and records: progress, logs, trackers and loss curves.

progress.py   the progress line, and the watch for loss spikes
log_file.py   a log that a resumed run continues without repeating a line
train_log.py  train_log.txt, the official one, a line a miniepoch
step_log.py   step_log.tsv, a line a step
trackers.py   wandb, TensorBoard, the live plot
curves.py     the loss curve of a run, and the official reference
charts.py     curves as HTML, SVG and PNG
"""
