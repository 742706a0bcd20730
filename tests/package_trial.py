"""The core of the package, installed from a wheel without extras, does what it promises: run by .ci/run.

    python package_trial.py

It needs this package and nothing else, and works in the current folder.
"""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moe_bias
from moe_bias import cli
from moe_bias.extras import EXTRA_OF

PROGRAM = str(Path(sys.executable).parent / "moe-bias")
WORDS = 64
OF_EXTRAS = ("moe_bias.serving.", "moe_bias.trl.", "moe_bias.server.", "moe_bias.report.", "moe_bias.tasks.equality")
"""Modules that need vLLM, TRL, Starlette, matplotlib or math-verify."""


def main() -> None:
    """One check after the other; the first that fails ends it."""
    package = Path(moe_bias.__file__).parent
    assert "site-packages" in package.parts, f"{package} is not what a wheel installs"
    assert (package / "py.typed").is_file()
    specs = {module: find_spec(module) for module in EXTRA_OF}
    there = [module for module, spec in specs.items() if spec is not None and spec.origin]  # a folder of tests has none
    assert not there, f"{there} came along without an extra"
    for words, expected in (("--version", f"moe-bias {version('moe-bias')}"), ("--help", "usage: moe-bias")):
        assert subprocess.check_output([PROGRAM, words], text=True).startswith(expected)
    import_everything()
    make_model(Path("tiny"))
    train_and_apply()
    refuse_what_is_missing()


def import_everything() -> None:
    """Every module can be imported, but those that exist for what an extra brings."""
    for module in walk_packages(moe_bias.__path__, "moe_bias."):
        if not module.name.startswith(OF_EXTRAS) and module.name != "moe_bias.__main__":
            import_module(module.name)


def train_and_apply() -> None:
    """A small file of one's own is trained on, and PEFT loads the adapter, which changes the model's logits."""
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n + 2} w{n + 3}"} for n in range(3, 43)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    on_cpu = ("--model", "tiny", "--device", "cpu")
    said(
        "train", "sft", *on_cpu, "--data", "rows.jsonl", "--support", "auto:20", "--epochs", "1", "--output", "adapter"
    )
    ids = torch.tensor([[5, 6, 7]])
    adapted = AutoPeftModelForCausalLM.from_pretrained("adapter")
    plain = AutoModelForCausalLM.from_pretrained("tiny")
    assert not torch.equal(adapted(ids).logits, plain(ids).logits)
    assert adapted.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]


def refuse_what_is_missing() -> None:
    """What an extra brings is named."""
    assert "general_points" in said("tasks")
    for extra, words in (
        ("tasks", "train rl --model tiny --task products --device cpu --output rl"),
        ("data", "train sft --model tiny --data nobody/nothing --device cpu --output hub"),
        ("report", "report adapter --output page"),
    ):
        assert f"pip install 'moe-bias[{extra}]'" in said(*words.split(), code=2)


def said(*words: str, code: int = 0) -> str:
    """What the command prints, on either stream; in this process, where torch is imported already."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        ended = cli.main(words)
    assert ended == code, f"{words} ended with {ended}:\n{printed.getvalue()}"
    return printed.getvalue()


def make_model(folder: Path) -> None:
    """A random model whose token t is the word `wt`."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)).save_pretrained(folder)


if __name__ == "__main__":
    main()
