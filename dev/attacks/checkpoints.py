"""Downloaded checkpoints that are hostile or damaged.

Nothing in a checkpoint may run code, hang for a minute, take 4 GiB more memory, or end in a traceback.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import children
from .mutations import mutate_bytes, mutate_json
from .seeds import png

Change = Callable[[Path], None]
_TEMPLATES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "map": "{{ [messages]|map(attribute='__class__')|list }}",
    "include": "{% include '/etc/passwd' %}",
    "change": "{% set x = messages.append(1) %}",
    "syntax": "{{",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 // 0 }}",
    "refusal": "{{ raise_exception('no') }}",
    "type": "{{ 'a' + 1 }}",
    "empty": "",
    "no messages": "hello",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long text": "{{ 'x' * 3000000000 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "many images": "{% for i in range(99999) %}<|image_pad|>{% endfor %}",
    "two images": "{% for m in messages %}<|image_pad|><|vision_end|><|image_pad|>{% endfor %}",
    "no image": "{% for m in messages %}<|im_start|>x<|im_end|>{% endfor %}",
}


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def edit(model: Path) -> None:
        value = json.loads((model / name).read_bytes())
        change(value)
        (model / name).write_text(json.dumps(value))

    return edit


def _cases(marker: Path, rng: random.Random, assets: Path, count: int) -> dict[str, Change]:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {marker}",)

    def template(text: str) -> Change:
        return lambda model: (model / "chat_template.jinja").write_text(text.replace("MARKER", str(marker))) and None

    def config(**changes: Any) -> Change:
        return _edit("config.json", lambda value: value.update(changes))

    def pickled(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))

    def pickled_adapter(model: Path) -> None:
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": "phantom:instruct",
            "r": 4,
            "target_modules": ["q_proj"],
        }
        (model / "adapter_config.json").write_text(json.dumps(adapter))
        (model / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
        (model / "config.json").unlink()

    def remote_code(model: Path) -> None:
        (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
        classes = {
            "AutoConfig": "evil.C",
            "AutoModelForImageTextToText": "evil.C",
            "AutoTokenizer": ["evil.C", "evil.C"],
        }
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            _edit(name, lambda value: value.update(auto_map={**classes, "AutoImageProcessor": "evil.C"}))(model)

    def unknown_kind(model: Path) -> None:
        remote_code(model)
        config(model_type="evil")(model)

    def index_outside(model: Path) -> None:
        (model / "model.safetensors").rename(model / "x.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))

    def dead_link(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors").symlink_to("/nowhere")

    def text_config(**changes: Any) -> Change:
        return _edit("config.json", lambda value: (value.get("text_config") or value).update(changes))

    def mutated(name: str, seed: int) -> Change:
        def change(model: Path) -> None:
            own, path = random.Random(seed), model / name
            data = path.read_bytes()
            if name.endswith(".json") and own.random() < 0.7:
                path.write_text(json.dumps(mutate_json(own, json.loads(data))))
            else:  # of the weights only the header, which is parsed
                path.write_bytes(mutate_bytes(own, data[:20_000], 3) + data[20_000:])

        return change

    cases: dict[str, Change] = {f"template: {name}": template(text) for name, text in _TEMPLATES.items()}
    cases |= {
        "pickled weights": pickled, "pickled adapter": pickled_adapter, "remote code": remote_code,
        "remote code of an unknown kind": unknown_kind, "index outside": index_outside, "dead link": dead_link,
        "huge sizes": text_config(hidden_size=10**6, num_hidden_layers=10**4),
        "no sizes": _edit("config.json", lambda value: value.pop("text_config")),
        "negative sizes": text_config(num_attention_heads=-1),
        "kernel from the Hub": config(attn_implementation="kernels-community/x"),
        "quantised": config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "tokenizer class": _edit("tokenizer_config.json", lambda value: value.update(tokenizer_class="os.system")),
    }  # fmt: skip
    files = sorted(path.name for path in assets.iterdir() if path.is_file())
    for number in range(count):
        name = rng.choice(files)
        cases[f"mutated {name}, {number}"] = mutated(name, rng.randrange(10**9))
    return cases


def main(options: argparse.Namespace) -> bool:
    """Ask every checkpoint a question; ``options.inputs`` / 100 of them are mutated. Returns whether all held."""
    import medvqa_rl

    out, faults = options.out / "checkpoints", 0
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    assets, marker = Path(medvqa_rl.__file__).parent / "phantom" / "assets" / "instruct", out / "marker"
    (out / "a.png").write_bytes(png(random.Random(0), 60, 60))
    cases = _cases(marker, random.Random(options.seed), assets, options.inputs // 100)
    for name, change in cases.items():
        model = out / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(assets, model)
        change(model)
        command = ["ask", str(out / "a.png"), "Is there a mass?", "--model", str(model), "--max-length", "16"]
        homes = {"HOME": str(out), "HF_HOME": str(out / "hf")}
        ended = children.run(command, out / "log", environment=homes, prepare=children.less_time(60))
        wrong = []
        if marker.exists():
            marker.unlink()
            wrong.append("code ran")
        if ended.code is None:
            wrong.append("no end in 300 s")
        elif ended.code == -signal.SIGXCPU:
            wrong.append("took 60 s of CPU time")
        elif not ended.is_clean or ended.code not in (0, 1, 2):
            wrong.append(f"exit code {ended.code}: {ended.last_words}")
        if ended.peak_bytes > 4 * 2**30:
            wrong.append(f"{ended.peak_bytes / 2**30:.1f} GiB")
        if wrong:
            faults += 1
            print(f"{name}: {'; '.join(wrong)}", flush=True)
    print(f"{len(cases)} checkpoints, {len(cases) - faults} borne")
    return not faults
