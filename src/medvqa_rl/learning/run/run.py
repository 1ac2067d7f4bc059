"""The life of a run: its folder, checkpoints, evaluations, logs, and how it ends. The loops tell it what they did."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate.accelerator import Accelerator

from medvqa_rl.config import Config
from medvqa_rl.core.files import checkpoint_folder, list_checkpoints
from medvqa_rl.core.types import Dataset, Group
from medvqa_rl.evaluation.evaluate import evaluate, write_evaluation
from medvqa_rl.evaluation.judging.instrument import as_instrument, load_eval_judge
from medvqa_rl.evaluation.measures.instruments import NOTHING, load_instruments
from medvqa_rl.learning.distributed.launch import read_launch
from medvqa_rl.learning.distributed.roll_call import RollCall
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.run.checkpoint import (
    TrainState,
    clean_up,
    load_checkpoint,
    load_optimizer,
    remove_old_checkpoints,
    save_best,
    save_checkpoint,
)
from medvqa_rl.learning.run.errors import RankLostError, Stopped, TrainingFailed, UnusableSampleError
from medvqa_rl.learning.run.logger import RunLogger
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.learning.run.step_metrics import CompletionRecord
from medvqa_rl.models.loading import Policy
from medvqa_rl.rewards.judges import JudgeIdentity
from medvqa_rl.rollout.decode import RolloutEngine

T = TypeVar("T")


class Run:
    """One run as a context manager. Entering takes the folder; leaving says how it ended.

    All ranks go through the same calls; only the main one writes.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, *, kind: str, resume: bool, given: Mapping[str, Any] | None
    ) -> None:
        """
        Args:
            kind: the command that runs, ``train`` or ``sft``.
            resume: continue the run in ``config.output_dir``.
            given: the settings as the user wrote them.
        """
        self.config = config
        self.dir = RunDir(config.output_dir)
        self.state = TrainState()
        self._accelerator = accelerator
        self._kind, self._resume, self._given = kind, resume, given
        self._is_main = accelerator.is_main_process
        self._signal: int | None = None
        self._exits = ExitStack()
        self._tracker: RunLogger | None = None
        self._checkpoint: Path | None = None
        """The checkpoint that a resumed run continues from."""
        self._instruments = NOTHING
        self._roll_call: RollCall | None = None

    def __enter__(self) -> Run:
        if self._is_main:
            self.dir.open(self.config, self._given, kind=self._kind, resume=self._resume)
            self._exits.callback(self.dir.close)
            clean_up(self.dir.path)
        accelerator = self._accelerator
        if accelerator.num_processes > 1:
            timeout = self.config.train.rank_timeout
            self._roll_call = RollCall(accelerator.process_index, accelerator.num_processes, timeout, self._give_up)
        # Only the main thread may handle signals; elsewhere they are someone else's business.
        is_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if is_main_thread else ():
            previous = signal.signal(number, self._ask_to_stop)
            self._exits.callback(signal.signal, number, previous)
        return self

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: the step under way is finished first; a second signal does not wait."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        if self._is_main:
            # Past the console, which this handler may have interrupted in the middle of a line.
            os.write(2, b"\nStopping when this step is done; once more stops at once and loses what is not saved.\n")

    def start(
        self,
        policy: Policy,
        engine: RolloutEngine,
        datasets: Mapping[str, Dataset],
        judges: Mapping[str, JudgeIdentity] | None = None,
    ) -> None:
        """Load the last checkpoint into the policy when resuming, and open the logs.

        Args:
            datasets: ``train``, and ``val`` where there are evaluations.
            judges: ``reward``, where a judge rewards.
        """
        self.policy, self.engine, self.datasets = policy, engine, datasets
        checkpoints = list_checkpoints(self.dir.path) if self._resume else []
        if checkpoints:
            self._checkpoint = checkpoints[-1]
            self.state = load_checkpoint(self._checkpoint, policy)
        if not self._is_main:
            return
        if self._resume:
            self.dir.cut_back(self.state.step, self.state.metrics_bytes)
        self.dir.check_data(datasets, resume=self._resume)
        used = dict(judges or {})
        if self.config.train.eval_steps:
            judge = load_eval_judge(self.config.eval_judge)
            used |= {} if judge is None else {"evaluation": judge.identity}
            self._instruments = load_instruments(self.config.eval, policy.device.type, as_instrument(judge))
        self.dir.check_judges(used, resume=self._resume)
        seed = self.config.train.seed
        changed = self.dir.compare_environment(seed, self.state.step) if self._resume else []
        if not self._resume:
            self.dir.write_environment(seed)
        self._write_status("running")
        self._tracker = self._exits.enter_context(RunLogger(self.dir, self.config, first_step=self.state.step))
        if self._resume:
            where = f"step {self.state.step}" if checkpoints else "the beginning, because no checkpoint was written"
            self._tracker.say(f"Resuming {self.dir.path} from {where}.")
        if changed:
            self._tracker.say(
                f"The environment is another than at the start: {', '.join(changed)}. The result can differ from that "
                "of an uninterrupted run by rounding."
            )

    def use_trained(self, trained: TrainedPolicy) -> TrainedPolicy:
        """Register the wrapped policy; when resuming, restore the optimizer state, else evaluate before step 1."""
        self.trained = trained
        if self._checkpoint is not None:
            load_optimizer(self._checkpoint, trained)
        elif self.config.train.eval_steps:
            self.evaluate()
        return trained

    def set_phase(self, phase: str) -> None:
        """Report to the other ranks what this one is doing: one of :data:`roll_call.PHASES`."""
        if self._roll_call is not None:
            self._roll_call.set_phase(self.state.step + 1, phase)

    def enter_context(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that is exited when the run ends, as :meth:`contextlib.ExitStack.enter_context` does."""
        return self._exits.enter_context(context)

    def finish_step(
        self, metrics: Mapping[str, float], records: Sequence[CompletionRecord] = (), groups: Sequence[Group] = ()
    ) -> None:
        """Log a step that was done; evaluate, save and stop as is due.

        Args:
            metrics: of the step, over all ranks.
            records: its completions, over all ranks.
            groups: this rank's groups, whose images trackers may get.

        Raises:
            Stopped: a signal asked for it; a checkpoint is saved.
        """
        train, state = self.config.train, self.state
        self.set_phase("logging")
        state.step += 1
        if self._tracker is not None:
            self._tracker.log(state.step, {**metrics, "num_tokens": float(state.num_tokens)})
            if records and train.log_completions_steps and state.step % train.log_completions_steps == 0:
                self._tracker.samples(state.step, records, groups)
            self._write_status("running")
        is_last = state.step >= train.steps
        if train.eval_steps and (is_last or state.step % train.eval_steps == 0):
            self.evaluate()
        number = self._agreed_signal()
        if is_last or number or (train.save_steps and state.step % train.save_steps == 0):
            self.save()
        if number and not is_last:
            if self._tracker is not None:
                self._write_status("stopped", reason=signal.Signals(number).name)
                self._tracker.say(
                    f"Stopped after step {state.step} as asked; a checkpoint is saved. Continue with "
                    f"`{self._how_to_resume()}`."
                )
            raise Stopped(number, self.dir.path)

    def _how_to_resume(self) -> str:
        """The command that continues this run, whatever command started it."""
        command = f"medvqa-rl {self._kind} {shlex.quote(str(self.dir.path / 'config.yaml'))} --resume"
        launch = read_launch(os.environ)
        if launch.num_ranks == 1:
            return command
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
            return f"{command} --gpus N train.engine={launch.engine}"  # on so many machines as there are next time
        return f"{command} --gpus {launch.num_ranks} train.engine={launch.engine}"

    def _where_to_go_on(self) -> str:
        """The last checkpoint and how to continue from it, as a sentence."""
        checkpoints = list_checkpoints(self.dir.path)
        if not checkpoints:
            return "No checkpoint was written yet."
        return f"The last checkpoint is {checkpoints[-1]}, which is whole: continue with `{self._how_to_resume()}`."

    def _give_up(self, sentence: str, speaks: bool) -> None:
        """Tell that a rank is lost, in a thread, because the main one waits for that rank or is itself stuck."""
        if speaks:
            # Past the console, whose lock the main thread may hold.
            os.write(2, f"\nerror: {sentence} {self._where_to_go_on()}\n".encode())
        if self._is_main:
            self._write_status("failed", reason=sentence)

    def finish(self) -> None:
        """All steps are done."""
        if self._tracker is not None:
            self._write_status("finished")
            self._tracker.say(f"Finished after {self.state.step} steps: {self.dir.path}")

    def evaluate(self) -> None:
        """Evaluate greedily on the validation split, keep the model if it is the best so far."""
        with self.trained.gathered():
            if self._tracker is not None:
                self._evaluate(self._tracker)
        self._accelerator.wait_for_everyone()

    def _evaluate(self, tracker: RunLogger) -> None:
        state = self.state
        evaluation = evaluate(
            self.engine,
            self.datasets["val"],
            self.config.eval,
            max_completion_length=self.config.rollout.max_completion_length,
            template=self.config.prompt.template,
            progress=self._evaluating,
            prefetch=self.config.prefetch,
            instruments=self._instruments,
        )
        write_evaluation(evaluation, self.dir.evaluation(state.step))
        metrics = evaluation.metrics
        tracker.log(state.step, metrics)
        unscored = evaluation.results["unscored_rate"]
        if unscored:
            tracker.say(
                f"{unscored:.1%} of the validation questions could not be scored and are left out: see "
                f"unscored_reason in {self.dir.evaluation(state.step) / 'samples.jsonl'}."
            )
        accuracy = metrics.get("eval/accuracy")
        # With too few questions scored it is another measure than at the other steps.
        counts = accuracy is not None and unscored <= self.config.eval.fail_on_unscored
        if counts and (state.best_accuracy is None or metrics["eval/accuracy"] > state.best_accuracy):
            state.best_accuracy, state.best_step = accuracy, state.step
            save_best(self.dir.best, self.policy, state)

    def _evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is, to other ranks too."""
        if self._tracker is not None:
            self._tracker.evaluating(done, total)
        if self._roll_call is not None:
            self._roll_call.tick()

    def save(self) -> None:
        """Write a checkpoint of this step and remove older ones beyond the limit."""
        self._save()
        self._accelerator.wait_for_everyone()

    def _save(self) -> None:
        """The same on the main rank, and on all where they hold parts of what is saved."""
        if self._tracker is not None:
            self.state.metrics_bytes = self._tracker.flush()
        folder = checkpoint_folder(self.dir.path, self.state.step)
        save_checkpoint(folder, self.trained, self.state, is_main=self._is_main)
        if self._is_main:
            remove_old_checkpoints(self.dir.path, self.config.train.save_total_limit)

    def _agreed_signal(self) -> int:
        """The signal that any rank received, 0 for none: all ranks stop at the same step."""
        own = self._signal or 0
        if self._accelerator.num_processes == 1:
            return own
        received = self._accelerator.gather(torch.tensor([own], device=self._accelerator.device))
        return int(received.max())

    def _write_status(self, state: str, **details: Any) -> None:
        best = {"best_step": self.state.best_step, "best_accuracy": self.state.best_accuracy}
        self.dir.write_status(state, self.state.step, self.config.train.steps, kind=self._kind, **best, **details)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = self._leave(error)
        with self._exits:
            if error is None or isinstance(error, Stopped):
                return
            if lost is not None:
                if self._tracker is not None:
                    self._tracker.has_failed = True
                    self._write_status("failed", reason=str(lost))
                raise lost from error
            if self._tracker is None:
                if self._is_main:
                    self.dir.discard()
                elif isinstance(error, TrainingFailed) and error.has_valid_weights:
                    self._save()  # as the main rank does, which may need this one's part
                return
            self._tracker.has_failed = True
            if isinstance(error, TrainingFailed):
                self._write_failure(error, self._tracker)
            # A sample fails on one rank alone, and a rank alone cannot save what others hold parts of.
            if isinstance(error, UnusableSampleError) and not self.trained.is_collective:
                self._save_what_is_done(self._tracker)
            try:
                state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                self._write_status(state, reason=str(error) or type(error).__name__)
            except OSError:
                # A full disk refuses this file too; the error under way says so.
                self._tracker = None
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"No space is left on the device of {self.dir.path}: free some and continue with --resume from "
                    "the last checkpoint, which is whole."
                ) from error

    def _leave(self, error: BaseException | None) -> RankLostError | None:
        """Tell the other ranks how this one ends, and find out whether it ends because one of them did."""
        if self._roll_call is None:
            return None
        lost = None
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingFailed):  # as failed exchanges raise it
            sentence = self._roll_call.who_is_lost()
            lost = None if sentence is None else RankLostError(f"{sentence} {self._where_to_go_on()}", ())
        is_well = error is None or isinstance(error, Stopped)
        self._roll_call.leave(None if is_well else str(lost or error) or type(error).__name__)
        return lost

    def _write_failure(self, error: TrainingFailed, tracker: RunLogger) -> None:
        """Save the groups that made training fail, and the weights before that where they are sound."""
        path = self.dir.path / f"failed_step_{self.state.step + 1:06d}.jsonl"
        path.write_text("".join(json.dumps(_describe(group)) + "\n" for group in error.groups), encoding="utf-8")
        tracker.say(f"{error} The samples and their completions are in {path}.")
        if error.has_valid_weights:
            self._save()
            folder = checkpoint_folder(self.dir.path, self.state.step)
            tracker.say(f"The weights after the last whole step are in {folder}.")

    def _save_what_is_done(self, tracker: RunLogger) -> None:
        """Save the steps before one whose data cannot be used, where they are not saved yet."""
        folder = checkpoint_folder(self.dir.path, self.state.step)
        if self.state.step and not folder.exists():
            self._save()
        if self.state.step:
            tracker.say(
                f"Step {self.state.step} and all before it are saved in {folder}: mend the file, then --resume."
            )


def _describe(group: Group) -> dict[str, Any]:
    """A group as plain values."""
    return {
        "sample_id": group.sample.id,
        "images": [image.key for image in group.sample.images],
        "template": group.template,
        "prompt": group.prompt.text,
        "gold": group.sample.answer,
        "completions": [completion.text for completion in group.completions],
    }
