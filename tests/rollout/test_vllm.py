"""Rollouts on vLLM, with a stand-in that accepts what the release accepts and runs the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from medvqa_rl.config import LoraConfig, RolloutConfig, VllmConfig
from medvqa_rl.core.types import EncodedPrompt, Group, Sample
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout import vllm as ours
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.vllm.agreement import VllmError, difference, rehearse
from medvqa_rl.rollout.vllm.client import check_answers
from medvqa_rl.rollout.vllm.engine import VllmEngine, check_version, collapsed, known, max_lora_rank, write_adapter
from medvqa_rl.rollout.vllm.local import Colocated, engine_arguments
from medvqa_rl.rollout.vllm.server import Server

MakePolicy = Callable[..., Policy]
GREEDY = RolloutConfig(num_generations=2, max_completion_length=8, top_k=1, max_batch=3)
SAMPLED = RolloutConfig(num_generations=3, max_completion_length=8, temperature=0.8)


@pytest.fixture
def make(
    fake_vllm: Any, serve_vllm: Callable[..., Any], tiny_policy: MakePolicy, tiny_folder: Callable[[str], Path]
) -> Callable[..., SimpleNamespace]:
    """Builds a policy and its vLLM engine: ``make("server", lora=LoraConfig(rank=2)).engine``."""

    def make_one(
        mode: str, arch: str = "qwen2_vl", *, sleep: bool = False, serve: Any = None, **settings: Any
    ) -> SimpleNamespace:
        policy = tiny_policy(arch, **settings)
        if mode == "colocate":
            source: Any = Colocated(policy, VllmConfig(sleep=sleep), rank=0, num_ranks=1)
            return SimpleNamespace(
                policy=policy, engine=VllmEngine(policy, source), llm=fake_vllm.LLM.made[-1], waits=[]
            )
        server = serve or serve_vllm(tiny_folder(arch))
        waits: list[int] = []
        config = VllmConfig(mode="server", server_url=server.url, timeout=20)
        source = Server(policy, config, is_main=True, wait_for_everyone=lambda: waits.append(1))
        return SimpleNamespace(policy=policy, engine=VllmEngine(policy, source), server=server, waits=waits)

    return make_one


def roll_out(
    engine: Any, policy: Policy, samples: Sequence[Sample], config: RolloutConfig, step: int = 0
) -> list[Group]:
    prompts = [policy.processor.encode(sample) for sample in samples]
    return engine.rollout(
        samples, config, seed=3, stream="train", step=step, occurrences=[0] * len(samples), prompts=prompts
    )


def tokens(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def move(policy: Policy, seed: int = 5) -> None:
    """Change the trained weights enough to change the most likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


KINDS: list[dict[str, Any]] = [{}, {"lora": LoraConfig(rank=2)}]


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
def test_greedy_tokens_equal_those_of_the_rollout_engine(make, mixed_samples, mode, arch):
    """The same tokens, prompts and features for one image, two of different sizes, and none."""
    own = make(mode, arch)
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    expected = roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY)
    assert tokens(groups) == tokens(expected)
    for group, other in zip(groups, expected, strict=True):
        assert group.sample is other.sample
        assert group.prompt.text == other.prompt.text
        for one, two in zip(group.completions, other.completions, strict=True):
            assert (one.text, one.is_truncated) == (two.text, two.is_truncated)
            assert one.logps is not None and len(one.logps) == len(one.token_ids)
        assert (group.image_features is None) == (not group.sample.images)
        if group.image_features is not None:
            torch.testing.assert_close(group.image_features, other.image_features)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS, ids=["full", "lora"])
def test_weights_are_synchronised_once_per_rollout(make, mixed_samples, mode, kind):
    own = make(mode, **kind)
    plain = RolloutEngine(own.policy)
    before = tokens(roll_out(plain, own.policy, mixed_samples, GREEDY))
    with own.engine.fresh():
        assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) == before
        move(own.policy)
        after = tokens(roll_out(plain, own.policy, mixed_samples, GREEDY))
        assert after != before
        assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) == before
    with own.engine.fresh():
        assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) == after
    assert len(own.waits) == (2 if mode == "server" else 0)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS, ids=["full", "lora"])
