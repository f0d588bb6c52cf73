"""TRL's RLOO trainer in a process of its own, for against_trl.py: times of its updates, and its peak memory.

    PYTHONPATH=.venv/bench python tests/bench/trl_updates.py SPEC.json RESULT.json

Generation is TRL's default, transformers' ``generate``. SPEC: ``model``, ``reward`` (folders), ``prompts`` (``text``
and ``token_ids``, in the order in which they are used), ``conversational``, ``samples_per_prompt``,
``prompts_per_step``, ``max_new_tokens``, ``num_updates``, ``micro_batch_size``, ``weights`` and ``autocast`` (torch
dtypes), ``learning_rate``, ``kl_coefficient``, ``threads``, ``seed``. RESULT: ``update_s`` of each update,
``completion_tokens`` (the mean length over all), ``peak_rss_bytes``.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def settings_of(spec: dict[str, Any], folder: str) -> Any:
    """One optimiser step an update over all its responses; no checkpoints, no logs, no evaluation."""
    from trl import RLOOConfig

    responses = spec["prompts_per_step"] * spec["samples_per_prompt"]
    return RLOOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=spec["autocast"] == "bfloat16",
        model_init_kwargs={"dtype": spec["weights"]},
        per_device_train_batch_size=spec["micro_batch_size"],
        gradient_accumulation_steps=responses // spec["micro_batch_size"],
        gradient_checkpointing=False,
        num_generations=spec["samples_per_prompt"],
        num_iterations=1,
        max_completion_length=spec["max_new_tokens"],
        max_steps=spec["num_updates"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        beta=spec["kl_coefficient"],
        shuffle_dataset=False,
        seed=spec["seed"],
        logging_steps=spec["num_updates"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def prompt_of(text: str, conversational: bool) -> Any:
    """TRL joins prompt and completion as text for the reward model: words need a space between them."""
    return [{"role": "user", "content": text}] if conversational else f"{text} "


def token_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """As TRL makes them."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"])


def train(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RLOOTrainer

    torch.set_num_threads(spec["threads"])
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    reward = AutoModelForSequenceClassification.from_pretrained(
        spec["reward"], num_labels=1, dtype=getattr(torch, spec["weights"])
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    prompts = [prompt_of(prompt["text"], spec["conversational"]) for prompt in spec["prompts"]]
    for prompt, given in zip(prompts, spec["prompts"], strict=True):
        assert token_ids(tokenizer, prompt) == given["token_ids"], "TRL would see other prompts than ocrm-ray"
    with tempfile.TemporaryDirectory() as folder:
        trainer = RLOOTrainer(
            model=spec["model"],
            reward_funcs=reward.eval(),
            args=settings_of(spec, folder),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return {
        "update_s": [after - before for before, after in itertools.pairwise(ends)],
        "completion_tokens": trainer.state.log_history[0]["completions/mean_length"],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(train(json.loads(Path(sys.argv[1]).read_text()))))
