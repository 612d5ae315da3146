"""What happens beside the steps of training: the progress bar and the clock, and signals to stop."""

import math
import os
import signal
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


def check_finite(loss: float, what: str, step: int) -> None:
    """Raise ValueError when a run has diverged."""
    if not math.isfinite(loss):
        raise ValueError(f"the {what} is {loss} at step {step}: try a lower learning rate")


class Watch(TrainerCallback):
    """The progress bar, the clock, and the check that losses are numbers."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.gradient_bytes = 0
        self.bar = tqdm(disable=True)

    def close(self) -> None:
        """Leave the bar, which else would write itself once more below the error that ended training."""
        self.bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # Trainer takes those of the run it resumes
        self.tokens_before = state.num_input_tokens_seen
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=0.5)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradient_bytes == 0:
            self.gradient_bytes = sum(p.grad.nbytes for p in kwargs["model"].parameters() if p.grad is not None)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        for name, what in (("loss", "loss"), ("eval_loss", "held-out loss")):
            check_finite(logs.get(name, 0.0), what, state.global_step)
        if "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", file=sys.stderr)
        if "loss" not in logs:
            return
        # The loss was just read from the device, so the step has ended there too.
        self.seconds += time.perf_counter() - self.started
        self.tokens = state.num_input_tokens_seen - self.tokens_before
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        self.bar.update()


def _tell(text: bytes) -> None:
    """Write to stderr; not by print, as a signal may have come in the middle of one.

    Where that was a terminal which has gone, nothing is written from now on.
    """
    try:
        os.write(2, text)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2) if os.path.sameopenfile(1, 2) else (2,):
            os.dup2(nowhere, stream)
        os.close(nowhere)


def _look(*_: Any) -> None:
    """Writes a line, which finds out whether the terminal is still there (see `_tell`).

    SIGHUP may come twice, or after Ctrl-C.
    """
    _tell(b"\n")


class Interrupt(TrainerCallback):
    """A context in which the first Ctrl-C, SIGTERM or SIGHUP ends training after the running step, with a checkpoint.

    The second, but for SIGHUP, ends it at once, as KeyboardInterrupt, so that what is to be undone is.
    """

    # From a person, from a scheduler of jobs or a machine that shuts down, and when a terminal goes.
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        self.signals = [s for s in self.SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
        self.previous = {number: signal.signal(number, self.ask) for number in self.signals}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def ask(self, *_: Any) -> None:
        self.asked = True
        for number in self.signals:
            signal.signal(number, _look if number == signal.SIGHUP else signal.default_int_handler)
        _tell(b"\ninterrupted: this step ends, then all is saved; Ctrl-C again stops at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end  # if it was asked meanwhile