def test_a_stale_prefix_cache_changes_the_tokens(make, mixed_samples, monkeypatch, mode, kind):
    """The stand-in caches prefixes: without a reset, it continues from keys of the old weights."""
    own = make(mode, **kind)
    with own.engine.fresh():
        roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    move(own.policy)
    expected = tokens(roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY))
    engine = own.llm.engine if mode == "colocate" else own.server.engine
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda: True)
    with own.engine.fresh():
        assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) != expected
    monkeypatch.undo()


def test_stale_image_features_change_the_tokens(make, mixed_samples, monkeypatch):
    """A server encodes images itself, so its features are stale after training the tower."""
    own = make("server", train_vision=True, train_projector=True)
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    assert all(group.image_features is None for group in groups)  # they are not to be trained on
    move(own.policy)
    expected = tokens(roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(own.server.engine, "reset_encoder_cache", lambda: None)
        with own.engine.fresh():
            assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) != expected
    with own.engine.fresh():
        assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) == expected


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_all_three_caches_are_cleared_after_loading_weights(make, mode):
    own = make(mode)
    engine = own.llm.engine if mode == "colocate" else own.server.engine
    engine.prefixes["old"] = engine.features["old"] = engine.patches["old"] = None
    with own.engine.fresh():
        assert not engine.prefixes and not engine.features and not engine.patches
    if mode == "server":
        paths = [path for path, _ in own.server.asked]
        assert paths[-4:] == ["/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_prefix_cache_that_cannot_be_cleared_raises(make, monkeypatch, mode):
    own = make(mode)
    engine = own.llm.engine if mode == "colocate" else own.server.engine
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(VllmError, match="could not clear its prefix cache, which holds"), own.engine.fresh():
        pass


def test_a_trained_tower_passes_its_features_to_vllm(make, mixed_samples):
    """In colocate mode images are passed as features, also with an adapter and a trained projector."""
    own = make("colocate", lora=LoraConfig(rank=2), train_projector=True)
    move(own.policy)
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    assert tokens(groups) == tokens(roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY))
    assert own.llm.engine.encoded == 0


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_log_probabilities_are_of_the_sampling_distribution(make, mixed_samples, model_inputs, mode):
    own = make(mode)
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, SAMPLED)
    model, processor = own.policy.model, own.policy.processor
    never = [*processor.suppressed_ids, *range(len(processor.tokenizer), model.lm_head.out_features)]
    for group in groups:
        for completion in group.completions:
            ids = completion.token_ids
            with torch.no_grad():
                logits = model(**model_inputs(model, group.prompt, ids)).logits[
                    0, len(group.prompt.input_ids) - 1 : -1
                ]
            logits[:, never] = -torch.inf
            expected = (logits / SAMPLED.temperature).log_softmax(-1)[range(len(ids)), list(ids)]
            np.testing.assert_allclose(completion.logps, expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_special_tokens_are_never_sampled(make, mixed_samples, monkeypatch, mode):
    config = RolloutConfig(num_generations=16, max_completion_length=8, temperature=2.0)
    own = make(mode)
    processor, words = own.policy.processor, causal_model(own.policy.model).lm_head.out_features
    never = {*processor.suppressed_ids, *range(len(processor.tokenizer), words)}
    assert words > len(processor.tokenizer) and processor.image_token_id in never

    def sampled() -> set[int]:
        with own.engine.fresh():
            groups = roll_out(own.engine, own.policy, mixed_samples, config)
        return {id for group in tokens(groups) for ids in group for id in ids}

    assert not sampled() & never
    own.engine._logit_bias = dict.fromkeys(never, 0.0)  # what happens without
    assert len(sampled() & never) > 3


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_completions_of_a_prompt_differ_and_are_reproducible(make, mixed_samples, mode):
    own = make(mode)
    config = SAMPLED.model_copy(update={"temperature": 2.0})
    with own.engine.fresh():
        first = tokens(roll_out(own.engine, own.policy, mixed_samples, config))
        alone = tokens(roll_out(own.engine, own.policy, mixed_samples[1:2], config))
        again = tokens(roll_out(own.engine, own.policy, mixed_samples, config))
        other = tokens(roll_out(own.engine, own.policy, mixed_samples, config, step=1))
    assert first == again and alone == first[1:2] and first != other
    assert all(len(set(group)) > 1 for group in first)


def test_images_are_encoded_once_and_prompts_prefilled_once(make, mixed_samples):
    own = make("server")
    with own.engine.fresh():
        roll_out(own.engine, own.policy, mixed_samples, SAMPLED)
    assert own.server.engine.encoded == 4  # one, two, none, one
    assert own.server.engine.prefilled == 4


def test_a_completion_ends_at_a_stop_token(make, make_sample):
    """Or is truncated at the limit."""
    own = make("colocate")
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, [make_sample(str(n)) for n in range(6)], SAMPLED)
    ended = [completion for group in groups for completion in group.completions]
    stop = set(own.policy.processor.stop_ids)
    assert all((completion.token_ids[-1] in stop) != completion.is_truncated for completion in ended)
    assert all(not stop & set(completion.token_ids[:-1]) for completion in ended)
    params = own.llm.requests[0][1]
    assert params.ignore_eos and set(params.stop_token_ids) == stop


