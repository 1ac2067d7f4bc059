"""A training run: its folder, checkpoints, evaluations and logs, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate.accelerator import Accelerator

from medvqa_rl.config import Config
from medvqa_rl.core.files import checkpoint_folder, describe_os_error, list_checkpoints, note_on_best
from medvqa_rl.core.types import Dataset, Group
from medvqa_rl.evaluation.judging.instrument import as_instrument, load_eval_judge
from medvqa_rl.evaluation.measures.instruments import NOTHING, load_instruments
from medvqa_rl.learning.distributed.roll_call import RollCall
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.run.checkpoint import (
    TrainState,
    choose_checkpoint,
    clean_up,
    describe_start,
    load_checkpoint,
    load_optimizer,
    remove_old_checkpoints,
    restore_best,
    save_checkpoint,
)
from medvqa_rl.learning.run.errors import (
    OutOfMemory,
    RankLostError,
    RunFolderLost,
    Stopped,
    TrainingFailed,
    UnusableSampleError,
    is_out_of_memory,
)
from medvqa_rl.learning.run.logger import RunLogger
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.learning.run.signals import StopSignals
from medvqa_rl.learning.run.step_metrics import CompletionRecord
from medvqa_rl.learning.run.unchanged import check_data, check_rewards
from medvqa_rl.learning.run.validation import log_and_keep_best, validate
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.summary import describe, describe_training
from medvqa_rl.rewards.functions import RewardFunction
from medvqa_rl.rewards.judges import JudgeIdentity
from medvqa_rl.rollout.decode import RolloutEngine

T = TypeVar("T")


class Run:
    """A training run as a context manager: entering locks the folder, leaving records how the run ended.

    Call :meth:`start`, :meth:`use_trained`, :meth:`finish_step` after each step, and :meth:`finish`, on all ranks.
    Only the main rank writes files.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        *,
        kind: str,
        resume: bool,
        given: Mapping[str, Any] | None,
        resume_from: int | None = None,
    ) -> None:
        """
        Args:
            kind: the command that runs, ``train`` or ``sft``.
            resume: continue the run in ``config.output_dir``.
            resume_from: continue it from the checkpoint of this step instead of the newest.
            given: the settings as the user wrote them.
        """
        self.config = config
        self.dir = RunDir(config.output_dir)
        self.state = TrainState()
        # Set by start and use_trained.
        self.policy: Policy
        self.engine: RolloutEngine
        self.datasets: Mapping[str, Dataset]
        self.trained: TrainedPolicy
        self._accelerator = accelerator
        self._is_main = accelerator.is_main_process
        self._kind, self._given = kind, given
        self._resume, self._resume_from = resume or resume_from is not None, resume_from
        self._exits = ExitStack()
        self._signals = StopSignals(speaks=self._is_main)
        self._checkpoint: Path | None = None
        """The checkpoint that a resumed run continues from."""
        self._has_begun = False
        """Whether weights and optimizer are loaded, so that steps can be saved."""
        self._is_saving = False
        self._instruments = NOTHING
        self._logger: RunLogger | None = None
        """On the main rank, once the run has started."""
        self._roll_call: RollCall | None = None

    def __enter__(self) -> Run:
        if self._is_main:
            self.dir.open(self.config, self._given, kind=self._kind, resume=self._resume)
            self._exits.callback(self.dir.close)
            clean_up(self.dir.path)
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        if ranks > 1:
            timeout = self.config.train.rank_timeout
            self._roll_call = RollCall(rank, ranks, timeout, self._report_lost_rank)
        self._exits.enter_context(self._signals)
        return self

    def start(
        self,
        policy: Policy,
        engine: RolloutEngine,
        datasets: Mapping[str, Dataset],
        judges: Mapping[str, JudgeIdentity] | None = None,
        functions: Mapping[str, RewardFunction] | None = None,
    ) -> None:
        """Load the last checkpoint's weights when resuming, check data and judges, and open the logs.

        Args:
            datasets: ``train``, and ``val`` if there are evaluations.
            judges: the judges that score rewards, by role.
            functions: the user's reward functions, by dotted path.

        Raises:
            ValueError: when resuming, the data or a judge has changed.
        """
        self.policy, self.engine, self.datasets = policy, engine, datasets
        if self._resume:
            command = self.dir.resume_command(self._kind)
            self._checkpoint = choose_checkpoint(self.dir.path, self._resume_from, command, is_main=self._is_main)
        if self._checkpoint is not None:
            self.state = load_checkpoint(self._checkpoint, policy)
        if not self._is_main:
            return
        if self._resume:
            missing = self.dir.cut_back(self.state.step, self.state.metrics_bytes)
            remove_old_checkpoints(self.dir.path, self.config.train.save_total_limit)  # if killed before it did
        check_data(self.dir.path, datasets, resume=self._resume)
        used = dict(judges or {})
        if self.config.train.eval_steps:
            judge = load_eval_judge(self.config.eval_judge)
            used |= {} if judge is None else {"evaluation": judge.identity}
            self._instruments = load_instruments(self.config.eval, policy.device.type, as_instrument(judge))
        repaired = check_rewards(self.dir.path, used, functions or {}, resume=self._resume)
        changes = self.dir.record_environment(self.config.train.seed, self.state.step, resume=self._resume)
        self._write_status("running")
        self._logger = self._exits.enter_context(RunLogger(self.dir, self.config, first_step=self.state.step))
        self._logger.say(describe(policy))
        self._logger.say(describe_training(policy))
        if self._resume:
            resume = self.dir.record_resume(
                self.config,
                self._given,
                step=self.state.step,
                checkpoint=self._checkpoint,
                environment=changes,
                functions=repaired,
                is_gpu=policy.device.type != "cpu",
            )
            start = describe_start(self._checkpoint, self._resume_from)
            self._logger.say(f"Resuming {self.dir.path} from {start}. {resume.promise} {missing}".rstrip())

    def use_trained(self, trained: TrainedPolicy) -> TrainedPolicy:
        """Register the wrapped policy; when resuming, restore the optimizer state, else evaluate before step 1."""
        self.trained = trained
        if self._checkpoint is not None:
            load_optimizer(self._checkpoint, trained)
        self._has_begun = True
        if self.config.train.eval_steps and (self._checkpoint is None or not self.state.is_evaluated):
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
        """Log a completed step; evaluate, save and stop if due.

        Args:
            metrics: the step's metrics over all ranks.
            records: its completions over all ranks.
            groups: this rank's groups, whose images trackers may receive.

        Raises:
            Stopped: a signal requested it. A checkpoint is saved.
        """
        train, state = self.config.train, self.state
        self.set_phase("logging")
        if self._logger is not None:
            metrics = {**metrics, "num_tokens": float(state.num_tokens)}
            self._logger.record(state.step + 1, metrics)
        state.step += 1
        is_last = state.step >= train.steps
        state.is_evaluated = not (train.eval_steps and (is_last or state.step % train.eval_steps == 0))
        self.trained.has_moved = False  # from here on the step is whole
        if self._logger is not None:
            self._logger.show(state.step, metrics)
            if records and train.log_completions_steps and state.step % train.log_completions_steps == 0:
                self._logger.log_samples(state.step, records, groups)
        self._write_status("running")
        if not state.is_evaluated:
            self.evaluate()
        number = self._agreed_signal()
        if is_last or number or (train.save_steps and state.step % train.save_steps == 0):
            self.save()
        if number and not is_last:
            self._write_status("stopped", reason=signal.Signals(number).name)
            self._say(
                f"Stopped after step {state.step} as requested; a checkpoint is saved. Continue with "
                f"`{self.dir.resume_command(self._kind)}`."
            )
            raise Stopped(number, self.dir.path)

    def finish(self) -> None:
        """Record that all steps are done."""
        self._write_status("finished")
        self._say(f"Finished after {self.state.step} steps: {self.dir.path}")
        if note := note_on_best(self.dir.path):
            self._say(note)
        for line in self.dir.next_commands(self._kind, self.config.train.steps):
            self._say(line)

    def evaluate(self) -> None:
        """Evaluate greedily on the validation split, and save the model if it is the best so far. Collective."""
        with self.trained.gathered(), nullcontext() if self._logger is None else self._logger.evaluating():
            evaluation = validate(
                self.config,
                self._accelerator,
                self.engine,
                self.datasets["val"],
                instruments=self._instruments,
                progress=self._show_evaluation_progress,
            )
            if self._logger is not None and evaluation is not None:
                log_and_keep_best(evaluation, self.dir, self._logger, self.policy, self.state, self.config.eval)
        self.state.is_evaluated = True
        self._accelerator.wait_for_everyone()

    def _show_evaluation_progress(self, done: int, total: int) -> None:
        if self._logger is not None:
            self._logger.show_evaluation_progress(done, total)
        if self._roll_call is not None:
            self._roll_call.tick()

    def save(self) -> None:
        """Write a checkpoint of the current step and remove older ones beyond the limit. Collective."""
        self._save()
        self._accelerator.wait_for_everyone()

    def _save(self) -> None:
        """:meth:`save` without waiting for the other ranks."""
        if self._logger is not None:
            self.state.metrics_bytes = self._logger.flush()
        self._is_saving = True  # still set if it fails
        folder = checkpoint_folder(self.dir.path, self.state.step)
        save_checkpoint(folder, self.trained, self.state, is_main=self._is_main)
        self._is_saving = False
        if self._logger is not None:
            if note := restore_best(self.dir.path, self.state):
                self._logger.say_once(note)
            remove_old_checkpoints(self.dir.path, self.config.train.save_total_limit)

    def _agreed_signal(self) -> int:
        """The signal that any rank received, 0 if none, so that all ranks stop after the same step. Collective."""
        own = self._signals.number
        if self._accelerator.num_processes == 1:
            return own
        received = self._accelerator.gather(torch.tensor([own], device=self._accelerator.device))
        return int(received.max())

    def _say(self, text: str) -> None:
        if self._logger is not None:
            self._logger.say(text)

    def _write_status(self, state: str, **details: Any) -> None:
        if self._is_main:
            best = {"best_step": self.state.best_step, "best_accuracy": self.state.best_accuracy}
            self.dir.write_status(state, self.state.step, self.config.train.steps, kind=self._kind, **best, **details)

    def _resume_hint(self) -> str:
        """A sentence that names the last checkpoint and how to continue from it."""
        checkpoints = list_checkpoints(self.dir.path)
        if not checkpoints:
            return f"No checkpoint was written yet: start again with `{self.dir.resume_command(self._kind)}`."
        return f"The last checkpoint is {checkpoints[-1]}: continue with `{self.dir.resume_command(self._kind)}`."

    def _report_lost_rank(self, sentence: str, speaks: bool) -> None:
        """Report a lost rank. Runs in a thread of the roll call, because the main thread is blocked.

        Args:
            speaks: whether this rank is the one that prints.
        """
        if speaks:
            # Not through the console, whose lock the main thread may hold.
            os.write(2, f"\nerror: {sentence} {self._resume_hint()}\n".encode())
        self._write_status("failed", reason=sentence)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._exits:
            failure = self._save_completed_steps(error)
            match self._leave_roll_call(failure):
                case None | Stopped() | RunFolderLost():
                    return
                case _ if self._is_main and self._logger is None:  # failed before the run started
                    self.dir.discard()
                    return
                case failure:
                    pass
            if self._logger is not None:
                self._logger.has_failed = True
                state = "stopped" if isinstance(failure, KeyboardInterrupt) else "failed"
                with suppress(OSError, RunFolderLost):  # the disk may be full, which is then reported below
                    self._write_status(state, reason=str(failure) or type(failure).__name__)
            if failure is not error:
                raise failure from error

    def _leave_roll_call(self, error: BaseException | None) -> BaseException | None:
        """Tell the other ranks how this one ends.

        Returns:
            The error, or a RankLostError if a lost rank caused it.
        """
        if self._roll_call is None:
            return error
        # Failed collectives raise a RuntimeError.
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingFailed):
            sentence = self._roll_call.find_lost_ranks()
            if sentence is not None:
                error = RankLostError(f"{sentence} {self._resume_hint()}", ())
        is_failure = error is not None and not isinstance(error, Stopped)
        self._roll_call.leave((str(error) or type(error).__name__) if is_failure else None)
        return error

    def _save_completed_steps(self, error: BaseException | None) -> BaseException | None:
        """Save a checkpoint of the steps before the one that failed, and say in the error's notes how to go on.

        Returns:
            The error, or an OutOfMemory in its place.
        """
        if error is None or isinstance(error, Stopped | KeyboardInterrupt | RunFolderLost) or not self._has_begun:
            return error
        if is_out_of_memory(failure := error):
            failure = OutOfMemory(error, self.state.step + 1, self._kind)
            traceback.clear_frames(error.__traceback__)  # they hold what the step computed
            self.trained.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        notes = []
        if isinstance(failure, TrainingFailed) and failure.groups and self._is_main:
            notes.append(failure.write_groups(self.dir.path / f"failed_step_{self.state.step + 1:06d}.jsonl"))
        notes.append(self._save_last_whole_step(failure))
        if isinstance(failure, UnusableSampleError) and failure.images:
            skipped = shlex.quote(f"data.skip_images={json.dumps([*self.config.data.skip_images, *failure.images])}")
            notes.append(f"Replace the file first, or leave it out: add {skipped} to the command.")
        if self._logger is not None:
            for note in notes:
                failure.add_note(note)
                with suppress(OSError):  # the disk may be full
                    self._logger.note(note)
        return failure

    def _save_last_whole_step(self, error: BaseException) -> str:
        """Save a checkpoint of the last whole step unless there is one, if this rank can, and say how to go on."""
        state, trained = self.state, self.trained
        is_whole = not trained.has_moved and not (isinstance(error, TrainingFailed) and not error.has_valid_weights)
        needs_all = trained.is_collective and self._accelerator.num_processes > 1
        if not state.step or not is_whole or needs_all or self._is_saving:
            return self._resume_hint()
        folder = checkpoint_folder(self.dir.path, state.step)
        if not folder.exists():
            try:
                self._save()
            except (ValueError, OSError, RuntimeError, MemoryError) as problem:
                why = describe_os_error(problem) if isinstance(problem, OSError) else str(problem)
                return f"The steps since the last checkpoint could not be saved. {why} {self._resume_hint()}"
        command = self.dir.resume_command(self._kind)
        return f"Step {state.step} and all before it are saved in {folder}: continue with `{command}`."
