"""TRL's GRPOTrainer for ``benchmarks.step``, with stock transformers models and Hugging Face rollouts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Square, Workload, make_config, now, share_of_vowels
from benchmarks.engines import Step, Stopwatch, add_noise, forbid_stopping, samples_by_step
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.types import Sample
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.processor import Processor


def run_trl(workload: Workload, folder: Path, steps: int, *, reference_noise: float = 0.0) -> list[Step]:
    """Run training steps of TRL's GRPOTrainer with Hugging Face rollouts.

    Raises:
        ValueError: TRL is not installed.
    """
    try:
        import datasets
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText, PrinterCallback, TrainerCallback
        from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
        from transformers.processing_utils import ProcessorMixin
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise ValueError(
            f"The engine trl cannot be used ({error}): pip install 'medvqa-rl[bench]', or choose --engine ours."
        ) from error

    class ImagesOnly(Qwen2VLProcessor):  # type: ignore[misc]
        """The stock processor without video support, which needs torchvision."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    config = make_config(workload, folder, steps=steps)
    pixels = workload.side**2
    processor = Processor.from_folder(folder, Qwen2VL(), min_pixels=pixels, max_pixels=pixels)
    forbid_stopping(processor)
    processor.tokenizer.padding_side = "left"  # TRL pads on the left; token types follow the padding side
    is_gpu = torch.cuda.is_available()
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, workload.dtype), attn_implementation="sdpa", local_files_only=True
    ).to("cuda" if is_gpu else "cpu")
    model.requires_grad_(not workload.lora)
    if not workload.train_vision:
        model.model.visual.requires_grad_(False)
    targets = config.model.lora.targets if config.model.lora else ()
    watch = Stopwatch()
    done: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []
    batches = workload.prompts // workload.prompts_per_micro_batch

    class Timed(GRPOTrainer):  # type: ignore[misc]
        """Times the phases of a step."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with watch.phase("experience"):
                return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts: Any) -> Any:
            generated = super()._generate(prompts)
            self.last_prompts, self.last_completions = generated[0], generated[1]
            return generated

        def _calculate_rewards(self, *args: Any) -> Any:
            with watch.phase("reward"):
                values = super()._calculate_rewards(*args)
            self.last_rewards = values[:, 0].tolist()
            return values

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with watch.phase("reference"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Times each step from the end of the previous one, so that data loading is included."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole, seconds = now() - self.began, watch.take()
            reward, reference = seconds["reward"], seconds.get("reference", 0.0)
            rollout = seconds["experience"] - reward - reference
            measured = {"rollout": rollout, "reward": reward, "reference": reference}
            done.append(
                {
                    **measured,
                    "update": whole - sum(measured.values()),
                    "prompt_ids": [list(map(int, ids)) for ids in trainer.last_prompts[:: workload.generations]],
                    "completion_ids": [list(map(int, ids)) for ids in trainer.last_completions],
                    "rewards": trainer.last_rewards,
                }
            )
            self.began = now()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                logged.append(logs)

    with tempfile.TemporaryDirectory() as output:
        arguments = GRPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=workload.prompts * workload.generations // batches,
            gradient_accumulation_steps=batches,
            num_generations=workload.generations,
            max_completion_length=workload.length,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generation_kwargs={"suppress_tokens": _suppressed(processor, model.lm_head.weight.shape[0])},
            beta=workload.beta,
            use_bias_correction_kl=False,
            loss_type="grpo",
            scale_rewards="group",
            num_iterations=1,
            learning_rate=workload.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            gradient_checkpointing=workload.checkpointing,
            bf16=workload.dtype == "bfloat16",
            use_cpu=not is_gpu,
            shuffle_dataset=False,
            dataloader_num_workers=0,
            logging_steps=1,
            log_completions=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Timed(
            model=model,
            reward_funcs=share_of_vowels,
            args=arguments,
            train_dataset=_as_dataset(datasets, [s for part in samples_by_step(workload, steps) for s in part]),
            processing_class=ImagesOnly(
                processor.image_processor,
                processor.tokenizer,
                chat_template=processor.tokenizer.chat_template,
            ),
            callbacks=[Watch()],
            peft_config=(
                LoraConfig(
                    r=workload.lora,
                    lora_alpha=2 * workload.lora,
                    target_modules=rf".*language_model\..*\.({'|'.join(targets)})",
                    task_type="CAUSAL_LM",
                )
                if workload.lora
                else None
            ),
        )
        trainer.remove_callback(PrinterCallback)
        if reference_noise:
            add_noise(trainer.ref_model, reference_noise)
        trainer.train()
    return [
        Step(**measured, loss=log["loss"], entropy=log["entropy"], grad_norm=log["grad_norm"])
        for measured, log in zip(done, logged, strict=True)
    ]


def _as_dataset(datasets: Any, samples: Sequence[Sample]) -> Any:
    """Build a data set in TRL's format: a conversation with losslessly stored images, decoded on access."""
    rows = []
    for sample in samples:
        (part,) = [p for p in render_prompt(sample).messages[0]["content"] if p["type"] == "text"]
        images = [{"bytes": image.png, "path": None} for image in sample.images if isinstance(image, Square)]
        rows.append({"prompt": [{"role": "user", "content": part["text"]}], "images": images})
    features = datasets.Features(
        {
            "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": [datasets.Image()],
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def _suppressed(processor: Processor, words: int) -> list[int]:
    """Token ids that this package never samples: control tokens and padding rows of the output layer.

    Args:
        words: number of rows of the output layer.
    """
    return sorted({*processor.suppressed_ids, *range(len(processor.tokenizer), words)})