@pytest.mark.parametrize("kind", KINDS, ids=["full", "lora"])
def test_sleep_frees_memory_between_rollouts(make, mixed_samples, kind):
    own = make("colocate", sleep=True, **kind)
    for _ in range(2):
        with own.engine.fresh():
            groups = roll_out(own.engine, own.policy, mixed_samples, GREEDY)
        assert own.llm.asleep == {"weights", "kv_cache"}
        assert tokens(groups) == tokens(roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY))
        move(own.policy)
    assert own.llm.slept == ([1, 1] if kind else [2, 2])  # the weights below an adapter are needed again


def test_the_adapter_loads_in_peft(tiny_policy, tiny_folder, tmp_path):
    """It has no fully trained modules, which vLLM refuses."""
    policy = tiny_policy(lora=LoraConfig(rank=2), train_projector=True)
    move(policy)
    write_adapter(policy, tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder("qwen2_vl"), dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, tmp_path).named_parameters())
    adapters = {name: weight for name, weight in policy.model.named_parameters() if ".lora_" in name}
    assert adapters and {name for name in loaded if ".lora_" in name} == set(adapters)
    for name, weight in adapters.items():
        torch.testing.assert_close(loaded[name], weight)
    assert policy.model.peft_config["default"].modules_to_save == ["visual.merger"]  # the policy's own are untouched


def test_engine_arguments(fake_vllm, tiny_policy, monkeypatch):
    policy = tiny_policy(lora=LoraConfig(rank=9))
    Colocated(policy, VllmConfig(gpu_memory_utilization=0.4, max_model_length=700), rank=0, num_ranks=1)
    given = fake_vllm.LLM.made[-1].given
    assert (given["dtype"], given["max_lora_rank"], given["max_model_len"]) == ("float32", 16, 700)
    assert given["logprobs_mode"] == "processed_logprobs" and given["generation_config"] == "vllm"
    assert given["gpu_memory_utilization"] == 0.4 and "distributed_executor_backend" not in given
    ranks = engine_arguments(policy, VllmConfig(), rank=1, num_ranks=2)
    assert (ranks["distributed_executor_backend"], ranks["seed"]) == ("external_launcher", 1)
    assert "max_model_len" not in ranks


def test_the_stand_in_refuses_what_the_release_refuses(fake_vllm):
    with pytest.raises(TypeError):
        fake_vllm.LLM("folder", mm_processor_kwargs={}, max_model_length=5)
    with pytest.raises(TypeError):
        fake_vllm.SamplingParams(max_new_tokens=5)
    with pytest.raises(TypeError):
        fake_vllm.bind("LLM.generate", [], None, None)


