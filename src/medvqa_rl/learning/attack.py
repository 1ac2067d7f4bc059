"""Attack the rewards of a config: what scores is loaded as training loads it, without the policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from medvqa_rl.config import Config
from medvqa_rl.core.progress import progress_bar
from medvqa_rl.core.randomness import Draws, address, permutation
from medvqa_rl.core.text import number_of
from medvqa_rl.core.types import DEFAULT_WORDING, Dataset, Sample, Wording
from medvqa_rl.evaluation.judging.calibration import calibration_warnings
from medvqa_rl.evaluation.pass_rates import load_training_set
from medvqa_rl.learning.batching.mixing import template_for
from medvqa_rl.learning.batching.skipping import without_images
from medvqa_rl.learning.grpo import check_rewardable, make_rewards
from medvqa_rl.models.loading import load_processor
from medvqa_rl.rewards.attack.attack import Policy, make_group, most_requests, score_group
from medvqa_rl.rewards.attack.question import Target, make_target
from medvqa_rl.rewards.attack.results import AttackResult, summarise
from medvqa_rl.rewards.attack.texts import RIGHT
from medvqa_rl.rewards.judges.endpoint import host_of
from medvqa_rl.rewards.judges.load import caches_folder, load_rewarding, notices, rubrics_of

OF_POLICY = ("looking", "calibration")
"""Rewards that depend on the policy's probabilities of a completion, which a text that it did not sample lacks."""
POOL = 200
"""Further questions from which answers and reasoning are borrowed."""


def run_attack(config: Config, *, questions: int, seed: int, bound: float, say: Callable[[str], None]) -> AttackResult:
    """Attack the rewards with the texts of :mod:`medvqa_rl.rewards.attack.texts`, on questions of the training data.

    Args:
        config: of a training run.
        questions: number of questions; all, if there are fewer.
        seed: of the questions and of what is borrowed.
        bound: the most that the total of a wrong completion may exceed that of the honest right one.
        say: told notices and warnings, and the number of requests to an endpoint.

    Raises:
        ValueError: no reward is left, no question has a known wrong answer, or data, tokenizer, judge or reward
            functions cannot be used.
    """
    left_out = [name for name in OF_POLICY if config.rewards.weights[name]]
    named = {**config.rewards.weights, **_functions(config)}
    weights = {name: weight for name, weight in named.items() if weight and name not in OF_POLICY}
    if not weights:
        raise ValueError(
            f"There is no reward to attack besides {' and '.join(left_out) or 'none'}, which the policy's own "
            "probabilities decide: set another weight, such as rewards.correctness=1."
        )
    rewards = config.rewards.model_copy(update=dict.fromkeys(left_out, 0.0))
    config = config.model_copy(update={"rewards": rewards, "eval_judge": None})
    dataset = without_images(load_training_set(config.data), config.data.skip_images)
    for line in (*notices(config), *check_rewardable(config, dataset)):
        say(line)
    processor = load_processor(config.model)
    if config.prompt.wording != DEFAULT_WORDING:
        processor.use(config.prompt.wording)
    limit = config.rollout.max_completion_length
    room = int(limit * (1 - config.rewards.overlong_buffer)) if rewards.overlong else limit
    policy = Policy(processor.encode_completion, processor.decode, limit, max(room, 1))
    targets, skipped = _targets(config, dataset, processor.wording, questions, seed)
    written = []
    with progress_bar("questions written") as show:
        for place, target in enumerate(targets):
            show(place, len(targets))
            prompt = processor.encode(target.sample, target.template)
            names, group = make_group(target, prompt, policy)
            if not group.completions[names.index(RIGHT)].is_truncated:
                written.append((names, group))
    if not written:
        raise ValueError(
            f"No right answer fits into rollout.max_completion_length={limit} tokens, even after a single sentence: "
            "raise it."
        )
    skipped += len(targets) - len(written)
    groups = [group for _, group in written]
    rubrics = rubrics_of(rewards)
    if rubrics and config.judge.endpoint is not None:
        say(
            f"Notice: at most {number_of(most_requests(groups, rubrics), 'request')} will be sent to "
            f"{host_of(config.judge.endpoint)}; equal texts, and those with cached grades, are not sent again."
        )
    judges = load_rewarding(config, say)
    for line in calibration_warnings(caches_folder(config.judge), judges.values()):
        say(line)
    scoring, found = make_rewards(config, judges), []
    with progress_bar("questions scored") as show:
        for place, (names, group) in enumerate(written):
            show(place, len(written))
            found.append(score_group(names, group, scoring, count_tokens=processor.count_tokens))
    return summarise(
        found,
        weights,
        dataset=dataset.name,
        skipped=skipped,
        seed=seed,
        max_completion_length=limit,
        bound=bound,
        left_out=left_out,
    )


def _functions(config: Config) -> dict[str, float]:
    """Weights of the user's functions, by the name under which they score."""
    return {path.rpartition(".")[2]: weight for path, weight in config.rewards.functions.items()}


def _targets(config: Config, dataset: Dataset, wording: Wording, count: int, seed: int) -> tuple[list[Target], int]:
    """Draw questions with a known wrong answer, and count those without one that were drawn.

    Raises:
        ValueError: there is none.
    """
    pool = list(_drawn(dataset, count + POOL, seed))
    targets: list[Target] = []
    skipped = 0
    for sample in pool:
        template = template_for(sample, config.prompt, seed=seed, step=0, occurrence=0)
        target = make_target(sample, pool, template=template, wording=wording, seed=seed)
        if target is None:
            skipped += 1
        else:
            targets.append(target)
        if len(targets) == count:
            break
    if not targets:
        raise ValueError(
            f"No wrong answer is known to any of {number_of(len(pool), 'training question')} of {dataset.name}: an "
            "open question needs another one with another answer, and a choice question a wrong option. Add "
            "questions, or check data.answer_types and data.families."
        )
    return targets, skipped


def _drawn(dataset: Dataset, count: int, seed: int) -> Iterator[Sample]:
    """Random questions, all different."""
    if dataset.is_endless:
        draws = Draws("reward attack", seed)
        indices = dict.fromkeys(draws.below(len(dataset)) for _ in range(count))
    else:
        order = permutation(address("reward attack", seed), len(dataset))
        indices = dict.fromkeys(order[:count].tolist())
    for index in indices:
        yield dataset[index]
