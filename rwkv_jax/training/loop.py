"""The training loop: batch, step, log, checkpoint, stop."""

import contextlib

from rwkv_jax.errors import UserError
from rwkv_jax.parallel import distributed
from rwkv_jax.training.report import Report
from rwkv_jax.training.run import Run
from rwkv_jax.training.saver import Saver
from rwkv_jax.training.stopping import Stop


def train(run: Run, stop: Stop) -> None:
    """Trains until the schedule ends and rwkv-final.pth is written, or until `stop`.

    The loss of a step is fetched while the next step runs, so the device never waits for the host.

    Raises:
        UserError: consecutive steps were not finite, the data cannot be used, or the final model
            cannot be written. The progress until then is saved.
        SystemExit: the run stopped early; a checkpoint is saved.
    """
    state, train_step = run.start.state, run.build_step()
    any_process = distributed.make_any_process(run.mesh)
    report = Report(run)  # before `stop` handles Ctrl-C: a tracker may ask for an API key
    batches = run.batches(report.stalled)
    with stop, report, Saver(run, report) as saver, contextlib.closing(batches):
        saver.exporter.write_missing(state.params)
        for step in run.steps:
            try:
                batch = next(batches)
            except UserError:
                saver.save_before_bad_data(step, state)
                raise
            state, metrics = train_step(state, batch)
            report.add(step, metrics)
            if report.diverged(metrics):
                saver.stop_diverged(state)
            stopping, overdue = any_process((bool(stop), saver.overdue()), metrics.loss)
            if stopping or overdue or saver.due(step):
                saver.save(step, state, stopping)
            if stopping and step != run.steps[-1]:
                saver.stop_early(step)
    saver.exporter.require_final(state.params)