def test_prompts_are_collapsed_to_one_placeholder_per_image(tiny_policy, mixed_samples):
    """Also for adjacent images, which no chat template produces."""
    processor = tiny_policy().processor
    pad = processor.image_token_id
    for sample in mixed_samples:
        prompt = processor.encode(sample)
        plain = processor.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        assert collapsed(prompt, processor) == plain
    grid = np.array([[1, 4, 4], [1, 2, 4]])  # 4 and 2 tokens
    ids = np.array([7, *[pad] * 6, 8])
    assert collapsed(EncodedPrompt(ids, {"image_grid_thw": grid}, ""), processor) == [7, pad, pad, 8]


def test_unknown_log_probabilities():
    assert known(-0.25) == -0.25
    assert all(np.isnan(known(value)) for value in (None, float("nan"), float("-inf"), -9999.0))


def test_a_server_that_resizes_images_differently_is_detected(
    serve_vllm, tiny_policy, tiny_folder, make_image, make_sample
):
    server = serve_vllm(tiny_folder("qwen2_vl"), max_pixels=56 * 56)
    policy = tiny_policy()
    source = Server(policy, _at(server.url), is_main=True, wait_for_everyone=lambda: None)
    sample = make_sample("wide", images=(make_image(112, 112),))
    with pytest.raises(
        VllmError,
        match=r"read the prompt of sample 'wide' as \d+ tokens, but training reads .*resize",
    ):
        roll_out(VllmEngine(policy, source), policy, [sample], GREEDY)


def _at(url: str) -> VllmConfig:
    return VllmConfig(mode="server", server_url=url, timeout=20)


def test_a_server_with_other_settings_is_refused(serve_vllm, tiny_policy, tiny_folder):
    server = serve_vllm(tiny_folder("qwen2_vl"))
    plain, adapted = tiny_policy(), tiny_policy(lora=LoraConfig(rank=20))

    def refused(policy: Policy) -> str:
        with pytest.raises(ValueError) as caught:
            Server(policy, _at(server.url), is_main=True, wait_for_everyone=lambda: None)
        return str(caught.value)

    assert "(--max-lora-rank is 16, but an adapter of rank 20 is trained): start it with" in refused(adapted)
    assert "--enable-lora --max-lora-rank 32" in refused(adapted)
    server.max_lora_rank = None
    assert "(--enable-lora is missing)" in refused(adapted)
    server.max_lora_rank, server.updates_lora = 32, False
    assert "(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 is missing)" in refused(adapted)
    good = server.model
    for name, value, message in (
        ("model", "/models/other", "it serves /models/other, but model.path is"),
        ("logprobs_mode", "raw_logprobs", "(--logprobs-mode is raw_logprobs instead of processed_logprobs)"),
        ("generation_config", "auto", "(--generation-config is auto instead of vllm)"),
        ("dtype", "torch.bfloat16", "(--dtype is bfloat16 instead of float32)"),
    ):
        server.model = good | {name: value}
        assert message in refused(plain)
    server.model, server.scales_out = good | {"dtype": "torch.float16"}, False
    message = refused(plain)
    assert "(--dtype is float16 instead of float32; --enable-scale-out is missing)" in message
    assert "--enable-scale-out --dtype float32" in message and "chunked" not in message
    server.answers["/server_info"] = (404, {"detail": "Not Found"})
    message = refused(plain)
    assert "no vLLM server in development mode answers there" in message and "VLLM_SERVER_DEV_MODE=1" in message
    assert "visual.merger are trained in addition to the adapter" in refused(
        tiny_policy(lora=LoraConfig(rank=2), train_projector=True)
    )


def test_an_unreachable_server(serve_vllm, tiny_folder):
    with pytest.raises(ValueError, match=r"no vLLM server can be used there: .* does not answer /health: .*refused"):
        check_answers(_at("http://127.0.0.1:9"))
    server = serve_vllm(tiny_folder("qwen2_vl"))
    assert check_answers(_at(server.url)) == "0.32.0"
    server.answers["/version"] = (200, {"name": "another service"})
    with pytest.raises(ValueError, match="Another server answers there: it names no version of vLLM"):
        check_answers(_at(server.url))
    server.answers["/health"] = (302, "http://192.0.2.1/health")  # nobody named that host
    with pytest.raises(ValueError, match="HTTP 302"):
        check_answers(_at(server.url))


