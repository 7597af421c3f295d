"""Make the digital baselines of a model with llm-compressor, one directory each.

python examples/make_baselines.py demo:smollm2-135m-instruct baselines
optimum-cli analog evaluate demo:smollm2-135m-instruct baselines/* demo-out --output report

They are calibrated on tokens that the model generates itself. What is there already is left alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot

from analog_plugin import AnalogError, generate_dataset
from analog_plugin.demo import resolve_model
from analog_plugin.paths import atomic_directory
from analog_plugin.pretrained import load_causal_lm, load_tokenizer

RECIPES = Path(__file__).with_name("recipes") / "baselines"
#: Calibration sequences and their length.
ROWS, LENGTH = 64, 128


def make(model: str, output: Path, rows: int = ROWS, length: int = LENGTH) -> list[Path]:
    """Write one checkpoint a recipe below ``output``; return their directories."""
    source = resolve_model(model)
    tokens = None
    made = []
    for recipe in sorted(RECIPES.glob("*.yaml")):
        target = output / recipe.stem
        made.append(target)
        if target.exists() or recipe.stem.startswith("llm-qat"):  # that one is trained: see below
            continue
        if tokens is None:
            original = load_causal_lm(source, name=model, dtype="float32")
            tokens = generate_dataset(original, rows * length, length).tolist()
        with atomic_directory(target) as directory:
            oneshot(
                model=source,
                tokenizer=source,
                recipe=str(recipe),
                dataset=Dataset.from_dict({"input_ids": tokens}),
                num_calibration_samples=rows,
                max_seq_length=length,
                output_dir=str(directory),
                log_dir=None,
            )
            load_tokenizer(source).save_pretrained(directory)
    return [path for path in made if path.exists()]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/make_baselines.py MODEL OUTPUT")
    try:
        for path in make(sys.argv[1], Path(sys.argv[2])):
            print(path)
    except AnalogError as error:
        raise SystemExit(f"error: {error}") from None
    print("LLM-QAT is trained: optimum-cli export analog --recipe", RECIPES / "llm-qat-w4-si8.yaml")


if __name__ == "__main__":
    main()