def test_the_server_is_asked_without_the_proxy(serve_vllm, tiny_folder, proxy):
    check_answers(_at(serve_vllm(tiny_folder("qwen2_vl")).url))
    assert proxy.seen == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"error": "out of memory"}), "answers /inference/v1/generate with HTTP 500.*out of memory"),
        ((200, {"choices": []}), "returned an unexpected response"),
        ((200, {"prompt_token_ids": [1], "choices": []}), "read the prompt of sample 'one' as 1 tokens"),
    ],
)
def test_a_server_that_fails_during_training(make, mixed_samples, answer, message):
    own = make("server")
    own.server.answers["/inference/v1/generate"] = answer
    with own.engine.fresh(), pytest.raises(VllmError, match=message):
        roll_out(own.engine, own.policy, mixed_samples[:1], GREEDY)


@pytest.mark.parametrize("top", [{}, {"top_k": 3}, {"top_p": 0.8}])
def test_vllm_agrees_with_the_policy_it_has_only(make, mixed_samples, top):
    """Log-probabilities after suppression, temperature, top-k and top-p, with one image, two and none."""
    own = make("colocate")
    config = SAMPLED.model_copy(update=top)
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, config)
    assert difference(own.policy, groups, config) < 2e-5
    move(own.policy)
    assert difference(own.policy, groups, config) > 0.1


def test_tokens_outside_of_the_own_distribution_count(make, mixed_samples):
    """A greedy choice of other weights has no probability here, which is no agreement."""
    own = make("colocate")
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    assert difference(own.policy, groups, GREEDY) == 0.0
    move(own.policy)
    assert difference(own.policy, groups, GREEDY) > 0.3


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_other_weights_are_noticed_in_the_first_rollout(make, mixed_samples, mode):
    own = make(mode)
    engine = own.llm.engine if mode == "colocate" else own.server.engine
    engine.reload_weights = lambda **given: None
    move(own.policy)
    with own.engine.fresh(), pytest.raises(VllmError, match=r"differ from those of training by .* does not explain"):
        roll_out(own.engine, own.policy, mixed_samples, SAMPLED)


def rehearsed(own: SimpleNamespace, samples: Sequence[Sample]) -> Any:
    def sample(config: RolloutConfig) -> list[Group]:
        with own.engine.fresh():
            return roll_out(own.engine, own.policy, samples, config)

    return rehearse(own.policy, GREEDY, sample)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS, ids=["full", "lora"])
def test_a_rehearsal_hands_changed_weights_over_and_takes_them_back(make, mixed_samples, mode, kind):
    own = make(mode, **kind)
    before = [weight.detach().clone() for weight in own.policy.model.parameters()]
    found = rehearsed(own, mixed_samples)
    assert found.before < 1e-4 and found.changed < 1e-4 and found.unchanged > 0.3
    assert all(map(torch.equal, before, own.policy.model.parameters()))
    assert tokens(roll_out(own.engine, own.policy, mixed_samples, GREEDY)) == tokens(
        roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY)
    )


@pytest.mark.parametrize("broken", ["handover", "prefix cache"])
def test_a_rehearsal_notices_weights_that_are_not_handed_over(make, mixed_samples, monkeypatch, broken):
    own = make("colocate")
    if broken == "handover":
        monkeypatch.setattr(own.llm.engine, "reload_weights", lambda **given: None)
    else:
        monkeypatch.setattr(own.llm.engine, "reset_prefix_cache", lambda: True)
    before = [weight.detach().clone() for weight in own.policy.model.parameters()]
    with pytest.raises(VllmError, match="did not take over changed weights"):
        rehearsed(own, mixed_samples)
    assert all(map(torch.equal, before, own.policy.model.parameters()))


def test_an_adapter_lies_on_the_original_weights(make, mixed_samples, tiny_folder, tmp_path, serve_vllm):
    """Not on those that an earlier run left on the server."""
    server = serve_vllm(tiny_folder("qwen2_vl"))
    earlier = make("server", serve=server)
    move(earlier.policy)
    with earlier.engine.fresh():
        pass
    own = make("server", serve=server, lora=LoraConfig(rank=2))
    with own.engine.fresh():
        groups = roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    assert tokens(groups) == tokens(roll_out(RolloutEngine(own.policy), own.policy, mixed_samples, GREEDY))
    served = tiny_folder("qwen2_vl")
    loads = [body["kwargs"]["weights_path"] for path, body in server.asked if path == "/collective_rpc"]
    assert loads[-1] == str(served)


def test_a_server_that_is_restarted(make, mixed_samples, monkeypatch):
    """Before a rollout it is checked again; during one, its completions may be of other weights."""
    own = make("server", lora=LoraConfig(rank=2))
    own.server.instance = "second"
    with own.engine.fresh():
        roll_out(own.engine, own.policy, mixed_samples, GREEDY)
        own.server.instance = "third"
        with pytest.raises(VllmError, match="was restarted during the rollout"):
            roll_out(own.engine, own.policy, mixed_samples, GREEDY)
    own.server.model = own.server.model | {"dtype": "torch.bfloat16"}
    with pytest.raises(VllmError, match="--dtype is bfloat16 instead of float32"), own.engine.fresh():
        pass


def test_completions_that_vllm_aborts(make, mixed_samples, monkeypatch):
    own = make("colocate")
    complete = own.llm.engine.complete

    def aborted(*args: Any) -> Any:
        ids, outputs = complete(*args)
        outputs[0].finish_reason = "abort"
        return ids, outputs

    monkeypatch.setattr(own.llm.engine, "complete", aborted)
    with own.engine.fresh(), pytest.raises(VllmError, match=r"early, after \d+ tokens \(reason: abort\)"):
        roll_out(own.engine, own.policy, mixed_samples[:1], GREEDY)
    monkeypatch.setattr(own.llm.engine, "complete", lambda *args: (lambda ids, out: (ids, out[1:]))(*complete(*args)))
    with own.engine.fresh(), pytest.raises(VllmError, match="returned 1 completions for sample 'one' instead of 2"):
        roll_out(own.engine, own.policy, mixed_samples[:1], GREEDY)


def test_errors_of_vllm_are_reported(make, mixed_samples, monkeypatch):
    own = make("colocate")
    own.llm.given["max_model_len"] = 20
    with (
        own.engine.fresh(),
        pytest.raises(VllmError, match="could not complete the prompts of this step: The decoder"),
    ):
        roll_out(own.engine, own.policy, mixed_samples[:1], GREEDY)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(own.llm.engine, "reload_weights", fail)
    with pytest.raises(VllmError, match="could not load the weights: CUDA out of memory"), own.engine.fresh():
        pass


def test_vllm_that_does_not_start(fake_vllm, tiny_policy, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Failed to infer device type")

    monkeypatch.setattr(fake_vllm.LLM, "__init__", fail)
    with pytest.raises(ValueError, match=r"vLLM does not start with these settings \(Failed to infer device type\)"):
        Colocated(tiny_policy(), VllmConfig(), rank=0, num_ranks=1)
    with pytest.raises(ValueError, match="rank 600, but vLLM takes at most 512"):
        max_lora_rank(600)
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 512)] == [8, 8, 16, 512]


def test_versions_outside_what_was_tested():
    assert check_version("0.32.1") is None and check_version("0.32.0+cpu") is None
    assert "with vLLM 0.32, not with 0.33.0" in check_version("0.33.0")
    assert "not with this version" in check_version(None)
    for version in ("0.31.9", "0.3.2"):
        with pytest.raises(ValueError, match=rf"vLLM {version} is too old: run `pip install 'vllm==0.32.\*'`"):
            check_version(version)


def test_docstrings_state_that_the_modules_have_not_run_on_a_gpu():
    for name in ("engine", "local", "server"):
        assert "ot yet run" in (Path(ours.__file__).parent / f"{name}.py").read_text().split('"""')[1]
